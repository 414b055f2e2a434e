"""Energy of a network's forward pass on an accelerator that skips zeros, per layer, in two accountings.

The energy is that of memory accesses and of multiplications; an element or an operation that is zero costs nothing.
A value x counts as zero when |x| <= 2^-126, whatever its type.

`published` is the arithmetic of the simulator behind the paper's ratios (Sponge Examples, EuroS&P 2021, arXiv
2006.03463), to the letter. It charges each leaf module's forward call with reading its inputs, parameters and buffers
and writing its outputs, so that a convolution's output is written, read and written again by batch norm and ReLU.
Its quirks are kept: see `_published_operations` and `EnergyReport.ratio`. A ReLU's input counts as what it is *after*
the call, as the simulator sees it with in-place ReLUs, the paper's own; a ReLU that is not in place is counted alike.

`fused` is what an accelerator does that folds batch norm into the convolution and applies whatever follows, up to the
next layer that multiplies, before it writes. Its assumptions:

- Only convolutions and matrix products multiply. Each reads the non-zeros of its inputs and of its weights and
  biases, and executes a multiplication where both operands are non-zero (effective MACs; a MAC costs one operation
  of the hardware's, as in the published model, and everything else computes for free).
- What lies between two of them is one tensor, whatever views, casts, normalisations, activations and pools stand
  between: its non-zeros are written once, by the layer that computed it, and read by each consumer. What the network
  returns is written too; its input is only read.
- An element-wise operator of two activations (a residual addition, a gate) happens where the later one is computed; the
  other one is read from memory. It has a row of its own.
- Weights are read once per call of the layer and batch. `ideal_joules_per_image` is without these reads.
"""

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from eatlib.activations import LayerCall, OperatorCall, Trace

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


# --- counting -------------------------------------------------------------------------------------------------------

Count = int | Tensor
"""A number, or on an accelerator a tensor on it that holds one: reading it at once would wait for the device."""

_CHUNK = 2**17  # elements that stay in a core's cache between the three steps below


def count_nonzero(x: Tensor) -> Count:
    """How many elements of `x` are not zero, |x| > 2^-126; exact for any size, type and memory layout.

    NaN counts as not zero. No copy is made of a tensor that fills its memory in any order of dimensions.
    """
    x = x.detach()
    if x.is_complex():
        return count_nonzero(x.abs())
    if x.device.type != "cpu":
        return torch.count_nonzero(_nonzero_mask(x))
    if x.layout != torch.strided:
        x = x.to_dense()
    flat = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).contiguous().view(-1)
    if not x.is_floating_point():
        return int(np.count_nonzero(flat.numpy()))
    bits, threshold = _BITS[x.element_size()], _threshold(x.dtype)
    values = flat.view(bits[0]).numpy().view(bits[1])
    # Shifting the sign out makes magnitudes comparable as integers: three vectorised steps in a core's cache.
    size = min(_CHUNK, values.size)
    magnitude, nonzero = np.empty(size, bits[1]), np.empty(size, bool)
    total = 0
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        np.left_shift(part, 1, out=magnitude[: part.size])
        np.greater(magnitude[: part.size], threshold, out=nonzero[: part.size])
        total += int(np.count_nonzero(nonzero[: part.size]))
    return total


def _nonzero_mask(x: Tensor) -> Tensor:
    return x.abs() > ZERO if x.is_floating_point() else x != 0


_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}


@cache
def _threshold(dtype: torch.dtype) -> Any:
    """The bits of 2^-126 without the sign; 0 in float16, whose smallest number is larger."""
    signed, unsigned = _BITS[dtype.itemsize]
    bits = torch.tensor(ZERO, dtype=dtype).view(signed).item()
    return unsigned(bits << 1)


# --- what is charged ------------------------------------------------------------------------------------------------


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
        producer: index of the fused row that computed it, up to any element-wise work since; -1: the network's input.
        layers: the leaf module calls that it passed through since.
        written: whether it was written to memory.
    """

    producer: int
    layers: tuple[str, ...] = ()
    written: bool = False


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _tensors(argument)
    elif isinstance(arguments, dict):
        for argument in arguments.values():
            yield from _tensors(argument)


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


class _Pass:
    """One forward pass: what each accounting charges for it."""

    def __init__(self, exact_macs: bool) -> None:
        self.images = 0
        self.rows: dict[Accounting, list[_Row]] = {"published": [], "fused": []}
        self.uncounted: dict[Accounting, dict[str, None]] = {"published": {}, "fused": {}}
        self.uses: dict[str, tuple[int, int]] = {}
        """By leaf module call: memory accesses to what became of its output, and MACs on it, zeros included."""
        self._exact_macs = exact_macs
        self._facts = _Facts()
        self._latest: dict[int, _Value] = {}  # by memory: for views of a tensor that changed
        self._labels: Counter[str] = Counter()

    def start(self, arguments: Any) -> None:
        for x in _tensors(arguments):
            self._set_value(x, _Value(-1))

    def end(self, output: Any) -> None:
        for x in _tensors(output):
            if (value := self._value(x)) is not None:
                self._write(x, value)
        for rows in self.rows.values():
            _resolve(rows)

    def count(self, x: Tensor) -> Count:
        """Non-zeros of `x`; counted once while it does not change."""
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
        row = _Row(call.name, call.kind)
        for x in _tensors(call.output):
            row.write(x, self.count(x))
            if (value := self._value(x)) is not None:
                value.layers += (call.name,)
        if _is_activation(call.module):
            # As if it had worked in place: its input is its output.
            row.inputs, row.nonzero_inputs = row.outputs, row.nonzero_outputs
        else:
            for x in _tensors(call.inputs):
                row.read(x, self.count(x))
        for x in _published_parameters(call.module):
            row.read_parameter(x, self.count(x))
        operations = _published_operations(call.module, row)
        if operations is None:
            self.uncounted["published"][f"{call.name}: operations of {call.kind}"] = None
        row.operations = operations or 0
        self.rows["published"].append(row)

    # fused: operators

    def operator(self, call: OperatorCall) -> Any:
        packet = call.function.overloadpacket
        operands = [
            (x, value) for x in _tensors((call.arguments, call.keywords)) if (value := self._value(x)) is not None
        ]
        if not operands:
            return self._run(call)
        moves = call.function.is_view or packet in _MOVES
        pointwise = torch.Tag.pointwise in call.function.tags
        where = f"{call.name or 'the network itself'}: {packet.__name__}{' (element-wise)' if pointwise else ''}"
        if not (call.in_leaf or moves):
            self.uncounted["published"][where] = None
        if packet in _PRODUCTS:
            output = self._run(call)
            value = self._multiply(call, output)
        elif moves:
            x, value = operands[0]
            output = self._run(call)
            if output.numel() != x.numel():
                value = dataclasses.replace(value)
        else:
            if pointwise:
                self._join(call, operands)
            elif packet not in _EPILOGUES:
                self.uncounted["fused"][where] = None
            latest = max((value for _, value in operands), key=lambda value: value.producer)
            value = _Value(latest.producer, latest.layers)
            output = self._run(call)
        for x in _tensors(output):
            self._set_value(x, value)
        return output

    def _run(self, call: OperatorCall) -> Any:
        output = call.run()
        if call.function._schema.is_mutable:
            for x in _written(call):
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
            self._use(value, x.numel(), row.operations)
            self._write(x, value)
        return nonzero

    def _write(self, x: Tensor, value: _Value) -> None:
        if value.producer >= 0 and not value.written:
            self.rows["fused"][value.producer].write(x, self.count(x))
            self._use(value, x.numel(), 0)
        value.written = True

    def _use(self, value: _Value, accesses: int, macs: int) -> None:
        for layer in value.layers:
            before = self.uses.get(layer, (0, 0))
            self.uses[layer] = (before[0] + accesses, before[1] + macs)


def _written(call: OperatorCall) -> Iterator[Tensor]:
    """The arguments that the operator writes to."""
    for index, argument in enumerate(call.function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            positional = index < len(call.arguments)
            yield from _tensors(call.arguments[index] if positional else call.keywords.get(argument.name))


def _is_activation(module: nn.Module) -> bool:
    return hasattr(module, "inplace") and type(module).__module__ == "torch.nn.modules.activation"


def _published_parameters(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        yield from (module.running_mean, module.running_var)  # twice, as published


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

_MOVES = _operators("_to_copy", "clone", "_unsafe_view", "_reshape_copy")

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
        if transposed:
            right = right.sum(1, keepdim=True)
        else:
            right = right.unflatten(0, (groups, -1)).sum(1)
        macs = _aten.convolution(
            left.double(), right.double(), None, *geometry, transposed, output_padding, groups
        ).sum()
    else:
        macs = (left.sum(-2) * right.sum(-1)).sum()
    macs = macs.round().to(torch.int64)
    return int(macs) if macs.device.type == "cpu" else macs


# --- the meter and its report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyReport:
    """Energy of the forward passes that a meter saw, in one accounting.

    Attributes:
        ratio: energy with zero-skipping over energy without it. `published`: the mean over the batches;
            `fused`: of the totals.
        joules_per_image, dense_joules_per_image: with and without zero-skipping.
        ideal_joules_per_image: with zero-skipping, and the weights read once for ever.
        batch_sizes: how many batches there were of each size.
        uncounted: what ran but is not in these numbers.
    """

    accounting: Accounting
    hardware: Hardware
    images: int
    batch_sizes: dict[int, int]
    ratio: float
    rows: list[_Row] = field(repr=False)
    uncounted: list[str]

    @property
    def joules_per_image(self) -> float:
        return math.fsum(row.energy_pj(self.hardware) for row in self.rows) * 1e-12 / self.images

    @property
    def dense_joules_per_image(self) -> float:
        return math.fsum(row.dense_energy_pj(self.hardware) for row in self.rows) * 1e-12 / self.images

    @property
    def ideal_joules_per_image(self) -> float:
        weights = self.hardware.memory_pj * sum(int(row.nonzero_parameters) for row in self.rows) * 1e-12
        return self.joules_per_image - weights / self.images

    @property
    def totals(self) -> dict[str, int]:
        return {name: sum(getattr(row, name) for row in self.rows) for name in _SUMMED if name != "effective"}

    @cached_property
    def layers(self) -> Any:
        import pandas as pd  # a slow import that a training run does without

        energies = [row.energy_pj(self.hardware) for row in self.rows]
        total = math.fsum(energies)
        return pd.DataFrame(
            {
                "name": row.name,
                "kind": row.kind,
                "inputs": row.inputs,
                "nonzero_inputs": row.nonzero_inputs,
                "outputs": row.outputs,
                "nonzero_outputs": row.nonzero_outputs,
                "firing": int(row.nonzero_outputs) / row.outputs if row.outputs else float("nan"),
                "parameters": row.parameters,
                "nonzero_parameters": row.nonzero_parameters,
                "operations": row.operations,
                "effective_operations": float(row.effective),
                "joules_per_image": energy * 1e-12 / self.images,
                "share": energy / total,
            }
            for row, energy in zip(self.rows, energies, strict=True)
        )


class EnergyMeter:
    """Counts what a model's forward passes cost, in both accountings at once; a context manager.

    Each forward pass of the model within it is one batch.

    Args:
        hardware: a name of `HARDWARE`, or prices of your own.
        exact_macs: count effective MACs from the places of the zeros, not from the layers' shares of zeros.

    Raises:
        EnergyError: unknown hardware; a model without parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        hardware: str | Hardware = "horowitz-45nm-float32",
        exact_macs: bool = False,
    ) -> None:
        self.hardware = find_hardware(hardware)
        self._exact_macs = exact_macs
        self._rows: dict[Accounting, dict[str, _Row]] = {"published": {}, "fused": {}}
        self._uncounted: dict[Accounting, dict[str, None]] = {"published": {}, "fused": {}}
        self._ratios: list[float] = []
        self._batch_sizes: Counter[int] = Counter()
        self._pass = _Pass(exact_macs)
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

    def _start(self, arguments: Any) -> None:
        self._pass = _Pass(self._exact_macs)
        self._pass.start(arguments)
        self._pass.images = next(_tensors(arguments)).shape[0]

    def _end(self, output: Any) -> None:
        finished = self._pass
        finished.end(output)
        self._pass = _Pass(self._exact_macs)
        self._last = finished
        published = finished.rows["published"]
        shares = _share(published, "parameters") * _share(published, "inputs")
        for row in published:
            row.effective = row.operations * shares  # quirk: one product for the whole network
        for accounting, rows in finished.rows.items():
            for row in rows:
                if row.name in (sums := self._rows[accounting]):
                    sums[row.name].add(row)
                else:
                    sums[row.name] = row
            self._uncounted[accounting] |= finished.uncounted[accounting]
        energy = math.fsum(row.energy_pj(self.hardware) for row in published)
        dense = math.fsum(row.dense_energy_pj(self.hardware) for row in published)
        self._ratios.append(energy / dense)
        self._batch_sizes[finished.images] += 1

    def report(self, accounting: Accounting = "published") -> EnergyReport:
        """The energy of all batches so far.

        Raises:
            EnergyError: unknown accounting; no forward pass yet.
        """
        if accounting not in ACCOUNTINGS:
            raise EnergyError(f"accounting = {accounting!r}: must be one of {', '.join(ACCOUNTINGS)}")
        if not self._ratios:
            raise EnergyError("no forward pass was measured: run the model within the meter first")
        rows = [dataclasses.replace(row) for row in self._rows[accounting].values()]
        if accounting == "published":
            ratio = math.fsum(self._ratios) / len(self._ratios)
        else:
            ratio = math.fsum(row.energy_pj(self.hardware) for row in rows) / math.fsum(
                row.dense_energy_pj(self.hardware) for row in rows
            )
        return EnergyReport(
            accounting,
            self.hardware,
            sum(size * batches for size, batches in self._batch_sizes.items()),
            dict(self._batch_sizes),
            ratio,
            rows,
            list(self._uncounted[accounting]),
        )

    def _activation_joules(self) -> dict[str, float]:
        """Energy of one element of each leaf module call's output in the last pass, were none zero."""
        prices = {}
        for row in self._last.rows["published"]:
            accesses, operations = self._last.uses.get(row.name, (0, 0))
            energy = self.hardware.memory_pj * accesses + self.hardware.operation_pj * operations
            prices[row.name] = energy * 1e-12 / row.outputs
        return prices

    def firing(self) -> list[tuple[str, str, float]]:
        """(name, kind, share of outputs that are not zero) of each leaf module call, in the order of the calls."""
        return [
            (row.name, row.kind, int(row.nonzero_outputs) / row.outputs)
            for row in self._rows["published"].values()
            if row.outputs
        ]


def _share(rows: list[_Row], what: str) -> Fraction:
    return Fraction(sum(getattr(row, f"nonzero_{what}") for row in rows), sum(getattr(row, what) for row in rows))


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
        batches: tensors, or (images, labels) pairs, as a data loader yields them.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with EnergyMeter(model, hardware=hardware, exact_macs=exact_macs) as meter, torch.no_grad():
            for batch in batches:
                model(batch if isinstance(batch, Tensor) else batch[0])
    finally:
        for module, training in modes.items():
            module.training = training
    return meter.report(accounting)


def activation_cost(
    model: nn.Module,
    images: Tensor,
    hardware: str | Hardware = "horowitz-45nm-float32",
) -> dict[str, float]:
    """What one non-zero activation of each layer costs, as a share of the batch's energy without zero-skipping.

    In the `fused` accounting: the tensor that leaves the layer, after whatever follows up to the next layer that
    multiplies, is written once, and read and multiplied by each consumer; that energy, over the elements of the
    layer's output. Layers between the same two multiplying layers share one tensor, so each carries all of its energy.

    Args:
        images: one batch, (N, C, H, W).

    Returns:
        By leaf module call, as in `EnergyMeter.firing`: the share of one element of its output in the batch.
    """
    meter = EnergyMeter(model, hardware=hardware)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with meter, torch.no_grad():
            model(images)
    finally:
        for module, training in modes.items():
            module.training = training
    dense = meter.report("fused").dense_joules_per_image * len(images)
    return {name: joules / dense for name, joules in meter._activation_joules().items()}
