"""What `studies/derive.py` writes: networks after treatments that train nothing."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from eatlib import load
from eatlib.config import RunConfig
from eatlib.data import load_data
from eatlib.results import ROOT, StudyResults
from eatlib.training import fit

derive = runpy.run_path(str(ROOT / "studies" / "derive.py"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_study):
    """A folder with one small network and its weights, and one whose weights are gone."""
    folder = tmp_path_factory.mktemp("results") / "rivals"
    values = {"train_samples": 150, "test_samples": 100, "width": 0.0625, "epochs": 2, "batch_size": 16}
    values |= {"learning_rate": 0.02, "save_weights": True, "schedule": "triangular", "validation_share": 0.3}
    runs = [RunConfig.parse(values | {"seed": seed}) for seed in (0, 1)]
    names = make_study(folder, runs)
    for run in runs:
        name = names[run.hash]
        fit(run, save_weights_to=folder / f"{name}.safetensors").save(folder / f"{name}.json")
    (folder / f"{names[runs[1].hash]}.safetensors").unlink()
    return folder


def test_images_for_calibration_come_from_all_classes():
    """The first ones can be of one class alone, in files that are sorted; int8 takes its ranges from them."""
    taken = derive["calibration_images"](torch.arange(3 * derive["CALIBRATION"] + 50))
    assert len(taken) == derive["CALIBRATION"]
    assert taken[-1] >= 3 * (derive["CALIBRATION"] - 1)
    assert derive["calibration_images"](torch.arange(9)).tolist() == [*range(9)]


def test_batch_norm_sees_all_classes_in_each_batch_also_where_images_are_sorted(trained, monkeypatch):
    network, config = load(trained / "digits_resnet18_lambda0_seed0.json")
    data, seen = load_data(config), []
    data = dataclasses.replace(data, train=data.train[data.train.labels.argsort()])
    monkeypatch.setitem(derive["treat"].__globals__, "prune_weights", lambda *given: seen.extend(given[2]))
    derive["treat"](network, {"pruned": 0.5}, data, config, dict)
    assert len(seen) == -(-len(data.train) // config.batch_size)
    assert min(len(labels.unique()) for _, labels in seen) > 3
    assert torch.equal(torch.cat([labels for _, labels in seen]).sort().values, data.train.labels)


def test_each_treatment_is_done_once_and_counted(trained, monkeypatch, capsys):
    known = derive["main"].__globals__
    treatments = [{"thresholds": 0.2}, {"pruned": 0.0}, {"pruned": 0.5}, {"pruned": 0.5, "thresholds": 0.2}]
    monkeypatch.setitem(known, "LOSSES", (0.2,))
    monkeypatch.setitem(known, "OTHERS", treatments[1:3])
    derive["main"](trained)
    assert "no weights, left out: digits_resnet18_lambda0_seed1" in capsys.readouterr().err
    first = (trained / "derived.jsonl").read_text().splitlines()
    monkeypatch.setitem(known, "OTHERS", treatments[1:])
    derive["main"](trained)
    lines = (trained / "derived.jsonl").read_text().splitlines()
    assert lines[:3] == first
    records = [json.loads(line) for line in lines]
    assert [record["treatment"] for record in records] == treatments
    run = StudyResults.load(trained).runs["digits_resnet18_lambda0_seed0"]
    assert {record["hash"] for record in records} == {run.config_hash}
    for split, evaluation in (("validation", run.validation), ("test", run.test)):
        thresholds, anew, pruned, both = (record[split]["energy"] for record in records)
        for accounting, energy in evaluation.energy.items():
            assert thresholds[accounting]["ratio"] < energy.ratio
            assert both[accounting]["ratio"] < pruned[accounting]["ratio"] < anew[accounting]["ratio"]
            assert thresholds[accounting]["totals"][0]["accesses"] == energy.totals[0].accesses
            assert pruned[accounting]["uncounted"] == evaluation.uncounted[accounting]
        assert pruned["fused"]["totals"][0]["operations"] == evaluation.energy["fused"].totals[0].operations
    network, _ = load(trained / "digits_resnet18_lambda0_seed0.json")
    derive["prune_weights"](network, 0.5, load_data(run.config).train.images.split(50))
    weights = [p for p in network.parameters() if p.dim() > 1]
    gone = sum(int((p == 0).sum()) for p in weights)
    assert gone == pytest.approx(sum(p.numel() for p in weights) / 2, abs=1)
    assert anew["fused"]["weights"] - pruned["fused"]["weights"] == gone  # which are read once a batch
    assert all(record["provenance"]["code"] == run.provenance.code for record in records)


def test_thresholds_are_a_way_of_their_own_for_standard_training_alone():
    standard, aware = (derive["treatments"](RunConfig(lambda_=value)) for value in (0, 1))
    only = [[part["thresholds"] for part in parts if [*part] == ["thresholds"]] for parts in (standard, aware)]
    assert only == [[0.005, 0.01, 0.02, 0.05], [0.01]]
    assert standard[4:] == aware[1:]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "nowhere/study.yaml: not a readable"), ("plain", "plain: no run")]
)
def test_a_folder_without_networks_is_told_in_a_line(tmp_path, make_study, make_result, name, message):
    names = make_study(tmp_path / "plain", [RunConfig(epochs=1)])
    for file in names.values():
        make_result().save(tmp_path / "plain" / f"{file}.json")
    command = [sys.executable, str(ROOT / "studies" / "derive.py"), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)
