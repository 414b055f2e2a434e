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

import collections
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from eatlib.energy.count import ZERO, Counter, Row, tensors
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


@dataclass(slots=True, eq=False)
class Value:
    """What a tensor is to the accelerator; views and casts of it are the same value.

    Attributes:
        producer: index of the row that computed it, up to any element-wise work since; -1: the network's input.
        layers: the leaf module calls that it passed through since.
        written: whether it was written to memory.
    """

    producer: int
    layers: tuple[str, ...] = ()
    written: bool = False


class FusedPass:
    """One forward pass.

    Attributes:
        rows: one for each layer that multiplies, and each element-wise operator of two activations.
        uncounted: the names of what ran but is not in these numbers.
        accesses, macs: by leaf module call, those to and on the tensor that came out of it, if it were dense.
    """

    def __init__(self, inputs: object, counter: Counter, exact_macs: bool) -> None:
        self.rows: list[Row] = []
        self.uncounted: dict[str, None] = {}
        self.accesses: collections.Counter[str] = collections.Counter()
        self.macs: collections.Counter[str] = collections.Counter()
        self._counter, self._exact_macs = counter, exact_macs
        self._values: dict[Hashable, Value] = {}
        self._latest: dict[int, Value] = {}  # by memory: for other views of a tensor that changed
        self._labels: collections.Counter[str] = collections.Counter()
        for x in tensors(inputs):
            self._set_value(x, Value(-1))

    def operands(self, call: Operator) -> list[tuple[Tensor, Value]]:
        """Those that depend on the network's input; the others are constants, such as parameters."""
        if call.function.overloadpacket in _NEW:
            return []
        return [(x, value) for x in tensors((call.arguments, call.keywords)) if (value := self._value(x)) is not None]

    def operator(self, call: Operator, operands: list[tuple[Tensor, Value]]) -> Any:
        """Run an operator, charge it, and return its output."""
        kind = kind_of(call.function)
        if not operands or kind == "move":
            output = self._run(call)
            for x, value in operands[:1]:
                for y in tensors(output):  # each part of a tensor is written on its own
                    self._set_value(y, value if y.numel() == x.numel() else replace(value))
            return output
        if kind == "product":
            output = self._run(call)
            value = self._multiply(call, output)
        else:
            latest = max((value for _, value in operands), key=lambda value: value.producer)
            others = [x for x, value in operands if value.producer != latest.producer]
            if kind == "element-wise" and others:
                row = self._add_row(call, call.function.overloadpacket.__name__)
                for x in others:
                    self._read(row, x)
            elif kind == "unknown":
                self.uncounted[describe(call)] = None
            output, value = self._run(call), Value(latest.producer, latest.layers)
        for y in tensors(output):
            self._set_value(y, value)
        return output

    def layer(self, name: str, output: object) -> None:
        """A leaf module has returned `output`, whose operators ran before."""
        for x in tensors(output):
            if (value := self._value(x)) is not None:
                value.layers += (name,)

    def end(self, output: object) -> None:
        for x in tensors(output):
            if (value := self._value(x)) is not None:
                self._write(x, value)

    def _value(self, x: Tensor) -> Value | None:
        """None for constants: parameters, buffers and whatever is made of them alone."""
        place, latest = self._counter.place(x), self._latest.get(self._counter.memory(x))
        if place not in self._values and latest is not None:
            self._values[place] = replace(latest, written=False)
        return self._values.get(place)

    def _set_value(self, x: Tensor, value: Value) -> None:
        self._values[self._counter.place(x)] = self._latest[self._counter.memory(x)] = value

    def _run(self, call: Operator) -> Any:
        output = call.run()
        if call.function._schema.is_mutable:
            for x in tensors(output):  # an operator that changes a tensor returns it
                self._counter.changed(x)
        return output

    def _add_row(self, call: Operator, kind: str) -> Row:
        operator = call.function.overloadpacket.__name__
        name = call.name if call.in_leaf else f"{call.name}.{operator}".lstrip(".")
        if call.in_leaf and self._labels[name]:
            name = f"{name}.{operator}"
        self._labels[name] += 1
        self.rows.append(Row(name if self._labels[name] == 1 else f"{name}#{self._labels[name]}", kind))
        return self.rows[-1]

    def _multiply(self, call: Operator, output: Tensor) -> Value:
        row = self._add_row(call, call.kind if call.in_leaf else call.function.overloadpacket.__name__)
        left, right = (call.arguments[index] for index in _FACTORS[call.function.overloadpacket])
        row.operations = _macs(call, left, right, output)
        for x in tensors(call.arguments[:3]):
            self._read(row, x)
        if self._exact_macs:
            row.effective_operations = _effective_macs(call, left, right)
        else:
            nonzero, elements = self._counter(left) * self._counter(right), left.numel() * right.numel()
            row.effective_operations = row.operations * nonzero / max(1, elements)
        return Value(len(self.rows) - 1)

    def _read(self, row: Row, x: Tensor) -> None:
        value = self._value(x)
        row.charge("parameters" if value is None else "inputs", x, self._counter(x))
        if value is not None:
            self._use(value, x.numel(), row.operations)
            self._write(x, value)

    def _write(self, x: Tensor, value: Value) -> None:
        if value.producer >= 0 and not value.written:
            self.rows[value.producer].charge("outputs", x, self._counter(x))
            self._use(value, x.numel(), 0)
        value.written = True

    def _use(self, value: Value, accesses: int, macs: int) -> None:
        for layer in value.layers:
            self.accesses[layer] += accesses
            self.macs[layer] += macs


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
