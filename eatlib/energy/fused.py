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
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from eatlib.energy.count import ZERO, Row, count_nonzero, finish, tensors
from eatlib.energy.published import charge_layer, skip_operations
from eatlib.energy.trace import Operator
from eatlib.hardware import Accounting

_FACTORS = {"convolution": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Operators that multiply, and which of their first three arguments they do; the third, a bias, is added."""
_MOVES = ("_to_copy", "clone", "_unsafe_view", "_reshape_copy", "as_strided_")  # besides views
# Applied to a layer's output before it is written, as all that is element-wise is.
_EPILOGUES = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
    _batch_norm_with_update _batch_norm_no_update native_layer_norm native_group_norm _fused_rms_norm native_dropout
    max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d
    avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mean sum amax amin max min var_mean _softmax _log_softmax cat
    stack copy_ constant_pad_nd repeat roll flip upsample_nearest2d upsample_bilinear2d hardswish hardswish_
"""


@cache
def kind_of(function: Any) -> Literal["product", "constant", "move", "element-wise", "epilogue", "unknown"]:
    """What this accounting does with an operator."""
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
    layers: tuple[str, ...] = ()  # the leaf module calls that it passed through since
    written: bool = False  # to memory


class ForwardPass:
    """One forward pass, in both accountings.

    It counts each tensor once for as long as it does not change, and keeps none of them alive.

    Attributes:
        rows: by accounting: one for each call of a leaf module (`published`); one for each layer that multiplies, and
            each element-wise operator of two activations (`fused`).
        uncounted: by accounting, the names of what ran but is not in these numbers.
        uses: of tensors in memory: the leaf module calls that one came out of, its elements, and the MACs with it.
    """

    def __init__(self, inputs: list[Tensor], exact_macs: bool) -> None:
        self.rows: dict[Accounting, list[Row]] = {"published": [], "fused": []}
        self.uncounted: dict[Accounting, dict[str, None]] = {"published": {}, "fused": {}}
        self.uses: list[tuple[tuple[str, ...], int, int]] = []
        self._exact_macs = exact_macs
        self._counts: dict[Hashable, int | Tensor] = {}
        self._values: dict[Hashable, Value] = {}  # by place, and the latest by memory: for other views of what changed
        self._versions: Counter[int] = Counter()  # of memory; inference mode is without PyTorch's own
        self._storages: dict[int, StorageWeakRef] = {}
        self._labels: Counter[str] = Counter()
        for x in inputs:
            self._set_value(x, Value(-1))

    def operator(self, call: Operator) -> Any:
        """Run an operator, charge it, and return its output."""
        kind = kind_of(call.function)
        operands = [(x, value) for x in tensors((call.arguments, call.keywords)) if (value := self._value(x))]
        if kind == "constant" or not operands:  # the network's input has no part in it
            return self._run(call)
        label = f"{call.name or 'the network itself'}: {call.function.overloadpacket.__name__}"
        if not call.in_leaf and kind != "move":
            self.uncounted["published"][f"{label} (element-wise)" if kind == "element-wise" else label] = None
        if kind == "unknown":
            self.uncounted["fused"][label] = None
        x, value = max(operands, key=lambda operand: operand[1].producer)
        others = [other for other, earlier in operands if earlier.producer != value.producer]
        if kind == "element-wise" and others:  # it happens where its latest operand is computed, and reads the others
            row = self._new_row(call, call.function.overloadpacket.__name__)
            for other in others:
                self._read(row, other)
        output = self._run(call)
        if kind == "product":
            self._multiply(call, output)
            value = Value(len(self.rows["fused"]) - 1)
        elif kind != "move":
            value = Value(value.producer, value.layers)
        for y in tensors(output):
            part = kind == "move" and y.numel() != x.numel()  # it is written on its own
            self._set_value(y, replace(value) if part else value)
        return output

    def layer(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A leaf module has been called; its operators ran before."""
        row = Row(name, type(module).__name__)
        if not charge_layer(row, module, inputs, output, self._count):
            self.uncounted["published"][f"{name}: operations of {row.kind}"] = None
        self.rows["published"].append(row)
        for x in tensors(output):
            if value := self._value(x):
                value.layers += (name,)

    def end(self, output: Any) -> None:
        """The network has returned `output`."""
        for x in tensors(output):
            self._write(x)
        finish(self.rows["published"] + self.rows["fused"])
        skip_operations(self.rows["published"])

    def _run(self, call: Operator) -> Any:
        output = call.run()
        if call.function._schema.is_mutable:
            for x in tensors(output):  # an operator that changes a tensor returns it
                self._versions[x.untyped_storage()._cdata] += 1
        return output

    def _place(self, x: Tensor) -> tuple[int, Hashable]:
        """What `x` shares with its views alone, and which of their elements it is, until an operator writes to them."""
        storage = x.untyped_storage()
        memory = storage._cdata
        if memory not in self._storages:
            self._storages[memory] = StorageWeakRef(storage)  # while this lives, the address is not used again
        dimensions = tuple(sorted(zip(x.stride(), x.shape, strict=True)))
        return memory, (self._versions[memory], x.dtype, x.storage_offset(), dimensions)

    def _count(self, x: Tensor) -> int | Tensor:
        place = self._place(x)
        if place not in self._counts:
            self._counts[place] = count_nonzero(x)
        return self._counts[place]

    def _value(self, x: Tensor) -> Value | None:
        """None for constants: parameters, buffers and whatever is made of them alone."""
        place = self._place(x)
        if place not in self._values and place[0] in self._values:
            self._values[place] = replace(self._values[place[0]], written=False)
        return self._values.get(place)

    def _set_value(self, x: Tensor, value: Value) -> None:
        place = self._place(x)
        self._values[place] = self._values[place[0]] = value

    def _new_row(self, call: Operator, kind: str) -> Row:
        operator = call.function.overloadpacket.__name__
        name = call.name if call.in_leaf else f"{call.name}.{operator}".lstrip(".")
        if call.in_leaf and self._labels[name]:
            name = f"{name}.{operator}"
        self._labels[name] += 1
        row = Row(name if self._labels[name] == 1 else f"{name}#{self._labels[name]}", kind)
        self.rows["fused"].append(row)
        return row

    def _multiply(self, call: Operator, output: Tensor) -> None:
        operator = call.function.overloadpacket.__name__
        row = self._new_row(call, call.kind if call.in_leaf else operator)
        left, right = (call.arguments[index] for index in _FACTORS[operator])
        row.operations = output.numel() * left.shape[-1]
        if operator == "convolution":  # the products on the padding count, as usual
            transposed = call.arguments[6]
            row.operations = (left if transposed else output).numel() * right[0].numel()
        for x in tensors(call.arguments[:3]):
            self._read(row, x)
        nonzero = self._count(left) * self._count(right)
        row.effective_operations = row.operations * nonzero / max(1, left.numel() * right.numel())
        if self._exact_macs:
            row.effective_operations = _effective_macs(call, left, right)

    def _read(self, row: Row, x: Tensor) -> None:
        value = self._value(x)
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


def _effective_macs(call: Operator, left: Tensor, right: Tensor) -> Tensor:
    """Multiply-accumulates with both operands non-zero.

    Sums over the batch and over the output channels come first, as the products are linear in both.
    """
    left, right = ((x.abs() > ZERO).double() for x in (left, right))
    if call.function.overloadpacket.__name__ != "convolution":
        return (left.sum(-2) * right.sum(-1)).sum()
    *geometry, transposed, output_padding, groups = call.arguments[3:9]
    left = left.sum(0, keepdim=True)
    right = right.sum(1, keepdim=True) if transposed else right.unflatten(0, (groups, -1)).sum(1)
    return torch.convolution(left, right, None, *geometry, transposed, output_padding, groups).sum().round()
