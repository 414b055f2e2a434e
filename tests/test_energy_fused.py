"""The fused accounting against hand-made sums, and what counts as zero."""

import copy

import pytest
import torch
from test_energy import PJ, Functional, Modular, images, measure, sums, tiny
from torch import Tensor, nn

from eatlib.energy import count_nonzero

# --- the fused accounting -----------------------------------------------------------------------------------------


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
    accesses = sum(nonzero[:3]) + sum(nonzero[1:]) + sums(report)["nonzero_parameters"]
    expected = 1950 * accesses + 3.7 * layers["effective_operations"].sum()
    assert report.joules_per_image * 4 * PJ == pytest.approx(expected, rel=1e-9)
    assert layers["share"].sum() == pytest.approx(1)


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
        (accounting, net.groups): sums(measure(net, x, accounting=accounting))["operations"]
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
    assert sums(report)["effective_operations"] == expected


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


# --- zeros --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accounting", ["published", "fused"])
def test_pruned_weights_and_dead_channels_lower_the_energy(accounting: str) -> None:
    x = images(2, 3, 16, 16)
    before = measure(tiny(), x, accounting=accounting)
    pruned = tiny()
    with torch.no_grad():
        pruned[4].weight[:, :, 0, 0] = 0
    after = measure(pruned, x, accounting=accounting)
    assert sums(before)["nonzero_parameters"] - sums(after)["nonzero_parameters"] == 8 * 16
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_integers_that_are_not_zero_are_counted(dtype: torch.dtype) -> None:
    values = {torch.int8: [-128, 0, 127, 1], torch.uint8: [255, 0, 128, 1]}.get(dtype, [1, 0, 1, 1])
    assert count_nonzero(torch.tensor(values, dtype=dtype)) == 3


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
    for same in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, None]):
        assert count_nonzero(same) == expected
    assert count_nonzero(x[:, ::2, 1:]) == int((x[:, ::2, 1:] != 0).sum())
    assert count_nonzero(x[:1].expand(3, -1, -1, -1)) == 3 * int((x[:1] != 0).sum())
    assert count_nonzero(x[:0]) == 0
    assert count_nonzero(x > 0) == expected
    assert count_nonzero((100 * x).int()) == int(((100 * x).int() != 0).sum())
