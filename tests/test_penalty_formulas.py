"""The penalties against their definitions in float64."""

import pytest
import torch
from torch import Tensor

from eatlib.penalties import PENALTIES, hoyer, l0, l1, transformed_l1

DEFINITIONS = {
    "l0": lambda x, sigma: (x**2 / (x**2 + sigma)).sum(),
    "l1": lambda x, sigma: x.abs().sum(),
    "hoyer": lambda x, sigma: x.abs().sum() ** 2 / (x**2).sum(),
    "transformed_l1": lambda x, sigma: ((1 + sigma) * x.abs() / (sigma + x.abs())).sum(),
}


def value_and_gradient(function, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = function(x, sigma)
    return value.detach(), torch.autograd.grad(value, x)[0]


def test_by_hand():
    x = torch.tensor([0.0, 0.1, -0.3])
    assert l0(x, 0.01).item() == pytest.approx(0.5 + 0.9)
    assert l1(x).item() == pytest.approx(0.4)
    assert hoyer(x).item() == pytest.approx(0.16 / 0.1)
    assert transformed_l1(x, 0.1).item() == pytest.approx(1.1 * (0.5 + 0.75))


@pytest.mark.parametrize("seed", range(80))
@pytest.mark.parametrize("name", PENALTIES)
def test_values_and_gradients_are_the_definitions_within_float32(name, seed):
    generator = torch.Generator().manual_seed(seed)
    sigma, scale, size = (10 ** (9 * torch.rand(3, generator=generator) - 8)).tolist()
    x = 30 * scale * torch.randn(10 + int(1000 * size), generator=generator)
    if seed % 2:
        x = x.relu()
    value, gradient = value_and_gradient(PENALTIES[name], x, sigma)
    exact, exact_gradient = value_and_gradient(DEFINITIONS[name], x.double(), sigma)
    unit = (1 + sigma) * len(x) if name == "transformed_l1" else exact
    assert value.dtype == torch.float32
    assert (value - exact).abs() <= 1e-6 * unit
    error = torch.where(x == 0, 0, gradient - exact_gradient)  # at 0 the gradient of |x| is a convention
    assert error.abs().max() <= 1e-6 * exact_gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PENALTIES)
def test_computed_in_float32_whatever_comes_in(name, dtype):
    x = torch.randn(300, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected, expected_gradient = value_and_gradient(PENALTIES[name], x.float(), 1e-3)
    value, gradient = value_and_gradient(PENALTIES[name], x, 1e-3)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("sigma", [1.0, 1e-4, 1e-30])
@pytest.mark.parametrize("name", PENALTIES)
def test_zeros_infinities_and_extremes_make_no_nan(name, sigma):
    infinite = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65504.0, 6e-8], dtype=torch.float16)
    tiny = torch.tensor([0.0, 1e-38, -1e-30, 1e-20, 1e-10, 1e15])
    for x in (infinite, infinite.bfloat16(), tiny, torch.zeros(5), torch.zeros(0)):
        value, gradient = value_and_gradient(PENALTIES[name], x, sigma)
        assert value.isfinite()
        assert not gradient.isnan().any()
    assert PENALTIES[name](torch.tensor([1.0, float("nan")]), sigma).isnan()
