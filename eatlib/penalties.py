"""What makes activations zero: the paper's l0 surrogate and its rivals, and the object that sums them over a model."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from eatlib.activations import LayerCall, Watch, leaf_modules
from eatlib.models import count_parameters

LARGEST = 1e18
"""Activations are clipped here, so that squares stay finite: an infinity of half precision counts as firing."""

ZERO_MAKERS = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink)
"""Activation modules whose output is exactly zero over a range of inputs; `layers="relu"` means these."""

_attached: WeakSet[nn.Module] = WeakSet()


def l0(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Smooth count of the non-zero elements, sum_j x_j^2 / (x_j^2 + sigma) (paper, eq. 1), in float32."""
    square = _finite(x).square()
    return (square / (square + sigma)).sum()


def l1(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Sum of magnitudes, in float32. `sigma` has no part in it."""
    return x.float().abs().sum()


def hoyer(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Squared l1 over squared l2 norm, in float32; 0 if all elements are 0.

    It ignores the scale: n equal elements among zeros give n (Yang, Wen, Li 2020). `sigma` has no part in it.
    """
    x = _finite(x)
    total, squares = x.abs().sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)
    return (total.square() / squares.clamp(min=1e-300)).float()


def transformed_l1(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """sum_j (1 + sigma) |x_j| / (sigma + |x_j|), in float32: l0 for small sigma, l1 for large (Ma et al. 2019)."""
    magnitude = _finite(x).abs()
    return ((1 + sigma) * magnitude / (sigma + magnitude)).sum()


def _finite(x: Tensor) -> Tensor:
    return x.float().clamp(-LARGEST, LARGEST)


PENALTIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l0": l0,
    "l1": l1,
    "hoyer": hoyer,
    "transformed_l1": transformed_l1,
}


class ActivationPenalty:
    """The penalty of a model's last training-mode forward pass, as a term for the loss.

    penalty = ActivationPenalty(model)
    loss = F.cross_entropy(model(images), labels) + lambda_ * penalty()
    penalty.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: str = "l0",
        *,
        sigma: float = 1e-4,
        layers: Literal["relu", "all"] | Sequence[str] = "relu",
        normalization: Literal["layer_mean", "parameters", "energy"] = "layer_mean",
        costs: Mapping[str, float] | None = None,
    ) -> None:
        self._model = model
        self._function = PENALTIES[penalty]
        self._sigma = sigma
        self._normalization = normalization
        self._costs = costs
        self._parameters = count_parameters(model)
        self._values: list[Tensor] = []
        self._watch = Watch(model, self._on_call, modules=_select(model, layers), on_start=self._values.clear)

    def _on_call(self, call: LayerCall) -> None:
        if not self._model.training:
            return
        x = call.output
        value = self._function(x if isinstance(call.module, nn.ReLU) else x.clone(), self._sigma)
        if self._normalization == "layer_mean":
            value = value / x.numel()
        elif self._normalization == "parameters":
            value = value / (len(x) * self._parameters)
        else:
            value = value * self._costs[call.name]
        self._values.append(value)

    def __call__(self) -> Tensor:
        values = torch.stack(self._values)
        self._values.clear()
        return values.mean() if self._normalization == "layer_mean" else values.sum()

    def detach(self) -> None:
        """Remove the penalty from the model."""
        self._watch.close()
        self._values.clear()

    def __enter__(self) -> "ActivationPenalty":
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()


def _select(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    leaves = leaf_modules(model)
    if layers == "relu":
        return [name for name, module in leaves.items() if isinstance(module, ZERO_MAKERS)]
    if layers == "all":
        return [name for name, module in leaves.items() if not isinstance(module, nn.modules.dropout._DropoutNd)]
    return [name for name in leaves if any(fnmatchcase(name, pattern) for pattern in layers)]
