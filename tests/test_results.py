"""A result is written whole or not at all, and nothing else passes for one."""

import json
from pathlib import Path

import pytest

from eatlib.config import Study
from eatlib.results import ResultError, RunResult, StudyResults, git_state, write_atomically


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
    (tmp_path / "bad.json").write_text("{")
    found = StudyResults.load(tmp_path)
    assert [result.config.lambda_ for result in found.results] == [1]
    assert [run.lambda_ for run in found.missing] == [0, 2]
    assert len(found.problems) == 1
    assert "bad.json" in found.problems[0]
    assert found.table()["test_published_ratio"].tolist() == [0.7]
    assert found.code() == "All runs were made by code outside git."


def test_results_of_several_commits_are_called_mixed(make_result):
    results = [make_result(seed=seed) for seed in range(3)]
    for result, commit in zip(results, ["a" * 40, "a" * 40, "b" * 40], strict=True):
        object.__setattr__(result.provenance, "git_commit", commit)
        object.__setattr__(result.provenance, "git_clean", True)
    study = Study(name="s", label="s", blocks=[{"grid": {"seed": [0]}}])
    assert StudyResults(study, results[:2], [], []).code() == "All runs were made by commit aaaaaaaaaa."
    assert "2 by commit aaaaaaaaaa, 1 by commit bbbbbbbbbb" in StudyResults(study, results, [], []).code()


def test_git_state_is_of_this_repository():
    commit, clean = git_state()
    if not (Path(__file__).parent.parent / ".git").exists():
        assert (commit, clean) == (None, None)
    else:
        assert len(commit) == 40
        assert isinstance(clean, bool)
