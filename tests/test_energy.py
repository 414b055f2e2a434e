"""The energy model against the published simulator's values, hand-made sums, and torch's own behaviour."""

import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eatlib.energy import (
    HARDWARE,
    EnergyError,
    EnergyReport,
    Hardware,
    count_nonzero,
    energy_report,
    fused,
    published,
)
from eatlib.models import build_model

PJ = 1e12
UNIT = Hardware("unit", memory_pj=1.0, operation_pj=0.0, source="counts memory accesses")


def tiny(inplace: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def images(*shape: int, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(*shape)


def measure(model: nn.Module, *batches: Tensor, **options: object) -> EnergyReport:
    return energy_report(model, batches, **options)


def sums(report: EnergyReport) -> dict[str, float]:
    """Of each column of the table, over the layers."""
    return report.layers.sum(numeric_only=True).to_dict()


class Functional(nn.Module):
    """A residual block written with functions and operators; as modules in `Modular`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first.weight, self.first.bias, padding=1))
        return F.relu(x + self.second(x))


class Modular(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.first(x))
        return self.relu2(x + self.second(x))


# --- the published simulator --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_published_reference_of_the_tiny_network(inplace: bool) -> None:
    report = measure(tiny(inplace), images(4, 3, 16, 16))
    assert report.ratio == pytest.approx(0.7791301, rel=1e-6)
    assert report.joules_per_image * 4 * PJ == pytest.approx(127617034.98, rel=1e-9)
    assert report.dense_joules_per_image * 4 * PJ == pytest.approx(163794251.2, rel=1e-12)
    totals = sums(report)
    assert (totals["nonzero_parameters"], totals["parameters"]) == (1634, 1708)
    assert (totals["nonzero_inputs"], totals["inputs"]) == (30079, 42112)
    assert (totals["nonzero_outputs"], totals["outputs"]) == (32982, 39080)
    assert totals["operations"] == 578176
    assert report.uncounted == []


def test_published_reference_of_torchvisions_resnet18() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    x = images(8, 3, 64, 64)
    report = measure(model, x)
    assert report.ratio == pytest.approx(0.8826210, rel=1e-6)
    assert report.joules_per_image * 8 * PJ == pytest.approx(40358170164.6, rel=1e-9)
    assert report.dense_joules_per_image * 8 * PJ == pytest.approx(45725369597.6, rel=1e-12)
    # What the hooks cannot see is named: torchvision adds and flattens with functions.
    assert [what for what in report.uncounted if not what.endswith("add_ (element-wise)")] == []
    assert len(report.uncounted) == 8
    assert "layer2.0.relu#2" in list(report.layers["name"])


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1", "mobilenet_v2", "mnasnet0_5", "googlenet", "densenet121"])
def test_published_is_the_simulators_arithmetic_on_other_networks(name: str) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = get_model(name, weights=None, num_classes=5, **options).eval()
    x = images(2, 3, 64, 64)
    assert measure(model, x).ratio == pytest.approx(float(simulator(model, x)), rel=1e-6)


def simulator(model: nn.Module, x: Tensor) -> Fraction:
    """The published arithmetic, as PAPER.md describes it, with in-place ReLUs."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = True
    sums = dict.fromkeys(("p", "p0", "i", "i0", "o", "o0", "operations"), 0)

    def count(kind: str, tensor: Tensor) -> None:
        sums[kind] += tensor.numel()
        sums[f"{kind}0"] += int((tensor.abs() > 2.0**-126).sum())

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for tensor in inputs:
            count("i", tensor)
        count("o", output)
        for tensor in (*module.parameters(), *module.buffers()):
            count("p", tensor)
        if isinstance(module, nn.Conv2d):
            sums["operations"] += output.numel() * module.kernel_size[0] ** 2 * inputs[0].shape[1]
        elif isinstance(module, nn.Linear):
            sums["operations"] += module.weight.numel() * inputs[0].shape[0]
        elif isinstance(module, nn.BatchNorm2d):
            count("p", module.running_mean)
            count("p", module.running_var)
            sums["operations"] += 4 * output.numel()
        elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
            sums["operations"] += output.numel() * module.kernel_size**2
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            sums["operations"] += inputs[0].numel()

    for module in model.modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    memory, price = Fraction(1950), Fraction("3.7")
    dense = memory * (sums["p"] + sums["i"] + sums["o"]) + price * sums["operations"]
    share = Fraction(sums["p0"], sums["p"]) * Fraction(sums["i0"], sums["i"])
    return (memory * (sums["p0"] + sums["i0"] + sums["o0"]) + price * sums["operations"] * share) / dense


def test_published_ratio_is_the_mean_over_batches_of_any_size() -> None:
    model, x = tiny(), images(5, 3, 16, 16)
    report = measure(model, x[:3], x[3:])
    apart = [measure(model, part).ratio for part in (x[:3], x[3:])]
    assert report.ratio == pytest.approx(sum(apart) / 2, rel=1e-12)
    assert report.images == 5


def test_a_module_that_the_simulator_does_not_know_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 2))
    assert measure(model, images(2, 3, 8, 8)).uncounted == ["1: operations of GELU"]


# --- the paper's networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_only_the_normalisation_and_additions_of_the_papers_networks_are_functional(name: str) -> None:
    model = build_model(name, classes=4, image_size=16, width=1 / 16)
    batch = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert measure(model, batch, accounting="fused").uncounted == []
    assert all(what.endswith("(element-wise)") for what in measure(model, batch).uncounted)


# --- what is printed and refused ----------------------------------------------------------------------------------


def test_the_report_prints_what_it_says() -> None:
    batches = [images(number, 3, 16, 16) for number in (3, 2, 3)]
    text = str(measure(tiny(), *batches, accounting="fused"))
    for part in (
        "energy ratio 0.",
        "fused",
        "horowitz-45nm-float32",
        "batches of 2 x 3, 1 x 2",
        "Conv2d",
        "nothing",
    ):
        assert part in text


def test_hardware_is_data() -> None:
    model, x = tiny(), images(2, 3, 16, 16)
    assert HARDWARE["horowitz-45nm-float32"].memory_pj == 1950
    own = measure(model, x, hardware=UNIT)
    totals = sums(own)
    accesses = totals["nonzero_inputs"] + totals["nonzero_outputs"] + totals["nonzero_parameters"]
    assert own.joules_per_image * 2 * PJ == pytest.approx(accesses)
    assert all("Horowitz" in hardware.source for hardware in HARDWARE.values())
    with pytest.raises(EnergyError, match=r"memory_pj = -1"):
        Hardware("bad", -1, 1, "")


def test_bad_input_is_refused_with_advice() -> None:
    x = images(2, 3, 16, 16)
    refused = {
        "saw no batch": lambda: measure(tiny()),
        "no layer that multiplies": lambda: measure(nn.BatchNorm2d(3), x, accounting="fused"),
        r"give a list of batches, \[images\]": lambda: energy_report(tiny(), x),
        "a batch is a dict": lambda: measure(tiny(), {"images": x}),
        r"shape \(16,\): must be a batch": lambda: measure(tiny(), x[0, 0, 0]),
        r"N at least 1": lambda: measure(tiny(), x[:0]),
        "hardware = 'eniac': must be one of horowitz": lambda: measure(tiny(), x, hardware="eniac"),
        "accounting = 'mine': must be one of published, fused": lambda: measure(tiny(), x, accounting="mine"),
        "output holds NaN.*: look at images": lambda: measure(tiny(), x * float("nan")),
        "is compiled": lambda: measure(torch.compile(tiny()), x),
    }
    for message, call in refused.items():
        with pytest.raises(EnergyError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"\(unsigned char\) and bias type \(float\)"):  # PyTorch's own words
        measure(tiny(), x.byte())


def test_counts_may_stay_on_the_device_until_the_end_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build_model("resnet18", classes=4, image_size=16, width=1 / 16), images(3, 3, 16, 16)
    expected = [measure(model, x[:2], x[2:], accounting=accounting) for accounting in ("published", "fused")]
    for module in (fused, published):
        monkeypatch.setattr(module, "count_nonzero", lambda x: torch.tensor(count_nonzero(x), dtype=torch.float64))
    for report in expected:
        deferred = measure(model, x[:2], x[2:], accounting=report.accounting)
        assert deferred.layers.equals(report.layers)
        assert deferred.ratio == report.ratio


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accounting", ["published", "fused"])
@pytest.mark.parametrize("exact_macs", [False, True])
def test_gpu_counts_as_the_cpu_does(accounting: str, exact_macs: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    x = images(4, 3, 8, 8)
    options = {"accounting": accounting, "exact_macs": exact_macs}
    cpu = measure(model, x, **options)
    assert sums(measure(model.cuda(), x, **options)) == pytest.approx(sums(cpu), rel=1e-12)


def test_torchs_own_pruning_counts_as_zeros():
    from torch.nn.utils import prune

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4))
    images = torch.rand(3, 3, 4, 4)
    prune.l1_unstructured(model[1], "weight", amount=0.75)
    attached = [energy_report(model, [images], accounting=accounting).ratio for accounting in ("published", "fused")]
    prune.remove(model[1], "weight")
    removed = [energy_report(model, [images], accounting=accounting).ratio for accounting in ("published", "fused")]
    assert attached == removed
