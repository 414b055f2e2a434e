"""What makes activations zero: the paper's l0 surrogate, its rivals, and the object that sums one over a model.

The four penalties are pure functions `penalty(x, sigma)` of a tensor. `ActivationPenalty` is the sum of one of them, or
of a function of one's own, over a model's layers, as a term for the loss.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eatlib.models import count_parameters, leaf_modules

Penalty = Callable[[Tensor, float], Tensor]
"""(x, sigma) -> scalar, summed over the elements of `x`."""

Normalization = Literal["layer_mean", "parameters", "energy"]

ZERO_MAKERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink)
"""Activation functions that are exactly zero over a range of inputs; `layers="relu"` means these, and"""

ZERO_FUNCTIONS = dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "F.relu")
ZERO_FUNCTIONS |= {F.relu6: "F.relu6", F.hardswish: "F.hardswish", F.hardsigmoid: "F.hardsigmoid"}
"""their functional forms, by the name that a call has as a layer."""


# --- the penalties --------------------------------------------------------------------------------------------------


def l0(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Smooth count of the non-zero elements, sum_j x_j^2 / (x_j^2 + sigma) (paper, eq. 1).

    Args:
        x: any shape, any floating-point type.
        sigma: softness, above 0; an element of magnitude sqrt(sigma) counts half.

    Returns:
        A float32 scalar, computed in float32.
    """
    return _L0.apply(x, sigma)


def l1(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Sum of magnitudes, sum_j |x_j|; as `l0`, but `sigma` has no part in it."""
    return _float32(x).abs().sum()


def hoyer(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """Squared l1 over squared l2 norm, (sum_j |x_j|)^2 / sum_j x_j^2; 0 if all elements are 0.

    A count that ignores the scale: k equal elements among zeros give k (Yang, Wen, Li, DeepHoyer, ICLR 2020).
    As `l0`, but `sigma` has no part in it.
    """
    x = _float32(x)
    squares = x.square().sum()
    return x.abs().sum().square() / torch.where(squares == 0, 1, squares)


def transformed_l1(x: Tensor, sigma: float = 1e-4) -> Tensor:
    """sum_j (1 + sigma) |x_j| / (sigma + |x_j|); as `l0`.

    Between l0 (small sigma) and l1 (large sigma); Ma, Miao, Niu, Zhang, Transformed l1 regularization, 2019.
    """
    # 1 - 1 / (1 + |x| / sigma) is the same quotient, but its derivative loses no digits where |x| is far above sigma.
    return ((1 + sigma) * (1 - 1 / (1 + _float32(x).abs() / sigma))).sum()


PENALTIES: dict[str, Penalty] = {"l0": l0, "l1": l1, "hoyer": hoyer, "transformed_l1": transformed_l1}
"""By the names that `ActivationPenalty` and a configuration give them."""


def _l0_value(x: Tensor, sigma: float) -> Tensor:
    # 1 / (1 + sigma / x^2), in one piece of memory; where x is 0, this is 1 / infinity.
    return _float32(x).pow(-2).mul_(sigma).add_(1).reciprocal_().sum()


def _l0_gradient(x: Tensor, sigma: float, factor: Tensor) -> Tensor:
    # 2 x / sigma / (1 + x^2 / sigma)^2
    wide = _float32(x)
    root = torch.addcmul(wide.new_ones(()), wide, wide, value=1 / sigma)
    return root.pow_(-2).mul_(wide).mul_(factor * (2 / sigma)).to(x.dtype)


class _L0(torch.autograd.Function):
    """`l0` with its own gradient, which needs `x` alone, as ReLU's does; plain autograd would keep others as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sigma: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sigma = sigma
        return _l0_value(x, sigma)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        return _l0_gradient(*ctx.saved_tensors, ctx.sigma, factor), None


class _ReLU(torch.autograd.Function):
    """ReLU and, of its output's first `count` images, `l0`: where these are few, it costs little more than ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool, sigma: float, count: int) -> tuple[Tensor, Tensor]:
        y = x.relu_() if inplace else x.relu()
        ctx.mark_dirty(*[x] * inplace)
        ctx.save_for_backward(y)
        ctx.sigma, ctx.count = sigma, count
        return y, _l0_value(y[:count], sigma)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, factor: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        gradient[: ctx.count] += _l0_gradient(y[: ctx.count], ctx.sigma, factor)
        return gradient, None, None, None


def _float32(x: Tensor) -> Tensor:
    """An infinity of half precision is a neuron that fires: it becomes a number whose square is finite."""
    return x if x.dtype == torch.float32 else x.float().clamp_(-1e18, 1e18)


# --- in a model -----------------------------------------------------------------------------------------------------

_attached: WeakSet[nn.Module] = WeakSet()


class ActivationPenalty(AbstractContextManager):
    """The penalty of a model's activations, as a term for its loss (paper, eq. 3).

        penalty = ActivationPenalty(model)
        loss = F.cross_entropy(model(images), labels) + lambda_ * penalty()
        penalty.detach()

    Calling it gives the float32 scalar of the model's latest forward pass in training mode; each pass can be asked
    for once, and one that was not asked for is forgotten when the next starts. In evaluation mode the model runs as if
    nothing were attached. A module that is called several times counts as several layers: path, path#2, ...
    `with ActivationPenalty(model) as penalty:` detaches at the end.

    Works with in-place modules and additions, autocast, gradient accumulation, `torch.compile` (attach first, then
    compile) and, for modules, gradient checkpointing (`use_reentrant=False`). Copies of the model, pickled ones too,
    are not penalised.

    Attributes:
        layers: paths of the modules that are penalised; functional calls show in `values`.

    Args:
        penalty: "l0" (the paper's), "l1", "hoyer", "transformed_l1", or a function of one's own: `penalty(x, sigma)`
            gets a layer's output, in whatever type it has, and returns a scalar for autograd.
        sigma: softness of the penalty, above 0.
        layers: "relu": the modules of `ZERO_MAKERS`, and what calls `ZERO_FUNCTIONS` itself, as layers F.relu,
            F.relu#2, ...; "all": every leaf module but dropout, as the authors' attack code; or name patterns (fnmatch)
            of leaf modules, such as ["features.*"].
        normalization: "layer_mean": the mean over a layer's elements, then over the layers (the authors' attack code);
            "parameters": the sum over all elements of a sample over the model's parameters, as the mean over the
            batch (the paper's text); "energy": each layer weighted by its entry in `costs`.
        share: of each batch's images, the first ones, that the penalty is taken on. As batches are shuffled, it is an
            unbiased estimate of the whole (not of "hoyer"), and costs less.
        costs: for "energy": by layer call, energy of one non-zero element as a share of the energy of one image
            without zero-skipping (`eatlib.energy.activation_cost` times its number of images). With "l0", the sum
            over the layers of `layers="relu"` is then a smooth estimate of the activations' part of the energy ratio.

    Raises:
        ValueError: an argument is not among those allowed, no layer fits, or another penalty is attached.
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: str | Penalty = "l0",
        *,
        sigma: float = 1e-4,
        layers: str | Iterable[str] = "relu",
        normalization: Normalization = "layer_mean",
        share: float = 1.0,
        costs: Mapping[str, float] | None = None,
    ) -> None:
        if not callable(penalty) and penalty not in PENALTIES:
            raise ValueError(f"penalty = {penalty!r}: must be one of {', '.join(PENALTIES)}, or a function")
        if not (math.isfinite(sigma) and sigma >= 1e-30):  # smaller ones are no float32
            raise ValueError(f"sigma = {sigma!r}: must be a finite number from 1e-30 up")
        if normalization not in (allowed := get_args(Normalization)):
            raise ValueError(f"normalization = {normalization!r}: must be one of {', '.join(allowed)}")
        if not 0 < share <= 1:
            raise ValueError(f"share = {share!r}: must be above 0, and at most 1")
        if (normalization == "energy") != (costs is not None):
            raise ValueError(f"normalization = {normalization!r}: costs go with 'energy', and only with it")
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "the model is compiled: give the network that it was made from, and compile that afterwards"
            )
        if model in _attached:
            raise ValueError("the model has an ActivationPenalty attached already: detach() that one first")
        self.layers = choose_layers(model, layers)
        self._model = model
        self._penalty = penalty if callable(penalty) else PENALTIES[penalty]
        self._sigma, self._normalization, self._costs, self._share = sigma, normalization, costs, share
        self._parameters = count_parameters(model)
        self._terms: dict[str, Tensor] = {}
        self._latest: dict[str, Tensor] = {}
        self._over = self._fused = self._plain = False
        self._thread: int | None = None  # that is in the model
        self._layer: str | None = None  # that is being called
        self._functions, self._functional = _Functions(self), layers == "relu"
        leaves = leaf_modules(model)
        self._names = {leaves[name]: name for name in self.layers}
        self._handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
        for leaf in self._names:
            self._handles += [leaf.register_forward_pre_hook(self._enter), leaf.register_forward_hook(self._leave)]
        self._handles += [model.register_forward_hook(self._end, always_call=True)]
        _attached.add(model)

    def __call__(self) -> Tensor:
        """The penalty of the latest forward pass.

        Raises:
            RuntimeError: there was none in training mode since the last call, or it did not end.
            ValueError: nothing in the model makes zeros.
        """
        if not self._over:
            raise RuntimeError("no activations to penalise: call the model in training mode before each penalty()")
        self._over, terms, self._terms = False, self._terms, {}
        self._latest = {label: term.detach() for label, term in terms.items()}
        if not terms:
            raise ValueError(
                "layers = 'relu': the model has nothing that makes zeros, such as nn.ReLU or F.relu. GELU, SiLU and "
                "the like make small values, not zeros, so that their penalty would save no energy: "
                "eatlib.models.with_relus swaps modules, for fine-tuning; F.gelu and the like take a change of the code"
            )
        stacked = torch.stack([*terms.values()])
        return stacked.mean() if self._normalization == "layer_mean" else stacked.sum()

    def values(self) -> dict[str, float]:
        """The latest penalty's term of each layer call; it is the mean (`layer_mean`) or the sum of these."""
        return {label: term.item() for label, term in self._latest.items()}

    def __repr__(self) -> str:
        penalty, model = getattr(self._penalty, "__name__", self._penalty), type(self._model).__name__
        facts = f"sigma={self._sigma:g}, normalization={self._normalization!r}"
        calls = " and its functional calls" if self._functional else ""
        return f"ActivationPenalty({penalty} of {len(self.layers)} modules of {model}{calls}, {facts})"

    def detach(self) -> None:
        """Leave the model as it was; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._end(self._model, None, None)  # of a pass that an interruption ended, which calls no hook
        self._terms, self._over = {}, False
        _attached.discard(self._model)

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, which the hooks of a copied model have, pickled or not, is attached to nothing."""
        return {"_model": None, "_names": {}}

    def _start(self, module: nn.Module, inputs: Any, keywords: Any) -> None:
        if module is not self._model:  # but its copy, or its replica on another device
            return
        if self._thread not in (None, _thread()):
            raise RuntimeError("the model runs in two threads at once, whose activations the penalty cannot tell apart")
        self._end(self._model, None, None)  # of a pass that was interrupted
        if not module.training:
            return
        self._terms, self._over, self._layer = {}, False, None
        self._thread, self._with_gradient = _thread(), torch.is_grad_enabled()
        self._images = next((len(x) for x in (*inputs, *keywords.values()) if isinstance(x, Tensor) and x.dim()), None)
        # torch.compile makes one kernel of ReLU and its penalty by itself, and cannot trace `_ReLU`.
        self._fused = self._functional and self._penalty is l0 and not torch.compiler.is_compiling()
        self._functions.__enter__()

    def _end(self, module: nn.Module, _: Any, output: Any) -> None:
        if module is self._model and self._thread == _thread():
            self._thread, self._over = None, output is not None  # None: it raised
            self._functions.__exit__(None, None, None)

    def _enter(self, leaf: nn.Module, _: Any) -> None:
        self._layer, self._plain = self._names.get(leaf), type(leaf).forward is nn.ReLU.forward

    def _leave(self, leaf: nn.Module, _: Any, output: Any) -> None:
        if leaf in self._names and self._model.training and not (self._fused and self._plain):
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise TypeError(f"{self._names[leaf]} returns {kind}, no tensor: name other layers in `layers`")
            self._add(self._names[leaf], output, self._plain)
        self._layer = None

    def _add(self, name: str, x: Tensor, keeps: bool) -> None:
        """Penalise the output of a layer's call; `keeps`: its own gradient needs it, so that nothing overwrites it."""
        part = x[: self._count(x)] if self._share < 1 else x
        self._store(name, self._penalty(part if keeps else part.clone(), self._sigma), part, x)

    def _count(self, x: Tensor) -> int:
        return max(1, round(self._share * len(x)))

    def _store(self, name: str, value: Tensor, part: Tensor, x: Tensor) -> None:
        if self._thread is None:  # what gradient checkpointing computes once more, later, is no new pass
            return
        if self._with_gradient and not torch.is_grad_enabled():
            raise RuntimeError(f"{name} runs without gradients: leave it out, or checkpoint with use_reentrant=False")
        calls = sum(label.partition("#")[0] == name for label in self._terms)
        label = f"{name}#{calls + 1}" if calls else name
        self._terms[label] = value.float() * self._weight(label, part, x)

    def _weight(self, label: str, part: Tensor, x: Tensor) -> float:
        if self._normalization == "layer_mean":
            return 1 / part.numel()
        images = len(part) * (self._images or len(x)) / len(x)  # (N, T, F) may be (N T, F) inside the model
        if self._normalization == "parameters":
            return 1 / (images * self._parameters)
        if label not in self._costs:
            raise ValueError(f"costs has no entry for {label}; it has {', '.join(self._costs)}")
        return self._costs[label] / images


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()


class _Functions(TorchFunctionMode):
    """Adds to a penalty what calls a function that makes zeros, by itself or as ReLU does.

    It runs for any layers: by it torch.compile knows a penalised pass from that of a model that has no penalty.
    """

    def __init__(self, penalty: ActivationPenalty) -> None:
        super().__init__()
        self._penalty = penalty

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        penalty, keywords, name = self._penalty, keywords or {}, ZERO_FUNCTIONS.get(function)
        if penalty._fused and name == "F.relu" and (penalty._layer is None or penalty._plain):
            x = arguments[0] if arguments else keywords["input"]
            inplace = function in (torch.relu_, Tensor.relu_) or keywords.get("inplace", arguments[1:2] == (True,))
            inside = inplace and not x._is_view()  # autograd lets no function with two outputs write into a view
            output, value = _ReLU.apply(x, inside, penalty._sigma, penalty._count(x))
            penalty._store(penalty._layer or name, value, output[: penalty._count(x)], output)
            return x.copy_(output) if inplace and not inside else output
        output = function(*arguments, **keywords)
        if name and penalty._functional and penalty._layer is None:
            penalty._add(name, output, name == "F.relu")
        return output


def choose_layers(model: nn.Module, layers: str | Iterable[str] = "relu") -> list[str]:
    """Paths of the leaf modules that `layers` means (see `ActivationPenalty`).

    Raises:
        ValueError: a pattern fits none.
    """
    leaves = leaf_modules(model)
    if layers == "all":
        return [name for name, module in leaves.items() if "Dropout" not in type(module).__name__]
    if layers == "relu":
        return [name for name, module in leaves.items() if isinstance(module, ZERO_MAKERS)]
    patterns = [] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError(f"layers = {layers!r}: must be 'relu', 'all' or a list of name patterns")
    if unfit := [pattern for pattern in patterns if not fnmatch.filter(leaves, pattern)]:
        raise ValueError(f"layers: {unfit[0]!r} fits none of {', '.join(leaves)}")
    return [name for name in leaves if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
