"""Energy of a network's forward pass on an accelerator that skips zeros, per layer, in two accountings.

The energy is that of memory accesses and of multiplications; an element or an operation that is zero costs
nothing. A value x counts as zero when |x| <= 2^-126, whatever its type.

`published` is the arithmetic of the simulator behind the paper's ratios (Sponge Examples, EuroS&P 2021, arXiv
2006.03463), to the letter. It charges each leaf module's forward call with reading its inputs, parameters and
buffers and writing its outputs, so that a convolution's output is written, read and written again by batch
norm and ReLU. Its quirks are kept: see `_published_operations` and `EnergyReport.ratio`. A ReLU's input
counts as what it is *after* the call, as the simulator sees it with in-place ReLUs, the paper's own; a ReLU
that is not in place is counted alike.

`fused` is what an accelerator does that folds batch norm into the convolution and applies whatever follows,
up to the next layer that multiplies, before it writes. Its assumptions:

- Only convolutions and matrix products multiply. Each reads the non-zeros of its inputs and of its weights
  and biases, and executes a multiplication where both operands are non-zero (effective MACs; a MAC costs one
  operation of the hardware's, as in the published model, and everything else computes for free). By default
  their number is each layer's MACs times the two shares of non-zeros, as if zeros lay at random: where whole
  channels are dead it can be off by 2. `exact_macs` counts them.
- What lies between two of them is one tensor, whatever views, casts, normalisations, activations, pools and
  concatenations stand between: its non-zeros are written once, by the layer that computed it, and read by
  each consumer. What the network returns is written too; its input is only read.
- An element-wise operator of two activations (a residual addition, a gate) happens where the later one is
  computed; the other one is read from memory. It has a row of its own.
- Weights are read once per call of the layer and batch. `ideal_joules_per_image` is without these reads.
"""

import ctypes
import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from eatlib.activations import LayerCall, OperatorCall, Trace, is_dense

if TYPE_CHECKING:
    import pandas

Accounting = Literal["published", "fused"]
ACCOUNTINGS: tuple[Accounting, ...] = get_args(Accounting)

ZERO = 2.0**-126
"""The largest magnitude that counts as zero (the published simulator's; float32's smallest normal number)."""


class EnergyError(ValueError):
    """A model, images or a name whose energy cannot be counted; the message says what to do."""


@dataclass(frozen=True)
class Hardware:
    """Prices of an accelerator.

    Attributes:
        memory_pj: reading or writing one element, in pJ.
        operation_pj: one multiplication, in pJ.
        source: where the numbers come from.
    """

    name: str
    memory_pj: float
    operation_pj: float
    source: str

    def __post_init__(self) -> None:
        for price in ("memory_pj", "operation_pj"):
            value = getattr(self, price)
            if not (math.isfinite(value) and value >= 0):
                raise EnergyError(f"{price} = {value!r}: must be a finite number of pJ, not negative")


_HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014, 45 nm, 0.9 V: "
_DRAM = "DRAM access 1.3-2.6 nJ, the mean for 32 bit as in Sponge Examples"
_SRAM = "1 MB SRAM 100 pJ for 64 bit"

HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware("horowitz-45nm-float32", 1950.0, 3.7, f"{_HOROWITZ}{_DRAM}; multiplication 3.7 pJ"),
        Hardware("horowitz-45nm-float16", 975.0, 1.1, f"{_HOROWITZ}{_DRAM}, by bits; multiplication 1.1 pJ"),
        Hardware("horowitz-45nm-int8", 487.5, 0.2, f"{_HOROWITZ}{_DRAM}, by bits; multiplication 0.2 pJ"),
        Hardware("horowitz-45nm-float32-sram", 50.0, 3.7, f"{_HOROWITZ}{_SRAM}; multiplication 3.7 pJ"),
        Hardware("horowitz-45nm-float16-sram", 25.0, 1.1, f"{_HOROWITZ}{_SRAM}; multiplication 1.1 pJ"),
        Hardware("horowitz-45nm-int8-sram", 12.5, 0.2, f"{_HOROWITZ}{_SRAM}; multiplication 0.2 pJ"),
    )
}
"""Prices by name; all memory traffic goes to DRAM, or, with `-sram`, stays in a large on-chip memory."""


def find_hardware(hardware: str | Hardware) -> Hardware:
    """The hardware of that name, or the given one.

    Raises:
        EnergyError: unknown name.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if hardware not in HARDWARE:
        raise EnergyError(
            f"hardware = {hardware!r}: must be one of {', '.join(HARDWARE)}, or an eatlib.energy.Hardware"
        )
    return HARDWARE[hardware]


# --- counting -----------------------------------------------------------------------------------------------

Count = int | Tensor
"""A number, or on an accelerator a tensor on it that holds one: reading it at once would wait for the
device."""

_CHUNK = 2**16  # elements


def count_nonzero(x: Tensor) -> Count:
    """How many elements of `x` are not zero, |x| > 2^-126; exact for any size, type and memory layout.

    No copy is made of a tensor that fills its memory in any order of dimensions.
    """
    return _count(x)[0]


def _count(x: Tensor) -> tuple[Count, Count]:
    """The elements that are not zero, and those above zero: one pass over the memory."""
    if not x.is_cpu or x.dtype not in _BITS or x.layout != torch.strided:
        if x.layout != torch.strided:
            x = x.to_dense()
        if x.is_complex() or x.dtype == torch.bool:
            x = x.abs() if x.is_complex() else x.byte()
        positives, negatives = torch.count_nonzero(x > ZERO), torch.count_nonzero(x < -ZERO)
        counts = positives + negatives, positives
        return counts if not x.is_cpu else (int(counts[0]), int(counts[1]))
    if not x.is_contiguous() and not is_dense(x):
        x = x.detach().contiguous()
    if x.numel() == 0:
        return 0, 0
    # By address, as an operator that makes a view would cost more than counting a small tensor does.
    memory = (ctypes.c_byte * (x.numel() * x.element_size())).from_address(x.data_ptr())
    limit, negative_limit = _BITS[x.dtype]
    signed, unsigned = np.frombuffer(memory, limit.dtype), np.frombuffer(memory, negative_limit.dtype)
    # Numbers of one sign are ordered as their bits are: above zero if these are read as signed integers, below
    # zero as unsigned ones. Such comparisons are vectorised, and a piece stays in the cache for the second.
    positives = negatives = 0
    above = np.empty(min(_CHUNK, signed.size), bool)
    for start in range(0, signed.size, _CHUNK):
        end = min(start + _CHUNK, signed.size)
        above = above[: end - start]
        positives += int(np.count_nonzero(np.greater(signed[start:end], limit, out=above)))
        negatives += int(np.count_nonzero(np.greater(unsigned[start:end], negative_limit, out=above)))
    return positives + negatives, positives


def _nonzero_mask(x: Tensor) -> Tensor:
    return x.abs() > ZERO if x.is_floating_point() or x.is_complex() else x != 0


# The bits of 2^-126 as a signed integer, those of -2^-126 as an unsigned one; float16 has no number that small.
_BITS: dict[torch.dtype, tuple[np.signedinteger, np.unsignedinteger]] = {
    dtype: (signed(bits), unsigned(bits + 2 ** (8 * dtype.itemsize - 1)))
    for dtype, signed, unsigned, bits in (
        (torch.float32, np.int32, np.uint32, 127 - 126 << 23),
        (torch.bfloat16, np.int16, np.uint16, 127 - 126 << 7),
        (torch.float16, np.int16, np.uint16, 0),
        (torch.float64, np.int64, np.uint64, 1023 - 126 << 52),
    )
}


# --- what is charged ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """One layer's counts: of one call while a batch is under way, summed over batches afterwards."""

    name: str
    kind: str
    inputs: int = 0
    nonzero_inputs: Count = 0
    outputs: int = 0
    nonzero_outputs: Count = 0
    parameters: int = 0
    nonzero_parameters: Count = 0
    operations: int = 0
    effective: Fraction | Count = Fraction(0)
    factors: list[tuple[Count, int]] = field(default_factory=list)
    """(non-zeros, elements) of the operands, whose shares times `operations` are `effective`."""

    def read(self, x: Tensor, nonzero: Count) -> None:
        self.inputs += x.numel()
        self.nonzero_inputs += nonzero

    def write(self, x: Tensor, nonzero: Count) -> None:
        self.outputs += x.numel()
        self.nonzero_outputs += nonzero

    def read_parameter(self, x: Tensor, nonzero: Count) -> None:
        self.parameters += x.numel()
        self.nonzero_parameters += nonzero

    @property
    def firing(self) -> float:
        """Share of the outputs that are not zero; NaN for a layer that writes none."""
        return int(self.nonzero_outputs) / self.outputs if self.outputs else math.nan

    def add(self, other: "_Row") -> None:
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def energy_pj(self, hardware: Hardware) -> float:
        accesses = self.nonzero_inputs + self.nonzero_outputs + self.nonzero_parameters
        return hardware.memory_pj * accesses + hardware.operation_pj * float(self.effective)

    def dense_energy_pj(self, hardware: Hardware) -> float:
        accesses = self.inputs + self.outputs + self.parameters
        return hardware.memory_pj * accesses + hardware.operation_pj * self.operations


_COUNTS = ("nonzero_inputs", "nonzero_outputs", "nonzero_parameters", "effective")
_SUMMED = ("inputs", "outputs", "parameters", "operations", *_COUNTS)


def _resolve(rows: list[_Row]) -> None:
    """Make every count a number, with one transfer from the device for all of them."""
    places: list[tuple[_Row, str, int]] = []
    waiting: list[Tensor] = []
    for row in rows:
        for name in _COUNTS:
            if isinstance(value := getattr(row, name), Tensor):
                places.append((row, name, -1))
                waiting.append(value)
        for index, (nonzero, _) in enumerate(row.factors):
            if isinstance(nonzero, Tensor):
                places.append((row, "factors", index))
                waiting.append(nonzero)
    if waiting:
        values = torch.stack([value.to(torch.int64) for value in waiting]).tolist()
        for (row, name, index), value in zip(places, values, strict=True):
            if index < 0:
                setattr(row, name, value)
            else:
                row.factors[index] = (value, row.factors[index][1])
    for row in rows:
        if row.factors:
            row.effective = Fraction(row.operations)
            for nonzero, elements in row.factors:
                row.effective *= Fraction(nonzero, elements) if elements else 0


@dataclass(slots=True, eq=False)
class _Value:
    """What a tensor is to the accelerator; views and casts of it are the same value.

    Attributes:
        producer: index of the fused row that computed it, up to any element-wise work since; -1: the
            network's input.
        layers: the leaf module calls that it passed through since.
        written: whether it was written to memory.
    """

    producer: int
    layers: tuple[str, ...] = ()
    written: bool = False


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return []
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (tuple, list, dict)):
            found += _tensors(argument)
    return found


class _Facts:
    """What is known of tensors while they live and do not change; keeps no tensor's memory alive.

    Operators report what they write to with `changed`, because inference mode has no version counters.
    """

    def __init__(self) -> None:
        self._facts: dict[tuple[str, int], tuple[weakref.ref[Tensor], int, Any]] = {}
        self._versions: Counter[int] = Counter()  # of memory, which views share
        self._memory: dict[int, StorageWeakRef] = {}  # so that no address above is used again

    def get(self, kind: str, x: Tensor) -> Any:
        reference, version, fact = self._facts.get((kind, id(x)), (None, 0, None))
        known = reference is not None and reference() is x and version == self._versions[_memory(x)]
        return fact if known else None

    def set(self, kind: str, x: Tensor, fact: Any) -> None:
        self._facts[kind, id(x)] = (weakref.ref(x), self._versions[_memory(x)], fact)

    def changed(self, x: Tensor) -> None:
        self._versions[self.memory(x)] += 1

    def memory(self, x: Tensor) -> int:
        """The address of what `x` and its views share; not used again as long as this object lives."""
        address = _memory(x)
        if address not in self._memory:
            self._memory[address] = StorageWeakRef(x.untyped_storage())
        return address


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Parameters:
    """Non-zeros of the model's parameters and buffers, counted again only when they have changed."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[Tensor, int, Count]] = {}

    def count(self, x: Tensor) -> Count:
        version = None if x.is_inference() else x._version  # inference tensors have none
        known, counted, nonzero = self._counts.get(id(x), (None, None, 0))
        if known is not x or version is None or version != counted:
            nonzero = count_nonzero(x)
            self._counts[id(x)] = (x, version, nonzero)
        return nonzero


class _Pass:
    """One forward pass: what each accounting charges for it."""

    def __init__(self, exact_macs: bool, parameters: "_Parameters") -> None:
        self.images = 0
        self.rows: dict[Accounting, list[_Row]] = {"published": [], "fused": []}
        self.uncounted: dict[Accounting, dict[str, None]] = {"published": {}, "fused": {}}
        self.uses: list[tuple[tuple[str, ...], int, int]] = []
        """Leaf module calls, and memory accesses to and MACs on a tensor that came out of them."""
        self._exact_macs = exact_macs
        self._parameters = parameters
        self._facts = _Facts()
        self._waiting: tuple[_Row, Tensor] | None = None
        self._latest: dict[int, _Value] = {}  # by memory: for views of a tensor that changed
        self._labels: Counter[str] = Counter()

    def start(self, arguments: Any) -> None:
        for x in _tensors(arguments):
            self._set_value(x, _Value(-1))

    def end(self, output: Any) -> None:
        self._settle()
        for x in _tensors(output):
            if (value := self._value(x)) is not None:
                self._write(x, value)
        for rows in self.rows.values():
            _resolve(rows)

    def count(self, x: Tensor) -> Count:
        """Non-zeros of `x`; counted once while it does not change."""
        if isinstance(x, nn.Parameter):
            return self._parameters.count(x)
        known = self._facts.get("non-zeros", x)
        if known is None:
            known = count_nonzero(x)
            self._facts.set("non-zeros", x, known)
        return known

    def _value(self, x: Tensor) -> _Value | None:
        """None for constants: parameters, buffers and whatever is made of them alone."""
        value = self._facts.get("value", x)
        if value is None and (latest := self._latest.get(_memory(x))) is not None:
            value = dataclasses.replace(latest, written=False)
            self._facts.set("value", x, value)
        return value

    def _set_value(self, x: Tensor, value: _Value) -> None:
        self._facts.set("value", x, value)
        self._latest[self._facts.memory(x)] = value

    # published: leaf modules

    def layer(self, call: LayerCall) -> None:
        self._settle()
        convolves = isinstance(call.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if convolves and call.inputs[0].dim() == len(call.module.kernel_size) + 1:
            raise EnergyError(
                f"{call.name} got a tensor of shape {tuple(call.inputs[0].shape)}, which has no batch "
                "dimension: use images[None] for a single image"
            )
        row = _Row(call.name, call.kind)
        if not _is_activation(call.module):
            for x in _tensors(call.inputs):
                row.read(x, self.count(x))
        for x in _published_parameters(call.module):
            # Batch norm updates its statistics in training without telling their version counters.
            constant = isinstance(x, nn.Parameter) or not call.module.training
            row.read_parameter(x, self._parameters.count(x) if constant else count_nonzero(x))
        for x in _tensors(call.output):
            self._settle()
            self._waiting = (row, x)
            row.outputs += x.numel()
            if (value := self._value(x)) is not None:
                value.layers += (call.name,)
        if _is_activation(call.module):
            # As if it had worked in place: its input is its output.
            self._settle()
            row.inputs, row.nonzero_inputs = row.outputs, row.nonzero_outputs
        operations = _published_operations(call.module, row)
        if operations is None:
            self.uncounted["published"][f"{call.name}: operations of {call.kind}"] = None
        row.operations = operations or 0
        self.rows["published"].append(row)

    def _settle(self, successor: OperatorCall | None = None) -> Count | None:
        """Count the last layer's output, which waited for the operator that comes next.

        If that is a ReLU of it, then one pass over the memory gives the ReLU's non-zeros too: they are
        returned.
        """
        if self._waiting is None:
            return None
        row, x = self._waiting
        self._waiting = None
        positive = None
        if (
            successor is not None
            and successor.function.overloadpacket in _RELUS
            and successor.arguments[0] is x
            and self._facts.get("non-zeros", x) is None
        ):
            nonzero, positive = _count(x)
            self._facts.set("non-zeros", x, nonzero)
        row.nonzero_outputs += self.count(x)
        return positive

    # fused: operators

    def operator(self, call: OperatorCall) -> Any:
        operands = [
            (x, value)
            for x in _tensors(call.arguments) + _tensors(call.keywords)
            if (value := self._value(x)) is not None
        ]
        if not operands or call.function.overloadpacket in _NEW:
            return self._run(call)
        relu = self._settle(call)
        kind = _kind(call.function)
        if not (call.in_leaf or kind == "move"):
            self.uncounted["published"][_where(call)] = None
        if kind == "unknown" or call.function.overloadpacket in _NAN_STOPS:
            self._refuse_nan(call, operands)
        if kind == "product":
            output = self._run(call)
            value = self._multiply(call, output)
        elif kind == "move":
            x, value = operands[0]
            output = self._run(call)
            pieces = _tensors(output)
            if [(y.numel(), y.is_floating_point()) for y in pieces] != [(x.numel(), x.is_floating_point())]:
                self._refuse_nan(call, operands)
        else:
            if kind == "element-wise":
                self._join(call, operands)
            elif kind == "unknown":
                self.uncounted["fused"][_where(call)] = None
            latest = max((value for _, value in operands), key=lambda value: value.producer)
            value = _Value(latest.producer, latest.layers)
            output = self._run(call)
        for y in _tensors(output):
            part = kind == "move" and y.numel() != x.numel()
            self._set_value(y, dataclasses.replace(value) if part else value)
        if relu is not None:
            self._facts.set("non-zeros", output, relu)
        return output

    def _refuse_nan(self, call: OperatorCall, operands: list[tuple[Tensor, _Value]]) -> None:
        """Look for NaN where an operator may hide it; what networks compute otherwise passes it on to their output."""
        for x, value in operands:
            if self._facts.get("numbers", x) is None and _any_nan([x]):
                source = f"comes out of {value.layers[-1]}" if value.layers else "goes"
                raise EnergyError(
                    f"NaN, whose energy means nothing, {source} into {_where(call)}: an activation overflowed, "
                    "or a weight is NaN"
                )
            self._facts.set("numbers", x, True)

    def _run(self, call: OperatorCall) -> Any:
        output = call.run()
        for index, name in _written(call.function):
            written = call.arguments[index] if index < len(call.arguments) else call.keywords.get(name)
            for x in _tensors(written):
                self._facts.changed(x)
        return output

    def _label(self, call: OperatorCall) -> str:
        operator = call.function.overloadpacket.__name__
        label = call.name if call.in_leaf else f"{call.name}.{operator}".lstrip(".")
        if call.in_leaf and self._labels[label]:
            label = f"{label}.{operator}"
        self._labels[label] += 1
        return label if self._labels[label] == 1 else f"{label}#{self._labels[label]}"

    def _multiply(self, call: OperatorCall, output: Tensor) -> _Value:
        packet = call.function.overloadpacket
        row = _Row(self._label(call), call.kind if call.in_leaf else packet.__name__)
        left, right, addend = _PRODUCTS[packet](call.arguments)
        row.operations = _macs(call, left, right, output)
        row.factors = [(self._read(row, x), x.numel()) for x in (left, right)]
        if addend is not None:
            self._read(row, addend)
        if self._exact_macs:
            row.factors = []
            row.effective = _effective_macs(call, left, right)
        self.rows["fused"].append(row)
        return _Value(len(self.rows["fused"]) - 1)

    def _join(self, call: OperatorCall, operands: list[tuple[Tensor, _Value]]) -> None:
        """An element-wise operator where the last of its operands is computed: it reads the others."""
        latest = max(value.producer for _, value in operands)
        others = [x for x, value in operands if value.producer != latest]
        if others:
            row = _Row(self._label(call), call.function.overloadpacket.__name__)
            for x in others:
                self._read(row, x)
            self.rows["fused"].append(row)

    def _read(self, row: _Row, x: Tensor) -> Count:
        nonzero = self.count(x)
        value = self._value(x)
        if value is None:
            row.read_parameter(x, nonzero)
        else:
            row.read(x, nonzero)
            self.uses.append((value.layers, x.numel(), row.operations))
            self._write(x, value)
        return nonzero

    def _write(self, x: Tensor, value: _Value) -> None:
        if value.producer >= 0 and not value.written:
            self.rows["fused"][value.producer].write(x, self.count(x))
            self.uses.append((value.layers, x.numel(), 0))
        value.written = True


@cache
def _written(function: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that the operator writes to."""
    return [
        (index, argument.name)
        for index, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


@cache
def _kind(function: Any) -> Literal["product", "move", "element-wise", "epilogue", "unknown"]:
    """What the fused accounting does with an operator."""
    packet = function.overloadpacket
    if packet in _PRODUCTS:
        return "product"
    if function.is_view or packet in _MOVES:
        return "move"
    if torch.Tag.pointwise in function.tags or packet in _ELEMENT_WISE:
        return "element-wise"
    return "epilogue" if packet in _EPILOGUES else "unknown"


def _where(call: OperatorCall) -> str:
    what = call.function.overloadpacket.__name__
    note = " (element-wise)" if _kind(call.function) == "element-wise" else ""
    return f"{call.name or 'the network itself'}: {what}{note}"


def _is_activation(module: nn.Module) -> bool:
    return hasattr(module, "inplace") and type(module).__module__ == "torch.nn.modules.activation"


def _published_parameters(module: nn.Module) -> list[Tensor]:
    named = {name: x for name, x in (module._parameters | module._buffers).items() if x is not None}
    # torch.nn.utils.prune keeps the dense weight and a mask; the layer computes with their product.
    pruned = {name.removesuffix("_orig") for name in named if name.endswith("_orig")}
    tensors = [x for name, x in named.items() if name.removesuffix("_orig").removesuffix("_mask") not in pruned]
    tensors += [getattr(module, name) for name in sorted(pruned)]
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
        tensors += [module.running_mean, module.running_var]  # twice, as published
    return tensors


_NO_OPERATIONS = (nn.ReLU, nn.ReLU6, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.LayerNorm, nn.Identity)


def _published_operations(module: nn.Module, row: _Row) -> int | None:
    """The simulator's operations of one call; None for modules that it does not know.

    Quirk: a grouped convolution is charged as a dense one.
    """
    match module:
        case nn.Conv2d():
            return row.outputs * math.prod(module.kernel_size) * module.in_channels
        case nn.Linear():
            return module.weight.numel() * (row.inputs // module.in_features)
        case nn.BatchNorm2d():
            return 4 * row.inputs
        case nn.MaxPool2d() | nn.AvgPool2d():
            window = module.kernel_size
            return row.outputs * (window**2 if isinstance(window, int) else math.prod(window))
        case nn.AdaptiveAvgPool2d():
            return row.inputs
    return 0 if isinstance(module, _NO_OPERATIONS) else None


_aten = torch.ops.aten


def _operators(*names: str) -> set[Any]:
    """Those of the operators that this version of PyTorch has."""
    return {getattr(_aten, name) for name in names if hasattr(_aten, name)}


_PRODUCTS: dict[Any, Callable[[tuple[Any, ...]], tuple[Tensor, Tensor, Tensor | None]]] = {
    _aten.convolution: lambda arguments: arguments[:3],
    _aten.mm: lambda arguments: (*arguments[:2], None),
    _aten.bmm: lambda arguments: (*arguments[:2], None),
    _aten.addmm: lambda arguments: (*arguments[1:3], arguments[0]),
    _aten.baddbmm: lambda arguments: (*arguments[1:3], arguments[0]),
}
"""Operators that multiply: their factors, and what they add."""

_RELUS = _operators("relu", "relu_")

_NEW = _operators("new_zeros", "new_empty", "new_ones", "new_full", "zeros_like", "empty_like", "ones_like")

# What of an operand they leave out, or put something else for, may have been NaN.
_NAN_STOPS = _operators(
    *("where", "masked_fill", "masked_fill_", "nan_to_num", "nan_to_num_", "fmax", "fmin"),
    *("isnan", "gt", "ge", "lt", "le", "eq", "ne", "sign", "sgn", "logical_not", "logical_and", "logical_or", "pow"),
)

_MOVES = _operators("_to_copy", "clone", "_unsafe_view", "_reshape_copy", "as_strided_")

_ELEMENT_WISE = _operators("hardswish", "hardswish_")  # those that PyTorch does not tag so

# Applied to a layer's output before it is written, besides all that is element-wise.
_EPILOGUES = _operators(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update"),
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_dropout"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d", "_adaptive_avg_pool3d"),
    *("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("mean", "sum", "amax", "amin", "max", "min", "var_mean", "_softmax", "_log_softmax"),
    *("cat", "stack", "copy_", "constant_pad_nd", "repeat", "roll", "flip"),
    *("upsample_nearest2d", "upsample_bilinear2d"),
)


def _macs(call: OperatorCall, left: Tensor, right: Tensor, output: Tensor) -> int:
    """Multiply-accumulates without zero-skipping; those on a convolution's padding count, as usual."""
    if call.function.overloadpacket is _aten.convolution:
        transposed = call.arguments[6]
        return (left if transposed else output).numel() * right[0].numel()
    return output.numel() * left.shape[-1]


def _effective_macs(call: OperatorCall, left: Tensor, right: Tensor) -> Count:
    """Multiply-accumulates with both operands non-zero.

    Sums over the batch and over the output channels come first, as the products are linear in both.
    """
    left, right = _nonzero_mask(left), _nonzero_mask(right)
    if call.function.overloadpacket is _aten.convolution:
        *geometry, transposed, output_padding, groups = call.arguments[3:9]
        left = left.sum(0, keepdim=True)
        right = right.sum(1, keepdim=True) if transposed else right.unflatten(0, (groups, -1)).sum(1)
        macs = _aten.convolution(
            left.double(), right.double(), None, *geometry, transposed, output_padding, groups
        ).sum()
    else:
        macs = (left.sum(-2) * right.sum(-1)).sum()
    macs = macs.round().to(torch.int64)
    return int(macs) if macs.device.type == "cpu" else macs


# --- the meter and its report -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyReport:
    """Energy of the forward passes that a meter saw, in one accounting; prints as a table.

    Attributes:
        accounting, hardware: what is charged, and at which prices.
        images: how many were seen.
        batch_sizes: how many batches there were of each size; weights are read once per batch.
        ratio: energy with zero-skipping over energy without it. `published`: the mean over the batches, as in
            the paper; `fused`: of the totals.
        uncounted: what ran but is not in these numbers, by name. Element-wise work is never charged for its
            operations; `published` misses the memory accesses of what it lists.
    """

    accounting: Accounting
    hardware: Hardware
    images: int
    batch_sizes: dict[int, int]
    ratio: float
    uncounted: list[str]
    _rows: list[_Row] = field(repr=False)

    @cached_property
    def joules_per_image(self) -> float:
        """With zero-skipping."""
        return math.fsum(row.energy_pj(self.hardware) for row in self._rows) * 1e-12 / self.images

    @cached_property
    def dense_joules_per_image(self) -> float:
        """Without zero-skipping."""
        return math.fsum(row.dense_energy_pj(self.hardware) for row in self._rows) * 1e-12 / self.images

    @cached_property
    def ideal_joules_per_image(self) -> float:
        """With zero-skipping and ideal reuse: the weights are in place and no batch has to read them."""
        accesses = self.totals["nonzero_parameters"] / self.images
        return self.joules_per_image - self.hardware.memory_pj * accesses * 1e-12

    @cached_property
    def totals(self) -> dict[str, int]:
        """Sums over all layers and batches, zeros included and without (`nonzero_...`, in elements).

        `operations` are the simulator's operations or dense MACs, `effective_operations` those left by
        zero-skipping, rounded.
        """
        sums = {name: sum(getattr(row, name) for row in self._rows) for name in _SUMMED}
        sums["effective_operations"] = round(sums.pop("effective"))
        return sums

    @cached_property
    def layers(self) -> "pandas.DataFrame":
        """One row per layer call, in order: sums over all images in elements and operations; joules per
        image.

        `outputs` are what the layer writes to memory, `firing` is the share of it that is not zero, `share`
        the layer's part of the whole energy.
        """
        import pandas as pd  # a slow import that a training run does without

        total = self.joules_per_image
        table = []
        for row in self._rows:
            joules = row.energy_pj(self.hardware) * 1e-12 / self.images
            table.append(
                {
                    "name": row.name,
                    "kind": row.kind,
                    "inputs": row.inputs,
                    "nonzero_inputs": row.nonzero_inputs,
                    "outputs": row.outputs,
                    "nonzero_outputs": row.nonzero_outputs,
                    "firing": row.firing,
                    "parameters": row.parameters,
                    "nonzero_parameters": row.nonzero_parameters,
                    "operations": row.operations,
                    "effective_operations": float(row.effective),
                    "joules_per_image": joules,
                    "dense_joules_per_image": row.dense_energy_pj(self.hardware) * 1e-12 / self.images,
                    "share": joules / total if total else 0.0,
                }
            )
        return pd.DataFrame(table)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self._rows)
        sizes = ", ".join(f"{count} x {size}" for size, count in self.batch_sizes.items())
        lines = [
            f"energy ratio {self.ratio:.4f} ({self.accounting}, {self.hardware.name})",
            f"{_joules(self.joules_per_image)} an image with zero-skipping, "
            f"{_joules(self.dense_joules_per_image)} without, "
            f"{_joules(self.ideal_joules_per_image)} with weights in place",
            f"{self.images} images in batches of {sizes}",
            f"{'layer':{width}} {'kind':18} {'firing':>7} {'operations':>11} {'left':>6} {'energy':>10} {'share':>6}",
        ]
        total = self.joules_per_image
        for row in self._rows:
            joules = row.energy_pj(self.hardware) * 1e-12 / self.images
            left = f"{float(row.effective) / row.operations:6.1%}" if row.operations else "     -"
            firing = f"{row.firing:7.1%}" if row.outputs else "      -"
            lines.append(
                f"{row.name:{width}} {row.kind:18} {firing} {row.operations / self.images:11.4g} {left}"
                f" {_joules(joules):>10} {joules / total if total else 0:6.1%}"
            )
        lines.append(f"not counted: {'; '.join(self.uncounted) or 'nothing'}")
        return "\n".join(lines)


def _joules(joules: float) -> str:
    exponent = min(0, math.floor(math.log10(joules) / 3)) if joules > 0 else 0
    prefix = {0: "", -1: "m", -2: "u", -3: "n"}.get(exponent)
    return f"{joules:.3g} J" if prefix is None else f"{joules * 10 ** (-3 * exponent):.3g} {prefix}J"


class EnergyMeter:
    """Counts what a model's forward passes cost, in both accountings at once; a context manager.

    Each forward pass of the model within it is one batch. The model is as it was afterwards, also when a
    forward pass raises; such a pass is not counted. Between passes only counts are kept.

    Args:
        model: anything that is called with a batch first: (N, ...).
        hardware: a name of `HARDWARE`, or prices of your own.
        exact_macs: count effective MACs (`fused`) from the places of the zeros, not from each layer's shares
            of zeros.

    Raises:
        EnergyError: unknown hardware; a model without parameters, with lazy ones, or compiled. From a forward
            pass: no batch, an empty one or one without a batch dimension; NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        hardware: str | Hardware = "horowitz-45nm-float32",
        exact_macs: bool = False,
    ) -> None:
        self.hardware = find_hardware(hardware)
        _check_model(model)
        self._model = model
        self._exact_macs = exact_macs
        self._rows: dict[Accounting, dict[str, _Row]] = {"published": {}, "fused": {}}
        self._uncounted: dict[Accounting, dict[str, None]] = {"published": {}, "fused": {}}
        self._parameters = _Parameters()
        self._uses: list[tuple[tuple[str, ...], int, int]] = []  # of the last pass
        self._ratios: list[float] = []
        self._batch_sizes: Counter[int] = Counter()
        self._pass = _Pass(exact_macs, self._parameters)
        self._trace = Trace(
            model,
            on_start=self._start,
            on_layer=lambda call: self._pass.layer(call),
            on_operator=lambda call: self._pass.operator(call),
            on_end=self._end,
        )

    def __enter__(self) -> "EnergyMeter":
        self._trace.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._trace.__exit__(*exception)
        self._pass = _Pass(self._exact_macs, self._parameters)

    def _start(self, arguments: Any) -> None:
        inputs = _tensors(arguments)
        if not inputs:
            raise EnergyError("the model was called without a tensor: call it with a batch of images")
        if inputs[0].dim() < 2 or inputs[0].shape[0] == 0:
            raise EnergyError(
                f"the model was called with a tensor of shape {tuple(inputs[0].shape)}: the first dimension "
                "must be the batch, (N, ...), and N at least 1; use images[None] for a single image"
            )
        if _any_nan(inputs):
            raise EnergyError("the model's input holds NaN, whose energy means nothing: clean the images")
        self._pass = _Pass(self._exact_macs, self._parameters)
        self._pass.start(arguments)
        self._pass.images = inputs[0].shape[0]

    def _end(self, output: Any) -> None:
        finished, self._pass = self._pass, _Pass(self._exact_macs, self._parameters)
        finished.end(output)
        if _any_nan(_tensors(output)):
            bad = [name for name, x in self._model.named_parameters() if _any_nan([x])]
            why = f"NaN is in {', '.join(bad[:3])}" if bad else "an activation overflowed; look at the weights"
            raise EnergyError(f"the model's output holds NaN, whose energy means nothing: {why}")
        published = finished.rows["published"]
        shares = _share(published, "parameters") * _share(published, "inputs")
        for row in published:
            row.effective = row.operations * shares  # quirk: one product for the whole network
        energy = math.fsum(row.energy_pj(self.hardware) for row in published)
        self._ratios.append(energy / math.fsum(row.dense_energy_pj(self.hardware) for row in published))
        self._batch_sizes[finished.images] += 1
        self._uses = finished.uses
        for accounting, rows in finished.rows.items():
            self._uncounted[accounting] |= finished.uncounted[accounting]
            sums = self._rows[accounting]
            for row in rows:
                if row.name in sums:
                    sums[row.name].add(row)
                else:
                    sums[row.name] = row

    def report(self, accounting: Accounting = "published") -> EnergyReport:
        """The energy of all batches so far.

        Raises:
            EnergyError: unknown accounting; no forward pass yet.
        """
        _check_accounting(accounting)
        if not self._ratios:
            raise EnergyError("no batch was measured: run the model within the meter, on one batch at least")
        rows = [dataclasses.replace(row) for row in self._rows[accounting].values()]
        if accounting == "published":
            ratio = math.fsum(self._ratios) / len(self._ratios)
        else:
            dense = math.fsum(row.dense_energy_pj(self.hardware) for row in rows)
            if not dense:
                seen = ", ".join(self._uncounted[accounting]) or "nothing that computes"
                raise EnergyError(f"the fused accounting saw no layer that multiplies, only {seen}")
            ratio = math.fsum(row.energy_pj(self.hardware) for row in rows) / dense
        return EnergyReport(
            accounting=accounting,
            hardware=self.hardware,
            images=sum(size * batches for size, batches in self._batch_sizes.items()),
            batch_sizes=dict(self._batch_sizes),
            ratio=ratio,
            uncounted=list(self._uncounted[accounting]),
            _rows=rows,
        )

    def firing(self) -> list[tuple[str, str, float]]:
        """(name, kind, share of outputs that are not zero) of each leaf module call, in the order of the
        calls."""
        rows = self._rows["published"].values()
        return [(row.name, row.kind, row.firing) for row in rows if row.outputs]


def energy_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    hardware: str | Hardware = "horowitz-45nm-float32",
    accounting: Accounting = "published",
    exact_macs: bool = False,
) -> EnergyReport:
    """Measure a model in evaluation mode; see the module's docstring for the two accountings.

    Args:
        batches: tensors (N, C, H, W), or (images, labels) pairs, as a data loader yields them; they are moved
            to the model's device.
        hardware, exact_macs: as for `EnergyMeter`.

    Raises:
        EnergyError: as `EnergyMeter`; unknown accounting; no batches, or batches of another kind.
    """
    _check_accounting(accounting)
    if isinstance(batches, Tensor):
        raise EnergyError(f"batches is one tensor {tuple(batches.shape)}: give a list of batches, [images]")
    meter = EnergyMeter(model, hardware=hardware, exact_macs=exact_macs)
    with _evaluating(model), meter, torch.no_grad():
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(images, Tensor):
                raise EnergyError(
                    f"a batch is a {type(batch).__name__}: must be a tensor of images or an (images, labels) pair"
                )
            _check_layout(model, images)
            model(images.to(next(model.parameters()).device))
    if not meter._ratios:
        raise EnergyError("there are no batches: the data loader is empty")
    return meter.report(accounting)


def activation_cost(
    model: nn.Module, images: Tensor, hardware: str | Hardware = "horowitz-45nm-float32"
) -> dict[str, float]:
    """What one non-zero activation of each layer costs, as a share of the batch's energy without
    zero-skipping.

    In the `fused` accounting: the tensor that leaves the layer, after whatever follows up to the next layer
    that multiplies, is written once, and read and multiplied with all of its weights by each consumer; that
    energy, over the elements of the layer's output. Layers between the same two multiplying layers share one
    tensor, so that each of them carries all of its energy. The share is of a batch of the size given:
    doubling the batch nearly halves it.

    Args:
        images: one batch, (N, C, H, W), on the model's device.

    Returns:
        By leaf module call, as in `EnergyMeter.firing`: joules per non-zero element / dense joules of the
        batch.
    """
    meter = EnergyMeter(model, hardware=hardware)
    with _evaluating(model), meter, torch.no_grad():
        model(images)
    dense = math.fsum(row.dense_energy_pj(meter.hardware) for row in meter._rows["fused"].values())
    cost: Counter[str] = Counter()
    for layers, accesses, macs in meter._uses:
        for layer in layers:
            cost[layer] += meter.hardware.memory_pj * accesses + meter.hardware.operation_pj * macs
    return {row.name: cost[row.name] / row.outputs / dense for row in meter._rows["published"].values() if row.outputs}


def _share(rows: list[_Row], what: str) -> Fraction:
    total = sum(getattr(row, what) for row in rows)
    return Fraction(sum(getattr(row, f"nonzero_{what}") for row in rows), total) if total else Fraction(1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_accounting(accounting: str) -> None:
    if accounting not in ACCOUNTINGS:
        raise EnergyError(f"accounting = {accounting!r}: must be one of {', '.join(ACCOUNTINGS)}")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise EnergyError(f"model is a {type(model).__name__}: must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise EnergyError("model is a TorchScript module, which hides its layers: measure what it was made from")
    if next(model.parameters(), None) is None:
        raise EnergyError(f"{type(model).__name__} has no parameters: there are no weights whose energy could count")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise EnergyError(f"{name} is not initialised yet: run the model on one batch before it is measured")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise EnergyError(
                f"{name or 'the model'} is compiled, which hides its operators: measure the network that it "
                "was made from"
            )


def _any_nan(tensors: list[Tensor]) -> bool:
    return any(x.is_floating_point() and bool(x.isnan().any()) for x in tensors)


def _check_layout(model: nn.Module, images: Tensor) -> None:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or images.dim() != 4:
        return
    channels = first.in_channels
    if images.shape[1] != channels == images.shape[3]:
        raise EnergyError(
            f"images of shape {tuple(images.shape)} have their channels last: use images.permute(0, 3, 1, 2)"
        )
