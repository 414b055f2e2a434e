"""A result is written whole or not at all, and nothing else passes for one."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from eatlib import steps, tables
from eatlib.config import Block, RunConfig, Study
from eatlib.hardware import Hardware
from eatlib.results import ROOT, ResultError, RunResult, StudyResults, computing, git_state, write_atomically


def test_save_and_load_give_the_same_result(tmp_path, make_result):
    result = make_result(seed=3, **{"lambda": 0.5})
    path = tmp_path / "new folder" / "run.json"
    result.save(path)
    assert RunResult.load(path) == result
    assert json.loads(path.read_text())["config"]["lambda"] == 0.5


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_writing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, moment):
    path = tmp_path / "run.json"
    path.write_text("old")

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moment, crash)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def damaged(text: str, change: str) -> str:
    values = json.loads(text)
    match change:
        case "truncated":
            return text[: len(text) // 2]
        case "foreign":
            return '{"hello": 1}'
        case "another schema":
            values["schema_version"] = 99
        case "altered configuration":
            values["config"]["seed"] += 1
        case "unknown field":
            values["extra"] = 1
        case "impossible accuracy":
            values["test"]["accuracy"] = 1.5
        case "not finite":
            values["test"]["loss"] = float("nan")
        case "epochs missing":
            values["history"] = []
    return json.dumps(values)


@pytest.mark.parametrize(
    "change",
    [
        "truncated",
        "foreign",
        "another schema",
        "altered configuration",
        "unknown field",
        "impossible accuracy",
        "not finite",
        "epochs missing",
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, make_result, change):
    path = tmp_path / "run.json"
    make_result().save(path)
    path.write_text(damaged(path.read_text(), change))
    with pytest.raises(ResultError, match=r"run\.json"):
        RunResult.load(path)


def test_a_study_reports_what_is_missing_and_what_is_no_result(tmp_path, make_result):
    study = Study(name="s", label="s", fixed={"epochs": 1}, blocks=[{"grid": {"lambda": [0, 1, 2]}}])
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    make_result(**{"lambda": 1}).save(tmp_path / "a.json")
    make_result(**{"lambda": 9}).save(tmp_path / "of-another-study.json")
    for name, text in {"bad": "{", "deep": "[" * 100_000, "long": "9" * 5000}.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to("nowhere")
    found = StudyResults.load(tmp_path)
    assert {name: result.config.lambda_ for name, result in found.runs.items()} == {"a": 1}
    assert found.missing == ["digits_resnet18_lambda0_seed0", "digits_resnet18_lambda2_seed0"]
    assert re.findall(r"(\w+)\.json", "".join(found.problems)) == ["bad", "deep", "folder", "gone", "long"]


def test_a_run_that_would_have_the_name_of_anothers_result_gets_its_own(tmp_path, make_result):
    """Paths to one lambda by other ways: their last runs differ in where they start alone."""
    long = [{"lambda": 0}, {"lambda": 1}, {"lambda": 4}]
    study = Study(name="s", label="s", fixed={"epochs": 1}, blocks=[{"path": long}])
    for name, run in study.runs().items():
        make_result(**run.to_dict()).save(tmp_path / f"{name}.json")
    more = study.model_copy(update={"blocks": [Block(path=[long[0], long[2]]), *study.blocks]})
    found = StudyResults.load(tmp_path, more)
    assert len(found.configs) == 4
    assert len(found.runs) == 3
    (missing,) = found.missing
    assert found.configs[missing].start == found.configs["digits_resnet18_lambda0_seed0"].hash


def test_weights_that_are_made_once_more_are_those_of_the_result(tmp_path, make_result, monkeypatch):
    study = Study(name="s", label="s", fixed={"epochs": 1}, blocks=[{"path": [{"lambda": 0}, {"lambda": 1}]}])
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    first, second = study.runs()
    make_result(0.9, **study.runs()[first].to_dict()).save(tmp_path / f"{first}.json")
    before = (tmp_path / f"{first}.json").read_bytes()

    def execute(_, __, parameters, **___):
        config = RunConfig.parse({key: parameters[key] for key in RunConfig.model_fields})
        make_result(0.8, **config.to_dict()).save(Path(parameters["work_dir"], "result.json"))
        Path(parameters["work_dir"], "result.safetensors").touch()

    monkeypatch.setattr("papermill.execute_notebook", execute)
    with pytest.raises(RuntimeError, match=f"{first}, trained once more for its weights, differs from its JSON"):
        steps.train(tmp_path, second)
    assert (tmp_path / f"{first}.json").read_bytes() == before


def test_a_study_keeps_weights_that_any_block_asks_for():
    blocks = [{"grid": {"seed": [0, 1]}}, {"fixed": {"save_weights": True}}]
    kept = [run.save_weights for run in Study(name="s", label="s", blocks=blocks).runs().values()]
    assert kept == [True, False]


def study_results(*results):
    study = Study(name="s", label="s", blocks=[{"grid": {"seed": [0]}}])
    return StudyResults(study, {}, {str(number): result for number, result in enumerate(results)}, [], [])


def test_a_table_has_a_row_a_run(make_result):
    table = study_results(
        make_result(0.9, 0.7, sigma=1e-2), make_result(0.52, 0.2, sigma=1e-2, **{"lambda": 3})
    ).table()
    assert table["run"].tolist() == ["0", "1"]
    assert table["sigma"].tolist() == [1e-4, 1e-2], "standard training is one setting, whatever its penalty fields say"
    assert table["test_published_ratio"].tolist() == pytest.approx([0.7, 0.2])
    assert table["test_relu_firing"].tolist() == pytest.approx([0.35, 0.1])
    assert table["test_collapsed"].tolist() == [False, True], "0.52 is 4 % of the way from chance, 0.5, to 1"


def test_any_prices_apply_to_a_results_counts(make_result):
    found = study_results(make_result(0.9, 0.6, products=0.0))
    for memory, operation in ((1950.0, 3.7), (10.0, 10.0)):
        row = found.table(Hardware("mine", memory, operation, "invented")).iloc[0]
        assert row["test_published_ratio"] == pytest.approx(0.6 * memory / (memory + operation))
        assert row["test_fused_joules"] == pytest.approx(1e-12 * 600 * memory / 10), "600 accesses of 10 images"
    assert found.table().equals(found.table("horowitz-45nm-float32"))


def test_a_notebooks_outputs_and_parameters_are_not_its_code():
    def notebook(code, outputs=(), parameter="0", text="a"):
        cell = {"cell_type": "code", "metadata": {}, "source": [code], "outputs": list(outputs)}
        first = cell | {"metadata": {"tags": ["parameters"]}, "source": [parameter]}
        return json.dumps({"cells": [first, {"cell_type": "markdown", "metadata": {}, "source": [text]}, cell]})

    assert computing(notebook("fit()")) == computing(notebook("fit()", ["done"], "1", "b")) == [["fit()"]]
    assert computing(notebook("fit()")) != computing(notebook("fit(2)"))


def test_git_state_is_of_this_repository():
    commit, clean = git_state()
    if not (Path(__file__).parent.parent / ".git").exists():
        assert (commit, clean) == (None, None)
    else:
        assert len(commit) == 40
        assert isinstance(clean, bool)


def test_patterns_of_layers_survive_markdown():
    text = tables.markdown(pd.DataFrame({"layers": ["features.relu*, a|b"]}))
    assert text.splitlines()[-1] == "| features.relu\\*, a\\|b |"


def test_the_papers_decreases_follow_from_its_ratios():
    for paper in pd.read_csv(ROOT / "results" / "reference" / "paper.csv", comment="#").itertuples():
        assert 100 * (1 - paper.eat_ratio / paper.st_ratio) == pytest.approx(paper.energy_decrease_percent, abs=0.02)
