"""Figures of a study, from frames that `notebooks/2_tradeoff.ipynb` makes."""

import sys

import jinja2
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from eatlib.hardware import ACCOUNTINGS, HARDWARE
from eatlib.results import ROOT
from eatlib.tables import SETTING, setting_text

RATIO, ACCURACY = "test_published_ratio", "test_accuracy"
AXIS_NAMES = {RATIO: "energy ratio (published)", ACCURACY: "test accuracy"}

STANDARD, AWARE = "standard training (ST)", "energy-aware training (EAT)"
COLORS = {STANDARD: "#0072b2", AWARE: "#d55e00"}
"""Two colours that colour-blind readers, and a grey printer, tell apart (Okabe and Ito)."""
PAIR_COLORS = ["#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#8c564b"]
"""Of data sets and networks: others, as those two say how a network was trained."""

LAYERS = (("run", "", 16), ("trained on", "D", 16), ("collapsed run", "X", 45), ("mean", "", 50), ("paper", "*", 110))
MARKS = pd.DataFrame.from_dict(
    {
        f"{training}, {layer}": (color, marker or own_marker, size)
        for layer, marker, size in LAYERS
        for (training, color), own_marker in zip(COLORS.items(), "so", strict=True)
    },
    orient="index",
    columns=["palette", "markers", "sizes"],
)
NAMED_BY = ("penalty", "penalty_normalization", "sigma", "warmup_epochs")
FRONT, SELECTED = "Pareto front", "selected on validation"
NAME = {"xytext": (-5, 5), "textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 8, "zorder": 6}
NAME |= {"rotation": -45, "rotation_mode": "anchor", "path_effects": [withStroke(linewidth=2, foreground="white")]}
"""Names stand to the upper left: no other mean lies there beside one on the Pareto front."""

PANELS = {"height": 3.3, "aspect": 1.35, "facet_kws": {"sharex": False, "sharey": False, "legend_out": False}}
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(ROOT / "notebooks" / "page"))


def tradeoff_figure(points: pd.DataFrame, margin: float) -> Figure:
    """Test accuracy against energy ratio (`published`), a panel for each `title`, in as many columns as networks.

    Args:
        points: a row a point, of standard training if lambda is 0. `layer` is one of `LAYERS` ("trained on": standard
            training that goes on; "mean": of a setting, joined by a line on a path), `FRONT` (joined by a line) or
            `SELECTED` (a ring); `floor`: where no ReLU fires. Collapsed runs are at least level with all others.
        margin: accuracy below the mean of standard training that the shaded band reaches down.
    """
    training = points["lambda"].eq(0).map({True: STANDARD, False: AWARE})
    lowest = points[ACCURACY].where(points["layer"] != "collapsed run").groupby(points["title"]).transform("min")
    below = points[points[ACCURACY] < lowest]  # they would leave no room for the others
    points = points.assign(mark=training + ", " + points["layer"], **{ACCURACY: points[ACCURACY].clip(lower=lowest)})
    marked = points[points["mark"].isin(MARKS.index)]
    semantics = {"x": RATIO, "y": ACCURACY, "hue": "mark", "style": "mark", "size": "mark", "col": "title"}
    grid = sns.relplot(marked, **semantics, **MARKS.to_dict(), col_wrap=points["model"].nunique(), **PANELS)
    for title, own in points.groupby("title"):
        axis = grid.axes_dict[title]
        front, selected = (own[own["layer"] == layer] for layer in (FRONT, SELECTED))
        for top in own.loc[own["mark"] == f"{STANDARD}, mean", ACCURACY]:
            band = f"test accuracy at most {100 * margin:g} points below ST"
            axis.axhspan(top - margin, top, color="0.9", zorder=0, label=band)
        for floor in own["floor"].dropna().unique():
            axis.axvline(floor, color="0.5", linestyle="--", linewidth=1, zorder=0.9, label="no ReLU fires")
        means = own[own["layer"] == "mean"]
        steps = means[(means["path"] != "") & ~means.duplicated([*{*SETTING} - {"lambda"}], keep=False)]  # on a path
        for _, path in steps.groupby([key for key in SETTING if key not in ("lambda", "path", "epochs")]):
            path = pd.concat([means[(means["lambda"] == 0) & (means["path"] == "")], path.sort_values("total_epochs")])
            axis.plot(path[RATIO], path[ACCURACY], c=COLORS[AWARE], zorder=0.8, label="path, from the weights before")
        if len(front):
            axis.plot(front[RATIO], front[ACCURACY], color="0.4", linewidth=1.2, zorder=0.9, label=FRONT)
        if len(selected):
            axis.scatter(selected[RATIO], selected[ACCURACY], s=140, c="none", edgecolor="black", label=SELECTED)
        named = pd.concat([selected, front]).query("`lambda` > 0").drop_duplicates([RATIO, ACCURACY])
        keys = {"lambda", *(key for key in NAMED_BY if len(named[key].unique()) > 1)}
        named = named.assign(text=[setting_text(point, keys) for point in named.to_dict("records")]).sort_values(RATIO)
        apart = named.groupby("text")[RATIO].diff().fillna(1) > 0.03  # of like points of two paths, one is named
        shown, break_ = (named["layer"] == SELECTED, "\n") if len(keys) > 2 else (apart, ", ")  # long names: one
        for point in named[shown].to_dict("records"):
            axis.annotate(point["text"].replace(", ", break_), (point[RATIO], point[ACCURACY]), **NAME)
        if len(lost := below[below["title"] == title]):
            least = f"    ↓ {lost[ACCURACY].min():.2f}"
            axis.text(lost[RATIO].max(), own[ACCURACY].min(), least, va="center", fontsize=8)
        axis.set(xlabel=AXIS_NAMES[RATIO], ylabel=AXIS_NAMES[ACCURACY], title=title, xmargin=0.12, ymargin=0.12)
    return finish(grid)


def ablation_figure(runs: pd.DataFrame) -> Figure:
    """The paper's figure 3: test accuracy and energy ratio over lambda, a line a sigma, means over seeds.

    Args:
        runs: a row of panels for each `title`, with its runs of standard training (lambda 0) for a dashed line.
    """
    runs = runs.assign(line=runs["sigma"].map("σ = {:g}".format)).sort_values("sigma", kind="stable")
    tall = runs.melt(["title", "lambda", "line", "test_collapsed"], [ACCURACY, RATIO], "quantity")
    penalised = tall[tall["lambda"] > 0]
    semantics = {"x": "lambda", "y": "value", "hue": "line", "row": "title", "col": "quantity"}
    grid = sns.relplot(penalised, kind="line", marker="o", errorbar=None, **semantics, **PANELS)
    ticks = penalised["lambda"].unique()
    for (title, quantity), own in tall.groupby(["title", "quantity"]):
        axis = grid.axes_dict[title, quantity]
        standard = own.loc[own["lambda"] == 0, "value"].mean()
        axis.axhline(standard, color="black", linestyle="--", linewidth=1, label=STANDARD)
        collapsed = own[own["test_collapsed"] & (own["lambda"] > 0)]
        if len(collapsed):
            cross = {"color": "black", "marker": "x", "s": 24, "zorder": 5, "label": "collapsed run"}
            axis.scatter(collapsed["lambda"], collapsed["value"], **cross)
        axis.set(xscale="log", xlabel="λ", ylabel=AXIS_NAMES[quantity], title=title)
        axis.set_xticks(ticks, map("{:g}".format, ticks))
        axis.minorticks_off()
    return finish(grid)


def explore_page(runs: pd.DataFrame, title: str, text: str) -> str:
    """A page that needs no network: a point a run, with menus for accounting, hardware, and data set and network.

    Args:
        runs: a row a run: `file`, `title`, `penalty` in words, ..., and energy ratios "<accounting> at <hardware>".
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # as in `eatlib.steps.main`
    import altair as alt
    import vl_convert

    hardware = [*dict.fromkeys([*runs["hardware"], *HARDWARE])]  # the runs' own comes first, and is shown first
    menus = {"accounting": ACCOUNTINGS, "hardware": hardware, "shown": ["all", *runs["title"].unique()]}
    chosen = [
        alt.param(name=name, value=options[0], bind=alt.binding_select(options=options, name=name))
        for name, options in menus.items()
    ]
    ratios = {f"{name}_ratio": f"datum['{name} at ' + hardware]" for name in ACCOUNTINGS}
    words = {"title:N": "data set, network", "penalty:N": "penalty", "seed:N": "seed", f"{ACCURACY}:Q": "test accuracy"}
    words |= {f"{name}:Q": name.replace("_", " ") for name in ratios} | {"file:N": "file"}
    form, near = {"Q": ".3f", "N": alt.Undefined}, alt.Scale(zero=False, padding=15)
    alt.data_transformers.disable_max_rows()
    chart = alt.Chart(runs, width="container", height=420, background="transparent", description=title)
    chart = chart.transform_filter("shown == 'all' || shown == datum.title").add_params(*chosen)
    chart = chart.transform_calculate(**ratios, ratio="datum[accounting + ' at ' + hardware]")
    chart = chart.mark_point(filled=True, size=80, opacity=0.8).encode(
        x=alt.X("ratio:Q", title="energy ratio", scale=near),
        y=alt.Y(ACCURACY, title="test accuracy", scale=near),
        color=alt.Color("title", title="data set, network", scale=alt.Scale(range=PAIR_COLORS)),
        shape=alt.condition("datum.lambda == 0", alt.value("square"), alt.value("circle")),
        tooltip=[alt.Tooltip(field, title=name, format=form[field[-1]]) for field, name in words.items()],
    )
    letters = {"labelFontSize": 12, "titleFontSize": 13}
    legend = letters | {"orient": "bottom", "columns": 1, "labelLimit": 330, "symbolLimit": 0}
    chart = chart.configure(axis=letters, legend=legend, view={"stroke": None}).to_dict()
    known = {"title": title, "text": text, "chart": chart, "vega": vl_convert.javascript_bundle()}
    return PAGES.get_template("explore.html.j2").render(known)


def finish(grid: sns.FacetGrid) -> Figure:
    """Put one legend for all panels below them."""
    figure, entries = grid.figure, {}
    for axis in grid.axes.flat:
        entries |= {handle.get_label(): handle for handle in axis.get_legend_handles_labels()[0]}
    grid.legend.remove()
    width = max(6.6, figure.get_figwidth())
    figure.set(layout_engine="constrained", size_inches=(width, figure.get_figheight() + 0.9))
    place = {"loc": "outside lower center", "ncols": int(width / 2.8), "frameon": False}
    figure.legend(entries.values(), entries.keys(), **place)
    return figure
