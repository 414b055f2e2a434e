"""Figures from the results of a study."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eatlib.config import RunConfig
from eatlib.results import Epoch, LayerFiring, RunResult, table_row

if TYPE_CHECKING:
    import pandas as pd  # a slow import, as eatlib.tables and seaborn are: the figures of a single run do without

STANDARD, AWARE = "standard training", "energy-aware training"
COLORS = {STANDARD: "#0072b2", AWARE: "#d55e00"}
"""Two colours that colour-blind readers, and a grey printer, tell apart (Okabe and Ito)."""
MARKERS = {STANDARD: "s", AWARE: "o"}


def use_style() -> None:
    """The look of all figures: seaborn's paper context on a white grid."""
    import seaborn as sns

    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", font_scale=1.1)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 150, "savefig.bbox": "tight"})


def training_name(config: RunConfig) -> str:
    """How a run's training is called in legends."""
    return AWARE if config.lambda_ > 0 else STANDARD


# --- a study --------------------------------------------------------------------------------------------------------


def _panels(table: pd.DataFrame, size: tuple[float, float]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A row a network and a column a data set (one row, if there is one data set); what has no runs says so."""
    from eatlib.tables import name_of

    datasets, models = table["dataset"].unique(), table["model"].unique()
    shape = (len(models), len(datasets)) if len(datasets) > 1 else (1, len(models))
    figure, axes = plt.subplots(
        *shape, figsize=(size[0] * shape[1], size[1] * shape[0]), squeeze=False, layout="constrained"
    )
    places = dict(zip([(dataset, model) for model in models for dataset in datasets], axes.flat, strict=True))
    present = set(table.groupby(["dataset", "model"]).groups)
    for group in places.keys() - present:
        places[group].set_axis_off()
        places[group].text(0.5, 0.5, f"no runs of {name_of(group)}", ha="center", transform=places[group].transAxes)
    return figure, {group: axis for group, axis in places.items() if group in present}


def _finish(figure: Figure, axes: Sequence[Axes], label: str) -> Figure:
    """One legend for all panels, and the study's label on top."""
    entries = {}
    for axis in axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=min(4, len(entries)), frameon=False
    )
    if label:
        figure.suptitle(label, fontsize=9, color="0.35", wrap=True)
    return figure


def pareto_front(points: pd.DataFrame, ratio: str, accuracy: str) -> pd.DataFrame:
    """The points that no other one beats in both energy ratio (lower) and accuracy (higher), in order of the ratio."""
    ordered = points.sort_values([ratio, accuracy], ascending=[True, False])
    return ordered[ordered[accuracy] > ordered[accuracy].cummax().shift(fill_value=float("-inf"))]


@cache
def silent_ratio(model: str, classes: int, image_size: int, width: float, batch_size: int, hardware: str) -> float:
    """The `published` energy ratio of one of the paper's networks if no ReLU ever fired: the floor of that accounting.

    Convolution and batch-norm outputs are taken as dense. A network that lost whole layers can be below.
    """
    import torch

    from eatlib.energy import energy_report, find_hardware
    from eatlib.models import build_model

    images = 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"classes": classes, "image_size": image_size, "width": width}
        network = build_model(model, **size, mean=(0.5,) * 3, std=(0.25,) * 3)
        rows = energy_report(network, [torch.rand(images, 3, image_size, image_size)]).layers
    reads = rows["kind"].eq("BatchNorm2d") | (rows.index == rows["kind"].eq("Conv2d").idxmax())
    writes = rows["kind"].isin(["Conv2d", "BatchNorm2d", "Linear"])
    sums = {column: rows[column].sum() * batch_size // images for column in ("inputs", "outputs", "operations")}
    left = (rows["inputs"][reads].sum() + rows["outputs"][writes].sum()) * batch_size // images
    parameters, nonzero = rows["parameters"].sum(), rows["nonzero_parameters"].sum()
    share = rows["inputs"][reads].sum() / rows["inputs"].sum() * nonzero / parameters  # of operations, as published
    prices = find_hardware(hardware)
    with_skipping = prices.memory_pj * (left + nonzero) + prices.operation_pj * sums["operations"] * share
    accesses = sums["inputs"] + sums["outputs"] + parameters
    return with_skipping / (prices.memory_pj * accesses + prices.operation_pj * sums["operations"])


def tradeoff_figure(table: pd.DataFrame, margin: float, accounting: str = "published", *, label: str = "") -> Figure:
    """Test accuracy against energy ratio, one panel per data set and network.

    Small points are single runs; crosses, those that collapsed to chance. Large points are means over seeds of the
    settings that compete (see `eatlib.tables.select`) and have no collapsed run, the line is their Pareto front with
    standard training's. The shaded band is the test accuracy within `margin` of standard training. For the paper's
    networks and data sets, its two points and the floor of the `published` accounting are drawn too.
    """
    import pandas as pd

    from eatlib import tables

    ratio, accuracy = f"test_{accounting}_ratio", "test_accuracy"
    figure, axes = _panels(table, (4.4, 3.6))
    chosen = tables.select(table, margin, accounting)
    for group, axis in axes.items():
        runs = table[(table[tables.GROUP] == list(group)).all(axis=1)]
        standard = runs[runs["lambda"] == 0]
        if len(standard):
            top = standard[accuracy].mean()
            band = f"test accuracy at most {100 * margin:g} points below ST"
            axis.axhspan(top - margin, top, color="0.9", zorder=0, label=band)
        means = []
        for side, part, shown in (
            (STANDARD, standard, standard),
            (AWARE, runs[runs["lambda"] > 0], tables.competitors(runs)),
        ):
            learned, collapsed = part[~part["collapsed"]], part[part["collapsed"]]
            style = {"color": COLORS[side], "marker": MARKERS[side]}
            axis.scatter(learned[ratio], learned[accuracy], s=10, alpha=0.6, zorder=2, **style)
            whole = shown.groupby(tables.SETTING).filter(lambda setting: not setting["collapsed"].any())
            means.append(whole.groupby(tables.SETTING)[[ratio, accuracy]].mean())
            name = f"{side} (ST)" if side == STANDARD else f"{side}, λ beside"
            axis.scatter(means[-1][ratio], means[-1][accuracy], s=42, edgecolor="white", zorder=3, label=name, **style)
            cross = {"color": "black", "marker": "x", "s": 24, "linewidth": 1.2}
            name = "collapsed to chance" if len(collapsed) else None
            axis.scatter(collapsed[ratio], collapsed[accuracy], zorder=4, label=name, **cross)
        centers = pd.concat([part for part in means if len(part)]) if any(map(len, means)) else means[0]
        front = pareto_front(centers, ratio, accuracy)
        axis.plot(front[ratio], front[accuracy], color="0.4", linewidth=1.2, zorder=1, label="Pareto front")
        picked = chosen[(chosen[tables.GROUP] == list(group)).all(axis=1)][tables.SETTING].dropna()
        for setting in picked.itertuples(index=False, name=None):
            ring = {"facecolor": "none", "edgecolor": "black", "linewidth": 1.2}
            axis.scatter(*centers.loc[setting], s=130, zorder=4, label="selected on validation", **ring)
        _name_points(axis, means[1], set(front.index) | set(picked.itertuples(index=False, name=None)))
        _draw_references(axis, group, runs, accounting)
        axis.set(title=tables.title_of(group, runs), xlabel=f"energy ratio ({accounting})", ylabel="test accuracy")
        axis.margins(0.12)
    return _finish(figure, list(axes.values()), label)


def _name_points(axis: Axes, centers: pd.DataFrame, best: set[tuple[object, ...]]) -> None:
    """Write lambda beside each mean, and what else of the penalty differs among them; if they are many, the best's."""
    settings = centers.index.to_frame()
    words = {"sigma": "σ {:g}", "warmup_epochs": "warm-up {}", "lambda": "{:g}"}
    varying = [key for key in settings if key == "lambda" or len(settings[key].unique()) > 1]
    for setting, point in centers.iterrows():
        if len(centers) > 8 and setting not in best:
            continue
        values = dict(zip(settings.columns, setting, strict=True))
        text = ", ".join(words.get(key, "{}").format(values[key]) for key in reversed(varying))
        place = {"textcoords": "offset points", "xytext": (6, -9)}
        axis.annotate(text, tuple(point), fontsize=8, color="0.3", **place)


def _draw_references(axis: Axes, group: tuple[str, str], runs: pd.DataFrame, accounting: str) -> None:
    """The paper's points and the floor, where there are any."""
    from eatlib.tables import PAPER

    if accounting != "published":
        return
    if group in PAPER:
        paper = PAPER[group]
        axis.plot(
            [paper.st_ratio, paper.eat_ratio],
            [paper.st_accuracy, paper.eat_accuracy],
            color="0.4",
            linestyle=":",
            linewidth=1,
            zorder=2,
        )
        for side in (STANDARD, AWARE):
            place = (paper.st_ratio, paper.st_accuracy) if side == STANDARD else (paper.eat_ratio, paper.eat_accuracy)
            axis.scatter(*place, s=70, marker="*", color=COLORS[side], zorder=2, label=f"{side} in the paper")
    if group[1] in ("resnet18", "vgg16"):
        first = runs.iloc[0]
        keys = ("model", "classes", "image_size", "width", "energy_batch_size", "hardware")
        floor = silent_ratio(*(first[key].item() if hasattr(first[key], "item") else first[key] for key in keys))
        axis.axvline(floor, color="0.5", linestyle="--", linewidth=1, label="no ReLU fires", zorder=0)


def ablation_figure(table: pd.DataFrame, accounting: str = "published", *, label: str = "") -> Figure | None:
    """The paper's figure 3: test accuracy and energy ratio over lambda, a line a sigma.

    Means are over the seeds that all sigmas have.

    Returns:
        None if nothing was run with several sigmas; else a row for each data set, network and penalty that was.
    """
    import seaborn as sns

    from eatlib import tables

    rest = [key for key in tables.SETTING if key not in ("sigma", "lambda")]
    penalised = table[table["lambda"] > 0]
    kinds = penalised.groupby([*tables.GROUP, *rest], sort=False).filter(lambda part: len(part["sigma"].unique()) > 1)
    if kinds.empty:
        return None
    kinds = list(kinds.groupby([*tables.GROUP, *rest], sort=False))
    columns = (("test_accuracy", "test accuracy"), (f"test_{accounting}_ratio", f"energy ratio ({accounting})"))
    figure, axes = plt.subplots(len(kinds), 2, figsize=(9, 3.2 * len(kinds)), squeeze=False, layout="constrained")
    for row, (kind, runs) in zip(axes, kinds, strict=True):
        group = kind[: len(tables.GROUP)]
        standard = table[(table[tables.GROUP] == list(group)).all(axis=1) & (table["lambda"] == 0)]
        seeds = set.intersection(*runs.groupby("sigma")["seed"].agg(set))
        if seeds:
            runs, standard = (part[part["seed"].isin(seeds)] for part in (runs, standard))
        shades = sns.color_palette("viridis", len(runs["sigma"].unique()) + 1)
        for axis, (column, name) in zip(row, columns, strict=True):
            for index, (value, part) in enumerate(runs.groupby("sigma")):
                line = part.groupby("lambda")[column].mean()
                marker = "osD^vP*X"[index % 8]
                axis.plot(line.index, line, color=shades[index], marker=marker, markersize=5, label=f"σ = {value:g}")
            collapsed = runs[runs["collapsed"]]
            name_of_cross = "collapsed to chance" if len(collapsed) else None
            axis.scatter(
                collapsed["lambda"], collapsed[column], color="black", marker="x", zorder=4, label=name_of_cross
            )
            axis.axhline(standard[column].mean(), color=COLORS[STANDARD], linestyle="--", linewidth=1, label=STANDARD)
            axis.set(xscale="log", xlabel="λ", ylabel=name)
            ticks = sorted(runs["lambda"].unique())
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        different = [f"{key} {value}" for key, value in zip(rest, kind[len(group) :], strict=True)]
        title = tables.title_of(group, runs)
        row[0].set_title(f"{title}\n{', '.join(different)}" if len(kinds) > len({k[:2] for k, _ in kinds}) else title)
        row[1].set_title(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}" if seeds else "different seeds")
    return _finish(figure, list(axes.flat), label)


# --- firing ---------------------------------------------------------------------------------------------------------


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


def firing_figure(results: Sequence[RunResult], chosen: pd.DataFrame, model: str, *, label: str = "") -> Figure:
    """The paper's figures 1 and 2: firing share of each layer of one network, a panel a data set, mean over seeds.

    Layers are in the order of the network, grouped by kind.

    Args:
        chosen: of `eatlib.tables.select`: which penalty stands for energy-aware training.
    """
    import pandas as pd

    from eatlib import tables

    chosen = chosen[chosen["model"] == model]
    figure, axes = plt.subplots(len(chosen), 1, figsize=(11, 2.9 * len(chosen)), squeeze=False, layout="constrained")
    for axis, (_, setting) in zip(axes.flat, chosen.iterrows(), strict=True):
        own = [r for r in results if [r.config.dataset, r.config.model] == setting[tables.GROUP].tolist()]
        values = setting[tables.SETTING].tolist()
        sides = {
            STANDARD: [r for r in own if r.config.lambda_ == 0],
            AWARE: [r for r in own if tables.setting_of(r.config) == values],
        }
        shares = {side: by_kind(mean_firing(part)) for side, part in sides.items() if part}
        firing_bars(axis, shares)
        layers = next(iter(shares.values()))
        starts = [i for i, layer in enumerate(layers) if i == 0 or layer.kind != layers[i - 1].kind]
        for start, end in zip(starts, [*starts[1:], len(layers)], strict=True):
            if start:
                axis.axvline(start - 0.5, color="0.5", linewidth=0.8)
            if end - start > 2:
                axis.text((start + end - 1) / 2, 1.02, layers[start].kind, ha="center", fontsize=8, color="0.3")
        axis.set_xlim(-0.6, len(layers) - 0.4)
        lambda_ = ", no setting within the margin"
        if not pd.isna(setting["lambda"]):
            lambda_ = f", λ = {setting['lambda']:g}, σ = {setting['sigma']:g}"
        runs = pd.DataFrame([table_row(result) for result in own])
        axis.set_title(tables.title_of(setting[tables.GROUP], runs).replace("\n", " ") + lambda_, loc="left", pad=14)
    if label:
        figure.suptitle(label, fontsize=9, color="0.35", wrap=True)
    return figure


def mean_firing(results: Sequence[RunResult]) -> list[LayerFiring]:
    """Firing share on the test split of each layer call, averaged over runs of one network."""
    return [
        LayerFiring(name=same[0].name, kind=same[0].kind, firing=sum(layer.firing for layer in same) / len(same))
        for same in zip(*(result.test.firing for result in results), strict=True)
    ]


def by_kind(layers: Sequence[LayerFiring]) -> list[LayerFiring]:
    """The layers grouped by kind: the kinds in the order in which they first appear, as do the layers in each."""
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    return sorted(layers, key=lambda layer: kinds.index(layer.kind))


def sparse(layers: Sequence[LayerFiring]) -> list[LayerFiring]:
    """Those that can be exactly zero: ReLUs, and the pools after them."""
    return [layer for layer in layers if layer.kind in ("ReLU", "ReLU6", "MaxPool2d")]


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


def save(figure: Figure, folder: Path, name: str, *, source: str = "") -> list[Path]:
    """Write the figure as PNG and PDF.

    Args:
        source: kept in the PNG, `StudyResults.digest` of what the figure shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    about = PngInfo()
    about.add_text("Source", source)
    # Figures are committed, alone and in notebooks: a palette makes them a third as large.
    Image.open(pixels).convert("RGB").quantize(128).save(png, optimize=True, pnginfo=about)
    figure.savefig(pdf, metadata={"CreationDate": None})  # which would make each rendering another file
    return [png, pdf]
