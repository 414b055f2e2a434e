"""Selection on validation, and the numbers of the trade-off table, from made-up results."""

import re

import matplotlib as mpl
import pandas as pd
import pytest
from PIL import Image

from eatlib import figures, tables
from eatlib.config import Study
from eatlib.results import ROOT, StudyResults

mpl.use("agg")
REFERENCE = ROOT / "results" / "reference"


def table_of(tmp_path, make_result, runs):
    """`runs`: lambda -> [(accuracy, ratio) for each seed]."""
    study = Study(name="s", label="s", fixed={"epochs": 1}, blocks=[{"grid": {"lambda": list(runs), "seed": [0, 1]}}])
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    for value, seeds in runs.items():
        for seed, (accuracy, ratio) in enumerate(seeds):
            result = make_result(accuracy, ratio, seed=seed, **{"lambda": value})
            result.save(tmp_path / f"{result.config.name}.json")
    return StudyResults.load(tmp_path)


RUNS = {
    0: [(0.90, 0.80), (0.92, 0.78)],
    1: [(0.91, 0.70), (0.91, 0.72)],
    2: [(0.90, 0.60), (0.87, 0.62)],  # 0.885 on average: within 3 points of 0.91
    5: [(0.80, 0.50), (0.90, 0.50)],  # 0.85: not
}


def test_the_lowest_energy_within_the_margin_is_selected(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    assert tables.select(table, 0.03)["lambda"].tolist() == [2]
    assert tables.select(table, 0.02)["lambda"].tolist() == [1]
    assert tables.select(table, 0.10)["lambda"].tolist() == [5]


def test_a_setting_with_fewer_seeds_than_others_is_not_selected(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    lucky = table[(table["lambda"] == 2) & (table["seed"] == 0)].assign(sigma=1e-2, validation_published_ratio=0.1)
    assert tables.select(pd.concat([table, lucky]), 0.03)["sigma"].tolist() == [1e-4]
    assert tables.select(table[table["seed"] == 0], 0.03)["lambda"].tolist() == [2]


def test_selection_looks_at_validation_and_the_table_at_test(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    table["test_accuracy"] = table["test_accuracy"] - 0.5
    table.loc[table["lambda"] == 1, "test_published_ratio"] = 0.1
    row = tables.tradeoff_table(table, 0.03).iloc[0]
    assert row["lambda"] == 2
    assert row["eat_accuracy"] == pytest.approx(0.385)


def test_table_means_spread_and_decrease_by_hand(tmp_path, make_result):
    row = tables.tradeoff_table(table_of(tmp_path, make_result, RUNS).table(), 0.03).iloc[0]
    assert row["st_accuracy"] == pytest.approx(0.91)
    assert row["st_accuracy_std"] == pytest.approx(0.02 / 2**0.5)
    assert row["st_ratio"] == pytest.approx(0.79)
    assert row["eat_ratio"] == pytest.approx(0.61)
    assert row["energy_decrease"] == pytest.approx(0.18 / 0.79)
    assert (row["st_seeds"], row["eat_seeds"]) == (2, 2)


def test_both_accountings_stand_side_by_side_and_the_first_selects(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    table["test_fused_ratio"] = table["test_published_ratio"] / 2
    table["validation_fused_ratio"] = 1 - table["validation_published_ratio"]
    published, fused = (row for _, row in tables.tradeoff_table(table, 0.03).iterrows())
    assert (published["accounting"], fused["accounting"]) == ("published", "fused")
    assert published["lambda"] == fused["lambda"] == 2
    assert fused["eat_ratio"] == pytest.approx(published["eat_ratio"] / 2)


def test_partial_data_are_called_partial(tmp_path, make_result):
    found = table_of(tmp_path, make_result, RUNS)
    table = found.table()
    assert "PARTIAL" not in found.scale()[0]
    table["complete"] = False
    assert set(tables.readable(tables.tradeoff_table(table, 0.03))["data set"]) == {"digits (partial data)"}
    title = figures.tradeoff_figure(table, 0.03).axes[0].get_title()
    assert title == "digits, ResNet-18\n(70 training, 10 test images, of partial data)"


def test_a_subset_of_a_complete_data_set_is_told_in_titles(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    assert tables.title_of(["digits"], table) == "digits"
    assert tables.title_of(["digits"], table.assign(test_images=5)) == "digits\n(70 training, 5 test images)"


def test_a_setting_of_which_a_run_collapsed_is_not_selected(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    one = (table["lambda"] == 2) & (table["seed"] == 1)
    assert tables.select(table.assign(validation_collapsed=one), 0.03)["lambda"].tolist() == [1]
    standard = (table["lambda"] == 0) & (table["seed"] == 1)
    summary = tables.tradeoff_table(table.assign(validation_collapsed=standard), 0.03)
    assert pd.isna(summary["energy_decrease"]).all()
    assert any("did not learn" in line for line in tables.gains(summary, 0.03))


def test_runs_that_differ_in_more_than_penalty_and_seed_are_named(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    assert tables.mixed(table) == []
    other = pd.concat([table, table.assign(width=0.25, seed=2)])
    assert tables.mixed(other) == ["MIXED: the runs of digits, ResNet-18 differ in width: make each its own study"]


def test_standard_training_is_one_setting_whatever_the_penaltys_fields_say(tmp_path, make_result):
    found = [make_result(sigma=sigma, warmup_epochs=0, seed=seed) for seed, sigma in enumerate((1e-2, 1e-4))]
    assert tables.setting_of(found[0].config) == tables.setting_of(found[1].config)


@pytest.mark.parametrize("kept", [[], [1, 2]])
def test_tables_without_standard_training_are_empty_not_an_error(tmp_path, make_result, kept):
    table = table_of(tmp_path, make_result, {value: RUNS[value] for value in kept} or {0: []}).table()
    summary = tables.tradeoff_table(table, 0.03)
    assert tables.readable(summary).empty
    assert tables.paper_table(summary).empty
    assert tables.gains(summary, 0.03) == []
    assert len(tables.settings_table(table)) == len(kept)


def test_patterns_of_layers_survive_markdown():
    text = tables.markdown(pd.DataFrame({"layers": ["features.relu*, a|b"]}))
    assert text.splitlines()[-1] == "| features.relu\\*, a\\|b |"


def test_no_setting_within_the_margin_is_said(tmp_path, make_result):
    table = table_of(tmp_path, make_result, {0: RUNS[0], 5: RUNS[5]}).table()
    summary = tables.tradeoff_table(table, 0.03)
    assert pd.isna(summary["energy_decrease"]).all()
    assert set(tables.readable(summary)["accuracy EAT"]) == {"none within the margin"}


def test_the_decreases_spread_is_over_seeds_that_both_trainings_have(tmp_path, make_result):
    found = table_of(tmp_path, make_result, RUNS)
    row = tables.tradeoff_table(found.table(), 0.03).iloc[0]
    by_seed = [1 - 0.60 / 0.80, 1 - 0.62 / 0.78]
    assert row["energy_decrease_std"] == pytest.approx((by_seed[0] - by_seed[1]) / 2**0.5)


def test_our_numbers_stand_beside_the_papers(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    assert tables.paper_table(tables.tradeoff_table(table, 0.03)).empty, "the paper has no digits"
    table["dataset"] = "cifar10"
    accuracy, ratio, decrease = tables.paper_table(tables.tradeoff_table(table, 0.03)).to_dict("records")
    assert (accuracy["ST"], accuracy["ST paper"], accuracy["ST difference"]) == ("0.910 ± 0.014", "0.92", "-0.01")
    assert (ratio["EAT"], ratio["EAT paper"], ratio["EAT difference"]) == ("0.610 ± 0.014", "0.61", "+0.00")
    assert (decrease["EAT paper"], decrease["EAT difference"]) == ("16.4%", "+6.4 points")
    assert (decrease["λ"], decrease["σ"]) == ("2", "0.0001")


def test_the_papers_decreases_follow_from_its_ratios():
    for paper in tables.PAPER.values():
        assert 1 - paper.eat_ratio / paper.st_ratio == pytest.approx(paper.energy_decrease, abs=2e-4)


def test_all_settings_are_listed_and_collapsed_runs_counted(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS | {10: [(0.5, 0.4), (0.9, 0.4)]}).table()
    shown = tables.settings_table(table)
    assert shown["λ"].tolist() == ["0 (ST)", "1", "2", "5", "10"]
    assert shown["collapsed"].tolist() == ["0 of 2"] * 4 + ["1 of 2"]
    assert shown["ReLU firing"].tolist()[:2] == ["100%", "90%"]
    short, same = tables.varying(shown)
    assert short.columns.tolist()[:3] == ["data set", "network", "λ"]
    assert same == "penalty l0, layers relu, normalisation layer_mean, warm-up 0, σ 0.0001"


def test_the_pareto_front_has_what_no_other_point_beats():
    points = pd.DataFrame({"ratio": [0.5, 0.5, 0.6, 0.7, 0.8], "accuracy": [0.6, 0.7, 0.7, 0.9, 0.8]})
    assert figures.pareto_front(points, "ratio", "accuracy").index.tolist() == [1, 3]


@pytest.mark.parametrize(("network", "floor"), [("resnet18", 0.471), ("vgg16", 0.448)])
def test_the_floor_of_the_published_accounting(network, floor):
    """PAPER.md's values, for batches of 512."""
    ratio = figures.silent_ratio(network, 10, 32, 1.0, 512, "horowitz-45nm-float32")
    assert ratio == pytest.approx(floor, abs=1e-3)


def test_layers_are_grouped_by_kind_in_the_order_of_the_network(make_result):
    layer = make_result().test.firing[0]
    kinds = ["Conv2d", "ReLU", "Conv2d", "Linear", "ReLU"]
    layers = [layer.model_copy(update={"name": str(place), "kind": kind}) for place, kind in enumerate(kinds)]
    assert [one.name for one in figures.by_kind(layers)] == ["0", "2", "1", "4", "3"]


def test_the_ablation_has_a_line_a_sigma_and_is_not_drawn_for_one(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    assert figures.ablation_figure(table) is None
    other = table[table["lambda"] > 0].assign(sigma=1e-2, test_accuracy=0.5)
    figure = figures.ablation_figure(pd.concat([table, other]), label="a label")
    accuracy, ratio = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in accuracy.get_lines()}
    assert lines["σ = 0.0001"] == pytest.approx([0.91, 0.885, 0.85])
    assert lines["σ = 0.01"] == [0.5] * 3
    assert ratio.get_ylabel() == "energy ratio (published)"
    few = figures.ablation_figure(pd.concat([table, other[other["seed"] == 0]]))
    lines = {line.get_label(): list(line.get_ydata()) for line in few.axes[0].get_lines()}
    assert lines["σ = 0.0001"] == pytest.approx([0.91, 0.90, 0.80]), "seed 0 alone, as for the other sigma"


@pytest.mark.parametrize("kept", [[0, 1, 2, 5], [0], [0, 5]])
def test_figures_are_drawn_from_whatever_there_is(tmp_path, make_result, kept):
    found = table_of(tmp_path, make_result, {value: RUNS[value] for value in kept})
    table = found.table()
    table["collapsed"] = table["lambda"] == 5
    tradeoff = figures.tradeoff_figure(table, 0.03, label="a label")
    firing = figures.firing_figure(found.results, tables.select(table, 0.03), "resnet18")
    assert tradeoff.axes[0].get_xlabel() == "energy ratio (published)"
    paths = figures.save(tradeoff, tmp_path, "tradeoff") + figures.save(firing, tmp_path, "firing")
    assert all(path.stat().st_size > 1000 for path in paths)


def test_the_readme_shows_the_committed_results():
    """If not: python -m eatlib.tables README.md"""
    text = (ROOT / "README.md").read_text()
    assert "<!-- results:quick -->" in text
    assert tables.fill_in(text) == text
    pictures = [ROOT / picture for picture in re.findall(r"\]\((results/\S+)\)", text)]
    assert pictures


@pytest.mark.parametrize("folder", sorted(REFERENCE.glob("*/")), ids=lambda folder: folder.name)
def test_the_committed_figures_and_tables_show_the_committed_results(folder):
    """If not: ./run_all.sh STUDY --results results/reference"""
    found = StudyResults.load(folder)
    assert not found.problems
    assert not found.missing
    for name in ("tradeoff.png", *(path.name for path in folder.glob("firing_*.png"))):
        assert Image.open(folder / name).text["Source"] == found.digest()
    summary = tables.readable(tables.tradeoff_table(found.table(), found.study.margin))
    saved = pd.read_csv(folder / "table.csv", comment="#", dtype=str, keep_default_na=False)
    assert saved.to_dict("records") == summary.astype(str).to_dict("records")
