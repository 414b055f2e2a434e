"""Tables for readers: names, numbers as text, the paper's table 1, and the files that a table is written to.

How runs are averaged and which setting is selected stands in `notebooks/2_tradeoff.ipynb`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eatlib.config import PENALTY_FIELDS
from eatlib.results import write_atomically

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

PAPER = pd.DataFrame(
    [
        ("gtsrb", "resnet18", 0.91, 0.93, 0.76, 0.55, 27.63),
        ("gtsrb", "vgg16", 0.90, 0.89, 0.69, 0.63, 8.69),
        ("cifar10", "resnet18", 0.92, 0.90, 0.73, 0.61, 16.43),
        ("cifar10", "vgg16", 0.91, 0.88, 0.67, 0.53, 20.89),
        ("celeba", "resnet18", 0.76, 0.78, 0.68, 0.63, 7.35),
        ("celeba", "vgg16", 0.77, 0.78, 0.63, 0.54, 14.28),
    ],
    columns=[*GROUP, "st_accuracy", "eat_accuracy", "st_ratio", "eat_ratio", "energy_decrease_percent"],
)
"""arXiv 2307.00368, table 1; from one run each, as far as it says."""


def names(table: pd.DataFrame) -> list[str]:
    """Data set and network of each row as a reader writes them; of a folder of images, the last part of its path."""
    images = [NAMES.get(dataset, Path(dataset).name) for dataset in table["dataset"]]
    extents = table["complete"].map({True: "", False: " (partial data)"})
    networks = [NAMES.get(model, model) for model in table["model"]]
    return [f"{data}{extent}, {model}" for data, extent, model in zip(images, extents, networks, strict=True)]


def setting_text(setting: Mapping[str, Any], keys: Collection[str]) -> str:
    """Those fields of a penalty, lambda first; ST for standard training, none where nothing was selected."""
    if not setting["lambda"] > 0:
        return "ST" if setting["lambda"] == 0 else "none within the margin"
    return ", ".join(word.format(setting[key]) for key, word in WORDS.items() if key in keys)


def mean_std(table: pd.DataFrame, column: str, form: str = "{:.3f}", absent: str = "") -> list[str]:
    """'mean ± std' for each row: of `column` and of `<column>_std`, which a single run has not."""
    pairs = table[[column, f"{column}_std"]].itertuples(index=False)
    return [" ± ".join(form.format(value) for value in pair if pd.notna(value)) or absent for pair in pairs]


def save(numbers: pd.DataFrame, text: pd.DataFrame, folder: Path, name: str, notes: Sequence[str]) -> str:
    """Write `numbers` as CSV and `text`, the same for readers, as Markdown, each under what there is to know of it.

    `pandas.read_csv(path, comment="#")` reads the former.

    Returns:
        The table as Markdown.
    """
    rows = [text.columns, ["---"] * len(text.columns), *text.itertuples(index=False)]
    cells = [[re.sub(r"([|*])", r"\\\1", cell) for cell in row] for row in rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    csv = numbers.to_csv(index=False, float_format="%.6g")
    write_atomically(folder / f"{name}.csv", "".join(f"# {note}\n" for note in notes) + csv)
    bullets = "\n".join(f"- {note}" for note in notes)
    source = f"The runs behind each row are named in [{name}.csv]({name}.csv)."
    write_atomically(folder / f"{name}.md", f"{bullets}\n\n{table}\n\n{source}\n")
    return table
