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
from torch import Tensor

from eatlib.energy.count import ZERO, NonZeros, Row, tensors
from eatlib.energy.trace import Operator

_aten = torch.ops.aten

_FACTORS = {_aten.convolution: (0, 1), _aten.mm: (0, 1), _aten.bmm: (0, 1), _aten.addmm: (1, 2), _aten.baddbmm: (1, 2)}
"""Operators that multiply, and which of their first three arguments they do; the third, a bias, is added."""


def _operators(names: str) -> set[Any]:
    """Those of the operators that this version of PyTorch has."""
    return {getattr(_aten, name) for name in names.split() if hasattr(_aten, name)}


_NEW = _operators("new_zeros new_empty new_ones new_full zeros_like empty_like ones_like")
_MOVES = _operators("_to_copy clone _unsafe_view _reshape_copy as_strided_")
_ELEMENT_WISE = _operators("hardswish hardswish_")  # besides those that PyTorch tags so
# Applied to a layer's output before it is written, as all that is element-wise is.
_EPILOGUES = _operators("""
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
    _batch_norm_with_update _batch_norm_no_update native_layer_norm native_group_norm _fused_rms_norm native_dropout
    max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d
    avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mean sum amax amin max min var_mean _softmax _log_softmax cat
    stack copy_ constant_pad_nd repeat roll flip upsample_nearest2d upsample_bilinear2d
""")


@cache
def kind_of(function: Any) -> Literal["product", "move", "element-wise", "epilogue", "unknown"]:
    """What this accounting does with an operator."""
    operator = function.overloadpacket
    if operator in _FACTORS:
        return "product"
    if function.is_view or operator in _MOVES:
        return "move"
    if torch.Tag.pointwise in function.tags or operator in _ELEMENT_WISE:
        return "element-wise"
    return "epilogue" if operator in _EPILOGUES else "unknown"


def describe(call: Operator) -> str:
    """The operator and where it ran, for the lists of what is not counted."""
    note = " (element-wise)" if kind_of(call.function) == "element-wise" else ""
    return f"{call.name or 'the network itself'}: {call.function.overloadpacket.__name__}{note}"


@dataclass
class Value:
    """What a tensor is to the accelerator; views and casts of it are the same value."""

    producer: int  # index of the row that computed it, up to any element-wise work since; -1: the network's input
    layers: tuple[str, ...] = ()  # the leaf module calls that it passed through since
    written: bool = False  # to memory


class FusedPass:
    """One forward pass.

    Attributes:
        rows: one for each layer that multiplies, and each element-wise operator of two activations.
        uncounted: the names of what ran but is not in these numbers.
        uses: of tensors in memory: the leaf module calls that one came out of, its elements, and the MACs with it.
    """

    def __init__(self, inputs: list[Tensor], counter: NonZeros, exact_macs: bool) -> None:
        self.rows: list[Row] = []
        self.uncounted: dict[str, None] = {}
        self.uses: list[tuple[tuple[str, ...], int, int]] = []
        self._counter, self._exact_macs = counter, exact_macs
        self._values: dict[Hashable, Value] = {}
        self._latest: dict[int, Value] = {}  # by memory: for other views of a tensor that changed
        self._labels: Counter[str] = Counter()
        for x in inputs:
            self._set_value(x, Value(-1))

    def operands(self, call: Operator) -> list[tuple[Tensor, Value]]:
        """Those that depend on the network's input; the others are constants, such as parameters."""
        if call.function.overloadpacket in _NEW:
            return []
        return [(x, value) for x in tensors((call.arguments, call.keywords)) if (value := self._value(x))]

    def operator(self, call: Operator, operands: list[tuple[Tensor, Value]]) -> Any:
        """Run an operator, charge it, and return its output."""
        if not operands:
            return self._run(call)
        kind = kind_of(call.function)
        x, value = max(operands, key=lambda operand: operand[1].producer)
        if kind == "element-wise":
            self._join(call, [other for other, earlier in operands if earlier.producer != value.producer])
        elif kind == "unknown":
            self.uncounted[describe(call)] = None
        output = self._run(call)
        if kind == "product":
            value = self._multiply(call, output)
        elif kind != "move":
            value = Value(value.producer, value.layers)
        for y in tensors(output):
            part = kind == "move" and y.numel() != x.numel()  # it is written on its own
            self._set_value(y, replace(value) if part else value)
        return output

    def layer(self, name: str, output: object) -> None:
        """A leaf module has returned `output`; its operators ran before."""
        for x in tensors(output):
            if value := self._value(x):
                value.layers += (name,)

    def end(self, output: object) -> None:
        for x in tensors(output):
            if value := self._value(x):
                self._write(x, value)

    def _value(self, x: Tensor) -> Value | None:
        """None for constants: parameters, buffers and whatever is made of them alone."""
        place = self._counter.place(x)
        if place not in self._values and place[0] in self._latest:
            self._values[place] = replace(self._latest[place[0]], written=False)
        return self._values.get(place)

    def _set_value(self, x: Tensor, value: Value) -> None:
        place = self._counter.place(x)
        self._values[place] = self._latest[place[0]] = value

    def _run(self, call: Operator) -> Any:
        output = call.run()
        if call.function._schema.is_mutable:
            for x in tensors(output):  # an operator that changes a tensor returns it
                self._counter.changed(x)
        return output

    def _new_row(self, call: Operator, kind: str) -> Row:
        operator = call.function.overloadpacket.__name__
        name = call.name if call.in_leaf else f"{call.name}.{operator}".lstrip(".")
        if call.in_leaf and self._labels[name]:
            name = f"{name}.{operator}"
        self._labels[name] += 1
        self.rows.append(Row(name if self._labels[name] == 1 else f"{name}#{self._labels[name]}", kind))
        return self.rows[-1]

    def _multiply(self, call: Operator, output: Tensor) -> Value:
        operator = call.function.overloadpacket
        row = self._new_row(call, call.kind if call.in_leaf else operator.__name__)
        left, right = (call.arguments[index] for index in _FACTORS[operator])
        row.operations = _macs(call, left, right, output)
        for x in tensors(call.arguments[:3]):
            self._read(row, x)
        nonzero = self._counter(left) * self._counter(right)
        row.effective_operations = row.operations * nonzero / max(1, left.numel() * right.numel())
        if self._exact_macs:
            row.effective_operations = _effective_macs(call, left, right)
        return Value(len(self.rows) - 1)

    def _join(self, call: Operator, others: list[Tensor]) -> None:
        """The operator happens where its latest operand is computed: it reads the others."""
        if others:
            row = self._new_row(call, call.function.overloadpacket.__name__)
            for x in others:
                self._read(row, x)

    def _read(self, row: Row, x: Tensor) -> None:
        value = self._value(x)
        row.charge("inputs" if value else "parameters", x, self._counter(x))
        if value:
            self.uses.append((value.layers, x.numel(), row.operations))
            self._write(x, value)

    def _write(self, x: Tensor, value: Value) -> None:
        if value.producer >= 0 and not value.written:
            self.rows[value.producer].charge("outputs", x, self._counter(x))
            self.uses.append((value.layers, x.numel(), 0))
        value.written = True


def _macs(call: Operator, left: Tensor, right: Tensor, output: Tensor) -> int:
    """Multiply-accumulates without zero-skipping; those on a convolution's padding count, as usual."""
    if call.function.overloadpacket is _aten.convolution:
        transposed = call.arguments[6]
        return (left if transposed else output).numel() * right[0].numel()
    return output.numel() * left.shape[-1]


def _effective_macs(call: Operator, left: Tensor, right: Tensor) -> float | Tensor:
    """Multiply-accumulates with both operands non-zero.

    Sums over the batch and over the output channels come first, as the products are linear in both.
    """
    left, right = ((x.abs() > ZERO).double() for x in (left, right))
    if call.function.overloadpacket is _aten.convolution:
        *geometry, transposed, output_padding, groups = call.arguments[3:9]
        left = left.sum(0, keepdim=True)
        right = right.sum(1, keepdim=True) if transposed else right.unflatten(0, (groups, -1)).sum(1)
        macs = _aten.convolution(left, right, None, *geometry, transposed, output_padding, groups).sum().round()
    else:
        macs = (left.sum(-2) * right.sum(-1)).sum()
    return macs.item() if macs.is_cpu else macs
