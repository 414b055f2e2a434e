"""What simulators of accelerators ask for: the shape of each layer's operation, and the density of its tensors.

Timeloop, with its sparse model Sparseloop (Wu et al., MICRO 2022), reads a layer as a problem file. Its format 0.4 is
here as in NVlabs/timeloop, workspace/example_designs: loops and tensors as in layer_shapes/problem_base.yaml, densities
as in example_designs/sparseloop/02.2.1-spMspM/problem.yaml. What each key may hold says the front end,
Accelergy-Project/timeloopfe, timeloopfe/v4/problem.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor, nn

from eatlib.energy.count import Row, finish
from eatlib.energy.fused import ForwardPass
from eatlib.energy.report import EnergyMeter, meter_batches
from eatlib.hardware import EnergyError

if TYPE_CHECKING:
    import pandas as pd  # a slow import that a training run does without

DIMENSIONS = ["N", "G", "C", "M", "P", "Q", "R", "S"]
COEFFICIENTS = ["Wstride", "Hstride", "Wdilation", "Hdilation"]
DISTRIBUTIONS = ("hypergeometric", "fixed_structured")
_WIDTH, _HEIGHT = [["R", "Wdilation"], ["P", "Wstride"]], [["S", "Hdilation"], ["Q", "Hstride"]]
_TENSORS = [
    {"name": "Inputs", "projection": [[["N"]], [["G"]], [["C"]], _WIDTH, _HEIGHT]},
    {"name": "Weights", "projection": [[[name]] for name in "GCMRS"]},
    {"name": "Outputs", "projection": [[[name]] for name in "NGMPQ"], "read_write": True},
]


class _Shapes(ForwardPass):
    """Keeps, over all passes and by row, the shape of each product, and its weights' counts without the biases'."""

    def __init__(self) -> None:
        super().__init__(exact_macs=False)
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.weights: dict[str, Row] = {}

    def _multiply(self, operator: str, arguments: Any, output: Tensor) -> None:
        super()._multiply(operator, arguments, output)
        name, shape = self.rows["fused"][-1].name, (None,) * 12
        left, weight = arguments[:2] if operator == "convolution" else arguments[-2:]
        row = self.weights.setdefault(name, Row(name, ""))
        if not self._value(weight):
            row.charge("parameters", weight, self._count(weight))
            if operator in ("mm", "addmm"):
                shape = (len(left), 1, *weight.shape, *[1] * 8)
            elif operator == "convolution" and not arguments[6] and output.dim() <= 4:
                sizes = output.shape[2:], weight.shape[2:], arguments[3], arguments[5]
                (q, p), (s, r), strides, dilations = ((1, *size)[-2:] for size in sizes)  # there may be no height
                channels = arguments[8], weight.shape[1], len(weight) // arguments[8]
                shape = (len(left), *channels, p, q, r, s, *strides[::-1], *dilations[::-1])
        if self.shapes.setdefault(name, shape)[1:] != shape[1:]:
            raise EnergyError(f"{name} has another shape than in an earlier batch: give images of one size")


def densities(model: nn.Module, batches: Iterable[Any]) -> "pd.DataFrame":
    """One row a convolution or matrix product of a model, in the order of the calls: its shape, and what is not zero.

    The shape: a batch of N (that of the first batch; of a linear layer all rows of its input), G groups with C input
    and M output channels each, outputs P wide and Q high, kernels R wide and S high, strides and dilations. The sizes
    multiply to the MACs. Transposed and three-dimensional convolutions have none, nor have products of two activations,
    whose factors both are `inputs`. What `fused` lists as not counted is not in the table.

    The counts are sums over all batches, by the `fused` accounting: `inputs` without padding, `weights` without biases,
    `outputs` as written, after normalisation, activation and pooling, `macs` with padding. A density is a quotient.

    Args:
        batches: as for `energy_report`.

    Raises:
        EnergyError: as `energy_report`; images of several sizes.
    """
    import pandas as pd

    meter = EnergyMeter(model)
    meter._pass = seen = _Shapes()
    layers = meter_batches(meter, batches).report("fused").layers.set_index("name")
    finish([*seen.weights.values()])
    weights = pd.DataFrame([*seen.weights.values()]).set_index("name")
    table = pd.DataFrame([*seen.shapes.values()], [*seen.shapes], DIMENSIONS + COEFFICIENTS).astype("Int64")
    table.insert(0, "kind", layers["kind"])
    table["macs"] = layers["operations"]
    for what, counts in (("inputs", layers), ("weights", weights), ("outputs", layers)):
        column = "parameters" if what == "weights" else what
        table[what], table[f"nonzero_{what}"] = counts[column], counts[f"nonzero_{column}"]
        table[f"{what}_density"] = table[f"nonzero_{what}"] / table[what]
    return table.rename_axis("name").reset_index()


def write_problems(table: "pd.DataFrame", folder: str | Path, distribution: str = "hypergeometric") -> list[Path]:
    """Write each layer of `densities` that has a shape as a problem file for Timeloop: `<row>-<name>.yaml`.

    Where pooling follows, what is written is no density of the layer's own outputs, and their density is left out.

    Args:
        distribution: where a tensor's non-zeros lie: "hypergeometric", at random; "fixed_structured", evenly.

    Raises:
        EnergyError: unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise EnergyError(f"distribution = {distribution!r}: must be one of {', '.join(DISTRIBUTIONS)}")
    coefficients = [{"name": name, "default": 1} for name in COEFFICIENTS]
    shape = {"name": "convolution", "dimensions": DIMENSIONS, "coefficients": coefficients, "data_spaces": _TENSORS}
    paths = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index, row in table.dropna(subset="N").iterrows():
        shares = row.filter(like="_density").dropna()  # what is not written has none
        if row["macs"] != row["outputs"] * row["C"] * row["R"] * row["S"]:  # it is pooled first
            shares = shares.drop("outputs_density", errors="ignore")
        known = {name.removesuffix("_density").capitalize(): float(share) for name, share in shares.items()}
        given = {name: {"distribution": distribution, "density": share} for name, share in known.items()}
        instance = {name: int(row[name]) for name in DIMENSIONS + COEFFICIENTS} | {"densities": given}
        problem = {"problem": {"version": 0.4, "instance": instance, "shape": shape}}
        paths.append(Path(folder) / f"{index:02}-{row['name'].replace('#', '-')}.yaml")
        paths[-1].write_text(yaml.safe_dump(problem, sort_keys=False, default_flow_style=None), encoding="utf-8")
    return paths
