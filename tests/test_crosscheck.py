"""What eatlib counts is what others count, but for differences that are known (benchmarks/crosscheck.py)."""

import runpy

import pytest
import torch
from torch import nn

from eatlib.energy import energy_report
from eatlib.results import ROOT

crosscheck = runpy.run_path(str(ROOT / "benchmarks" / "crosscheck.py"))
NETWORKS = crosscheck["NETWORKS"]


@pytest.fixture(scope="module", params=NETWORKS)
def counts(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    return crosscheck["count_all"](request.param, images=1)


def test_macs_are_those_of_torch(counts: dict[str, dict[str, float]]) -> None:
    assert counts["eatlib"]["MACs"] == counts["flop_counter"]["MACs"] > counts["inside"]["MACs"] > 0


def test_macs_are_those_of_fvcore(counts: dict[str, dict[str, float]]) -> None:
    pytest.importorskip("fvcore")
    assert counts["eatlib"]["MACs"] == counts["fvcore"]["MACs"] < counts["fvcore"]["all"]


def test_effective_macs_and_sparsity_are_those_of_neurobench(counts: dict[str, dict[str, float]]) -> None:
    """It leaves padding out of its MACs too, and sees the zeros of modules only, ReLU6 not among them by itself."""
    pytest.importorskip("neurobench")
    assert counts["neurobench"]["effective"] == pytest.approx(counts["eatlib"]["effective"], rel=1e-6)  # a float32 sum
    assert counts["neurobench"]["MACs"] == pytest.approx(counts["inside"]["MACs"], rel=1e-6)
    if counts["eatlib"]["sparsity"] is None:
        assert counts["neurobench"]["with ReLU6"] == 0
    else:
        assert counts["neurobench"]["with ReLU6"] == pytest.approx(counts["eatlib"]["sparsity"], rel=1e-9)


@pytest.mark.parametrize("options", [{"stride": 2, "padding": (1, 2)}, {"dilation": 2, "padding": 3, "groups": 2}])
def test_exact_macs_of_what_has_no_zeros_are_all_but_those_on_padding(options: dict) -> None:
    model, x = nn.Conv2d(4, 6, (3, 2), **options), torch.ones(2, 4, 7, 8)
    nn.init.ones_(model.weight)
    report = energy_report(model, [x], accounting="fused", exact_macs=True)
    assert report.layers["effective_operations"].sum() == crosscheck["inside"](model, x)["MACs"]
