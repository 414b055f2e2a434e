"""Selection on validation, and the numbers of the trade-off table, from made-up results."""

import re

import matplotlib as mpl
import pandas as pd
import pytest

from eatlib import figures
from eatlib.config import Study
from eatlib.results import ROOT, StudyResults

mpl.use("agg")


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
    assert figures.select(table, 0.03)["lambda"].tolist() == [2]
    assert figures.select(table, 0.02)["lambda"].tolist() == [1]
    assert figures.select(table, 0.10)["lambda"].tolist() == [5]


def test_selection_looks_at_validation_and_the_table_at_test(tmp_path, make_result):
    table = table_of(tmp_path, make_result, RUNS).table()
    table["test_accuracy"] = table["test_accuracy"] - 0.5
    table.loc[table["lambda"] == 1, "test_published_ratio"] = 0.1
    row = figures.tradeoff_table(table, 0.03).iloc[0]
    assert row["lambda"] == 2
    assert row["eat_accuracy"] == pytest.approx(0.385)


def test_table_means_spread_and_decrease_by_hand(tmp_path, make_result):
    row = figures.tradeoff_table(table_of(tmp_path, make_result, RUNS).table(), 0.03).iloc[0]
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
    published, fused = (row for _, row in figures.tradeoff_table(table, 0.03).iterrows())
    assert (published["accounting"], fused["accounting"]) == ("published", "fused")
    assert published["lambda"] == fused["lambda"] == 2
    assert fused["eat_ratio"] == pytest.approx(published["eat_ratio"] / 2)


def test_partial_data_are_called_partial(tmp_path, make_result):
    found = table_of(tmp_path, make_result, RUNS)
    table = found.table()
    assert "PARTIAL" not in found.scale()[0]
    table["complete"] = False
    assert set(figures.readable(figures.tradeoff_table(table, 0.03))["data set"]) == {
        "digits (partial data: 80 + 10 images)"
    }
    assert (
        figures.tradeoff_figure(table, 0.03).axes[0].get_title() == "digits, ResNet-18 (partial data: 80 + 10 images)"
    )


def test_no_setting_within_the_margin_is_said(tmp_path, make_result):
    table = table_of(tmp_path, make_result, {0: RUNS[0], 5: RUNS[5]}).table()
    summary = figures.tradeoff_table(table, 0.03)
    assert pd.isna(summary["energy_decrease"]).all()
    assert set(figures.readable(summary)["accuracy EAT"]) == {"none within the margin"}


@pytest.mark.parametrize("kept", [[0, 1, 2, 5], [0], [0, 5]])
def test_figures_are_drawn_from_whatever_there_is(tmp_path, make_result, kept):
    found = table_of(tmp_path, make_result, {value: RUNS[value] for value in kept})
    table = found.table()
    tradeoff = figures.tradeoff_figure(table, 0.03, label="a label")
    firing = figures.firing_figure(found.results, figures.select(table, 0.03))
    assert tradeoff.axes[0].get_xlabel() == "energy ratio (published)"
    paths = figures.save(tradeoff, tmp_path, "tradeoff") + figures.save(firing, tmp_path, "firing")
    assert all(path.stat().st_size > 1000 for path in paths)


def test_the_readme_shows_the_committed_results():
    """If not: python -m eatlib.figures README.md"""
    text = (ROOT / "README.md").read_text()
    assert "<!-- results:quick -->" in text
    assert figures.fill_in(text) == text
    for picture in re.findall(r"\]\((results/\S+)\)", text):
        assert (ROOT / picture).is_file()
