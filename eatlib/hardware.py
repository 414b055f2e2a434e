"""Prices of accelerators that skip zeros, and what a network's counts cost at them; needs neither model nor PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import add
from typing import Literal, get_args

Accounting = Literal["published", "fused"]
ACCOUNTINGS: tuple[Accounting, ...] = get_args(Accounting)


class EnergyError(ValueError):
    """A model, images or a name whose energy cannot be counted; the message says what to do."""


@dataclass(frozen=True)
class Hardware:
    """Prices of an accelerator in pJ: of reading or writing one element, and of one multiplication."""

    name: str
    memory_pj: float
    operation_pj: float
    source: str  # of the prices

    def __post_init__(self) -> None:
        for price in ("memory_pj", "operation_pj"):
            if not 0 <= (value := getattr(self, price)) < math.inf:
                raise EnergyError(f"{price} = {value!r}: must be a finite number of pJ, not negative")

    def joules(self, accesses: float, operations: float) -> float:
        """Energy of so many memory accesses and multiplications (numbers, or columns of a table)."""
        return 1e-12 * (self.memory_pj * accesses + self.operation_pj * operations)


_SOURCE = "M. Horowitz, Computing's energy problem, ISSCC 2014, 45 nm, 0.9 V: multiplication, and "
_DRAM = _SOURCE + "DRAM access 1.3-2.6 nJ, the mean for 32 bit as in Sponge Examples, by bits"
_SRAM = _SOURCE + "1 MB SRAM 100 pJ for 64 bit, by bits"
_PRICES = (
    Hardware("horowitz-45nm-float32", 1950.0, 3.7, _DRAM),
    Hardware("horowitz-45nm-float16", 975.0, 1.1, _DRAM),
    Hardware("horowitz-45nm-int8", 487.5, 0.2, _DRAM),
    Hardware("horowitz-45nm-float32-sram", 50.0, 3.7, _SRAM),
    Hardware("horowitz-45nm-float16-sram", 25.0, 1.1, _SRAM),
    Hardware("horowitz-45nm-int8-sram", 12.5, 0.2, _SRAM),
)
HARDWARE: dict[str, Hardware] = {hardware.name: hardware for hardware in _PRICES}
"""Prices by name; all memory traffic goes to DRAM, or, with `-sram`, stays in a large on-chip memory."""


def find_hardware(hardware: str | Hardware) -> Hardware:
    """The hardware of that name, or the given one; EnergyError if there is none of that name."""
    if isinstance(hardware, Hardware):
        return hardware
    if hardware not in HARDWARE:
        raise EnergyError(f"hardware = {hardware!r}: must be one of {', '.join(HARDWARE)}, or a Hardware")
    return HARDWARE[hardware]


@dataclass(frozen=True)
class Totals:
    """Counts of the forward passes over batches of one size, in one accounting, summed over layers and batches."""

    batches: int  # forward passes
    images: int  # of all these batches
    accesses: int  # elements of inputs, outputs and parameters
    nonzero_accesses: int
    operations: int  # multiplications
    effective_operations: float  # those that zero-skipping leaves

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*map(add, astuple(self), astuple(other)))

    def joules(self, hardware: Hardware, *, dense: bool = False) -> float:
        """Energy with zero-skipping or, `dense`, without."""
        counts = (self.accesses, self.operations) if dense else (self.nonzero_accesses, self.effective_operations)
        return hardware.joules(*counts)


def joules_per_image(totals: Sequence[Totals], hardware: Hardware, *, dense: bool = False) -> float:
    """Mean over all images."""
    return math.fsum(part.joules(hardware, dense=dense) for part in totals) / sum(part.images for part in totals)


def energy_ratio(totals: Sequence[Totals], accounting: Accounting, hardware: Hardware) -> float:
    """Energy with zero-skipping over energy without it.

    `published`: the mean over the batches of each one's ratio, as in the paper; batches of one size have the same
    energy without zero-skipping, so that the ratio of their sums is the mean of their ratios. `fused`: of all sums.
    """
    if accounting == "fused":
        return joules_per_image(totals, hardware) / joules_per_image(totals, hardware, dense=True)
    ratios = [part.batches * part.joules(hardware) / part.joules(hardware, dense=True) for part in totals]
    return math.fsum(ratios) / sum(part.batches for part in totals)
