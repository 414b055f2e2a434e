"""The meter that watches a model's forward passes, and the report of what they cost."""

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import astuple, dataclass, field
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eatlib.energy.count import NUMBERS, NonZeros, Row, finish, sum_rows, tensors
from eatlib.energy.fused import FusedPass, describe, kind_of
from eatlib.energy.published import PublishedPass
from eatlib.energy.trace import Operator, evaluating, trace
from eatlib.hardware import (
    ACCOUNTINGS,
    Accounting,
    EnergyError,
    Hardware,
    Totals,
    energy_ratio,
    find_hardware,
    joules,
    joules_per_image,
)

DEFAULT = "horowitz-45nm-float32"

if TYPE_CHECKING:
    import pandas as pd  # a slow import that a training run does without


@dataclass
class EnergyReport:
    """Energy of the forward passes that a meter saw, in one accounting; prints as a table.

    Attributes:
        accounting, hardware: what is charged, and at which prices.
        uncounted: what ran but is not in these numbers, by name. Element-wise work is never charged for its operations;
            `published` misses the memory accesses of what it lists.
    """

    accounting: Accounting
    hardware: Hardware
    uncounted: list[str] = field(default_factory=list)
    _rows: dict[str, Row] = field(default_factory=dict, repr=False)
    _batches: dict[tuple[int, ...], Totals] = field(default_factory=dict, repr=False)

    def add(self, rows: list[Row], images: int, uncounted: Iterable[str]) -> None:
        """Add a batch."""
        batch = sum_rows(rows).totals(1, images)
        size = images, batch.accesses, batch.operations
        before = self._batches.get(size, Totals(0, 0, 0, 0, 0, 0.0))
        self._batches[size] = Totals(*map(add, astuple(before), astuple(batch)))
        for row in rows:
            self._rows.setdefault(row.name, Row(row.name, row.kind)).add(row)
        self.uncounted = list(dict.fromkeys([*self.uncounted, *uncounted]))

    @property
    def batches(self) -> list[Totals]:
        """The counts of all batches of one size each, which `eatlib.hardware` prices for any hardware."""
        return list(self._batches.values())

    @property
    def images(self) -> int:
        return sum(totals.images for totals in self.batches)

    @property
    def batch_sizes(self) -> dict[int, int]:
        """How many batches there were of each size; weights are read once a batch."""
        return {totals.images // totals.batches: totals.batches for totals in self.batches}

    @property
    def ratio(self) -> float:
        """Energy with zero-skipping over energy without it, as `eatlib.hardware.energy_ratio` says."""
        return energy_ratio(self.batches, self.accounting, self.hardware)

    @property
    def joules_per_image(self) -> float:
        """With zero-skipping."""
        return joules_per_image(self.batches, self.hardware)

    @property
    def dense_joules_per_image(self) -> float:
        """Without zero-skipping."""
        return joules_per_image(self.batches, self.hardware, dense=True)

    @property
    def ideal_joules_per_image(self) -> float:
        """With zero-skipping and ideal reuse: the weights are in place and no batch has to read them."""
        reads = self.totals["nonzero_parameters"] / self.images
        return self.joules_per_image - 1e-12 * self.hardware.memory_pj * reads

    @property
    def totals(self) -> dict[str, int]:
        """Sums of the columns of `layers` with the same names, rounded."""
        whole = sum_rows(self._rows.values())
        return {number: round(getattr(whole, number)) for number in NUMBERS}

    @property
    def layers(self) -> "pd.DataFrame":
        """One row a layer call, in order: sums over all images in elements and operations; joules an image.

        `outputs` are what the layer writes to memory, `firing` is the share of it that is not zero; `operations` are
        the simulator's or MACs, `effective_operations` what zero-skipping leaves; `share` is the layer's of all energy.
        """
        import pandas as pd

        table = pd.DataFrame(self._rows.values())
        table.insert(6, "firing", table["nonzero_outputs"] / table["outputs"])
        totals = [[row.totals(len(self.batches), self.images)] for row in self._rows.values()]
        table["joules_per_image"] = [joules_per_image(row, self.hardware) for row in totals]
        table["dense_joules_per_image"] = [joules_per_image(row, self.hardware, dense=True) for row in totals]
        table["share"] = table["joules_per_image"] / (self.joules_per_image or 1)
        return table

    def __str__(self) -> str:
        columns = ["name", "kind", "firing", "operations", "effective_operations", "joules_per_image", "share"]
        sizes = ", ".join(f"{batches} x {size}" for size, batches in self.batch_sizes.items())
        return (
            f"energy ratio {self.ratio:.4f} ({self.accounting}, {self.hardware.name}), {self.joules_per_image:.3g} J an "
            f"image with zero-skipping, {self.dense_joules_per_image:.3g} J without\n{self.images} images in batches of "
            f"{sizes}\n{self.layers[columns].to_string(index=False, na_rep='-', float_format='{:.3g}'.format)}\n"
            f"not counted: {'; '.join(self.uncounted) or 'nothing'}"
        )


class EnergyMeter:
    """Counts what a model's forward passes cost, in both accountings at once; a context manager.

    Each forward pass of the model within it is one batch. The model is as it was afterwards, also when a pass raises;
    such a pass is not counted. Between passes only counts are kept.

    Args:
        model: anything that is called with a batch first: (N, ...).
        hardware: a name of `HARDWARE`, or prices of your own.
        exact_macs: count effective MACs (`fused`) from the places of the zeros, not from each layer's shares of zeros.

    Raises:
        EnergyError: unknown hardware; a model without parameters, with lazy ones, or compiled. From a forward pass: no
            batch, an empty one or one without a batch dimension; NaN in the input or output.
    """

    def __init__(self, model: nn.Module, *, hardware: str | Hardware = DEFAULT, exact_macs: bool = False) -> None:
        _check_model(model)
        self.hardware = find_hardware(hardware)
        self._model, self._exact_macs = model, exact_macs
        self._reports = {accounting: EnergyReport(accounting, self.hardware) for accounting in ACCOUNTINGS}

    def __enter__(self) -> "EnergyMeter":
        self._trace = trace(self._model, self._layer, self._operator, self._start, self._end)
        self._trace.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._trace.__exit__(*exception)

    def _start(self, arguments: Any) -> None:
        inputs = tensors(arguments)
        _check_inputs(inputs)
        self._images = len(inputs[0])
        counter = NonZeros()
        self._published, self._fused = PublishedPass(counter), FusedPass(inputs, counter, self._exact_macs)

    def _layer(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._published.layer(name, module, inputs, output)
        self._fused.layer(name, output)

    def _operator(self, call: Operator) -> Any:
        operands = self._fused.operands(call)
        if operands and not call.in_leaf and kind_of(call.function) != "move":
            self._published.uncounted[describe(call)] = None
        return self._fused.operator(call, operands)

    def _end(self, output: Any) -> None:
        self._fused.end(output)
        if _any_nan(tensors(output)):
            raise EnergyError("the model's output holds NaN, whose energy means nothing: look at its weights")
        finish(self._published.rows + self._fused.rows)
        self._published.skip_operations()
        self._reports["published"].add(self._published.rows, self._images, self._published.uncounted)
        self._reports["fused"].add(self._fused.rows, self._images, self._fused.uncounted)

    def report(self, accounting: Accounting = "published") -> EnergyReport:
        """The energy of all batches so far.

        Raises:
            EnergyError: unknown accounting; no forward pass yet; none with a layer that the accounting charges.
        """
        if accounting not in ACCOUNTINGS:
            raise EnergyError(f"accounting = {accounting!r}: must be one of {', '.join(ACCOUNTINGS)}")
        report = self._reports[accounting]
        if not report.batches:
            raise EnergyError("no batch was measured: run the model within the meter, on one batch at least")
        if not report.totals["inputs"]:
            seen = ", ".join(report.uncounted) or "nothing that computes"
            raise EnergyError(f"the {accounting} accounting saw no layer that multiplies, only {seen}")
        return deepcopy(report)

    def firing(self) -> list[tuple[str, str, float]]:
        """(name, kind, share of outputs that are not zero) of each leaf module call, in the order of the calls."""
        rows = self._reports["published"]._rows.values()
        return [(row.name, row.kind, row.nonzero_outputs / row.outputs) for row in rows if row.outputs]


def energy_report(
    model: nn.Module, batches: Iterable[Any], *, accounting: Accounting = "published", **options: Any
) -> EnergyReport:
    """Measure a model in evaluation mode; see `published` and `fused` for the two accountings.

    Args:
        batches: tensors (N, C, H, W), or (images, labels) pairs, as a data loader yields them; they are moved to the
            model's device.
        options: `hardware` and `exact_macs` of `EnergyMeter`.

    Raises:
        EnergyError: as `EnergyMeter`; unknown accounting; no batches, or batches of another kind.
    """
    if isinstance(batches, Tensor):
        raise EnergyError(f"batches is one tensor {tuple(batches.shape)}: give a list of batches, [images]")
    meter = EnergyMeter(model, **options)
    with evaluating(model), meter, torch.no_grad():
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(images, Tensor):
                kind = type(batch).__name__
                raise EnergyError(f"a batch is a {kind}: must be a tensor of images or an (images, labels) pair")
            model(images.to(next(model.parameters()).device))
    return meter.report(accounting)


def activation_cost(model: nn.Module, images: Tensor, hardware: str | Hardware = DEFAULT) -> dict[str, float]:
    """What one non-zero activation of each layer costs, as a share of the batch's energy without zero-skipping.

    In the `fused` accounting: the tensor that leaves the layer, after whatever follows up to the next layer that
    multiplies, is written once, and read and multiplied with all of its weights by each consumer; that energy, over the
    elements of the layer's output. Layers between the same two multiplying layers share one tensor, so that each of
    them carries all of its energy. The share is of a batch of the size given: doubling it nearly halves the share.

    Args:
        images: one batch, (N, C, H, W), on the model's device.

    Returns:
        By leaf module call, as in `EnergyMeter.firing`: joules per non-zero element / dense joules of the batch.
    """
    meter = EnergyMeter(model, hardware=hardware)
    with evaluating(model), meter, torch.no_grad():
        model(images)
    cost: Counter[str] = Counter()
    for layers, accesses, macs in meter._fused.uses:
        used = joules(Totals(1, len(images), accesses, accesses, macs, macs), meter.hardware)
        cost.update(dict.fromkeys(layers, used))
    dense = joules(*meter.report("fused").batches, meter.hardware, dense=True)
    return {row.name: cost[row.name] / row.outputs / dense for row in meter._published.rows if row.outputs}


def _check_model(model: nn.Module) -> None:
    """Refuse a model without weights to charge, or one that hides its operators."""
    if not list(model.parameters()):
        raise EnergyError(f"{type(model).__name__} has no parameters: there are no weights whose energy could count")
    if any(map(is_lazy, model.parameters())):
        raise EnergyError("the model has lazy parameters: run the model on one batch before it is measured")
    for module in model.modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise EnergyError("the model is compiled, which hides its operators: measure what it was made from")


def _check_inputs(inputs: list[Tensor]) -> None:
    if not inputs or inputs[0].dim() < 2 or len(inputs[0]) == 0:
        shape = f"a tensor of shape {tuple(inputs[0].shape)}" if inputs else "no tensor"
        raise EnergyError(
            f"the model was called with {shape}: the first dimension must be the batch, (N, ...), and N at least 1; "
            "use images[None] for a single image"
        )
    if _any_nan(inputs):
        raise EnergyError("the model's input holds NaN, whose energy means nothing: clean the images")


def _any_nan(found: list[Tensor]) -> bool:
    return any(x.is_floating_point() and bool(x.isnan().any()) for x in found)
