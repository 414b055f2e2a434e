"""Put the tables of results into the pages that show them.

    python docs/include.py README.md docs/results.md

writes anew what stands between `<!-- include FILE -->` and `<!-- /include -->`, from that Markdown file.
"""

import re
import sys
from pathlib import Path


def fill_in(page: Path) -> str:
    """The text of a Markdown page with the tables that it includes as their files are now, links set right."""

    def included(match: re.Match[str]) -> str:
        text = (page.parent / match[1]).read_text(encoding="utf-8")
        folder = Path(match[1]).parent.as_posix()
        text = re.sub(r"\]\((?!https?:|/)", f"]({folder}/", text)
        return f"<!-- include {match[1]} -->\n{text.strip()}\n<!-- /include -->"

    marked = r"<!-- include (\S+) -->.*?<!-- /include -->"
    return re.sub(marked, included, page.read_text(encoding="utf-8"), flags=re.DOTALL)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        Path(argument).write_text(fill_in(Path(argument)), encoding="utf-8")
