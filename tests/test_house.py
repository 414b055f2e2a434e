"""What keeps the house small and its pages true: sizes, the order of imports, and what README and docs say."""

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eatlib import load
from eatlib.config import Study
from eatlib.results import ROOT, RunResult

ORDER = ["hardware", "sources", "config", "results", "data", "models", "penalties", "energy"]
ORDER += ["checkpoint", "training", "curve", "thresholds", "tables", "figures", "steps", "study"]
"""The modules of eatlib in reading order."""
fill_in = runpy.run_path(str(ROOT / "docs" / "include.py"))["fill_in"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_sizes():
    code = {path: lines(path) for path in (ROOT / "eatlib").rglob("*.py")}
    assert sum(code.values()) <= 4101, "a ratchet: the aim is 3,200"
    everything = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert max(*code.values(), *map(lines, everything)) <= 400
    for name, limit in (("Snakefile", 100), ("run_all.sh", 80), ("README.md", 130)):
        assert lines(ROOT / name) <= limit, name


def test_committed_weights_are_small_and_those_of_the_results_beside_them():
    paths = sorted((ROOT / "results" / "reference").rglob("*.safetensors"))
    sizes = [path.stat().st_size for path in paths]
    assert sum(sizes) <= 20e6
    assert max(sizes, default=0) <= 6e6
    for path in paths:
        assert load(path)[1].hash == RunResult.load(path.with_suffix(".json")).config_hash
    attacked = pd.read_csv(ROOT / "results" / "reference" / "rivals" / "attack.csv")
    selected = {*attacked.loc[attacked["lambda"] > 0, "run"]}  # as docs/library.md says
    assert selected
    assert selected <= {path.stem for path in paths}


def test_imports_point_up_the_reading_order():
    for path in (ROOT / "eatlib").rglob("*.py"):
        name = path.relative_to(ROOT / "eatlib").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eatlib"):
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                imported = {part.split(".")[1] for part in modules if "." in part} & {*ORDER}
                assert all(ORDER.index(other) <= ORDER.index(name) for other in imported), (path, imported)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results_and_links_lead_somewhere(page):
    """If not: python docs/include.py README.md docs/*.md"""
    text = page.read_text(encoding="utf-8")
    assert fill_in(page) == text
    assert page.name != "README.md" or "<!-- include results/reference/table1/table1.md -->" in text
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        assert row.replace(r"\|", "").count("|") <= 7, f"at most 6 columns: {row}"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_a_page_includes_tables_and_its_links_reach_their_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "table.md").write_text("new [table.csv](table.csv) [web](https://x.org)\n")
    (tmp_path / "page.md").write_text("A\n<!-- include a/b/table.md -->\nold\n<!-- /include -->\nZ\n")
    assert fill_in(tmp_path / "page.md") == (
        "A\n<!-- include a/b/table.md -->\nnew [table.csv](a/b/table.csv) [web](https://x.org)\n<!-- /include -->\nZ\n"
    )


def test_the_readme_says_how_many_runs_a_study_has():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `([\w-]+)` \|.*\b(\d+) runs", text, re.MULTILINE))
    assert {"quick", "paper", "ablation"} <= said.keys()
    for name, runs in said.items():
        assert len(Study.load(ROOT / "studies" / f"{name}.yaml").runs()) == int(runs), name


def test_the_first_table_says_which_runs_have_how_many_epochs():
    """As in studies/table1.yaml; that the tables are what the notebook writes is tested in test_tradeoff."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "12 (ST), 2 (each λ), 10 (ST going on) epochs on cifar10" in text
    assert "6 (ST), 2 (each λ) epochs on gtsrb" in text


def test_what_is_saved_against_standard_training_as_long_is_what_the_notebook_says():
    """The README's and the results' two numbers for CIFAR-10, which no table has."""
    text = (ROOT / "notebooks" / "2_tradeoff.ipynb").read_text(encoding="utf-8")
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    said = " ".join(str(output.get("data", {}).get("text/markdown")) for output in outputs)
    saved = re.findall(r"which saves ([\d.]+)%", said)
    assert len(saved) == 2
    for page in PAGES[0], ROOT / "docs" / "results.md":
        text = page.read_text(encoding="utf-8")
        assert all(re.search(rf"{number} ?%", text) for number in saved), page.name


def snippets() -> list:
    return [
        pytest.param(code, id=f"{page.name}-{index}")
        for page in PAGES
        for index, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    ]


@pytest.mark.parametrize("code", snippets())
def test_snippets_run(code, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6)
    known = {"model": model, "images": images, "labels": labels, "F": F, "torch": torch, "folder": tmp_path}
    try:
        exec(code, known | {"test_batches": [(images, labels)], "batches": [(images, labels)]})
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "onnxruntime", "onnxscript", "transformers"):
            raise
        pytest.skip(f"{error.name} is not installed")
    assert not model[2]._forward_hooks


def test_a_study_in_the_docs_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    # Standard training is one run for both penalties.
    assert len(Study.load(tmp_path / "mine.yaml").runs()) == 2 * (1 + 2 * 2)


def test_the_penalty_and_the_meter_do_without_the_studys_packages():
    code = "import sys, eatlib; eatlib.ActivationPenalty, eatlib.energy_report\n"
    code += "print({'pandas', 'sklearn', 'torchvision', 'matplotlib', 'papermill', 'filelock'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
