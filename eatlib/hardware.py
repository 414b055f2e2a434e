"""Prices of accelerators that skip zeros, and what a network's counts cost at them; needs neither model nor PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Accounting = Literal["published", "fused"]
ACCOUNTINGS: tuple[Accounting, ...] = get_args(Accounting)


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
        raise EnergyError(f"hardware = {hardware!r}: must be one of {', '.join(HARDWARE)}, or a Hardware")
    return HARDWARE[hardware]


@dataclass(frozen=True)
class Totals:
    """Counts of the forward passes over batches of one size, in one accounting, summed over layers and batches.

    Attributes:
        batches: number of forward passes.
        images: of all these batches.
        accesses: elements of inputs, outputs and parameters; `nonzero_accesses` those that are not zero.
        operations: multiplications; `effective_operations` those that zero-skipping leaves.
    """

    batches: int
    images: int
    accesses: int
    nonzero_accesses: int
    operations: int
    effective_operations: float


def joules(totals: Totals, hardware: Hardware, *, dense: bool = False) -> float:
    """Energy with zero-skipping or, `dense`, without."""
    accesses = totals.accesses if dense else totals.nonzero_accesses
    operations = totals.operations if dense else totals.effective_operations
    return 1e-12 * (hardware.memory_pj * accesses + hardware.operation_pj * operations)


def joules_per_image(totals: Sequence[Totals], hardware: Hardware, *, dense: bool = False) -> float:
    """Mean over all images."""
    return math.fsum(joules(part, hardware, dense=dense) for part in totals) / sum(part.images for part in totals)


def energy_ratio(totals: Sequence[Totals], accounting: Accounting, hardware: Hardware) -> float:
    """Energy with zero-skipping over energy without it.

    `published`: the mean over the batches of each one's ratio, as in the paper; batches of one size have the same
    energy without zero-skipping, so that the ratio of their sums is the mean of their ratios. `fused`: of all sums.
    """
    if accounting == "fused":
        return joules_per_image(totals, hardware) / joules_per_image(totals, hardware, dense=True)
    ratios = [part.batches * joules(part, hardware) / joules(part, hardware, dense=True) for part in totals]
    return math.fsum(ratios) / sum(part.batches for part in totals)
