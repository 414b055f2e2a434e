"""Figures of a study, from frames that `notebooks/2_tradeoff.ipynb` makes, and of a single run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from eatlib.results import LayerFiring
from eatlib.tables import GROUP, PAPER, SETTING, names, setting_text

STANDARD, AWARE = "standard training", "energy-aware training"
COLORS = {STANDARD: "#0072b2", AWARE: "#d55e00"}
"""Two colours that colour-blind readers, and a grey printer, tell apart (Okabe and Ito)."""

RATIO, ACCURACY = "test_published_ratio", "test_accuracy"
AXIS_NAMES = {RATIO: "energy ratio (published)", ACCURACY: "test accuracy"}


def tradeoff_figure(
    runs: pd.DataFrame,
    means: pd.DataFrame,
    selected: pd.DataFrame,
    margin: float,
    floors: Mapping[tuple[str, str], float],
    *,
    label: str = "",
) -> Figure:
    """Test accuracy against energy ratio (`published`), a row a data set and a column a network.

    Args:
        runs: small points, one a run, or crosses where a run collapsed; of `StudyResults.table`.
        means: large points, one a setting, standard training among them.
        selected: those of `means` that get a ring.
        margin: accuracy below standard training that the shaded band reaches down.
        floors: by data set and network, the ratio at which a dashed line says 'no ReLU fires'.
    """
    groups = list(runs.groupby(GROUP))
    figure, axes = _panels(len(groups), runs["model"].nunique(), width=4.4, height=3.3)
    for axis, (group, own) in zip(axes, groups, strict=True):
        centers, ringed, paper = (frame.merge(own[GROUP][:1]) for frame in (means, selected, PAPER))
        for top in centers.loc[centers["lambda"] == 0, ACCURACY]:
            band = f"test accuracy at most {100 * margin:g} points below ST"
            axis.axhspan(top - margin, top, color="0.9", zorder=0, label=band)
        for side, short, marker in ((STANDARD, "st", "s"), (AWARE, "eat", "o")):
            single, mean = (frame[(frame["lambda"] > 0) == (side == AWARE)] for frame in (own, centers))
            style = {"color": COLORS[side], "marker": marker}
            _points(axis, single[~single["test_collapsed"]], s=10, alpha=0.6, zorder=2, **style)
            _points(axis, mean, f"{side} ({short.upper()})", s=42, edgecolor="white", zorder=4, **style)
            style |= {"marker": "*", "s": 70}
            _points(axis, paper, f"{side} in the paper", f"{short}_ratio", f"{short}_accuracy", **style)
        _cross_collapsed(axis, own)
        front = pareto_front(centers)
        axis.plot(front[RATIO], front[ACCURACY], color="0.4", linewidth=1.2, zorder=3, label="Pareto front")
        ring = {"s": 130, "facecolor": "none", "edgecolor": "black", "linewidth": 1.2, "zorder": 5}
        _points(axis, ringed, "selected on validation", **ring)
        _name_points(axis, pd.concat([front, ringed]).drop_duplicates(SETTING))
        if floor := floors.get(group):
            axis.axvline(floor, color="0.5", linestyle="--", linewidth=1, label="no ReLU fires", zorder=1)
        axis.set(xlabel=AXIS_NAMES[RATIO], ylabel=AXIS_NAMES[ACCURACY], title=names(own)[0])
        axis.margins(0.12)
    return _finish(figure, label)


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no other one beats in both energy ratio (lower) and accuracy (higher), in order of the ratio."""
    ordered = points.sort_values([RATIO, ACCURACY], ascending=[True, False])
    return ordered[ordered[ACCURACY] > ordered[ACCURACY].cummax().shift(fill_value=float("-inf"))]


def ablation_figure(runs: pd.DataFrame, *, label: str = "") -> Figure:
    """The paper's figure 3: test accuracy and energy ratio over lambda, a line a sigma, means over seeds.

    Args:
        runs: the runs to compare, a row of panels for each data set, network and penalty among them, and those of
            standard training (lambda 0) with the same seeds.
    """
    rest = [key for key in SETTING if key not in ("sigma", "lambda")]
    kinds = [kind for _, kind in runs[runs["lambda"] > 0].groupby([*GROUP, *rest], sort=False)]
    panels = [(kind, column) for kind in kinds for column in (ACCURACY, RATIO)]
    figure, axes = _panels(len(panels), 2, width=4.5, height=3.2)
    for axis, (kind, column) in zip(axes, panels, strict=True):
        means = kind.pivot_table(index="lambda", columns="sigma", values=column).rename(columns="σ = {:g}".format)
        means.plot(ax=axis, logx=True, marker="o", markersize=5, legend=False)
        _cross_collapsed(axis, kind, "lambda", column)
        standard = runs[runs["lambda"] == 0].merge(kind[GROUP][:1])[column].mean()
        axis.axhline(standard, color="black", linestyle="--", linewidth=1, label=STANDARD)
        penalty = f"{setting_text(kind.iloc[0], rest)}, seeds: {kind['seed'].nunique()}"
        axis.set(xlabel="λ", ylabel=AXIS_NAMES[column], title=names(kind)[0] if column == ACCURACY else penalty)
        axis.set_xticks(means.index, means.index.map("{:g}".format))
        axis.minorticks_off()
    return _finish(figure, label)


def firing_figure(panels: Mapping[str, pd.DataFrame], *, label: str = "") -> Figure:
    """The paper's figures 1 and 2: by title, a panel of `firing_bars`."""
    figure, axes = _panels(len(panels), 1, width=9, height=2.5)
    for axis, (title, firing) in zip(axes, panels.items(), strict=True):
        firing_bars(axis, firing)
        axis.set_title(title, loc="left")
    return _finish(figure, label)


def firing_bars(axis: Axes, firing: pd.DataFrame) -> None:
    """Share of firing (non-zero) outputs by layer (row), a bar for each column: `STANDARD`, `AWARE` or both."""
    firing.plot.bar(ax=axis, color=COLORS, width=0.8, legend=False, ylabel="firing share", ylim=(0, 1))
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(visible=False, axis="x")


def sparse(layers: Sequence[LayerFiring]) -> dict[str, float]:
    """Firing shares of the layers that can be exactly zero: the ReLUs, then the pools, each in the network's order."""
    relus = {layer.name: layer.firing for layer in layers if layer.kind.startswith("ReLU")}
    return relus | {layer.name: layer.firing for layer in layers if "Pool" in layer.kind}


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write the figure as PNG, whose path is returned, and as PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    png = folder / f"{name}.png"
    figure.savefig(png)
    # Figures are committed, alone and in notebooks: a palette makes them a third as large.
    Image.open(png).convert("RGB").quantize(128).save(png, optimize=True)
    figure.savefig(png.with_suffix(".pdf"), metadata={"CreationDate": None})  # or each rendering is another file
    plt.close(figure)  # or a notebook shows it once more
    return png


def _panels(count: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Panels of that size in inches, row by row."""
    rows = -(-count // columns)
    figure = plt.figure(figsize=(max(6.6, width * columns), height * rows + 0.9), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _points(axis: Axes, points: pd.DataFrame, label: str = "", x: str = RATIO, y: str = ACCURACY, **style: Any) -> None:
    """A scatter that the legend names if there is a point."""
    axis.scatter(points[x], points[y], label=label if len(points) else "", **style)


def _cross_collapsed(axis: Axes, runs: pd.DataFrame, x: str = RATIO, y: str = ACCURACY) -> None:
    style = {"color": "black", "marker": "x", "s": 24, "linewidth": 1.2, "zorder": 5}
    _points(axis, runs[runs["test_collapsed"]], "collapsed to chance", x, y, **style)


def _name_points(axis: Axes, points: pd.DataFrame) -> None:
    """Write lambda at each point with a penalty, sigma and warm-up too where they differ."""
    points = points[points["lambda"] > 0]
    keys = ["lambda", *(key for key in ("sigma", "warmup_epochs") if len(points[key].unique()) > 1)]
    style = {"fontsize": 8, "color": "0.2", "path_effects": [withStroke(linewidth=2, foreground="white")], "zorder": 6}
    style |= {"xytext": (-5, 5), "textcoords": "offset points", "rotation": -45, "rotation_mode": "anchor"}
    for point in points.to_dict("records"):  # no other mean lies to the upper left of one on the Pareto front
        axis.annotate(setting_text(point, keys), (point[RATIO], point[ACCURACY]), ha="right", va="center", **style)


def _finish(figure: Figure, label: str) -> Figure:
    """One legend for all panels, and the study's label on top."""
    entries = {}
    for axis in figure.axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    columns = int(figure.get_figwidth() / 2.8)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(label, fontsize=9, color="0.35", wrap=True)
    return figure
