"""`published`: the arithmetic of the simulator behind the paper's ratios, to the letter.

It is that of Sponge Examples (EuroS&P 2021, arXiv 2006.03463). Each call of a leaf module is charged with reading its
inputs, parameters and buffers, with writing its outputs, and with operations of its kind: a convolution's output is
written, read and written again by batch norm and ReLU. Functional calls are not seen. Quirks are kept:

- A ReLU's input counts as what it is *after* the call, as the simulator sees it with in-place ReLUs, the paper's own;
  a ReLU that is not in place is counted alike.
- A grouped convolution is charged as a dense one, and batch norm's running statistics are read twice.
- Zero-skipping leaves one share of every layer's operations: the network's share of non-zero parameters times its
  share of non-zero inputs.
- The ratio is the mean over the batches (`eatlib.hardware.energy_ratio`).
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from eatlib.energy.count import Row, count_nonzero, tensors

_NO_OPERATIONS = (nn.ReLU, nn.ReLU6, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.LayerNorm, nn.Identity)


def charge_layer(row: Row, module: nn.Module, inputs: Any, output: Any, count: Callable[[Tensor], Any]) -> bool:
    """Fill in the row of a leaf module's call, and say whether the simulator knows the module's operations."""
    for x in tensors(output):
        row.charge("outputs", x, count(x))
    activation = hasattr(module, "inplace") and type(module).__module__ == "torch.nn.modules.activation"
    for x in tensors(output if activation else inputs):
        row.charge("inputs", x, count(x))
    for x in _parameters(module):
        # In training, batch norm's operator changes its statistics without saying so: they are counted anew.
        row.charge("parameters", x, count(x) if isinstance(x, nn.Parameter) else count_nonzero(x))
    match module:
        case nn.Conv2d():
            row.operations = row.outputs * math.prod(module.kernel_size) * module.in_channels
        case nn.Linear():
            row.operations = module.weight.numel() * (row.inputs // module.in_features)
        case nn.BatchNorm2d():
            row.operations = 4 * row.inputs
        case nn.MaxPool2d() | nn.AvgPool2d():
            window = module.kernel_size
            row.operations = row.outputs * (window**2 if isinstance(window, int) else math.prod(window))
        case nn.AdaptiveAvgPool2d():
            row.operations = row.inputs
    return row.operations > 0 or isinstance(module, _NO_OPERATIONS)


def skip_operations(rows: list[Row]) -> None:
    """Fill in the effective operations of a pass whose rows are finished."""
    whole = sum(rows, Row("all", ""))
    left = whole.nonzero_inputs * (whole.nonzero_parameters if whole.parameters else 1)
    for row in rows:  # products of integers, so that only the division rounds
        row.effective_operations = row.operations * left / (max(1, whole.inputs) * max(1, whole.parameters))


def _parameters(module: nn.Module) -> list[Tensor]:
    named = module._parameters | module._buffers
    # torch.nn.utils.prune keeps the dense weight (_orig) and a mask; the layer computes with their product.
    names = [name.removesuffix("_orig") for name in named if f"{name.removesuffix('_mask')}_orig" not in named]
    if isinstance(module, nn.BatchNorm2d):
        names += ["running_mean", "running_var"]
    return [x for name in names if (x := getattr(module, name)) is not None]
