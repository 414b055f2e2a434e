"""Tables from the results of a study: the setting that is selected, the paper's table 1 beside ours, all settings.

    python -m eatlib.tables README.md

writes the tables of the committed results between the file's `<!-- results:STUDY -->` and `<!-- /results -->`, and the
table of all settings between `<!-- settings:STUDY -->` and `<!-- /settings -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eatlib.config import PENALTY_FIELDS, RunConfig
from eatlib.results import ROOT, StudyResults, table_values, write_atomically

ACCOUNTINGS = ("published", "fused")
GROUP = ["dataset", "model"]
SETTING = [*PENALTY_FIELDS, "lambda"]
NAMES = {
    "resnet18": "ResNet-18",
    "vgg16": "VGG-16",
    "cifar10": "CIFAR-10",
    "gtsrb": "GTSRB",
    "celeba": "CelebA",
}
"""How data sets and networks are written for readers; others are written as they are."""


@dataclass(frozen=True)
class Published:
    """A data set and network in the paper's table 1; from one run each, as far as it says."""

    st_accuracy: float
    eat_accuracy: float
    st_ratio: float
    eat_ratio: float
    energy_decrease: float


PAPER = {
    ("gtsrb", "resnet18"): Published(0.91, 0.93, 0.76, 0.55, 0.2763),
    ("gtsrb", "vgg16"): Published(0.90, 0.89, 0.69, 0.63, 0.0869),
    ("cifar10", "resnet18"): Published(0.92, 0.90, 0.73, 0.61, 0.1643),
    ("cifar10", "vgg16"): Published(0.91, 0.88, 0.67, 0.53, 0.2089),
    ("celeba", "resnet18"): Published(0.76, 0.78, 0.68, 0.63, 0.0735),
    ("celeba", "vgg16"): Published(0.77, 0.78, 0.63, 0.54, 0.1428),
}
"""arXiv 2307.00368, table 1."""


def name_of(group: Sequence[str]) -> str:
    """A data set, or data set and network, as a reader writes them; of a folder, its last part."""
    return ", ".join(NAMES.get(item, Path(item).name if item.startswith("folder:") else item) for item in group)


def title_of(group: Sequence[str], runs: pd.DataFrame) -> str:
    """The data set and network, and in a second line the images of these runs, unless they are a complete data set."""
    first = runs.iloc[0]
    used = {split: first[f"{split}_images"] for split in ("train", "validation", "test")}
    whole = used["train"] + used["validation"] == first["source_train"] and used["test"] == first["source_test"]
    if runs["complete"].all() and whole:
        return name_of(group)
    source = "" if runs["complete"].all() else ", of partial data"
    return f"{name_of(group)}\n({used['train']:,} training, {used['test']:,} test images{source})"


def _data_of(dataset: str, runs: pd.DataFrame) -> str:
    return name_of([dataset]) + ("" if runs["complete"].all() else " (partial data)")


def mixed(table: pd.DataFrame) -> list[str]:
    """Where runs of one data set and network differ in more than penalty and seed: their means would mean nothing."""
    own = {*GROUP, *SETTING, "seed"}
    fields = [field.alias or name for name, field in RunConfig.model_fields.items()]
    lines = []
    for group, runs in groups(table):
        different = [f for f in fields if f in table and f not in own and len(runs[f].unique()) > 1]
        if different:
            lines.append(
                f"MIXED: the runs of {name_of(group)} differ in {', '.join(different)}: make each its own study"
            )
    return lines


def setting_of(config: RunConfig) -> list[Any]:
    """The values of `SETTING` in a configuration, as they stand in `StudyResults.table`."""
    values = table_values(config)
    return [values[key] for key in SETTING]


def select(table: pd.DataFrame, margin: float, accounting: str = "published") -> pd.DataFrame:
    """The setting of the penalty that each data set and network gets in the trade-off table.

    Among the settings whose validation accuracy, averaged over seeds, is at most `margin` below standard
    training's, the one with the lowest validation energy ratio. The test split has no say. Settings that were tried
    with fewer seeds than others, as in an ablation, do not compete: the lowest of many single runs is mostly luck.
    Nor do those of which a run collapsed; where standard training itself did, nothing is selected.

    Args:
        table: of `StudyResults.table`.

    Returns:
        One row of `SETTING` per data set and network that has a standard training; NaN where no setting qualifies.
    """
    ratio = f"validation_{accounting}_ratio"
    rows = []
    for group, runs in groups(table):
        standard = runs[runs["lambda"] == 0]
        if standard.empty:
            continue
        competing = competitors(runs)
        competing = competing.groupby(SETTING).filter(lambda part: not part["validation_collapsed"].any())
        means = competing.groupby(SETTING)[["validation_accuracy", ratio]].mean().reset_index()
        allowed = means[means["validation_accuracy"] >= standard["validation_accuracy"].mean() - margin]
        learned = len(allowed) and not standard["validation_collapsed"].any()
        chosen = allowed.loc[allowed[ratio].idxmin(), SETTING].to_dict() if learned else {}
        rows.append(dict(zip(GROUP, group, strict=True)) | chosen)
    return pd.DataFrame(rows, columns=[*GROUP, *SETTING])


def groups(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """The runs of each data set and network, in the order of the study; none for a study without results."""
    return list(table.groupby(GROUP, sort=False)) if len(table) else []


def competitors(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the runs of one data set and network with a penalty, those of the settings with the most seeds."""
    penalised = runs[runs["lambda"] > 0]
    seeds = penalised.groupby(SETTING)["seed"].transform("size")
    return penalised[seeds == seeds.max()]


def runs_of(table: pd.DataFrame, setting: pd.Series) -> pd.DataFrame:
    """The runs of `table` with the data set, network and penalty of one row of `select`."""
    return table[(table[[*GROUP, *SETTING]] == setting[[*GROUP, *SETTING]]).all(axis=1)]


def tradeoff_table(table: pd.DataFrame, margin: float, accounting: str = "published") -> pd.DataFrame:
    """Test accuracy and energy ratio of standard and of energy-aware training, mean and spread over seeds.

    Args:
        accounting: whose validation ratio selects the setting; the test ratios of all accountings are shown.

    Returns:
        One row per data set, network and accounting. `*_std` is the sample standard deviation over seeds;
        `energy_decrease` is (ratio_ST - ratio_EAT) / ratio_ST of the means, its spread that over seeds which both have.
    """
    rows = []
    for _, setting in select(table, margin, accounting).iterrows():
        runs = table[(table[GROUP] == setting[GROUP]).all(axis=1)]
        sides = {"st": runs[runs["lambda"] == 0], "eat": runs_of(runs, setting)}
        for shown in ACCOUNTINGS:
            row = {key: setting[key] for key in (*GROUP, "lambda", "sigma")}
            row |= {"data": _data_of(setting["dataset"], runs), "accounting": shown}
            for side, part in sides.items():
                row[f"{side}_seeds"] = len(part)
                for quantity, column in (("accuracy", "test_accuracy"), ("ratio", f"test_{shown}_ratio")):
                    row[f"{side}_{quantity}"] = part[column].mean()
                    row[f"{side}_{quantity}_std"] = part[column].std()
            by_seed = [part.set_index("seed")[f"test_{shown}_ratio"] for part in sides.values()]
            row["energy_decrease"] = 1 - row["eat_ratio"] / row["st_ratio"]
            row["energy_decrease_std"] = (1 - by_seed[1] / by_seed[0]).std()
            rows.append(row)
    return pd.DataFrame(rows, columns=_TRADEOFF)


_TRADEOFF = [
    *(*GROUP, "data", "lambda", "sigma", "accounting", "st_seeds", "eat_seeds"),
    *(
        f"{side}_{quantity}{what}"
        for side in ("st", "eat")
        for quantity in ("accuracy", "ratio")
        for what in ("", "_std")
    ),
    *("energy_decrease", "energy_decrease_std"),
]


def gains(table: pd.DataFrame, margin: float) -> list[str]:
    """What `tradeoff_table` says, a sentence an accounting, and where seeds differ by more than the margin."""
    lines = []
    selected = table.dropna(subset="energy_decrease")
    for accounting, rows in selected.groupby("accounting", sort=False):
        several = rows.dropna(subset="energy_decrease_std")
        beyond = (several["energy_decrease"] > 2 * several["energy_decrease_std"]).sum()
        decrease = rows["energy_decrease"]
        line = f"{accounting}: the energy decrease is {decrease.min():.1%} to {decrease.max():.1%}"
        if len(several):
            seeds = several[["st_seeds", "eat_seeds"]].min(axis=None)
            line += f", more than twice its spread over seeds ({seeds} or more) in {beyond} of {len(several)} cases"
        lines.append(line + ".")
    for _, row in table[table["accounting"] == ACCOUNTINGS[0]].iterrows():
        where = f"{row['data']}, {name_of([row['model']])}"
        if pd.isna(row["energy_decrease"]):
            lines.append(f"{where}: no setting is within the margin, or standard training did not learn.")
        elif row["st_accuracy_std"] > margin:
            lines.append(f"{where}: the accuracy of standard training itself varies by ± {row['st_accuracy_std']:.3f}.")
    return lines


def _spread(row: pd.Series, key: str, form: str = ".3f", absent: str = "none within the margin") -> str:
    """Mean ± spread."""
    if pd.isna(row[key]):
        return absent
    std = row[f"{key}_std"]
    return f"{row[key]:{form}}" + ("" if pd.isna(std) else f" ± {std:{form}}")


def _number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:g}"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`tradeoff_table` as text for people: mean ± spread, names written out."""
    return pd.DataFrame(
        [
            {
                "data set": row["data"],
                "network": name_of([row["model"]]),
                "accuracy ST": _spread(row, "st_accuracy"),
                "accuracy EAT": _spread(row, "eat_accuracy"),
                "accounting": row["accounting"],
                "energy ratio ST": _spread(row, "st_ratio"),
                "energy ratio EAT": _spread(row, "eat_ratio"),
                "energy decrease": _spread(row, "energy_decrease", ".1%", absent=""),
                "λ": _number(row["lambda"]),
                "σ": _number(row["sigma"]),
                "seeds": " and ".join(
                    f"{count}" for count in dict.fromkeys([row["st_seeds"], row["eat_seeds"]]) if count
                ),
            }
            for _, row in table.iterrows()
        ]
    )


def paper_table(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's table 1, ours beside the paper's, as text; a difference is ours minus the paper's.

    Args:
        table: of `tradeoff_table`; its `published` rows are the paper's accounting.

    Returns:
        Three rows per data set and network that the paper has, so none at all for other studies.
    """
    rows = []
    for _, row in table.iterrows():
        theirs = PAPER.get((row["dataset"], row["model"]))
        if theirs is None or row["accounting"] != "published":
            continue
        paper = asdict(theirs)
        shown = {"data set": row["data"], "network": name_of([row["model"]])}
        for quantity in ("accuracy", "ratio"):
            line = shown | {"quantity": {"ratio": "energy ratio"}.get(quantity, quantity)}
            for side in ("st", "eat"):
                key = f"{side}_{quantity}"
                difference = "" if pd.isna(row[key]) else f"{row[key] - paper[key]:+.2f}"
                line |= {side.upper(): _spread(row, key), f"{side.upper()} paper": f"{paper[key]:.2f}"}
                line |= {f"{side.upper()} difference": difference}
            rows.append(line)
        ours, published = row["energy_decrease"], theirs.energy_decrease
        rows.append(
            shown
            | {"quantity": "energy decrease", "EAT": _spread(row, "energy_decrease", ".1%")}
            | {"EAT paper": f"{published:.1%}"}
            | {"EAT difference": "" if pd.isna(ours) else f"{100 * (ours - published):+.1f} points"}
            | {"λ": _number(row["lambda"]), "σ": _number(row["sigma"])}
        )
    return pd.DataFrame(rows).fillna("")


def settings_table(table: pd.DataFrame) -> pd.DataFrame:
    """Every setting of the penalty that a study tries, as text: mean ± spread on the test images.

    `ReLU firing` is the firing share, averaged over ReLUs, as a share of standard training's. `collapsed` counts the
    seeds that ended at chance.
    """
    rows = []
    for group, runs in groups(table):
        standard = runs[runs["lambda"] == 0]
        penalised = runs[runs["lambda"] > 0].groupby(SETTING, sort=False)
        for values, part in [(None, standard), *penalised]:
            if part.empty:
                continue
            setting = dict.fromkeys(SETTING, "") if values is None else dict(zip(SETTING, values, strict=True))
            means = {}
            for column in ("test_accuracy", "test_macro_accuracy", "test_published_ratio", "test_fused_ratio"):
                means |= {column: part[column].mean(), f"{column}_std": part[column].std()}
            row = pd.Series(means)
            relus = part["test_relu_firing"].mean() / standard["test_relu_firing"].mean()
            rows.append(
                {
                    "data set": _data_of(group[0], runs),
                    "network": name_of([group[1]]),
                    "penalty": setting["penalty"],
                    "layers": setting["penalty_layers"],
                    "normalisation": setting["penalty_normalization"],
                    "warm-up": setting["warmup_epochs"],
                    "σ": setting["sigma"] and f"{setting['sigma']:g}",
                    "λ": f"{setting['lambda']:g}" if setting["lambda"] else "0 (ST)",
                    "accuracy": _spread(row, "test_accuracy"),
                    "macro accuracy": _spread(row, "test_macro_accuracy"),
                    "published ratio": _spread(row, "test_published_ratio"),
                    "fused ratio": _spread(row, "test_fused_ratio"),
                    "ReLU firing": "" if pd.isna(relus) else f"{relus:.0%}",
                    "collapsed": f"{part['collapsed'].sum()} of {len(part)}",
                }
            )
    return pd.DataFrame(rows).astype(str)


def varying(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """`settings_table` without the columns of the penalty that say the same in each row, and what these say."""
    columns = [c for c in ("penalty", "layers", "normalisation", "warm-up", "σ") if c in table]
    said = {column: set(table[column]) - {""} for column in columns}
    same = {column: values.pop() for column, values in said.items() if len(values) == 1}
    return table.drop(columns=list(same)), ", ".join(f"{column} {value}" for column, value in same.items())


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown."""
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    cells = [[re.sub(r"([|*])", r"\\\1", cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def save(table: pd.DataFrame, folder: Path, name: str, notes: Sequence[str]) -> list[Path]:
    """Write a table of text as CSV and as Markdown, each under what there is to know about its scale."""
    csv = "".join(f"# {note}\n" for note in notes) + table.to_csv(index=False)
    paths = [folder / f"{name}.csv", folder / f"{name}.md"]
    write_atomically(paths[0], csv)  # pandas.read_csv(path, comment="#")
    write_atomically(paths[1], f"{_bullets(notes)}\n\n{markdown(table)}\n")
    return paths


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def fill_in(text: str, reference: Path = ROOT / "results" / "reference") -> str:
    """`text` with the tables and picture of each study that it marks, from the committed results."""

    def results(match: re.Match[str]) -> str:
        name = match[1]
        found = StudyResults.load(reference / name)
        summary = tradeoff_table(found.table(), found.study.margin)
        beside = paper_table(summary)
        tables = [markdown(readable(summary)), *([markdown(beside)] if len(beside) else [])]
        picture = f"results/reference/{name}/tradeoff.png"
        return "\n\n".join(
            [
                f"<!-- results:{name} -->\n**{found.study.label}**",
                _bullets(found.scale()),
                *tables,
                f"![Test accuracy against energy ratio, study {name}]({picture})\n<!-- /results -->",
            ]
        )

    def settings(match: re.Match[str]) -> str:
        found = StudyResults.load(reference / match[1])
        shown, same = varying(settings_table(found.table()))
        notes = _bullets([*found.scale(), f"the same in all: {same}"])
        return (
            f"<!-- settings:{match[1]} -->\n**{found.study.label}**\n\n{notes}\n\n{markdown(shown)}\n<!-- /settings -->"
        )

    text = re.sub(r"<!-- results:([\w.-]+) -->.*?<!-- /results -->", results, text, flags=re.DOTALL)
    return re.sub(r"<!-- settings:([\w.-]+) -->.*?<!-- /settings -->", settings, text, flags=re.DOTALL)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(fill_in(path.read_text()))
