"""Counting: the non-zeros of a tensor, the tensors of one forward pass, and a layer's row of the report."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from eatlib.hardware import Totals

ZERO = 2.0**-126
"""The largest magnitude that counts as zero (the published simulator's; float32's smallest normal number)."""
_PART = 2**16  # elements that stay in the cache from one step of a count to the next


def count_nonzero(x: Tensor) -> int | Tensor:
    """How many elements of `x` are not zero, |x| > 2^-126, NaN included; exact for any size, type and memory layout.

    Returns:
        An int; on an accelerator, which an int would have to wait for, a float64 tensor that holds one.
    """
    if not x.is_cpu or x.dtype == torch.bfloat16:
        zeros = torch.count_nonzero((x.byte() if x.dtype == torch.bool else x).abs() <= ZERO)
        return x.numel() - (int(zeros) if x.is_cpu else zeros.double())
    elements = x.detach().numpy().ravel(order="K")  # as they lie in memory: no copy, unless there are gaps
    parts = (elements[start : start + _PART] for start in range(0, elements.size, _PART))
    return elements.size - sum(int(np.count_nonzero(np.abs(part) <= ZERO)) for part in parts)


def tensors(arguments: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return []
    return [x for argument in arguments for x in tensors(argument)]


class NonZeros:
    """Counts each tensor of a forward pass once for as long as it does not change; keeps none of them alive."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, int | Tensor] = {}
        self._versions: defaultdict[int, int] = defaultdict(int)  # inference mode is without PyTorch's own
        self._storages: dict[int, StorageWeakRef] = {}

    def __call__(self, x: Tensor) -> int | Tensor:
        place = self.place(x)
        if place not in self._counts:
            self._counts[place] = count_nonzero(x)
        return self._counts[place]

    def place(self, x: Tensor) -> tuple[int, Hashable]:
        """What `x` shares with its views alone, and which of their elements it is, until an operator writes to them."""
        storage = x.untyped_storage()
        memory = storage._cdata
        if memory not in self._storages:
            self._storages[memory] = StorageWeakRef(storage)  # while this lives, the address is not used again
        dimensions = tuple(sorted(zip(x.stride(), x.shape, strict=True)))
        return memory, (self._versions[memory], x.dtype, x.storage_offset(), dimensions)

    def changed(self, x: Tensor) -> None:
        """An operator has written to `x`."""
        self._versions[self.place(x)[0]] += 1


@dataclass
class Row:
    """What a layer's call reads, writes and computes, zeros included and without (`nonzero_...`), or sums of calls.

    On an accelerator, the counts are tensors until `finish`.
    """

    name: str
    kind: str
    inputs: int = 0
    nonzero_inputs: int = 0
    outputs: int = 0
    nonzero_outputs: int = 0
    parameters: int = 0
    nonzero_parameters: int = 0
    operations: int = 0
    effective_operations: float = 0.0

    def charge(self, what: str, x: Tensor, nonzero: int | Tensor) -> None:
        """Add a tensor to `what`: "inputs", "outputs" or "parameters"."""
        vars(self)[what] += x.numel()
        vars(self)[f"nonzero_{what}"] += nonzero

    def add(self, other: "Row") -> None:
        for number in NUMBERS:
            vars(self)[number] += vars(other)[number]

    def totals(self, batches: int, images: int) -> Totals:
        """What `eatlib.hardware` prices."""
        accesses = self.inputs + self.outputs + self.parameters
        nonzero = self.nonzero_inputs + self.nonzero_outputs + self.nonzero_parameters
        return Totals(batches, images, accesses, nonzero, self.operations, self.effective_operations)


NUMBERS = [number.name for number in fields(Row)[2:]]


def sum_rows(rows: Iterable[Row]) -> Row:
    whole = Row("all", "")
    for row in rows:
        whole.add(row)
    return whole


def finish(rows: list[Row]) -> None:
    """Make numbers of all counts, with one transfer from the accelerator."""
    waiting = [(row, number) for row in rows for number in NUMBERS if isinstance(vars(row)[number], Tensor)]
    values = torch.stack([vars(row)[number] for row, number in waiting]).tolist() if waiting else []
    for (row, number), value in zip(waiting, values, strict=True):
        vars(row)[number] = value if number == "effective_operations" else round(value)
