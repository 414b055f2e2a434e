"""Tables for readers: names, numbers as text, the paper's table 1, and the files that a table is written to.

How runs are averaged and which setting is selected stands in `notebooks/2_tradeoff.ipynb`.

    python -m eatlib.tables README.md

writes anew what stands between `<!-- include FILE -->` and `<!-- /include -->`, from that Markdown file.
"""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eatlib.config import PENALTY_FIELDS
from eatlib.results import write_atomically

if TYPE_CHECKING:
    import pandas as pd

GROUP = ["dataset", "model"]
SETTING = [*PENALTY_FIELDS, "lambda"]
NAMES = {"resnet18": "ResNet-18", "vgg16": "VGG-16", "cifar10": "CIFAR-10", "gtsrb": "GTSRB", "celeba": "CelebA"}
"""How data sets and networks are written for readers; others are written as they are."""

WORDS = {
    "lambda": "λ {:g}",
    "sigma": "σ {:g}",
    "penalty": "{}",
    "penalty_layers": "on {}",
    "penalty_normalization": "{}",
    "warmup_epochs": "warm-up {:.0f}",
}
"""How the fields of a penalty are written for readers, in the order of reading."""


class PaperRow(NamedTuple):
    """A data set and network in the paper's table 1; from one run each, as far as it says."""

    st_accuracy: float
    eat_accuracy: float
    st_ratio: float
    eat_ratio: float
    energy_decrease_percent: float


PAPER = {
    ("gtsrb", "resnet18"): PaperRow(0.91, 0.93, 0.76, 0.55, 27.63),
    ("gtsrb", "vgg16"): PaperRow(0.90, 0.89, 0.69, 0.63, 8.69),
    ("cifar10", "resnet18"): PaperRow(0.92, 0.90, 0.73, 0.61, 16.43),
    ("cifar10", "vgg16"): PaperRow(0.91, 0.88, 0.67, 0.53, 20.89),
    ("celeba", "resnet18"): PaperRow(0.76, 0.78, 0.68, 0.63, 7.35),
    ("celeba", "vgg16"): PaperRow(0.77, 0.78, 0.63, 0.54, 14.28),
}
"""arXiv 2307.00368, table 1, by data set and network."""


def name_of(dataset: str, model: str, complete: bool = True) -> str:
    """A data set and network as a reader writes them; of a folder, its last part."""
    shown = Path(dataset).name if dataset.startswith("folder:") else NAMES.get(dataset, dataset)
    return f"{shown}{'' if complete else ' (partial data)'}, {NAMES.get(model, model)}"


def names(table: "pd.DataFrame") -> list[str]:
    """`name_of` each row."""
    return [name_of(*row) for row in table[[*GROUP, "complete"]].itertuples(index=False)]


def setting_text(setting: Mapping[str, Any], keys: Collection[str]) -> str:
    """Those fields of a penalty, lambda first; ST for standard training, none where nothing was selected."""
    if not setting["lambda"] > 0:
        return "ST" if setting["lambda"] == 0 else "none within the margin"
    return ", ".join(word.format(setting[key]) for key, word in WORDS.items() if key in keys)


def mean_std(table: "pd.DataFrame", column: str, form: str = "{:.3f}", absent: str = "") -> list[str]:
    """'mean ± std' for each row: of `column` and of `<column>_std`, which a single run has not."""
    pairs = zip(table[column], table[f"{column}_std"], strict=True)
    shown = [[form.format(value) for value in pair if value == value] for pair in pairs]  # NaN is not itself
    return [" ± ".join(values) or absent for values in shown]


def markdown(table: "pd.DataFrame") -> str:
    """A table of text as Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    cells = [[re.sub(r"([|*])", r"\\\1", cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def save(numbers: "pd.DataFrame", text: "pd.DataFrame", folder: Path, name: str, notes: Sequence[str]) -> str:
    """Write `numbers` as CSV and `text`, the same for readers, as Markdown, each under what there is to know of it.

    `pandas.read_csv(path, comment="#")` reads the former.

    Returns:
        The Markdown.
    """
    notes = [" ".join(note.split()) for note in notes]
    csv = "".join(f"# {note}\n" for note in notes) + numbers.to_csv(index=False, float_format="%.6g")
    write_atomically(folder / f"{name}.csv", csv)
    bullets = "\n".join(f"- {note}" for note in notes)
    source = f"The runs behind each row are named in [{name}.csv]({name}.csv)."
    write_atomically(folder / f"{name}.md", f"{bullets}\n\n{markdown(text)}\n\n{source}\n")
    return markdown(text)


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
        write_atomically(Path(argument), fill_in(Path(argument)))
