"""Tables and figures from the results of a study.

    python -m eatlib.figures README.md

writes the tables of the committed results between the file's `<!-- results:STUDY -->` and `<!-- /results -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eatlib.config import RunConfig
from eatlib.results import ROOT, Epoch, LayerFiring, RunResult, StudyResults

if TYPE_CHECKING:
    import pandas as pd  # pandas and seaborn are slow imports, which the figures of a single run do without

ACCOUNTINGS = ("published", "fused")
GROUP = ["dataset", "model"]
SETTING = ["penalty", "penalty_layers", "penalty_normalization", "sigma", "warmup_epochs", "lambda"]
NAMES = {
    "resnet18": "ResNet-18",
    "vgg16": "VGG-16",
    "cifar10": "CIFAR-10",
    "gtsrb": "GTSRB",
    "celeba": "CelebA",
    "digits": "digits",
}
"""How data sets and networks are written for readers; others are written as they are."""

STANDARD, AWARE = "standard training", "energy-aware training"
COLORS = {STANDARD: "#0072b2", AWARE: "#d55e00"}
"""Two colours that colour-blind readers, and a grey printer, tell apart (Okabe and Ito)."""


def use_style() -> None:
    """The look of all figures: seaborn's paper context on a white grid."""
    import seaborn as sns

    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 200, "savefig.bbox": "tight"})


def _title(group: Sequence[str], runs: pd.DataFrame) -> str:
    """The data set and network, and how many images there are if it is not the complete data set."""
    name = ", ".join(NAMES.get(item, item) for item in group)
    if runs["complete"].all():
        return name
    train, test = runs["source_train"].max(), runs["source_test"].max()
    return f"{name} (partial data: {train:,} + {test:,} images)"


def training_name(config: RunConfig) -> str:
    """How a run's training is called in legends."""
    return AWARE if config.lambda_ > 0 else STANDARD


def select(table: pd.DataFrame, margin: float, accounting: str = "published") -> pd.DataFrame:
    """The setting of the penalty that each data set and network gets in the trade-off table.

    Among the settings whose validation accuracy, averaged over seeds, is at most `margin` below standard
    training's, the one with the lowest validation energy ratio. The test split has no say.

    Args:
        table: of `StudyResults.table`.

    Returns:
        One row of `SETTING` per data set and network that has a standard training; NaN where no setting qualifies.
    """
    import pandas as pd

    ratio = f"validation_{accounting}_ratio"
    rows = []
    for group, runs in table.groupby(GROUP, sort=False):
        standard = runs[runs["lambda"] == 0]
        if standard.empty:
            continue
        means = runs[runs["lambda"] > 0].groupby(SETTING)[["validation_accuracy", ratio]].mean().reset_index()
        allowed = means[means["validation_accuracy"] >= standard["validation_accuracy"].mean() - margin]
        chosen = allowed.loc[allowed[ratio].idxmin(), SETTING].to_dict() if len(allowed) else {}
        rows.append(dict(zip(GROUP, group, strict=True)) | chosen)
    return pd.DataFrame(rows, columns=[*GROUP, *SETTING])


def runs_of(table: pd.DataFrame, setting: pd.Series) -> pd.DataFrame:
    """The runs of `table` with the data set, network and penalty of one row of `select`."""
    return table[(table[[*GROUP, *SETTING]] == setting[[*GROUP, *SETTING]]).all(axis=1)]


def tradeoff_table(table: pd.DataFrame, margin: float, accounting: str = "published") -> pd.DataFrame:
    """The paper's table 1 from our runs: test accuracy and energy ratio of both trainings, mean and spread.

    Args:
        accounting: whose validation ratio selects lambda; the test ratios of all accountings are shown.

    Returns:
        One row per data set, network and accounting. `*_std` is the sample standard deviation over seeds;
        `energy_decrease` is (ratio_ST - ratio_EAT) / ratio_ST of the means.
    """
    import pandas as pd

    rows = []
    for _, setting in select(table, margin, accounting).iterrows():
        runs = table[(table[GROUP] == setting[GROUP]).all(axis=1)]
        sides = {"st": runs[runs["lambda"] == 0], "eat": runs_of(runs, setting)}
        for shown in ACCOUNTINGS:
            row = {key: setting[key] for key in (*GROUP, "lambda", "sigma")}
            row |= {"data": _title([setting["dataset"]], runs), "accounting": shown}
            for side, part in sides.items():
                row[f"{side}_seeds"] = len(part)
                for quantity, column in (("accuracy", "test_accuracy"), ("ratio", f"test_{shown}_ratio")):
                    row[f"{side}_{quantity}"] = part[column].mean()
                    row[f"{side}_{quantity}_std"] = part[column].std()
            row["energy_decrease"] = 1 - row["eat_ratio"] / row["st_ratio"]
            rows.append(row)
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """`tradeoff_table` as text for people: mean ± spread, names written out."""
    import pandas as pd

    def spread(row: pd.Series, key: str) -> str:
        if pd.isna(row[key]):
            return "none within the margin"
        std = row[f"{key}_std"]
        return f"{row[key]:.{digits}f}" + ("" if pd.isna(std) else f" ± {std:.{digits}f}")

    return pd.DataFrame(
        [
            {
                "data set": row["data"],
                "network": NAMES.get(row["model"], row["model"]),
                "accuracy ST": spread(row, "st_accuracy"),
                "accuracy EAT": spread(row, "eat_accuracy"),
                "accounting": row["accounting"],
                "energy ratio ST": spread(row, "st_ratio"),
                "energy ratio EAT": spread(row, "eat_ratio"),
                "energy decrease": "" if pd.isna(row["energy_decrease"]) else f"{row['energy_decrease']:.1%}",
                "λ": "" if pd.isna(row["lambda"]) else f"{row['lambda']:g}",
                "seeds": " and ".join(
                    f"{count}" for count in dict.fromkeys([row["st_seeds"], row["eat_seeds"]]) if count
                ),
            }
            for _, row in table.iterrows()
        ]
    )


def tradeoff_figure(table: pd.DataFrame, margin: float, accounting: str = "published", *, label: str = "") -> Figure:
    """Test accuracy against energy ratio, one panel per data set and network.

    Small points are single runs, large ones means over seeds, joined in the order of lambda; the shaded band is
    the accuracy within `margin` of standard training.
    """
    ratio = f"test_{accounting}_ratio"
    groups = list(table.groupby(GROUP, sort=False))
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    chosen = select(table, margin, accounting)
    for axis, (group, runs) in zip(axes.flat, groups, strict=False):
        standard = runs[runs["lambda"] == 0]
        means = runs.groupby("lambda")[[ratio, "test_accuracy"]].mean()
        if len(standard):
            top = standard["test_accuracy"].mean()
            axis.axhspan(top - margin, top, color="0.9", zorder=0)
        axis.plot(means[ratio], means["test_accuracy"], color="0.5", linewidth=1, zorder=1)
        for side, part in ((STANDARD, standard), (AWARE, runs[runs["lambda"] > 0])):
            axis.scatter(part[ratio], part["test_accuracy"], s=10, color=COLORS[side], alpha=0.6, zorder=2)
            center = means.loc[part["lambda"].unique()]
            marker = "s" if side == STANDARD else "o"
            axis.scatter(
                center[ratio],
                center["test_accuracy"],
                s=42,
                color=COLORS[side],
                marker=marker,
                label=side if side == STANDARD else f"{side}, at the λ below",
                edgecolor="white",
                zorder=3,
            )
        for value, point in means.iterrows():
            if value > 0:
                axis.annotate(
                    f"{value:g}",
                    (point[ratio], point["test_accuracy"]),
                    textcoords="offset points",
                    xytext=(0, -13),
                    ha="center",
                    fontsize=8,
                    color="0.3",
                )
        picked = chosen[(chosen[GROUP] == list(group)).all(axis=1)]["lambda"]
        for value in picked.dropna():
            point = means.loc[value]
            axis.scatter(
                point[ratio],
                point["test_accuracy"],
                s=130,
                facecolor="none",
                edgecolor="black",
                linewidth=1.2,
                label="selected on validation",
                zorder=4,
            )
        axis.set(
            title=_title(group, runs),
            xlabel=f"energy ratio ({accounting})",
            ylabel="test accuracy",
        )
        axis.margins(0.12)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if label:
        figure.suptitle(label, fontsize=9, color="0.35")
    return figure


def firing_bars(axis: Axes, sides: dict[str, list[LayerFiring]]) -> None:
    """Share of firing (non-zero) outputs of each layer, in network order, one bar a training."""
    width = 0.8 / len(sides)
    for index, (side, layers) in enumerate(sides.items()):
        places = [position + (index - (len(sides) - 1) / 2) * width for position in range(len(layers))]
        axis.bar(places, [layer.firing for layer in layers], width, color=COLORS[side], label=side)
        axis.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=90, fontsize=7)
    axis.set(ylabel="firing share", ylim=(0, 1))
    axis.grid(visible=False, axis="x")
    axis.legend(frameon=False, loc="lower right", ncols=2, bbox_to_anchor=(1, 1))


def firing_figure(results: Sequence[RunResult], chosen: pd.DataFrame, *, label: str = "") -> Figure:
    """The paper's figures 1 and 2: firing share per layer that can be zero, averaged over seeds.

    Args:
        chosen: of `select`: which penalty stands for energy-aware training.
    """
    import pandas as pd

    figure, axes = plt.subplots(len(chosen), 1, figsize=(9, 3.2 * len(chosen)), squeeze=False, layout="constrained")
    for axis, (_, setting) in zip(axes.flat, chosen.iterrows(), strict=True):
        own = [r for r in results if [r.config.dataset, r.config.model] == setting[GROUP].tolist()]
        sides = {
            STANDARD: [r for r in own if r.config.lambda_ == 0],
            AWARE: [r for r in own if r.config.lambda_ == setting["lambda"]],
        }
        firing_bars(axis, {side: mean_firing(part) for side, part in sides.items() if part})
        axis.set_title(_title(setting[GROUP], pd.DataFrame([result.data.model_dump() for result in own])), loc="left")
    if label:
        figure.suptitle(label, fontsize=9, color="0.35")
    return figure


def mean_firing(results: Sequence[RunResult]) -> list[LayerFiring]:
    """Firing share on the test split of each ReLU and max-pool, averaged over runs of one network."""
    kept = [[layer for layer in r.test.firing if layer.kind in ("ReLU", "ReLU6", "MaxPool2d")] for r in results]
    return [
        LayerFiring(name=same[0].name, kind=same[0].kind, firing=sum(layer.firing for layer in same) / len(same))
        for same in zip(*kept, strict=True)
    ]


def curves_figure(history: Sequence[Epoch]) -> Figure:
    """Cross-entropy, penalty and accuracy over the epochs of one run."""
    epochs = [epoch.epoch for epoch in history]
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    for axis, field, name in zip(axes, ("loss", "penalty"), ("cross-entropy", "penalty"), strict=False):
        axis.plot(epochs, [getattr(epoch, field) for epoch in history], marker="o", markersize=3)
        axis.set(xlabel="epoch", ylabel=name, ylim=(0, None))
    for field, name in (("train_accuracy", "training"), ("validation_accuracy", "validation")):
        axes[2].plot(epochs, [getattr(epoch, field) for epoch in history], marker="o", markersize=3, label=name)
    axes[2].set(xlabel="epoch", ylabel="accuracy", ylim=(None, 1.01))
    axes[2].legend(frameon=False)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write the figure as PNG and PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    for path in paths:
        # The date would make each rendering of the same results another file.
        figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    return paths


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill_in(text: str, reference: Path = ROOT / "results" / "reference") -> str:
    """`text` with the table and picture of each study that it marks, from the committed results."""

    def section(match: re.Match[str]) -> str:
        name = match[1]
        found = StudyResults.load(reference / name)
        summary = readable(tradeoff_table(found.table(), found.study.margin))
        picture = f"results/reference/{name}/tradeoff.png"
        return (
            f"<!-- results:{name} -->\n**{found.study.label}**\n\n{markdown(summary)}\n\n"
            f"![Test accuracy against energy ratio, study {name}]({picture})\n<!-- /results -->"
        )

    return re.sub(r"<!-- results:([\w.-]+) -->.*?<!-- /results -->", section, text, flags=re.DOTALL)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(fill_in(path.read_text()))
