"""Figures of a study, from frames that `notebooks/2_tradeoff.ipynb` makes, and of a single run."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eatlib.results import Epoch, LayerFiring
from eatlib.tables import GROUP, PAPER, SETTING, name_of, setting_text

if TYPE_CHECKING:
    import pandas as pd  # a slow import, as seaborn is: the figures of a single run do without

STANDARD, AWARE = "standard training", "energy-aware training"
COLORS = {STANDARD: "#0072b2", AWARE: "#d55e00"}
"""Two colours that colour-blind readers, and a grey printer, tell apart (Okabe and Ito)."""


def use_style() -> None:
    """The look of all figures: seaborn's paper context on a white grid."""
    import seaborn as sns

    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 150, "savefig.bbox": "tight"})


# --- a study --------------------------------------------------------------------------------------------------------


def tradeoff_figure(
    runs: "pd.DataFrame",
    means: "pd.DataFrame",
    chosen: "pd.DataFrame",
    margin: float,
    floors: Mapping[tuple[str, str], float],
    accounting: str = "published",
    *,
    label: str = "",
) -> Figure:
    """Test accuracy against energy ratio, one panel per data set and network.

    Args:
        runs: small points, one a run, or crosses where a run collapsed; of `StudyResults.table`.
        means: large points, one a setting; with standard training's they make the Pareto front.
        chosen: the settings of `means` that get a ring.
        margin: accuracy below standard training that the shaded band reaches down.
        floors: by data set and network, the ratio at which a dashed line says 'no ReLU fires'.
    """
    ratio, accuracy = f"test_{accounting}_ratio", "test_accuracy"
    figure, axes = _panels(runs)
    for group, axis in axes.items():
        own, centers, picked = (frame[(frame[GROUP] == list(group)).all(axis=1)] for frame in (runs, means, chosen))
        standard = own[own["lambda"] == 0]
        if len(standard):
            top, band = standard[accuracy].mean(), f"test accuracy at most {100 * margin:g} points below ST"
            axis.axhspan(top - margin, top, color="0.9", zorder=0, label=band)
        for side, marker, name in ((STANDARD, "s", "ST"), (AWARE, "o", "EAT")):
            style = {"color": COLORS[side], "marker": marker}
            single, mean = (frame[(frame["lambda"] > 0) == (side == AWARE)] for frame in (own, centers))
            single = single[~single["test_collapsed"]]
            axis.scatter(single[ratio], single[accuracy], s=10, alpha=0.6, zorder=2, **style)
            style |= {"edgecolor": "white", "label": f"{side} ({name})"}
            axis.scatter(mean[ratio], mean[accuracy], s=42, zorder=4, **style)
        _cross_collapsed(axis, own, ratio, accuracy)
        front = pareto_front(centers, ratio, accuracy)
        axis.plot(front[ratio], front[accuracy], color="0.4", linewidth=1.2, zorder=3, label="Pareto front")
        ringed = centers.merge(picked[SETTING], on=SETTING)
        ring = {"facecolor": "none", "edgecolor": "black", "linewidth": 1.2}
        axis.scatter(ringed[ratio], ringed[accuracy], s=130, zorder=5, label="selected on validation", **ring)
        if group in PAPER and accounting == "published":
            paper = PAPER[group]
            points = {STANDARD: (paper.st_ratio, paper.st_accuracy), AWARE: (paper.eat_ratio, paper.eat_accuracy)}
            axis.plot(*zip(*points.values(), strict=True), color="0.4", linestyle=":", linewidth=1, zorder=2)
            for side, point in points.items():
                axis.scatter(*point, s=70, marker="*", color=COLORS[side], zorder=2, label=f"{side} in the paper")
        if group in floors:
            axis.axvline(floors[group], color="0.5", linestyle="--", linewidth=1, label="no ReLU fires", zorder=1)
        axis.set(xlabel=f"energy ratio ({accounting})", ylabel="test accuracy")
        axis.set_title(name_of(*group, complete=own["complete"].all()), parse_math=False)
        axis.margins(0.12)
    figure = _finish(figure, label)
    figure.draw_without_rendering()  # so that the panels have their size
    for group, axis in axes.items():
        _name_points(axis, means[(means[GROUP] == list(group)).all(axis=1)], ratio, accuracy)
    return figure


def pareto_front(points: "pd.DataFrame", ratio: str, accuracy: str) -> "pd.DataFrame":
    """The points that no other one beats in both energy ratio (lower) and accuracy (higher), in order of the ratio."""
    ordered = points.sort_values([ratio, accuracy], ascending=[True, False])
    return ordered[ordered[accuracy] > ordered[accuracy].cummax().shift(fill_value=float("-inf"))]


def ablation_figure(runs: "pd.DataFrame", accounting: str = "published", *, label: str = "") -> Figure:
    """The paper's figure 3: test accuracy and energy ratio over lambda, a line a sigma, means over seeds.

    Args:
        runs: the runs to compare, a row of panels for each data set, network and penalty among them, and those of
            standard training (lambda 0) with the same seeds.
    """
    import seaborn as sns

    rest = [key for key in SETTING if key not in ("sigma", "lambda")]
    kinds = list(runs[runs["lambda"] > 0].groupby([*GROUP, *rest], sort=False))
    figure, axes = plt.subplots(len(kinds), 2, figsize=(9, 3.2 * len(kinds)), squeeze=False, layout="constrained")
    for row, (kind, part) in zip(axes, kinds, strict=True):
        standard = runs[(runs[GROUP] == list(kind[:2])).all(axis=1) & (runs["lambda"] == 0)]
        lines, ticks = list(part.groupby("sigma")), sorted(part["lambda"].unique())
        shades = sns.color_palette("viridis", len(lines) + 1)
        for axis, column in zip(row, ("test_accuracy", f"test_{accounting}_ratio"), strict=True):
            for index, (sigma, line) in enumerate(lines):
                mean, style = line.groupby("lambda")[column].mean(), {"marker": "osD^vP*X"[index % 8], "markersize": 5}
                axis.plot(mean.index, mean, color=shades[index], label=f"σ = {sigma:g}", **style)
            _cross_collapsed(axis, part, "lambda", column)
            axis.axhline(standard[column].mean(), color=COLORS[STANDARD], linestyle="--", linewidth=1, label=STANDARD)
            axis.set(xscale="log", xlabel="λ")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        row[0].set_ylabel("test accuracy")
        row[1].set_ylabel(f"energy ratio ({accounting})")
        row[0].set_title(name_of(*kind[:2], complete=part["complete"].all()), parse_math=False)
        row[1].set_title(f"{setting_text(part.iloc[0], rest)}, seeds: {part['seed'].nunique()}", parse_math=False)
    return _finish(figure, label)


def firing_figure(panels: Mapping[str, Mapping[str, Mapping[str, float]]], *, label: str = "") -> Figure:
    """The paper's figures 1 and 2: by title, a panel of `firing_bars`."""
    size = (9, 0.7 + 2.5 * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, sides) in zip(axes.flat, panels.items(), strict=True):
        firing_bars(axis, sides)
        axis.set_title(title, loc="left", parse_math=False)
    return _finish(figure, label)


def _panels(runs: "pd.DataFrame") -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A row a network and a column a data set, or one row for one data set; a pair without runs stays empty."""
    datasets, models = runs["dataset"].unique(), runs["model"].unique()
    rows, columns = (len(models), len(datasets)) if len(datasets) > 1 else (1, len(models))
    size = (max(6.6, 4.4 * columns), 3.3 * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    places = dict(zip([(dataset, model) for model in models for dataset in datasets], axes.flat, strict=True))
    for group in places.keys() - set(runs.groupby(GROUP).groups):
        places.pop(group).remove()
    return figure, places


def _cross_collapsed(axis: Axes, runs: "pd.DataFrame", x: str, y: str) -> None:
    runs = runs[runs["test_collapsed"]]
    name = "collapsed to chance" if len(runs) else None
    axis.scatter(runs[x], runs[y], color="black", marker="x", s=24, linewidth=1.2, zorder=5, label=name)


def _name_points(axis: Axes, points: "pd.DataFrame", x: str, y: str) -> None:
    """Write lambda beside each point with a penalty, sigma and warm-up too where they differ, if there is room."""
    style = {"fontsize": 8, "color": "0.2", "path_effects": [withStroke(linewidth=2, foreground="white")], "zorder": 6}
    radius = 4 * axis.figure.dpi / 72
    centers = axis.transData.transform(points[[x, y]].to_numpy())
    taken = [Bbox([center - radius, center + radius]) for center in centers]
    points = points[points["lambda"] > 0].sort_values(x)
    keys = ["lambda", *(key for key in ("sigma", "warmup_epochs") if len(points[key].unique()) > 1)]
    for point in points.to_dict("records"):
        for place, side in (((5, -11), "left"), ((5, 5), "left"), ((-6, 5), "right"), ((-6, -11), "right")):
            style |= {"xytext": place, "ha": side, "textcoords": "offset points"}
            name = axis.annotate(setting_text(point, keys), (point[x], point[y]), **style)
            box = name.get_window_extent()
            if axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                taken.append(box)
                break
            name.remove()


def _finish(figure: Figure, label: str) -> Figure:
    """One legend for all panels, and the study's label on top."""
    entries = {}
    for axis in figure.axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    columns = min(4, len(entries), int(figure.get_figwidth() / 2.8))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)
    figure.suptitle(label, fontsize=9, color="0.35", wrap=True, parse_math=False)
    return figure


# --- a run ----------------------------------------------------------------------------------------------------------


def sparse(layers: Sequence[LayerFiring]) -> dict[str, float]:
    """Firing shares of the layers that can be exactly zero: the ReLUs, then the pools, each in the network's order."""
    relus = {layer.name: layer.firing for layer in layers if layer.kind.startswith("ReLU")}
    return relus | {layer.name: layer.firing for layer in layers if "Pool" in layer.kind}


def firing_bars(axis: Axes, sides: Mapping[str, Mapping[str, float]]) -> None:
    """Share of firing (non-zero) outputs by layer, a bar for each side: `STANDARD`, `AWARE` or both."""
    layers = list(next(iter(sides.values())).keys())
    width = 0.8 / len(sides)
    for index, (side, shares) in enumerate(sides.items()):
        places = [place + (index - (len(sides) - 1) / 2) * width for place in range(len(layers))]
        axis.bar(places, [shares[layer] for layer in layers], width, color=COLORS[side], label=side)
    axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    axis.set(ylabel="firing share", ylim=(0, 1), xlim=(-0.6, len(layers) - 0.4))
    axis.grid(visible=False, axis="x")


def curves_figure(history: Sequence[Epoch]) -> Figure:
    """Cross-entropy, penalty and accuracy over the epochs of one run."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    fields = {"loss": axes[0], "penalty": axes[1], "train_accuracy": axes[2], "validation_accuracy": axes[2]}
    for field, axis in fields.items():
        points = [(epoch.epoch, getattr(epoch, field)) for epoch in history]
        # Markers at 0 lie on the frame, which must not cut them.
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, clip_on=False, label=field.partition("_")[0])
    for axis, name in zip(axes, ("cross-entropy", "penalty", "accuracy"), strict=True):
        axis.set(xlabel="epoch", ylabel=name, ylim=(None if name == "accuracy" else 0, None))
    axes[2].legend(frameon=False)
    return figure


def save(figure: Figure, folder: Path, name: str, *, source: str = "") -> Path:
    """Write the figure as PNG, whose path is returned, and as PDF.

    Args:
        source: kept in the PNG, `StudyResults.digest` of what the figure shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    png, pixels, about = folder / f"{name}.png", io.BytesIO(), PngInfo()
    about.add_text("Source", source)
    figure.savefig(pixels, format="png")
    # Figures are committed, alone and in notebooks: a palette makes them a third as large.
    Image.open(pixels).convert("RGB").quantize(128).save(png, optimize=True, pnginfo=about)
    figure.savefig(png.with_suffix(".pdf"), metadata={"CreationDate": None})  # or each rendering is another file
    plt.close(figure)  # or a notebook shows it once more
    return png
