"""What makes activations zero: the paper's l0 surrogate, its rivals, and the object that sums one over a model.

The four penalties are pure functions of a tensor. `ActivationPenalty` is their sum over a model's layers, as a term
for the loss; on the CPU it computes the same functions in blocks that stay in a core's cache (see `_Surrogate`).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eatlib.activations import LayerCall, Watch, is_dense, leaf_modules
from eatlib.models import count_parameters

Normalization = Literal["layer_mean", "parameters", "energy"]

ZERO_MAKERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink)
"""Activation functions that are exactly zero over a range of inputs; `layers="relu"` means these."""

_LARGEST = 1e18  # activations are clipped here, so that an infinity of half precision is a neuron that fires
_BLOCK = 2**18  # elements, 1 MiB of float32: what a core's cache holds
_DEVICE_BLOCK = 2**22  # on an accelerator: large enough to keep it busy, small enough to take little memory


# --- the penalties --------------------------------------------------------------------------------------------------


def l0(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Smooth count of the non-zero elements, sum_j x_j^2 / (x_j^2 + sigma) (paper, eq. 1).

    Args:
        x: any shape, any floating-point type.
        sigma: softness, above 0; an element of magnitude sqrt(sigma) counts half.

    Returns:
        A float32 scalar, computed in float32.
    """
    # Written as 1 - 1 / (1 + x^2 / sigma), whose derivative loses no digits where x^2 is far above sigma.
    return (1 - 1 / (1 + _finite(x).square() / sigma)).sum()


def l1(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Sum of magnitudes, sum_j |x_j|; as `l0`, but `sigma` has no part in it."""
    return _finite(x).abs().sum()


def hoyer(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Squared l1 over squared l2 norm, (sum_j |x_j|)^2 / sum_j x_j^2; 0 if all elements are 0.

    A count that ignores the scale: k equal elements among zeros give k (Yang, Wen, Li, DeepHoyer, ICLR 2020).
    As `l0`, but `sigma` has no part in it.
    """
    x = _finite(x).double()
    squares = x.square().sum()
    return (x.abs().sum().square() / torch.where(squares == 0, 1, squares)).float()


def transformed_l1(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """sum_j (1 + sigma) |x_j| / (sigma + |x_j|); as `l0`.

    Between l0 (small sigma) and l1 (large sigma); Ma, Miao, Niu, Zhang, Transformed l1 regularization, 2019.
    """
    return ((1 + sigma) * (1 - sigma / (sigma + _finite(x).abs()))).sum()


def _finite(x: Tensor) -> Tensor:
    return x.float().clamp(-_LARGEST, _LARGEST)


# --- the same, quickly ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Surrogate:
    """A penalty, and how to compute it and its gradient with the fewest passes over float32 vectors.

    Attributes:
        formula: the pure function.
        sums: (x, sigma, scratch) -> what has to be summed over the elements.
        value: (sums, elements, sigma) -> the penalty, exact to about 1e-7 of the number of elements.
        add_gradient: (gradient, x, sigma, factor, sums, scratch) adds `factor` times the penalty's gradient at x.
    """

    formula: Callable[[Tensor, float], Tensor]
    sums: Callable[[Tensor, float, Tensor], tuple[Tensor, ...]]
    value: Callable[[list[Tensor], int, float], Tensor]
    add_gradient: Callable[[Tensor, Tensor, float, float, list[Tensor], Tensor], object]


_ONE = torch.ones((), dtype=torch.float32)


def _one_plus(x: Tensor, sigma: float, out: Tensor) -> Tensor:
    """1 + x^2 / sigma"""
    one = _ONE if _on_cpu(x) else x.new_ones(())
    return torch.addcmul(one, x, x, value=1 / sigma, out=out)


def _l0_gradient(gradient: Tensor, x: Tensor, sigma: float, factor: float, sums: list[Tensor], scratch: Tensor) -> None:
    _one_plus(x, sigma, scratch)
    gradient.addcdiv_(x, scratch.mul_(scratch), value=2 * factor / sigma)


def _l1_gradient(gradient: Tensor, x: Tensor, sigma: float, factor: float, sums: list[Tensor], scratch: Tensor) -> None:
    gradient.add_(torch.sign(x, out=scratch), alpha=factor)


def _hoyer_sums(x: Tensor, sigma: float, scratch: Tensor) -> tuple[Tensor, ...]:
    return torch.abs(x, out=scratch).sum(), torch.mul(x, x, out=scratch).sum(dtype=torch.float64)


def _hoyer_ratio(sums: list[Tensor]) -> Tensor:
    total, squares = sums
    return total / torch.where(squares == 0, 1, squares)


def _hoyer_gradient(
    gradient: Tensor, x: Tensor, sigma: float, factor: float, sums: list[Tensor], scratch: Tensor
) -> None:
    ratio = _hoyer_ratio(sums)
    gradient.add_(torch.sign(x, out=scratch).mul_(ratio), alpha=2 * factor)
    gradient.add_(torch.mul(x, ratio.square(), out=scratch), alpha=-2 * factor)


def _transformed_l1_gradient(
    gradient: Tensor, x: Tensor, sigma: float, factor: float, sums: list[Tensor], scratch: Tensor
) -> None:
    torch.abs(x, out=scratch).add_(sigma)
    scratch.mul_(scratch)
    gradient.addcdiv_(torch.sign(x), scratch, value=factor * sigma * (1 + sigma))


PENALTIES: dict[str, _Surrogate] = {
    "l0": _Surrogate(
        l0,
        lambda x, sigma, scratch: (_one_plus(x, sigma, scratch).reciprocal_().sum(),),
        lambda sums, elements, sigma: elements - sums[0],
        _l0_gradient,
    ),
    "l1": _Surrogate(
        l1,
        lambda x, sigma, scratch: (torch.abs(x, out=scratch).sum(),),
        lambda sums, elements, sigma: sums[0],
        _l1_gradient,
    ),
    "hoyer": _Surrogate(
        hoyer,
        _hoyer_sums,
        lambda sums, elements, sigma: sums[0] * _hoyer_ratio(sums),
        _hoyer_gradient,
    ),
    "transformed_l1": _Surrogate(
        transformed_l1,
        lambda x, sigma, scratch: (torch.abs(x, out=scratch).add_(sigma).reciprocal_().sum(),),
        lambda sums, elements, sigma: (1 + sigma) * (elements - sigma * sums[0]),
        _transformed_l1_gradient,
    ),
}
"""By the names that `ActivationPenalty` and a configuration give them."""


def _flatten(x: Tensor, like: Tensor) -> Tensor:
    """`x` as a vector in the order in which `like` lies in memory; a view where both lie densely and alike."""
    return x.permute(_order(like)).reshape(-1)


def _empty_like(x: Tensor) -> Tensor:
    """Dense memory laid out like `x`, so that `_flatten(result, x)` is a view of it.

    It is no view itself, as autograd would not accumulate into one.
    """
    return torch.empty_permuted(x.shape, _order(x), dtype=x.dtype, device=x.device)


def _order(x: Tensor) -> list[int]:
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _blocks(*vectors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Blocks of vectors of equal length, each with pieces of float32 memory of its size: one or, if the vectors have to
    be converted or the device is no CPU, three."""
    first = vectors[0]
    size = min(len(first), _BLOCK if _on_cpu(first) else _DEVICE_BLOCK)
    count = 1 if first.dtype == torch.float32 and _on_cpu(first) else 3  # new memory takes time
    memory = torch.empty(count, size, dtype=torch.float32, device=first.device).unbind()
    for blocks in zip(*(vector.split(max(1, size)) for vector in vectors), strict=True):
        length = len(blocks[0])
        yield *blocks, memory if length == size else tuple(piece[:length] for piece in memory)


def _as_float32(block: Tensor, memory: Tensor) -> Tensor:
    return block if block.dtype == torch.float32 else memory.copy_(block).clamp_(-_LARGEST, _LARGEST)


class _Penalize(torch.autograd.Function):
    """A layer's output and its penalty; with `rectify`, the output is ReLU of `x`.

    ReLU and penalty share one trip through memory each way. What is kept from forward to backward is the output, which
    ReLU keeps as well, and a few sums. Nothing is read back from an accelerator, which would have to wait.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, surrogate: _Surrogate, sigma: float, rectify: bool, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.surrogate, ctx.sigma, ctx.rectify = surrogate, sigma, rectify
        if inplace:
            ctx.mark_dirty(x)
        output = _empty_like(x) if rectify and not inplace else x
        parts = []
        for before, after, memory in _blocks(_flatten(x, x), _flatten(output, x)):
            if rectify:
                torch.clamp_min(before, 0, out=after)
            parts.append(surrogate.sums(_as_float32(after, memory[-1]), sigma, memory[0]))
        columns = zip(*parts, strict=True)
        ctx.sums = [
            column[0] if len(column) == 1 else torch.stack(column).sum(dtype=torch.float64) for column in columns
        ]
        ctx.save_for_backward(output)
        return output, surrogate.value(ctx.sums, x.numel(), sigma).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        if above is None:
            above = torch.zeros_like(output)
        if factor is None:
            gradient = torch.ops.aten.threshold_backward(above, output, 0) if ctx.rectify else above
            return gradient, None, None, None, None
        gradient, add_gradient = _empty_like(output), ctx.surrogate.add_gradient
        weight = factor.item() if _on_cpu(factor) else None
        vectors = (_flatten(tensor, output) for tensor in (output, above, gradient))
        for block, incoming, target, memory in _blocks(*vectors):
            if ctx.rectify:
                torch.ops.aten.threshold_backward.grad_input(incoming, block, 0, grad_input=target)
            else:
                target.copy_(incoming)
            x, scratch = _as_float32(block, memory[-1]), memory[0]
            if weight is None:  # a number on an accelerator, not to be read
                add_gradient(total := memory[1].zero_(), x, ctx.sigma, 1.0, ctx.sums, scratch)
                target.addcmul_(total, factor)
            elif target.dtype.itemsize < 4:
                add_gradient(total := memory[1].copy_(target), x, ctx.sigma, weight, ctx.sums, scratch)
                target.copy_(total)
            else:
                add_gradient(target, x, ctx.sigma, weight, ctx.sums, scratch)
        return gradient, None, None, None, None


# --- in a model -----------------------------------------------------------------------------------------------------

_attached: WeakSet[nn.Module] = WeakSet()


class ActivationPenalty:
    """The penalty of a model's activations, as a term for its loss (paper, eq. 3).

        penalty = ActivationPenalty(model)
        loss = F.cross_entropy(model(images), labels) + lambda_ * penalty()
        penalty.detach()

    Calling it gives the float32 scalar of the model's latest forward pass in training mode; each pass can be asked
    for once, and a pass that was not asked for is forgotten when the next one starts. In evaluation mode the model
    runs as if nothing were attached. A module that is called several times counts as several layers. `with
    ActivationPenalty(model) as penalty:` detaches at the end.

    A copy of the model that is made while a penalty is attached is not penalised, but keeps the original alive; to copy
    or save a model, use its `state_dict`, or detach first.

    Works with in-place modules and additions, autocast, gradient accumulation, `torch.compile` (attach first, then
    compile) and gradient checkpointing (`use_reentrant=False`).

    Args:
        penalty: "l0" (the paper's), "l1", "hoyer" or "transformed_l1".
        sigma: softness of the penalty, above 0.
        layers: "relu": modules whose output is exactly zero over a range of inputs (see `ZERO_MAKERS`);
            "all": every leaf module but dropout, as the authors' attack code; or name patterns (fnmatch) of leaf
            modules, such as ["features.*"]. Functional calls such as `F.relu` are no modules, and are not seen.
        normalization: "layer_mean": the mean over a layer's elements, then over the layers (the authors' attack code);
            "parameters": the sum over all elements of a sample over the model's parameters, as the mean over the
            batch (the paper's text); "energy": each layer weighted by its entry in `costs`.
        costs: for "energy": by layer call, energy of one non-zero element as a share of the energy of one image
            without zero-skipping (`eatlib.energy.activation_cost` times its number of images). With "l0", the sum
            over the layers of `layers="relu"` is then a smooth estimate of the activations' part of the energy ratio.

    Raises:
        ValueError: an argument is not among those allowed, no layer fits, or another penalty is attached.
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: str = "l0",
        *,
        sigma: float = 1e-4,
        layers: str | Iterable[str] = "relu",
        normalization: Normalization = "layer_mean",
        costs: Mapping[str, float] | None = None,
    ) -> None:
        if penalty not in PENALTIES:
            raise ValueError(f"penalty = {penalty!r}: must be one of {', '.join(PENALTIES)}")
        if not (math.isfinite(sigma) and sigma >= 1e-30):  # smaller ones are no float32
            raise ValueError(f"sigma = {sigma!r}: must be a finite number from 1e-30 up")
        if normalization not in get_args(Normalization):
            allowed = ", ".join(get_args(Normalization))
            raise ValueError(f"normalization = {normalization!r}: must be one of {allowed}")
        if (normalization == "energy") != (costs is not None):
            raise ValueError(f"normalization = {normalization!r}: costs go with 'energy', and only with it")
        if hasattr(model, "_orig_mod"):
            raise ValueError("the model is compiled: attach to the network that it was made from, then compile")
        if model in _attached:
            raise ValueError("the model has an ActivationPenalty attached already: detach() that one first")
        self._model = model
        self._surrogate = PENALTIES[penalty]
        self._sigma = sigma
        self._normalization = normalization
        self._costs = costs
        self._parameters = count_parameters(model)
        self._values: list[Tensor] = []
        self._active = False
        self._with_gradient = False
        chosen = choose_layers(model, layers)
        # By identity: two paths may lead to one module. One that is replaced already, or whose output a hook may
        # replace, is left alone.
        self._relus = [
            m
            for m in map(leaf_modules(model).get, chosen)
            if type(m) is nn.ReLU and "forward" not in vars(m) and not m._forward_hooks
        ]
        self._watch = Watch(model, self._on_call, modules=chosen, on_start=self._start, on_end=self._end)
        self._fused: tuple[nn.ReLU, Tensor] | None = None
        for relu in self._relus:
            self._fuse(relu)
        _attached.add(model)

    def __call__(self) -> Tensor:
        """The penalty of the latest forward pass.

        Raises:
            RuntimeError: there was none in training mode since the last call, or it did not end.
        """
        if self._active or not self._values:  # active: a pass that raised, or one that is still running
            raise RuntimeError(
                "no activations to penalise: call the model in training mode (model.train()) before each penalty()"
            )
        values, self._values = torch.stack(self._values), []
        return values.mean() if self._normalization == "layer_mean" else values.sum()

    def detach(self) -> None:
        """Leave the model as it was; a second call does nothing."""
        self._watch.close()
        for relu in self._relus:
            del relu.forward
        self._relus = []
        self._values = []
        _attached.discard(self._model)

    def __enter__(self) -> "ActivationPenalty":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _start(self) -> None:
        self._values = []
        self._fused = None
        self._active = self._model.training
        self._with_gradient = torch.is_grad_enabled()

    def _end(self) -> None:
        # What gradient checkpointing computes once more, later, is no new pass.
        self._active = False

    def _on_call(self, call: LayerCall) -> Tensor | None:
        if not self._model.training:
            return None
        x = call.output
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            kind = type(x).__name__ if not isinstance(x, Tensor) else f"a tensor of {x.dtype}"
            raise TypeError(
                f"{call.name} ({call.kind}) returns {kind}, which has no penalty: name other layers in `layers`"
            )
        if self._active and self._with_gradient and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{call.name} runs without gradients inside a pass with gradients, and so would its penalty: "
                "checkpoint with use_reentrant=False, or leave the layer out of `layers`"
            )
        output = None
        if torch.compiler.is_compiling():
            value = self._surrogate.formula(x, self._sigma)  # the compiler fuses it with what is around it
        elif self._fused is not None and self._fused[0] is call.module:
            value, self._fused = self._fused[1], None
        elif isinstance(call.module, nn.ReLU):
            # Its own gradient needs this output, so that no later layer may overwrite it.
            output, value = self._penalize(x)
        else:
            _, value = self._penalize(x.clone())
        if self._active:
            self._values.append(value * self._scale(call.name, x))
        return output

    def _penalize(self, x: Tensor, *, rectify: bool = False, inplace: bool = False) -> tuple[Tensor, Tensor]:
        return _Penalize.apply(x, self._surrogate, self._sigma, rectify, inplace)

    def _fuse(self, relu: nn.ReLU) -> None:
        """Have a module compute ReLU and penalty together, until `detach`."""

        def forward(module: nn.ReLU, input: Tensor) -> Tensor:
            is_copy = module is not relu
            if is_copy or torch.compiler.is_compiling() or not self._model.training:
                return F.relu(input, module.inplace)
            if relu.inplace and (input._is_view() or not is_dense(input)):
                # Autograd has no function of two outputs that overwrites a view, and blocks need dense memory.
                return F.relu_(input)
            output, value = self._penalize(input, rectify=True, inplace=relu.inplace)
            self._fused = relu, value
            return output

        relu.forward = MethodType(forward, relu)  # bound, so that a copy of the model has its own

    def _scale(self, name: str, x: Tensor) -> float:
        if self._normalization == "layer_mean":
            return 1 / max(1, x.numel())
        samples = max(1, len(x))
        if self._normalization == "parameters":
            return 1 / (samples * self._parameters)
        if name not in self._costs:
            raise ValueError(f"costs has no entry for {name}; it has {', '.join(self._costs)}")
        return self._costs[name] / samples


def choose_layers(model: nn.Module, layers: str | Iterable[str] = "relu") -> list[str]:
    """Paths of the leaf modules that `layers` means (see `ActivationPenalty`).

    Raises:
        ValueError: there are none, or a pattern fits none.
    """
    leaves = leaf_modules(model)
    kinds = ", ".join(sorted({type(module).__name__ for module in leaves.values()}))
    if layers == "relu":
        chosen = [name for name, module in leaves.items() if isinstance(module, ZERO_MAKERS)]
        if not chosen:
            raise ValueError(
                "layers = 'relu': the model has no module whose output is zero over a range of inputs, such as nn.ReLU "
                f"(it has {kinds}). GELU, SiLU and the like make no zeros, so that their penalty would save no energy; "
                "functional calls such as F.relu are not seen: make them modules"
            )
        return chosen
    if layers == "all":
        return [name for name, module in leaves.items() if "Dropout" not in type(module).__name__]
    if isinstance(layers, str):
        raise ValueError(f"layers = {layers!r}: must be 'relu', 'all' or a list of name patterns")
    chosen = {}
    for pattern in layers:
        fitting = [name for name in leaves if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"layers: {pattern!r} fits none of {', '.join(leaves)}")
        chosen |= dict.fromkeys(fitting)
    if not chosen:
        raise ValueError("layers = []: must name at least one layer")
    smooth = [name for name in chosen if _is_smooth(leaves[name])]
    if smooth:
        warnings.warn(
            f"{', '.join(smooth)}: these activation functions make small values, not zeros, so that zero-skipping "
            "saves nothing on them",
            stacklevel=3,
        )
    return list(chosen)


def _is_smooth(module: nn.Module) -> bool:
    """Whether it is an activation function that is zero at single points at most."""
    own = type(module).__module__ == nn.modules.activation.__name__
    return own and not isinstance(module, (*ZERO_MAKERS, nn.MultiheadAttention))
