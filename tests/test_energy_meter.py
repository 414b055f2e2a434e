"""What a meter does over batches, and what it leaves as it was."""

import copy
import gc
import json
import weakref

import pytest
import torch
from test_energy import PJ, Modular, images, measure, sums, tiny
from torch import Tensor, nn

from eatlib.energy import HARDWARE, EnergyMeter, Hardware, activation_cost, energy_report
from eatlib.hardware import energy_ratio, joules_per_image
from eatlib.models import build_model

# --- sums over batches --------------------------------------------------------------------------------------------


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
    assert split.joules_per_image > whole.joules_per_image
    counts = [sums(measure(model, *batches)) for batches in ([x], [x[:4], x[4:6], x[6:]])]
    for key in ("inputs", "nonzero_inputs", "outputs", "nonzero_outputs", "operations"):
        assert counts[0][key] == counts[1][key]


@pytest.mark.parametrize("accounting", ["published", "fused"])
def test_any_prices_apply_to_the_totals_of_the_batches(accounting: str) -> None:
    """As if the model had been measured at those prices; batches of one size share their totals."""
    x, own = images(7, 3, 16, 16), Hardware("own", memory_pj=20.0, operation_pj=1.0, source="made up")
    batches = (x[:3], x[3:6], x[6:])
    measured = measure(tiny(), *batches, accounting=accounting)
    repriced = measure(tiny(), *batches, accounting=accounting, hardware=own)
    assert [(totals.batches, totals.images) for totals in measured.batches] == [(2, 6), (1, 1)]
    assert measured.batches == repriced.batches
    assert energy_ratio(measured.batches, accounting, own) == repriced.ratio != measured.ratio
    assert joules_per_image(measured.batches, own) == repriced.joules_per_image
    assert joules_per_image(measured.batches, own, dense=True) == repriced.dense_joules_per_image
    whole, of_layers = sum(measured.batches[1:], measured.batches[0]), sums(measured)
    assert whole.accesses == sum(of_layers[what] for what in ("inputs", "outputs", "parameters"))
    assert whole.operations == of_layers["operations"]


def test_batches_of_one_number_of_images_may_differ_in_their_size() -> None:
    """The published ratio stays the mean over the batches."""
    sizes = [images(2, 3, side, side) for side in (16, 24, 24)]
    report = measure(tiny(), *sizes)
    assert [(totals.batches, totals.images) for totals in report.batches] == [(1, 2), (2, 4)]
    assert report.ratio == pytest.approx(sum(measure(tiny(), x).ratio for x in sizes) / 3, rel=1e-12)


def test_weights_changed_between_batches_are_counted_again() -> None:
    model, x = nn.Linear(8, 4), images(2, 8)
    with EnergyMeter(model) as meter, torch.no_grad():
        model(x)
        model.weight[0] = 0
        model(x)
    assert sums(meter.report("fused"))["nonzero_parameters"] == 2 * 36 - 8


def test_statistics_changed_by_training_are_counted_again() -> None:
    model, x = nn.BatchNorm2d(2).train(), images(3, 2, 4, 4)
    with EnergyMeter(model) as meter, torch.no_grad():
        model(x)
        nn.init.zeros_(model.running_var)
        model.momentum = 0.0
        model(x)
    # weight and counter, and the statistics twice; the bias is zero
    assert sums(meter.report())["nonzero_parameters"] == (2 + 1 + 2 * 4) + (2 + 1 + 2 * 2)


def test_memory_stays_constant_over_batches() -> None:
    model, x = tiny().eval(), images(2, 3, 16, 16)

    def objects(batches: int) -> int:
        with EnergyMeter(model) as meter, torch.no_grad():
            for _ in range(batches):
                model(x)
            gc.collect()
            return len(gc.get_objects()) + 0 * meter.hardware.memory_pj

    first, second, third = (objects(batches) for batches in (2, 12, 22))
    assert min(third - second, second - first) < 50, "what grows once is PyTorch's, or of a test before"


# --- the model is left alone --------------------------------------------------------------------------------------


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
    assert meter.report().layers.equals(measure(model, x).layers)


def test_only_calls_of_the_whole_model_itself_are_measured() -> None:
    model, x = tiny().eval(), images(2, 3, 16, 16)
    with EnergyMeter(model) as meter, torch.no_grad():
        model[0](x)
        copy.deepcopy(model)(x)  # with the hooks
        model(x)
        copy.deepcopy(model)(x)
    assert meter.report().layers.equals(measure(model, x).layers)


def test_a_meter_within_a_meter_counts_the_same() -> None:
    model, x = build_model("resnet18", classes=4, image_size=16, width=1 / 16).eval(), images(2, 3, 16, 16)
    alone = measure(model, x)
    with EnergyMeter(model) as outer:
        within = measure(model, x)
    for report in (outer.report(), within):
        assert report.layers.equals(alone.layers)
        assert report.uncounted == alone.uncounted


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
        assert sums(report)[key] == 2 * sums(reference)[key], key
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
    assert sums(fused)["parameters"] == 2 * 42
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


def test_a_layer_of_a_constant_is_counted_before_the_relu_changes_its_output() -> None:
    """Torchvision's swin_v2 computes position biases from a buffer."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.relu, self.last = nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)
            self.register_buffer("table", torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x) + self.relu(self.first(self.table)).sum()

    rows = measure(Biased(), images(2, 8)).layers.set_index("name")
    assert rows.loc["first", "nonzero_outputs"] == 40
    assert 0 < rows.loc["relu", "nonzero_outputs"] < 40


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
    assert set(activation_cost(Modular(), images(2, 3, 8, 8), hardware)) == {"first", "relu1", "second", "relu2"}


def test_activation_cost_of_branches_that_are_concatenated() -> None:
    """Each element of each is written once, and read and multiplied with three weights; one branch once more."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(5, 4), nn.Linear(5, 2), nn.Linear(10, 3)
            self.relu_a, self.relu_b = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.relu_a(self.a(x)), self.relu_b(self.b(x))
            return self.last(torch.cat([a, torch.cat([b, a], 1)], 1))

    model, x, hardware = Branches(), images(2, 5), "horowitz-45nm-float32"
    cost = activation_cost(model, x, hardware)
    dense = measure(model, x, accounting="fused").dense_joules_per_image * 2 * PJ
    assert cost["relu_b"] == pytest.approx((2 * 1950 + 3 * 3.7) / dense)
    assert cost["relu_a"] == pytest.approx(2 * cost["relu_b"])


def test_a_report_as_json_and_in_a_notebook() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    report = energy_report(model, [torch.rand(3, 1, 2, 2)])
    values = json.loads(json.dumps(report.to_dict()))
    assert values["ratio"] == report.ratio
    assert [layer["name"] for layer in values["layers"]] == ["0", "1", "2"]
    assert sum(layer["operations"] for layer in values["layers"]) == values["batches"][0]["operations"]
    html = report._repr_html_()
    assert f"energy ratio {report.ratio:.4f}" in html
    assert "<td>BatchNorm2d</td>" in html
