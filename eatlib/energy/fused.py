"""`fused`: an accelerator that folds what follows a layer into it, and skips zeros.

It applies batch norm, activations and all else up to the next layer that multiplies before it writes. Its assumptions:

- Only convolutions and matrix products multiply. Each reads the non-zeros of its inputs and of its weights and biases,
  and executes a multiplication where both operands are non-zero (effective MACs; a MAC costs one operation of the
  hardware's, as in the published model, and everything else computes for free). By default their number is each layer's
  MACs times the two shares of non-zeros, as if zeros lay at random: where whole channels are dead it can be off by 2.
  `exact_macs` counts them.
- What lies between two of them is one tensor, whatever views, casts, normalisations, activations, pools and
  concatenations stand between: its non-zeros are written once, by the layer that computed it, and read by each
  consumer. What the network returns is written too; its input is only read.
- An element-wise operator of two activations (a residual addition, a gate) happens where the later one is computed; the
  other one is read from memory. It has a row of its own.
- Weights are read once per call of the layer and batch.
- Attention is what its formula says: two matrix products a head, between which the attention weights, softmax applied,
  are written and read as any other tensor is.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eatlib.energy.count import ZERO, Row, count_nonzero, finish, tensors
from eatlib.energy.published import charge_layer, skip_operations
from eatlib.hardware import Accounting, EnergyError

_FACTORS = {"convolution": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Operators that multiply, and which of their first three arguments they do; the third, a bias, is added."""
_MOVES = ["_to_copy", "clone", "_unsafe_view", "_reshape_copy", "as_strided_"]  # besides views
_MOVES += ["dequantize_per_tensor", "dequantize_per_channel", "_assert_tensor_metadata"]  # of an exported int8 network
# Applied to a layer's output before it is written, as all that is element-wise is.
_EPILOGUES = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
    _batch_norm_with_update _batch_norm_no_update native_layer_norm native_group_norm _fused_rms_norm native_dropout
    max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d
    avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mean sum amax amin max min var_mean _softmax _log_softmax cat
    _safe_softmax linalg_vector_norm stack copy_ constant_pad_nd repeat roll flip upsample_nearest2d upsample_bilinear2d
    hardswish hardswish_ threshold threshold_ quantize_per_tensor
"""


@cache
def kind_of(function: Any) -> Literal["product", "constant", "move", "element-wise", "epilogue", "unknown"]:
    """What this accounting does with an operator; a constant's values do not depend on the network's input."""
    name = function.overloadpacket.__name__
    if name in _FACTORS:
        return "product"
    if name.startswith("new_") or name.endswith("_like"):
        return "constant"
    if function.is_view or name in _MOVES:
        return "move"
    if torch.Tag.pointwise in function.tags:
        return "element-wise"
    return "epilogue" if name in _EPILOGUES.split() else "unknown"


@dataclass
class Value:
    """What a tensor is to the accelerator; views and casts of it are the same value."""

    producer: int  # index of the row that computed it, up to any element-wise work since; -1: the network's input
    layers: Counter[str] = field(default_factory=Counter)  # leaf module calls since, by their share of it
    written: bool = False  # to memory


class ForwardPass(TorchDispatchMode):
    """The latest forward pass, in both accountings. It is told of modules' calls, and sees all operators.

    Functional calls (`F.relu`, `x += y`) are no modules' calls, but they are operators like any other. Each tensor is
    counted once for as long as it does not change, and none is kept alive.

    Attributes:
        running: name and kind of the modules that run, from the model inwards; kind is "" where one has modules itself.
        images: in the batch.
        rows: by accounting: one for each call of a leaf module (`published`); one for each layer that multiplies, and
            each element-wise operator of two activations (`fused`).
        uncounted: by accounting, the names of what ran but is not in these numbers.
        uses: of tensors in memory: the leaf module calls that one came out of, its elements, and the MACs with it.
    """

    def __init__(self, exact_macs: bool) -> None:
        super().__init__()
        self._exact_macs = exact_macs
        self.running: list[tuple[str, str]] = []

    def start(self, inputs: list[Tensor]) -> None:
        """The model is about to be called; forgets the pass before, also one that was interrupted."""
        self.running.clear()
        if not inputs or inputs[0].dim() < 2 or len(inputs[0]) == 0:
            shape = f"a tensor of shape {tuple(inputs[0].shape)}" if inputs else "no tensor"
            raise EnergyError(f"the model was called with {shape}: must be a batch, (N, ...) with N at least 1")
        self.images = len(inputs[0])
        self.rows: dict[Accounting, list[Row]] = {"published": [], "fused": []}
        self.uncounted: dict[Accounting, dict[str, None]] = {"published": {}, "fused": {}}
        self.uses: list[tuple[Counter[str], int, int]] = []
        # By memory, then by part of it, until an operator writes to that memory; None: the latest value there.
        self._counts: WeakKeyDictionary[UntypedStorage, dict[Hashable, int | Tensor]] = WeakKeyDictionary()
        self._values: WeakKeyDictionary[UntypedStorage, dict[Hashable, Value]] = WeakKeyDictionary()
        self._calls: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        for x in inputs:
            self._set_value(x, Value(-1))

    def enter(self, path: str, module: nn.Module) -> None:
        """A module is about to be called; `path#2` names the second call of a leaf module."""
        kind = type(module).__name__ if next(module.children(), None) is None else ""
        name = path or kind
        self._calls[name] += 1
        self.running.append((f"{name}#{self._calls[name]}" if kind and self._calls[name] > 1 else name, kind))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The module entered last has returned `output`, None if it raised; `inputs` are as they are after the call."""
        name, kind = self.running.pop()
        if output is None:
            return
        with torch._C._DisableTorchDispatch():
            if kind:
                row = Row(name, kind)
                self.rows["published"].append(row)
                if not charge_layer(row, module, inputs, output, self._count):
                    self.uncounted["published"][f"{name}: operations of {kind}"] = None
                for x in tensors(output):
                    if value := self._value(x):
                        value.layers = Counter({**value.layers, name: 1})
            if not self.running:  # the model itself has returned
                if any(x.isnan().any() for x in tensors(output)):
                    raise EnergyError("the model's output holds NaN, which has no energy: look at images and weights")
                for x in tensors(output):
                    self._write(x)
                finish(self.rows["published"] + self.rows["fused"])
                skip_operations(self.rows["published"])

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Run an operator, charge it, and return its output."""
        if not self.running:
            return function(*arguments, **(keywords or {}))
        if torch.is_inference_mode_enabled() and function._can_decompose():
            # Inference mode hands over conv2d and linear as they are; elsewhere PyTorch takes them apart first.
            with self:
                return function.decompose(*arguments, **(keywords or {}))
        operands = [(x, value) for x in tensors((arguments, keywords)) if (value := self._value(x))]
        kind = kind_of(function) if operands else "constant"
        (module, leaf), operator = self.running[-1], function.overloadpacket.__name__
        label = f"{module or 'the network itself'}: {operator}"
        if not leaf and kind not in ("constant", "move"):
            self.uncounted["published"][f"{label} (element-wise)" if kind == "element-wise" else label] = None
        if kind == "unknown":
            self.uncounted["fused"][label] = None
        x, value = max(operands, key=lambda operand: operand[1].producer, default=(None, None))
        others = [other for other, earlier in operands if earlier.producer != value.producer]
        if kind == "element-wise" and others:  # it happens where its latest operand is computed, and reads the others
            row = self._new_row(operator, operator)
            for other in others:
                self._read(row, other)
        output = function(*arguments, **(keywords or {}))
        if function._schema.is_mutable:
            for y in tensors(output):  # an operator that changes a tensor returns it
                self._counts.pop(y.untyped_storage(), None)
                self._values.pop(y.untyped_storage(), None)
        if kind == "constant":
            return output
        if kind == "product":
            self._multiply(operator, arguments, output)
            value = Value(len(self.rows["fused"]) - 1)
        elif operator in ("cat", "stack"):
            value = Value(value.producer)
            for y, part in operands:
                value.layers.update({layer: share * y.numel() / output.numel() for layer, share in part.layers.items()})
        elif kind != "move":
            value = Value(value.producer, value.layers)
        for y in tensors(output):
            part = kind == "move" and y.numel() != x.numel()  # it is written on its own
            self._set_value(y, replace(value) if part else value)
        return output

    def _count(self, x: Tensor) -> int | Tensor:
        counts, part = self._counts.setdefault(x.untyped_storage(), {}), _part(x)
        if part not in counts:
            counts[part] = count_nonzero(x)
        return counts[part]

    def _value(self, x: Tensor) -> Value | None:
        """None for constants: parameters, buffers and whatever is made of them alone."""
        values, part = self._values.get(x.untyped_storage(), {}), _part(x)
        if values and part not in values:
            values[part] = replace(values[None], written=False)
        return values.get(part)

    def _set_value(self, x: Tensor, value: Value) -> None:
        self._values.setdefault(x.untyped_storage(), {}).update({_part(x): value, None: value})

    def _new_row(self, operator: str, kind: str) -> Row:
        module, leaf = self.running[-1]
        name = module if leaf and not self._labels[module] else f"{module}.{operator}".lstrip(".")
        self._labels[name] += 1
        row = Row(name if self._labels[name] == 1 else f"{name}#{self._labels[name]}", kind)
        self.rows["fused"].append(row)
        return row

    def _multiply(self, operator: str, arguments: Any, output: Tensor) -> None:
        row = self._new_row(operator, self.running[-1][1] or operator)
        left, right = (arguments[index] for index in _FACTORS[operator])
        row.operations = output.numel() * left.shape[-1]
        if operator == "convolution":  # the products on the padding count, as usual
            row.operations = (left if arguments[6] else output).numel() * right[0].numel()  # transposed, or not
        for x in tensors(arguments[:3]):
            self._read(row, x)
        nonzero = self._count(left) * self._count(right)
        row.effective_operations = row.operations * nonzero / max(1, left.numel() * right.numel())
        if self._exact_macs:
            row.effective_operations = _effective_macs(operator, arguments, left, right)

    def _read(self, row: Row, x: Tensor) -> None:
        value = self._value(x)
        if value is None:  # weights that are expanded over a batch are read once
            x = x[tuple(slice(0, 1 if step == 0 else None) for step in x.stride())]
        row.charge("inputs" if value else "parameters", x, self._count(x))
        if value:
            self.uses.append((value.layers, x.numel(), row.operations))
            self._write(x)

    def _write(self, x: Tensor) -> None:
        value = self._value(x)
        if value and value.producer >= 0 and not value.written:
            self.rows["fused"][value.producer].charge("outputs", x, self._count(x))
            self.uses.append((value.layers, x.numel(), 0))
            value.written = True


def _part(x: Tensor) -> Hashable:
    """Which elements of its memory a tensor has, in whatever order."""
    return x.dtype, x.storage_offset(), tuple(sorted(zip(x.stride(), x.shape, strict=True)))


def _effective_macs(operator: str, arguments: Any, left: Tensor, right: Tensor) -> Tensor:
    """Multiply-accumulates with both operands non-zero.

    Sums over the batch and over the output channels come first, as the products are linear in both.
    """
    left, right = ((x.abs() > ZERO).double() for x in (left, right))
    if operator != "convolution":
        return (left.sum(-2) * right.sum(-1)).sum()
    transposed, _, groups = arguments[6:]
    right = right.sum(1, keepdim=True) if transposed else right.unflatten(0, (groups, -1)).sum(1)
    return torch.convolution(left.sum(0, keepdim=True), right, None, *arguments[3:]).sum().round()
