"""Energy of a network's forward pass on an accelerator that skips zeros, per layer, in two accountings.

The energy is that of memory accesses and of multiplications; an element or an operation that is zero costs nothing.
In reading order: `count` (non-zeros), `published` (the simulator behind the paper's ratios), `fused` (an accelerator
that fuses layers; and a forward pass as both see it), `report` (the meter, and what it says), `densities` (for
simulators).
"""

from eatlib.energy.count import count_nonzero
from eatlib.energy.densities import densities, write_problems
from eatlib.energy.report import EnergyMeter, EnergyReport, activation_cost, energy_report, silent_ratio
from eatlib.hardware import ACCOUNTINGS, HARDWARE, EnergyError, Hardware, find_hardware

__all__ = ["ACCOUNTINGS", "HARDWARE", "EnergyError", "EnergyMeter", "EnergyReport", "Hardware"]
__all__ += ["activation_cost", "count_nonzero", "densities", "energy_report", "find_hardware", "silent_ratio"]
__all__ += ["write_problems"]
