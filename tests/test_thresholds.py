"""Thresholds against hand-computed ones; and that networks which were pruned or made of integers are counted right."""

import copy
import runpy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eatlib.data import Split
from eatlib.energy import EnergyMeter, count_nonzero, energy_report
from eatlib.models import build_model
from eatlib.results import ROOT
from eatlib.thresholds import find_thresholds, share_thresholds, thresholded

derive = runpy.run_path(str(ROOT / "studies" / "derive.py"))


class Functional(nn.Module):
    """ReLU as a function, also in place, as a tensor's method, and ReLU6, one after the other; plus 1 in between."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x) + 1
        x = torch.relu(x) + 1
        F.relu(x, inplace=True)  # what it returns is not used
        return F.relu6(x.relu_() + 1)


class Reused(nn.Module):
    """One ReLU, called four times."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.relu(x) + 1
        return x - 1


@pytest.mark.parametrize("model", [Functional(), Reused(True), Reused(False)], ids=["functions", "in place", "reused"])
def test_each_call_has_its_threshold_and_what_equals_it_is_zero(model):
    x = torch.tensor([[-1.0, 0.5, 1.0, 1.5]])
    calls = 5 if isinstance(model, Functional) else 4
    with torch.no_grad(), thresholded(model, [1.0, 0, 2.0, *[0] * (calls - 3)]):
        y = model(x.clone())
    # by hand: only 1.5 passes t = 1; + 1, t = 0 changes nothing, + 1; of (2, 2, 2, 3.5) only 3.5 passes t = 2
    assert y.tolist() == [[1.0, 1.0, 1.0, 4.5]]


def test_without_the_context_and_in_other_models_nothing_changes():
    model, other, x = nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()), torch.tensor([[0.5, 2.0]])
    with thresholded(model, [1.0]):
        assert model(x).tolist() == [[0.0, 2.0]]
        assert other(x).tolist() == F.relu(x).tolist() == [[0.5, 2.0]]
    assert model(x).tolist() == [[0.5, 2.0]]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("values", [[], [1.0, 1.0]])
def test_another_number_of_thresholds_is_refused(values):
    model = nn.Sequential(nn.ReLU())
    with thresholded(model, values), pytest.raises(ValueError, match=f"{len(values)} thresholds for"):
        model(torch.ones(1, 2))


def test_a_share_counts_the_positive_outputs_behind_the_thresholds_before():
    x = torch.tensor([[-3.0, -1, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]])
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    # 3 of 1 ... 10 go, then .3 x 7 = 2.1 of 4 ... 10
    assert share_thresholds(model, x, 0.3) == [3.0, 5.0]
    with thresholded(model, [3.0, 5.0]):
        assert count_nonzero(model(x)) == 5
    assert share_thresholds(model, x, 0) == [0.0, 0.0]
    with thresholded(model, share_thresholds(model, x, 1)):
        assert count_nonzero(model(x)) == 0


def identity(features: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(features, features, bias=False), nn.ReLU())
    nn.init.eye_(model[0].weight)
    return model


def test_the_largest_share_within_each_loss_is_found():
    # Ten images of class 1, whose only evidence is 1, 2, ... 10: a threshold of k makes class 0 of k of them.
    images = torch.stack([torch.zeros(10), torch.arange(1.0, 11)], 1)
    validation = Split(images, torch.ones(10, dtype=torch.int64))
    found = find_thresholds(identity(2), validation, [0.05, 0.1, 0.25, 0.5], step=0.1)
    assert found == {0.05: [0.0], 0.1: [1.0], 0.25: [2.0], 0.5: [5.0]}


def test_a_relu6_module_has_a_threshold_and_a_model_without_relus_is_refused():
    relu6 = nn.Sequential(identity(2)[0], nn.ReLU6())
    assert share_thresholds(relu6, torch.tensor([[1.0, 2], [3, 9]]), 0.5) == [2.0]
    with torch.no_grad(), thresholded(relu6, [2.0]):
        assert relu6(torch.tensor([[2.0, 3], [-1, 9]])).tolist() == [[0, 3], [0, 6]]
    smooth = nn.Sequential(identity(2)[0], nn.GELU())
    with pytest.raises(ValueError, match="calls no ReLU"):
        find_thresholds(smooth, Split(torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)), [0.1])


@pytest.mark.parametrize("accounting", ["published", "fused"])
def test_the_energy_report_sees_the_zeros(accounting):
    model = nn.Sequential(*identity(4), nn.Linear(4, 1))
    x = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    before = energy_report(model, [x], accounting=accounting)
    with thresholded(model, [6.0]):
        after = energy_report(model, [x], accounting=accounting)
    assert after.uncounted == before.uncounted == []
    kept = {  # 2 of 8; `published` has the ReLU's output, and reads it after the call, too
        "published": [(8, 8), (2, 2), (2, 2)],
        "fused": [(8, 2), (2, 2)],
    }[accounting]
    assert [*zip(after.layers["nonzero_inputs"], after.layers["nonzero_outputs"], strict=True)] == kept
    assert after.ratio < before.ratio


@pytest.mark.parametrize("inplace", [True, False])
def test_gradients_pass_only_what_passes(inplace):
    model, x = nn.Sequential(nn.Identity(), nn.ReLU(inplace)), torch.tensor([[0.5, 2.0, -1.0]], requires_grad=True)
    with thresholded(model, [1.0]):
        model(x * 3).sum().backward()
    assert x.grad.tolist() == [[3.0, 3.0, 0.0]]
    x.grad = None
    with thresholded(model, [2.0]):
        model(x * 3).sum().backward()
    assert x.grad.tolist() == [[0.0, 3.0, 0.0]]


# --- pruned and quantised -------------------------------------------------------------------------------------------


def totals(model: nn.Module, x: Tensor) -> dict[str, dict]:
    return {name: energy_report(model, [x], accounting=name).to_dict()["batches"][0] for name in ("published", "fused")}


def test_pruning_makes_its_share_of_the_weights_zero_and_lowers_both_accountings():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)), torch.rand(4, 3, 8, 8)
    pruned = copy.deepcopy(model)
    derive["prune_weights"](pruned, 0.5, [x])
    before, after = totals(model, x), totals(pruned, x)
    weights = 8 * 3 * 9 + 10 * 8 * 36
    for name in before:
        assert before[name]["nonzero_accesses"] - after[name]["nonzero_accesses"] == weights // 2
        assert after[name]["accesses"] == before[name]["accesses"]
        assert after[name]["effective_operations"] < before[name]["effective_operations"]
    assert not [name for name, _ in pruned.named_buffers()], "the masks are part of the weights"


def test_pruning_takes_batch_norms_statistics_anew():
    torch.manual_seed(0)
    model, x = build_model("resnet18", classes=3, image_size=8, width=0.0625), torch.rand(8, 3, 8, 8)
    derive["prune_weights"](model, 0.5, [x])
    with torch.no_grad():
        mean = model.conv1(model.normalize(x)).mean((0, 2, 3))
    torch.testing.assert_close(model.bn1.running_mean, mean)


class Integers(TorchDispatchMode):
    """Of each tensor that becomes integers, how many are not its zero point."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        if "quantize_per_tensor" in str(function) and "dequantize" not in str(function):
            self.counts.append(int((output != arguments[2]).sum()))
        return output


@pytest.mark.filterwarnings("ignore")  # torch.export's, of its own future
def test_an_int8_network_is_counted_by_its_zero_points():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(8 * 16, 10)).eval()
    x = torch.randn(16, 3, 8, 8)  # with both signs: the zero point of the input is not 0
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = -1  # a dead channel
    network = derive["to_int8"](model, x)
    with torch.no_grad(), Integers() as integers:
        network(x)
    report = energy_report(network, [x], accounting="fused")
    layers = report.layers
    assert report.uncounted == []
    assert layers["nonzero_inputs"].tolist() == integers.counts[:3]  # flattened, the last becomes integers once more
    assert layers["nonzero_outputs"].tolist()[:2] == integers.counts[1:3]
    assert layers["inputs"].tolist() == [x.numel(), 16 * 8 * 36, 16 * 8 * 16]
    assert layers["nonzero_parameters"][0] <= 7 * 27 + 8  # the dead channel's weights are zeros as integers, too
    float_report = energy_report(model, [x], accounting="fused")
    assert report.ratio <= float_report.ratio  # what rounds to zero is added
    assert report.ratio == pytest.approx(float_report.ratio, abs=0.02)
    with EnergyMeter(network) as meter, torch.no_grad():
        network(x)
    with pytest.raises(ValueError, match="no layer that multiplies"):
        meter.report("published")
