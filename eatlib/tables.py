"""Tables for readers: names, and numbers as text.

How runs are averaged and which setting is selected stands in `notebooks/2_tradeoff.ipynb`.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eatlib.config import PENALTY_FIELDS

GROUP = ["dataset", "model"]
SETTING = [*PENALTY_FIELDS, "lambda", "path", "epochs"]
NAMES = {"resnet18": "ResNet-18", "vgg16": "VGG-16", "cifar10": "CIFAR-10", "gtsrb": "GTSRB", "celeba": "CelebA"}
"""How data sets and networks are written for readers; others are written as they are."""

WORDS = {
    "lambda": "λ {:g}",
    "sigma": "σ {:g}",
    "penalty": "{}",
    "penalty_layers": "on {}",
    "penalty_normalization": "{}",
    "penalty_share": "on {:.0%} of the images",
    "warmup_epochs": "warm-up {:.0f}",
    "path": "after λ {}",
    "epochs": "{:.0f} epochs",
}
"""How the fields of a setting are written for readers, in the order of reading."""


def names(table: pd.DataFrame) -> list[str]:
    """Data set and network of each row as a reader writes them; of a folder of images, the last part of its path."""
    images = [NAMES.get(dataset, Path(dataset).name) for dataset in table["dataset"]]
    extents = table["complete"].map({True: "", False: " (partial data)"})
    networks = [NAMES.get(model, model) for model in table["model"]]
    return [f"{data}{extent}, {model}" for data, extent, model in zip(images, extents, networks, strict=True)]


def setting_text(setting: Mapping[str, Any], keys: Collection[str]) -> str:
    """Those fields of a penalty, lambda first; ST for standard training, none where nothing was selected."""
    if pd.isna(setting["lambda"]):
        return "none within the margin"
    if setting["lambda"] == 0 and not setting["path"]:
        return "ST"
    silent = PENALTY_FIELDS if setting["lambda"] == 0 else ()
    told = [key for key in WORDS if key in {*keys} - {*silent} and (key != "penalty_share" or setting[key] < 1)]
    words = [WORDS[key].format(setting[key]) for key in told]
    return ", ".join(words).replace("after λ ,", "from nothing,")


def mean_std(table: pd.DataFrame, column: str, form: str = "{:.3f}", absent: str = "") -> list[str]:
    """'mean ± std' for each row: of `column` and of `<column>_std`, which a single run has not."""
    pairs = table[[column, f"{column}_std"]].itertuples(index=False)
    return [" ± ".join(form.format(value) for value in pair if pd.notna(value)) or absent for pair in pairs]


def hypervolume(curve: pd.DataFrame, energy: str, most: float, least: float, lines: bool = True) -> float:
    """The area, of energy and test accuracy, under the lines through a curve's points, or else under steps.

    A point on a line is what one gets by running some images on the one network, the rest on the other. Points that
    another beats in both, by its accuracy on validation images, are left out.

    Args:
        curve: a row a point, with columns `energy`, "validation_accuracy" and "test_accuracy".
        most, least: how far up in energy, and down in accuracy, the area reaches.
    """
    curve = curve.sort_values(energy)
    front = curve[curve["validation_accuracy"] > curve["validation_accuracy"].cummax().shift(fill_value=-1)]
    places = (np.arange(10_000) + 0.5) * most / 10_000
    if not lines:
        places = np.r_[0, front[energy]][np.searchsorted(front[energy], places, side="right")]
    return most * np.interp(places, front[energy], front["test_accuracy"], left=least).clip(least).mean() - most * least


def markdown(text: pd.DataFrame) -> str:
    """A table of strings as Markdown."""
    rows = [text.columns, ["---"] * len(text.columns), *text.itertuples(index=False)]
    cells = [[re.sub(r"([|*])", r"\\\1", cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
