"""Counting: the non-zeros of a tensor, the tensors in a call's arguments, and a layer's row of the report."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ZERO = 2.0**-126
"""The largest magnitude that counts as zero (the published simulator's; float32's smallest normal number)."""
_PART = 2**16  # elements that stay in the cache from one step of a count to the next


def count_nonzero(x: Tensor) -> int | Tensor:
    """How many elements of `x` are not zero, |x| > 2^-126, NaN included; exact for any size, type and memory layout.

    Returns:
        An int; on an accelerator, which an int would have to wait for, a float64 tensor that holds one.
    """
    whole = not (x.is_floating_point() or x.is_complex())  # whose magnitude may be too large: int8 has no 128
    if whole or not x.is_cpu or x.dtype == torch.bfloat16:
        zeros = torch.count_nonzero(x == 0 if whole else x.abs() <= ZERO)
        return x.numel() - (int(zeros) if x.is_cpu else zeros.double())
    elements = x.detach().numpy().ravel(order="K")  # as they lie in memory: no copy, unless there are gaps
    parts = (elements[start : start + _PART] for start in range(0, elements.size, _PART))
    return elements.size - sum(int(np.count_nonzero(np.abs(part) <= ZERO)) for part in parts)


def tensors(value: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [value] if isinstance(value, Tensor) else [x for part in parts for x in tensors(part)]


@dataclass
class Row:
    """What a layer's call reads, writes and computes, zeros included and without (`nonzero_...`); rows add up.

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

    def __add__(self, other: "Row") -> "Row":
        numbers = list(zip(vars(self).values(), vars(other).values(), strict=True))[2:]
        return Row(self.name, self.kind, *(mine + its for mine, its in numbers))


def finish(rows: list[Row]) -> None:
    """Make numbers of all counts, with one transfer from the accelerator."""
    waiting = [(vars(row), what, x) for row in rows for what, x in vars(row).items() if isinstance(x, Tensor)]
    values = torch.stack([x for _, _, x in waiting]).tolist() if waiting else []
    for (row, what, _), value in zip(waiting, values, strict=True):
        row[what] = value if what == "effective_operations" else round(value)
