"""What `2_tradeoff.ipynb` selects, computes and writes, executed as it stands on made-up results."""

import re
import shutil

import IPython.display
import matplotlib as mpl
import nbformat
import pandas as pd
import pytest

from eatlib import figures, tables
from eatlib.config import Study
from eatlib.results import ROOT, StudyResults

mpl.use("agg")
REFERENCE = ROOT / "results" / "reference"
CELLS = [
    cell
    for cell in nbformat.read(ROOT / "notebooks" / "2_tradeoff.ipynb", as_version=4).cells
    if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
]
RUNS = {  # lambda: (accuracy, energy ratio) of each seed
    0: [(0.90, 0.80), (0.92, 0.78)],
    1: [(0.91, 0.70), (0.91, 0.72)],
    2: [(0.90, 0.60), (0.87, 0.62)],  # 0.885 on average: within 3 points of 0.91
    5: [(0.80, 0.50), (0.90, 0.50)],  # 0.85: not
}


@pytest.fixture
def tradeoff(tmp_path, make_result, monkeypatch):
    """Execute the notebook on `runs`, as `RUNS` or more fields by lambda; its variables, `said` among them."""

    def execute(runs=RUNS, *, margin=0.03, draw=False, hardware=None, extra=(), **fixed):
        fixed = {"epochs": 1, "width": 0.0625} | fixed
        made = [
            values | {"lambda": value, "seed": seed}
            for value, seeds in runs.items()
            for seed, given in enumerate(seeds)
            for values in [given if isinstance(given, dict) else dict(zip(("accuracy", "ratio"), given, strict=True))]
        ]
        results = [make_result(**(fixed | values)) for values in [*made, *extra]]
        blocks = [{"fixed": result.config.to_dict()} for result in results] or [{"fixed": fixed}]
        study = Study(name="s", label="a $ label", margin=margin, blocks=blocks)
        folder = tmp_path / "s"
        folder.mkdir(exist_ok=True)
        (folder / "study.yaml").write_text(study.to_yaml())
        names = {run.hash: name for name, run in study.runs().items()}
        for result in results:
            result.save(folder / f"{names[result.config_hash]}.json")
        return execute_in(folder, draw=draw, hardware=hardware)

    def execute_in(folder, *, draw=False, hardware=None):
        said = []
        monkeypatch.setattr(IPython.display, "display", lambda shown: said.append(getattr(shown, "data", "")))
        variables = {"study": folder.name, "results": str(folder.parent), "hardware": hardware}
        for cell in CELLS:
            if draw or "nbval-ignore-output" not in cell.metadata.get("tags", []):
                exec(cell.source, variables)
        return variables | {"said": "\n".join(text for text in said if isinstance(text, str))}

    execute.on = execute_in
    return execute


def row_of(notebook, accounting="published"):
    """The only data set and network's row of the table."""
    (row,) = notebook["comparison"].query("accounting == @accounting").to_dict("records")
    return row


@pytest.mark.parametrize(("margin", "chosen"), [(0.03, 2), (0.02, 1), (0.10, 5)])
def test_the_lowest_energy_within_the_margin_is_selected(tradeoff, margin, chosen):
    assert row_of(tradeoff(margin=margin))["lambda"] == chosen


def test_a_setting_with_fewer_seeds_than_others_is_not_selected(tradeoff):
    lucky = {"accuracy": 0.9, "ratio": 0.1, "lambda": 2, "sigma": 1e-2, "seed": 0}
    assert row_of(tradeoff(extra=[lucky]))["sigma"] == 1e-4
    one_seed = {value: seeds[:1] for value, seeds in RUNS.items()}
    assert row_of(tradeoff(one_seed))["lambda"] == 2


def test_selection_looks_at_validation_and_the_table_at_test(tradeoff):
    runs = {key: [{"accuracy": 0.4, "ratio": 0.1 + key / 10, "validation": own} for own in RUNS[key]] for key in RUNS}
    row = row_of(tradeoff(runs))
    assert (row["lambda"], row["eat_accuracy"]) == (2, pytest.approx(0.4))
    assert row["eat_ratio"] == pytest.approx(0.3)


def test_a_setting_of_which_a_run_collapsed_is_not_selected(tradeoff):
    collapsed = {"accuracy": 0.9, "ratio": 0.6, "validation": (0.5, 0.6)}
    assert row_of(tradeoff(RUNS | {2: [(0.95, 0.60), collapsed]}, margin=0.3))["lambda"] == 5
    notebook = tradeoff(RUNS | {0: [RUNS[0][0], collapsed]}, margin=0.3)
    assert pd.isna(row_of(notebook)["energy_decrease_percent"])
    assert "standard training did not learn" in notebook["said"]


def test_means_spread_and_decrease_by_hand(tradeoff):
    notebook = tradeoff()
    row = row_of(notebook)
    assert (row["st_accuracy"], row["st_accuracy_std"]) == pytest.approx((0.91, 0.02 / 2**0.5))
    assert (row["st_ratio"], row["eat_ratio"]) == pytest.approx((0.79, 0.61))
    assert (row["st_seeds"], row["eat_seeds"]) == (2, 2)
    assert row["energy_decrease_percent"] == pytest.approx(100 * 0.18 / 0.79)
    by_seed = [1 - 0.60 / 0.80, 1 - 0.62 / 0.78]
    assert row["energy_decrease_percent_std"] == pytest.approx(100 * (by_seed[0] - by_seed[1]) / 2**0.5)
    sentence = "**published**: the energy decrease is 22.8%, more than twice its spread over seeds in 1 of 1 cases."
    assert sentence in notebook["said"]


def test_what_is_left_against_standard_training_that_goes_on(tradeoff, make_result):
    before = make_result(**{"epochs": 1, "width": 0.0625, "lambda": 0}).config_hash
    on = {"lambda": 0, "seed": 0, "start": before, "epochs": 2, "accuracy": 0.93, "ratio": 0.75}
    said = tradeoff(extra=[on])["said"]
    assert "goes on: 3 epochs of it have accuracy 0.930, ratio 0.750. Within the margin of that: λ 1, " in said
    assert "which saves 5.3% at accuracy 0.910." in said  # 1 - .71 / .75


def test_of_several_standard_trainings_paths_begin_from_one_or_else_the_longest_counts(tradeoff, make_result):
    longer = {"accuracy": 0.95, "ratio": 0.9, "lambda": 0, "epochs": 4, "seed": 0}
    assert row_of(tradeoff(extra=[longer]))["st_ratio"] == pytest.approx(0.9)
    before = make_result(**{"epochs": 1, "width": 0.0625, "lambda": 0}).config_hash
    step = {"accuracy": 0.9, "ratio": 0.3, "lambda": 7, "epochs": 2, "start": before, "seed": 0}
    assert row_of(tradeoff(extra=[longer, step]))["st_ratio"] == pytest.approx(0.79)


def test_smaller_networks_are_left_out(tradeoff):
    smaller = {"accuracy": 0.2, "ratio": 0.2, "lambda": 0, "width": 0.03125}
    notebook = tradeoff(extra=[smaller | {"seed": seed} for seed in (0, 1)])
    assert row_of(notebook)["st_accuracy"] == pytest.approx(0.91)
    assert "All of the study's 10 runs have a result." in notebook["said"]
    assert "Left out: 2 runs of smaller networks." in notebook["said"]


def test_the_spread_is_over_the_seeds_that_both_trainings_have(tradeoff):
    row = row_of(tradeoff(RUNS | {0: [*RUNS[0], (0.91, 0.70)]}))
    by_seed = [1 - 0.60 / 0.80, 1 - 0.62 / 0.78]
    assert (row["st_seeds"], row["eat_seeds"]) == (3, 2)
    assert row["energy_decrease_percent_std"] == pytest.approx(100 * (by_seed[0] - by_seed[1]) / 2**0.5)


def test_published_selects_for_both_accountings(tradeoff):
    runs = {0: [{"ratio": 0.8, "fused": 0.6}], 1: [{"ratio": 0.7, "fused": 0.1}], 2: [{"ratio": 0.6, "fused": 0.3}]}
    notebook = tradeoff(runs)
    assert row_of(notebook, "fused")["lambda"] == 2
    assert row_of(notebook, "fused")["energy_decrease_percent"] == pytest.approx(50)


def test_hypervolumes_and_their_changes_by_hand(tradeoff):
    runs = {
        0: [{"accuracy": 0.9, "ratio": 0.8, "epochs": 8}, {"accuracy": 0.9, "ratio": 0.8, "epochs": 8}],
        1: [{"accuracy": 0.9, "ratio": 0.7}, {"accuracy": 0.85, "ratio": 0.7}],
        2: [{"accuracy": 0.85, "ratio": 0.5}, {"accuracy": 0.9, "ratio": 0.5}],  # of seed 1, it dominates lambda 1
        4: [{"accuracy": 0.7, "ratio": 0.4}, {"accuracy": 0.8, "ratio": 0.4}],  # 10 points and more below: no area
    }
    longer = [{"accuracy": 0.9, "ratio": 0.7, "epochs": 3, "lambda": value, "seed": 0} for value in (1, 2)]
    notebook = tradeoff(runs, extra=longer)
    first, other, second = notebook["volumes"].to_dict("records")
    # down to .8: seed 0 has (.5, .85), (.7, .9) and (.8, .9), and from (.4, .7) up to .5 a triangle above .8
    assert first["hypervolume"] == pytest.approx(0.1 * 0.1 + 0.2 * 0.075 + 0.5 * 0.033333 * 0.05, rel=1e-3)
    assert second["hypervolume"] == pytest.approx(0.3 * 0.1 + 0.1 * 0.1 / 2, rel=1e-3)
    change = 100 * (0.1 * 0.1 / first["hypervolume"] - 1)
    assert (other["name"], other["change_percent"]) == ("from nothing, 3 epochs a λ", pytest.approx(change))
    assert (first["epochs"], first["images_a_point"], other["epochs"]) == (8 + 3, 11 / 4 * 70, 8 + 2 * 3)


def test_savings_are_compared_with_what_is_possible(tradeoff):
    notebook = tradeoff(dataset="cifar10")
    gone, (floor,), (paper,) = notebook["gone"].set_index("which"), notebook["floors"]["floor"], notebook["theirs"]
    expected = {"within 1": (1, 0.79 - 0.71, 0.0), "within 3": (2, 0.79 - 0.61, 2.5)}
    for which, (value, saved, lost) in expected.items():
        row = gone.loc[which]
        assert (row["lambda"], row["points_lost"]) == (value, pytest.approx(lost))
        assert row["possible_percent"] == pytest.approx(100 * saved / (0.79 - floor))
    theirs = gone.loc["the paper, within 3"]
    assert (theirs["floor"], theirs["points_lost"]) == (paper, pytest.approx(2))
    assert theirs["possible_percent"] == pytest.approx(100 * (0.73 - 0.61) / (0.73 - paper))
    assert paper == pytest.approx(0.47, abs=0.005)  # the paper's network is not narrowed


def test_other_prices_apply_to_the_counts_and_go_to_a_folder_of_their_own(tradeoff, tmp_path):
    runs = {0: [{"ratio": 0.8, "products": 1.0}], 1: [{"ratio": 0.6, "products": 0.0}]}
    name = "horowitz-45nm-int8-sram"  # 12.5 pJ an access, 0.2 pJ a multiplication, as many of the one as of the other
    standard, aware = (12.5 * 0.8 + 0.2) / 12.7, 12.5 * 0.6 / 12.7
    priced = tradeoff(runs)["priced"].query("accounting == 'published'").set_index("prices")
    assert priced.loc[name, "energy_decrease_percent"] == pytest.approx(100 * (1 - aware / standard))
    row = row_of(tradeoff(runs, hardware=name))
    assert (row["st_ratio"], row["eat_ratio"]) == pytest.approx((standard, aware))
    assert name in (tmp_path / "s" / name / "table.md").read_text()


def test_tables_name_their_runs_and_are_narrow(tradeoff, tmp_path):
    tradeoff(dataset="cifar10")
    folder = tmp_path / "s"
    for name in ("table", "table1", "settings", "hardware"):
        text = (folder / f"{name}.md").read_text()
        assert all(line.count("|") <= 7 for line in text.splitlines()), "more than six columns"
        assert f"]({name}.csv)" in text
        rows = pd.read_csv(folder / f"{name}.csv", comment="#")
        for row in rows.to_dict("records"):
            assert all((folder / f"{run}.json").is_file() for run in row["runs"].split(" "))
    (row, _) = pd.read_csv(folder / "table.csv", comment="#").to_dict("records")
    seeds = [f"cifar10_resnet18_lambda{value}_seed{seed}" for value in (0, 2) for seed in (0, 1)]
    assert row["runs"].split(" ") == seeds
    assert row["energy_decrease_percent"] == pytest.approx(22.7848)


def test_our_numbers_stand_beside_the_papers(tradeoff):
    text = tradeoff(dataset="cifar10")["text_beside"].to_dict("records")
    assert text == [
        {
            "data set, network": "CIFAR-10, ResNet-18",
            "accuracy ST": "0.910 ± 0.014 (0.92)",
            "accuracy EAT": "0.885 ± 0.021 (0.90)",
            "energy ratio ST": "0.790 ± 0.014 (0.73)",
            "energy ratio EAT": "0.610 ± 0.014 (0.61)",
            "energy decrease": "22.8% ± 3.2% (16.4%)",
        }
    ]
    assert "Nothing in this study stands in the paper's table." in tradeoff(dataset="digits")["said"]


def test_all_settings_are_listed_and_collapsed_runs_counted(tradeoff, tmp_path):
    listed = tradeoff(RUNS | {10: [(0.5, 0.4), (0.9, 0.4)]})["listed"]
    assert listed["lambda"].tolist() == [0, 1, 2, 5, 10]
    assert listed["collapsed_runs"].tolist() == [0, 0, 0, 0, 1]
    assert listed["relu_firing_percent_of_st"].tolist()[:2] == pytest.approx([100, 100 * 0.71 / 0.79])
    text = (tmp_path / "s" / "settings.md").read_text()
    assert "- the same in all: l0, on relu, layer_mean, warm-up 0" in text
    assert "| digits, ResNet-18 | λ 10, σ 0.0001 | 0.700 ± 0.283 (1 collapsed) |" in text


def test_a_path_is_a_line_from_standard_training_and_counts_all_its_epochs(tradeoff, make_result):
    extra = []
    for seed in (0, 1):
        before = make_result(**{"epochs": 1, "width": 0.0625, "lambda": 0, "seed": seed}).config_hash
        for weight, accuracy, ratio in ((2, 0.91, 0.7), (4, 0.90, 0.6)):
            values = {"lambda": weight, "seed": seed, "start": before, "epochs": 3}
            extra.append(values | {"accuracy": accuracy, "ratio": ratio})
            before = make_result(**({"width": 0.0625} | values)).config_hash
    known = tradeoff({0: RUNS[0], 4: [(0.89, 0.65)] * 2}, extra=extra)
    assert row_of(known)["path"] == "0, 2", "the step, not the run from nothing"
    listed = known["listed"].set_index(["lambda", "path"])["total_epochs"].to_dict()
    assert listed == {(0, ""): 1, (4, ""): 1, (2, "0"): 4, (4, "0, 2"): 7}
    apart = known["points"].query("path == '0' and layer == 'mean'").assign(epochs=6)  # two λ, each from ST: no path
    points = pd.concat([known["points"], apart, apart.assign(**{"lambda": 4.0})])
    (axis,) = figures.tradeoff_figure(points, 0.03).axes
    (path,) = [line for line in axis.get_lines() if str(line.get_label()).startswith("path")]
    assert list(path.get_xdata()) == pytest.approx([0.79, 0.7, 0.6])
    assert known["text"]["penalty"].tolist()[1:] == [
        "λ 4, σ 0.0001, from nothing, 1 epochs",
        *(f"λ {weight}, σ 0.0001, after λ {before}, 3 epochs" for weight, before in ((2, "0"), (4, "0, 2"))),
    ]


def test_runs_that_differ_in_more_than_penalty_and_seed_are_named(tradeoff):
    assert "MIXED" not in tradeoff()["said"]
    other = {"accuracy": 0.9, "ratio": 0.7, "lambda": 1, "seed": 2, "momentum": 0.8, "digest": "1" * 64}
    said = tradeoff(extra=[other])["said"]
    assert "the runs of digits, ResNet-18 differ in momentum: make each its own study" in said
    assert "MIXED: runs of one data set saw different images." in said


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ({}, "0 of the study's 1 runs have a result"),
        ({1: RUNS[1], 2: RUNS[2]}, "No standard training (lambda 0) has a result"),
        ({0: RUNS[0]}, "no setting is within the margin"),
        ({0: RUNS[0], 5: RUNS[5]}, "no setting is within the margin"),
        ({0: RUNS[0][:1], 1: RUNS[1][:1]}, "the energy decrease is 12.5%."),
        ({0: [(0.5, 0.4)], 1: [(0.5, 0.3)]}, "standard training did not learn"),
    ],
    ids=["nothing", "no standard training", "nothing else", "none within the margin", "one seed", "all collapsed"],
)
def test_it_runs_on_whatever_there_is_and_says_so(tradeoff, tmp_path, runs, sentence):
    notebook = tradeoff(runs, draw=True)
    assert sentence in notebook["said"]
    assert (tmp_path / "s" / "table.csv").is_file()
    for name in ("tradeoff.png", "explore.html"):
        assert (tmp_path / "s" / name).is_file() == bool(runs)


def test_missing_runs_and_foreign_files_are_named(tradeoff, tmp_path):
    tradeoff()
    (tmp_path / "s" / "digits_resnet18_lambda1_seed1.json").unlink()
    (tmp_path / "s" / "foreign.json").write_text("{")
    said = tradeoff.on(tmp_path / "s")["said"]
    assert "7 of the study's 8 runs have a result" in said
    assert "Missing: digits_resnet18_lambda1_seed1." in said
    assert re.search(r"Not used: .*foreign\.json", said)


def test_results_of_several_codes_are_called_mixed(tradeoff, tmp_path):
    assert "All runs were made by the same code (commit outside git)." in tradeoff()["said"]
    path = tmp_path / "s" / "digits_resnet18_lambda1_seed1.json"
    path.write_text(path.read_text().replace(f'"code": "{"0" * 12}"', f'"code": "{"1" * 12}"'))
    assert "MIXED: the runs were made by different versions of the code." in tradeoff.on(tmp_path / "s")["said"]


def test_the_scale_of_the_runs_is_said_once_and_stands_in_the_tables(tradeoff, tmp_path):
    line = "resnet18 at 0.0625 of its width, 1 epochs on digits: 70 training, 10 validation and 10 test images of "
    line += "16x16 pixels, from the complete data set"
    assert tradeoff()["scales"] == [line]
    assert f"\n- {line}\n" in (tmp_path / "s" / "settings.md").read_text()


def test_figures_are_written_as_png_and_pdf(tradeoff, tmp_path):
    other = [{"accuracy": 0.5, "ratio": 0.6, "lambda": value, "sigma": 1e-2, "seed": 0} for value in (1, 2, 5)]
    tradeoff(draw=True, extra=other)
    for name in ("tradeoff", "firing_resnet18", "ablation"):
        for suffix in (".png", ".pdf"):
            assert (tmp_path / "s" / f"{name}{suffix}").stat().st_size > 1000


def test_the_tradeoff_has_means_front_ring_floor_and_the_papers_points(tradeoff):
    points = tradeoff(RUNS | {10: [(0.5, 0.4), (0.9, 0.4)]}, dataset="cifar10")["points"]
    (axis,) = figures.tradeoff_figure(points.assign(floor=0.47), 0.03).axes
    marks, ring = axis.collections
    means = [[0.79, 0.91], [0.71, 0.91], [0.61, 0.885], [0.50, 0.85]]
    paper = [[0.73, 0.92], [0.61, 0.90]]
    low = [(0.80, 0.4), (0.9, 0.4)]  # the collapsed run is level with the lowest of the others
    single = [[ratio, accuracy] for seeds in [*RUNS.values(), low] for accuracy, ratio in seeds]
    assert sorted(marks.get_offsets().tolist()) == [pytest.approx(point) for point in sorted([*single, *means, *paper])]
    assert ring.get_offsets().tolist() == [pytest.approx([0.61, 0.885])]
    drawn = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    assert {"standard training (ST), paper", "energy-aware training (EAT), collapsed run"} < drawn.keys()
    assert "standard training (ST), collapsed run" not in drawn
    assert list(drawn["Pareto front"].get_xdata()) == pytest.approx([0.5, 0.61, 0.71])
    assert list(drawn["no ReLU fires"].get_xdata()) == [0.47, 0.47]
    assert drawn["test accuracy at most 3 points below ST"].get_bbox().intervaly == pytest.approx([0.88, 0.91])
    assert axis.get_title() == "CIFAR-10, ResNet-18"
    near = points.assign(test_published_ratio=points["test_published_ratio"] + 0.01)  # as of another path
    (axis,) = figures.tradeoff_figure(pd.concat([points, near]), 0.03).axes
    assert sorted(text.get_text().strip() for text in axis.texts) == ["λ 1", "λ 2", "λ 5", "↓ 0.50"]
    words = points["lambda"].map("made-up {:g}".format)  # long names of many penalties: of the selected one alone
    (axis,) = figures.tradeoff_figure(points.assign(penalty=words, penalty_normalization=words), 0.03).axes
    assert [text.get_text().split("\n")[0].strip() for text in axis.texts] == ["λ 2", "↓ 0.50"]


def test_what_is_not_there_is_not_in_the_legend(tradeoff):
    points = tradeoff({0: RUNS[0]}, model="vgg11", width=1)["points"]
    (axis,) = figures.tradeoff_figure(points, 0.03).axes
    labels = axis.get_legend_handles_labels()[1]
    assert not {"selected on validation", "no ReLU fires", "energy-aware training (EAT), run"} & {*labels}


def test_partial_data_are_called_partial(tradeoff):
    chosen = tradeoff()["chosen"]
    assert tables.names(chosen.assign(complete=False)) == ["digits (partial data), ResNet-18"]


def test_the_ablation_has_a_line_a_sigma_over_shared_seeds(tradeoff):
    other = [{"accuracy": 0.5, "ratio": 0.6, "lambda": value, "sigma": 1e-2, "seed": 0} for value in (1, 2, 5)]
    known = tradeoff(extra=other, draw=True)
    accuracy, ratio = figures.ablation_figure(pd.concat([known["ablation"], known["beneath"]])).axes
    first, second, standard = (list(line.get_ydata()) for line in accuracy.get_lines() if len(line.get_ydata()))
    assert first == pytest.approx([0.91, 0.90, 0.80]), "seed 0 alone, as for the other sigma"
    assert second == [0.5] * 3
    assert standard == pytest.approx([0.90, 0.90])
    assert accuracy.get_legend_handles_labels()[1][:2] == ["σ = 0.0001", "σ = 0.01"]
    assert ratio.get_ylabel() == "energy ratio (published)"
    assert accuracy.get_title() == "digits, ResNet-18\nl0, on relu, layer_mean, warm-up 0, seeds: 1"


def test_the_pareto_front_has_what_no_other_point_beats(tradeoff):
    runs = {1: [(0.6, 0.5)], 2: [(0.7, 0.5)], 3: [(0.7, 0.6)], 4: [(0.9, 0.7)], 5: [(0.8, 0.8)]}
    assert tradeoff(runs)["front"]["lambda"].tolist() == [2, 4]


def test_relus_come_before_pools_and_dense_layers_are_left_out(tradeoff, tmp_path):
    known = tradeoff(draw=True)
    assert known["part"]["layer"].unique().tolist() == ["relu", "avgpool"]
    (axis,) = known["firing_figure"](known["part"]).axes
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert heights == [pytest.approx([0.395, 0.79]), pytest.approx([0.305, 0.61])]
    for path in (tmp_path / "s").glob("*.json"):
        path.write_text(path.read_text().replace("Conv2d", "MaxPool2d"))
    assert tradeoff.on(tmp_path / "s", draw=True)["part"]["layer"].unique().tolist() == ["relu", "conv1", "avgpool"]


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in REFERENCE.glob("*/table.csv")), ids=lambda folder: folder.name
)
def test_the_committed_tables_show_the_committed_results(folder, tradeoff, tmp_path):
    """If not: ./run_all.sh STUDY --results results/reference"""
    found = StudyResults.load(folder)
    assert not found.problems
    assert not found.missing or "PARTIAL: " in (folder / "table.md").read_text()
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=lambda _, names: [name for name in names if name.endswith((".md", ".csv"))])
    tradeoff.on(copy)
    for path in [*copy.glob("*.csv"), *copy.glob("*.md")]:
        assert path.read_text() == (folder / path.name).read_text()
    rows = [line.split(" | ") for line in (folder / "settings.md").read_text().splitlines() if line.startswith("| ")]
    if rows[0][-1] == "epochs in all |":
        numbers = pd.read_csv(folder / "settings.csv", comment="#")["total_epochs"]
        assert [float(row[-1].removesuffix(" |")) for row in rows[2:]] == numbers.to_list()
