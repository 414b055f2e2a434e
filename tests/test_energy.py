"""The energy model against the published simulator's values, hand-made sums, and torch's own behaviour."""

import copy
import gc
import weakref
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eatlib import energy
from eatlib.energy import (
    HARDWARE,
    EnergyError,
    EnergyMeter,
    EnergyReport,
    Hardware,
    activation_cost,
    count_nonzero,
    energy_report,
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


# --- the published simulator ------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_published_reference_of_the_tiny_network(inplace: bool) -> None:
    report = measure(tiny(inplace), images(4, 3, 16, 16))
    assert report.ratio == pytest.approx(0.7791301, rel=1e-6)
    assert report.joules_per_image * 4 * PJ == pytest.approx(127617034.98, rel=1e-9)
    assert report.dense_joules_per_image * 4 * PJ == pytest.approx(163794251.2, rel=1e-12)
    totals = report.totals
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
    assert report.batch_sizes == {3: 1, 2: 1}
    assert report.images == 5


def test_a_module_that_the_simulator_does_not_know_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 2))
    assert measure(model, images(2, 3, 8, 8)).uncounted == ["1: operations of GELU"]


# --- the fused accounting ---------------------------------------------------------------------------------


def test_fused_charges_what_a_fusing_accelerator_moves_and_multiplies() -> None:
    model, x = tiny(), images(4, 3, 16, 16)
    report = measure(model, x, accounting="fused")
    with torch.no_grad():
        model.eval()
        pooled = model[:4](x)
        averaged = model[4:9](pooled)
        logits = model[9](averaged)
    nonzero = [int((tensor != 0).sum()) for tensor in (x, pooled, averaged, logits)]
    layers = report.layers
    assert list(layers["name"]) == ["0", "4", "9"]
    assert list(layers["kind"]) == ["Conv2d", "Conv2d", "Linear"]
    assert list(layers["nonzero_inputs"]) == nonzero[:3]
    assert list(layers["nonzero_outputs"]) == nonzero[1:]
    assert list(layers["outputs"]) == [pooled.numel(), averaged.numel(), logits.numel()]
    assert list(layers["parameters"]) == [8 * 27 + 8, 16 * 72 + 16, 170]
    assert list(layers["operations"]) == [4 * 8 * 256 * 27, 4 * 16 * 64 * 72, 4 * 160]
    assert layers["effective_operations"][1] == pytest.approx(4 * 16 * 64 * 72 * nonzero[1] / pooled.numel())
    accesses = sum(nonzero[:3]) + sum(nonzero[1:]) + report.totals["nonzero_parameters"]
    expected = 1950 * accesses + 3.7 * layers["effective_operations"].sum()
    assert report.joules_per_image * 4 * PJ == pytest.approx(expected, rel=1e-9)
    assert layers["share"].sum() == pytest.approx(1)
    assert report.ideal_joules_per_image * 4 * PJ == pytest.approx(
        expected - 1950 * report.totals["nonzero_parameters"], rel=1e-9
    )


@pytest.mark.parametrize("inplace", [True, False])
def test_relu_in_place_or_not_is_the_same_energy(inplace: bool) -> None:
    x = images(2, 3, 16, 16)
    for accounting in ("published", "fused"):
        reports = [measure(tiny(way), x, accounting=accounting) for way in (inplace, True)]
        assert reports[0].layers.equals(reports[1].layers)


def test_functional_calls_cost_in_fused_what_modules_cost() -> None:
    x = images(2, 3, 8, 8)
    functional, modular = (measure(net, x, accounting="fused") for net in (Functional(), Modular()))
    assert functional.uncounted == modular.uncounted == []
    numbers = [column for column in functional.layers if column not in ("name", "kind")]
    assert functional.layers[numbers].equals(modular.layers[numbers])
    assert list(functional.layers["name"]) == ["convolution", "second", "add"]


def test_functional_calls_are_named_by_published() -> None:
    x = images(2, 3, 8, 8)
    assert measure(Functional(), x).uncounted == [
        "the network itself: convolution",
        "the network itself: relu (element-wise)",
        "the network itself: add (element-wise)",
    ]
    assert measure(Modular(), x).uncounted == ["the network itself: add (element-wise)"]


def test_a_residual_is_written_once_and_read_by_convolution_and_addition() -> None:
    net, x = Modular(), images(2, 3, 8, 8)
    layers = measure(net, x, accounting="fused").layers.set_index("name")
    first = int((net.relu1(net.first(x)) != 0).sum())
    assert layers.loc["first", "nonzero_outputs"] == first
    assert layers.loc["second", "nonzero_inputs"] == first
    assert layers.loc["add", "nonzero_inputs"] == first
    assert layers.loc["add", "outputs"] == 0
    assert layers.loc["second", "nonzero_outputs"] == int((net(x) != 0).sum())


def test_groups_lower_the_macs_in_fused_only() -> None:
    x = images(2, 8, 8, 8)
    dense, grouped = (nn.Conv2d(8, 8, 3, groups=groups) for groups in (1, 8))
    operations = {
        (accounting, net.groups): measure(net, x, accounting=accounting).totals["operations"]
        for accounting in ("published", "fused")
        for net in (dense, grouped)
    }
    assert operations["published", 8] == operations["published", 1] == operations["fused", 1]
    assert operations["fused", 8] * 8 == operations["fused", 1]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_exact_macs_count_each_product(layer: type[nn.Module], groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), layer(4, 6, 3, stride=2, padding=1, groups=groups, bias=False))
    with torch.no_grad():
        net[1].weight[net[1].weight.abs() < 0.1] = 0
    x = images(2, 4, 7, 7)
    report = measure(net, x, accounting="fused", exact_macs=True)
    masks = copy.deepcopy(net).double()
    with torch.no_grad():
        masks[1].weight.copy_(net[1].weight != 0)
        expected = int(masks[1]((x > 0).double()).sum())
    assert report.totals["effective_operations"] == expected


def test_shares_of_zeros_approximate_the_exact_macs() -> None:
    """On ReLU activations of an untrained network the product of shares is within 15 % of the truth.

    Padding explains part of it: its products are dense MACs, and never effective.
    """
    model, x = tiny(), images(4, 3, 16, 16)
    shares, exact = (
        measure(model, x, accounting="fused", exact_macs=way).layers["effective_operations"] for way in (False, True)
    )
    assert (exact <= shares).all()
    assert exact.sum() == pytest.approx(shares.sum(), rel=0.15)
    assert exact[2] == shares[2]  # a linear layer with dense weights


def test_matrix_products_of_activations_count_both_as_inputs() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) @ self.key(x).transpose(1, 2)

    net, x = Attention(), images(2, 3, 4)
    report = measure(net, x, accounting="fused", exact_macs=True)
    assert list(report.layers["name"]) == ["query", "key", "bmm"]
    assert list(report.layers["operations"]) == [2 * 3 * 16, 2 * 3 * 16, 2 * 9 * 4]
    assert list(report.layers["inputs"]) == [24, 24, 48]
    assert report.uncounted == []


def test_parts_of_a_tensor_are_written_once_each() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.first(x).chunk(2, dim=1)
            return self.second(left) + self.second(right)

    layers = measure(Gate(), images(3, 4), accounting="fused").layers.set_index("name")
    assert layers.loc["first", "outputs"] == 3 * 8
    assert layers.loc["second", "inputs"] == layers.loc["second#2", "inputs"] == 3 * 4
    assert layers.loc["add", "inputs"] == 3 * 2


def test_unknown_operators_are_named() -> None:
    class Sorted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sort().values)

    report = measure(Sorted(4, 2), images(3, 4), accounting="fused")
    assert report.uncounted == ["Sorted: sort"]


# --- zeros -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accounting", ["published", "fused"])
def test_pruned_weights_and_dead_channels_lower_the_energy(accounting: str) -> None:
    x = images(2, 3, 16, 16)
    before = measure(tiny(), x, accounting=accounting)
    pruned = tiny()
    with torch.no_grad():
        pruned[4].weight[:, :, 0, 0] = 0
    after = measure(pruned, x, accounting=accounting)
    assert before.totals["nonzero_parameters"] - after.totals["nonzero_parameters"] == 8 * 16
    assert after.ratio < before.ratio
    dead = tiny()
    with torch.no_grad():
        dead[0].weight[:4] = 0
        dead[0].bias[:4] = 0
    after = measure(dead, x, accounting=accounting)
    row = after.layers.set_index("name").loc["4"]
    was = before.layers.set_index("name").loc["4"]
    assert row["nonzero_inputs"] <= was["nonzero_inputs"] / 1.5
    assert after.ratio < before.ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_count_nonzero_at_the_threshold(dtype: torch.dtype) -> None:
    values = torch.tensor(
        [0.0, -0.0, 2.0**-126, -(2.0**-126), 2.0**-127, 2.0**-125, -(2.0**-125), 1.0, -1.0, 6e-8],
        dtype=dtype,
    )
    expected = sum(abs(value) > 2.0**-126 for value in values.double().tolist())
    assert count_nonzero(values) == expected
    assert count_nonzero(torch.tensor(float("nan"))) == 1


@pytest.mark.parametrize("count", [1, 65535, 65536, 65537, 300001])
def test_count_nonzero_of_any_size(count: int) -> None:
    x = images(count).relu()
    assert count_nonzero(x) == int((x != 0).sum())


def test_count_nonzero_of_any_layout() -> None:
    x = images(4, 6, 8, 10).relu()
    expected = int((x != 0).sum())
    for same in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, None], x.to_sparse()):
        assert count_nonzero(same) == expected
    assert count_nonzero(x[:, ::2, 1:]) == int((x[:, ::2, 1:] != 0).sum())
    assert count_nonzero(x[:1].expand(3, -1, -1, -1)) == 3 * int((x[:1] != 0).sum())
    assert count_nonzero(x[:0]) == 0
    assert count_nonzero(x > 0) == expected
    assert count_nonzero((100 * x).int()) == int(((100 * x).int() != 0).sum())


# --- sums over batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_macs", [False, True])
def test_sums_are_the_same_for_any_split_but_for_the_weights(exact_macs: bool) -> None:
    model, x = build_model("resnet18", classes=4, image_size=16, width=1 / 16), images(7, 3, 16, 16)
    whole, split = (
        measure(model, *batches, accounting="fused", exact_macs=exact_macs) for batches in ([x], [x[:4], x[4:6], x[6:]])
    )
    for column in whole.layers.columns.drop(["joules_per_image", "dense_joules_per_image", "share"]):
        factor = 3 if "parameters" in column else 1
        if whole.layers[column].dtype != object:
            assert (factor * whole.layers[column]).equals(split.layers[column]), column
    assert split.ideal_joules_per_image == pytest.approx(whole.ideal_joules_per_image, rel=1e-12)
    assert split.joules_per_image > whole.joules_per_image
    counts = [measure(model, *batches).totals for batches in ([x], [x[:4], x[4:6], x[6:]])]
    for key in ("inputs", "nonzero_inputs", "outputs", "nonzero_outputs", "operations"):
        assert counts[0][key] == counts[1][key]


def test_weights_changed_between_batches_are_counted_again() -> None:
    model, x = nn.Linear(8, 4), images(2, 8)
    with EnergyMeter(model) as meter, torch.no_grad():
        model(x)
        model.weight[0] = 0
        model(x)
    assert meter.report("fused").totals["nonzero_parameters"] == 2 * 36 - 8


def test_statistics_changed_by_training_are_counted_again() -> None:
    model, x = nn.BatchNorm2d(2).train(), images(3, 2, 4, 4)
    with EnergyMeter(model) as meter, torch.no_grad():
        model(x)
        nn.init.zeros_(model.running_var)
        model.momentum = 0.0
        model(x)
    # weight and counter, and the statistics twice; the bias is zero
    assert meter.report().totals["nonzero_parameters"] == (2 + 1 + 2 * 4) + (2 + 1 + 2 * 2)


def test_memory_stays_constant_over_batches() -> None:
    model, x = tiny().eval(), images(2, 3, 16, 16)

    def objects(batches: int) -> int:
        with EnergyMeter(model) as meter, torch.no_grad():
            for _ in range(batches):
                model(x)
            gc.collect()
            return len(gc.get_objects()) + 0 * meter.hardware.memory_pj

    objects(1)
    assert abs(objects(12) - objects(2)) < 50


# --- the model is left alone -------------------------------------------------------------------------------


def state(model: nn.Module) -> list[object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")
    return [
        [len(getattr(module, hook)) for module in model.modules() for hook in hooks],
        [module.training for module in model.modules()],
        [x.tolist() for x in (*model.parameters(), *model.buffers())],
        [parameter.grad for parameter in model.parameters()],
        sorted(model.__dict__),
    ]


class Faulty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a fault of the model's own")


def test_the_model_is_as_before() -> None:
    model = tiny().train()
    model[1].eval()
    before = state(model)
    x = images(2, 3, 16, 16)
    measure(model, x)
    assert state(model) == before


def test_the_model_is_as_before_when_its_forward_pass_raises() -> None:
    model = tiny().append(Faulty()).train()
    before = state(model)
    with pytest.raises(RuntimeError, match="of the model's own"):
        measure(model, images(2, 3, 16, 16))
    assert state(model) == before
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_failed_pass_is_not_counted() -> None:
    model = tiny().eval()
    x = images(2, 3, 16, 16)
    with EnergyMeter(model) as meter, torch.no_grad():
        with pytest.raises(RuntimeError):
            model(images(2, 4, 16, 16))
        model(x)
        with pytest.raises(RuntimeError):
            model[:9](x) @ model(images(2, 3, 16))
    assert meter.report().totals == measure(model, x).totals


@pytest.mark.parametrize("fails", [False, True])
def test_no_activation_is_kept(fails: bool) -> None:
    kept: list[weakref.ref[Tensor]] = []
    model = tiny().eval()
    handle = model[4].register_forward_hook(lambda _, inputs, output: kept.append(weakref.ref(output)))
    if fails:
        model.append(Faulty())
    with EnergyMeter(model) as meter, torch.no_grad():
        try:
            model(images(2, 3, 16, 16))
        except RuntimeError as error:
            error.with_traceback(None)
    handle.remove()
    gc.collect()
    assert [reference() for reference in kept] == [None]
    assert meter.hardware.name in HARDWARE


def test_logits_and_gradients_are_the_same_within_a_meter() -> None:
    x = images(4, 3, 16, 16)
    gradients = []
    for measured in (False, True):
        model = tiny().train()
        if measured:
            with EnergyMeter(model):
                model(x).square().sum().backward()
        else:
            model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("accounting", ["published", "fused"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_inference_mode_and_gradients_change_nothing(mode: type, accounting: str) -> None:
    model = build_model("resnet18", classes=4, image_size=16, width=1 / 16).eval()
    x = images(2, 3, 16, 16)
    with EnergyMeter(model) as meter, mode():
        model(x)
    assert meter.report(accounting).layers.equals(measure(model, x, accounting=accounting).layers)


def test_autocast_reads_and_writes_each_tensor_once() -> None:
    model = build_model("resnet18", classes=4, image_size=16, width=1 / 16).eval()
    x = images(2, 3, 16, 16)
    reference = measure(model, x, accounting="fused")
    with EnergyMeter(model) as meter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
        model(x)  # with the weights that autocast has cast already
    report = meter.report("fused")
    assert list(report.layers["name"]) == list(reference.layers["name"])
    for key in ("inputs", "outputs", "parameters", "nonzero_parameters", "operations"):
        assert report.totals[key] == 2 * reference.totals[key], key
    assert report.ratio == pytest.approx(reference.ratio, rel=0.02)
    assert meter.report("published").ratio == pytest.approx(measure(model, x).ratio, rel=0.02)


def test_a_reused_module_has_a_row_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.relu = nn.Linear(6, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.layer(self.relu(self.layer(x))))

    model, x = Twice(), images(3, 6)
    fused = measure(model, x, accounting="fused")
    assert list(fused.layers["name"]) == ["layer", "layer#2"]
    assert fused.totals["parameters"] == 2 * 42
    with EnergyMeter(model) as meter, torch.no_grad():
        model(x)
    assert [name for name, _, _ in meter.firing()] == ["layer", "relu", "layer#2", "relu#2"]


def test_writes_into_part_of_a_tensor_are_seen() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros(len(x), 6)
            y[:, :3] = self.first(x)[:, :3]
            y[:, 3:].add_(self.first(x)[:, 3:])
            return self.second(y.relu_())

    layers = measure(Halves(), images(4, 6), accounting="fused").layers.set_index("name")
    assert layers.loc["second", "inputs"] == 24
    assert layers.loc["second", "parameters"] == 14


def test_firing_is_the_share_of_nonzero_outputs() -> None:
    model, x = tiny().eval(), images(4, 3, 16, 16)
    with EnergyMeter(model) as meter, torch.no_grad():
        model(x[:3])
        model(x[3:])
    firing = meter.firing()
    assert [(name, kind) for name, kind, _ in firing] == [
        (str(index), type(layer).__name__) for index, layer in enumerate(model)
    ]
    assert firing[2][2] == float((model[:3](x) != 0).double().mean())


def test_activation_cost_is_what_one_more_activation_costs() -> None:
    hardware = "horowitz-45nm-float32"
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), images(2, 5)
    dense = measure(model, x, accounting="fused").dense_joules_per_image * 2 * PJ
    cost = activation_cost(model, x, hardware)
    assert cost["1"] == pytest.approx((2 * 1950 + 3 * 3.7) / dense)
    assert cost["2"] == pytest.approx(1950 / dense)
    assert set(activation_cost(Modular(), images(2, 3, 8, 8))) == {"first", "relu1", "second", "relu2"}


# --- the paper's networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_only_the_normalisation_and_additions_of_the_papers_networks_are_functional(name: str) -> None:
    model = build_model(name, classes=4, image_size=16, width=1 / 16)
    batch = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert measure(model, batch, accounting="fused").uncounted == []
    assert all(what.endswith("(element-wise)") for what in measure(model, batch).uncounted)


# --- what is printed and refused ---------------------------------------------------------------------------


def test_the_report_prints_what_it_says() -> None:
    text = str(measure(tiny(), images(3, 3, 16, 16), accounting="fused"))
    for part in (
        "energy ratio 0.",
        "fused",
        "horowitz-45nm-float32",
        "batches of 1 x 3",
        "Conv2d",
        "nothing",
    ):
        assert part in text


def test_hardware_is_data() -> None:
    model, x = tiny(), images(2, 3, 16, 16)
    assert HARDWARE["horowitz-45nm-float32"].memory_pj == 1950
    own = measure(model, x, hardware=UNIT)
    totals = own.totals
    accesses = totals["nonzero_inputs"] + totals["nonzero_outputs"] + totals["nonzero_parameters"]
    assert own.joules_per_image * 2 * PJ == pytest.approx(accesses)
    assert all("Horowitz" in hardware.source for hardware in HARDWARE.values())
    with pytest.raises(EnergyError, match=r"memory_pj = -1"):
        Hardware("bad", -1, 1, "")


def test_bad_input_is_refused_with_advice() -> None:
    x = images(2, 3, 16, 16)
    refused = {
        "has no parameters": lambda: measure(nn.ReLU(), x),
        "must be a torch.nn.Module": lambda: measure("resnet18", x),
        "run the model on one batch": lambda: measure(nn.Sequential(nn.LazyConv2d(4, 3)), x),
        "data loader is empty": lambda: measure(tiny()),
        r"give a list of batches, \[images\]": lambda: energy_report(tiny(), x),
        "a batch is a dict": lambda: measure(tiny(), {"images": x}),
        "channels last": lambda: measure(tiny(), x.permute(0, 2, 3, 1)),
        "no batch dimension": lambda: measure(tiny(), x[0]),
        r"N at least 1": lambda: measure(tiny(), x[:0]),
        "hardware = 'eniac': must be one of horowitz": lambda: measure(tiny(), x, hardware="eniac"),
        "accounting = 'mine': must be one of published, fused": lambda: measure(tiny(), x, accounting="mine"),
        "input holds NaN": lambda: measure(tiny(), x * float("nan")),
        "no batch was measured": lambda: EnergyMeter(tiny()).report(),
        "is compiled": lambda: measure(torch.compile(tiny()), x),
    }
    for message, call in refused.items():
        with pytest.raises(EnergyError, match=message):
            call()
    broken = tiny()
    with torch.no_grad():
        broken[4].weight[0] = float("nan")
    with pytest.raises(EnergyError, match=r"output holds NaN.*NaN is in 4\.weight"):
        measure(broken, x)


@pytest.mark.parametrize(
    ("hide", "operator"),
    {
        torch.nan_to_num: "nan_to_num",
        lambda x: x.nan_to_num_(): "nan_to_num_",
        lambda x: torch.where(x > 0, x, 0): "gt",
        lambda x: x.masked_fill(x.isnan(), 0): "isnan|masked_fill",
        lambda x: x[:, :4]: "slice",
        lambda x: x.split(4, 1)[0]: "split",
        lambda x: x.sign().nan_to_num(): "sign",
        lambda x: (x == 0).float(): "eq",
        lambda x: x.int().float(): "_to_copy",
        lambda x: x[:, [0, 1]]: "index",
    }.items(),
)
def test_nan_that_would_not_reach_the_output_is_found_where_it_vanishes(
    hide: Callable[[Tensor], Tensor], operator: str
) -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.LazyLinear(2)
            with torch.no_grad():
                self.conv.bias[7] = float("nan")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(hide(self.conv(x)).flatten(1))

    model, x = Hiding(), images(2, 3, 6, 6)
    model(x)
    assert not model(x).isnan().any()
    with pytest.raises(EnergyError, match=f"NaN, .* comes out of conv into the network itself: ({operator})"):
        measure(model, x)


def test_counts_may_stay_on_the_device_until_the_end_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build_model("resnet18", classes=4, image_size=16, width=1 / 16), images(3, 3, 16, 16)
    expected = [measure(model, x[:2], x[2:], accounting=accounting) for accounting in ("published", "fused")]
    count = energy._count
    monkeypatch.setattr(energy, "_count", lambda x: tuple(map(torch.tensor, count(x))))
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
    assert measure(model.cuda(), x, **options).totals == cpu.totals


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


def test_a_model_that_multiplies_nothing_is_refused():
    with pytest.raises(EnergyError, match="no layer that multiplies"):
        energy_report(nn.BatchNorm2d(3), [torch.rand(2, 3, 4, 4)], accounting="fused")
