"""The meter that watches a model's forward passes, and the report of what they cost."""

import collections
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eatlib.energy.count import NUMBERS, Counter, Row, finish, sum_rows, tensors
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

if TYPE_CHECKING:
    import pandas as pd  # a slow import that a training run does without


@dataclass(frozen=True)
class EnergyReport:
    """Energy of the forward passes that a meter saw, in one accounting; prints as a table.

    Attributes:
        accounting, hardware: what is charged, and at which prices.
        batches: the counts of all batches of one size each, which `eatlib.hardware` prices for any hardware.
        uncounted: what ran but is not in these numbers, by name. Element-wise work is never charged for its operations;
            `published` misses the memory accesses of what it lists.
    """

    accounting: Accounting
    hardware: Hardware
    batches: list[Totals]
    uncounted: list[str]
    _rows: list[Row] = field(repr=False)

    @property
    def images(self) -> int:
        return sum(totals.images for totals in self.batches)

    @property
    def batch_sizes(self) -> dict[int, int]:
        """How many batches there were of each size; weights are read once a batch."""
        sizes: collections.Counter[int] = collections.Counter()
        for totals in self.batches:
            sizes[totals.images // totals.batches] += totals.batches
        return dict(sizes)

    @property
    def ratio(self) -> float:
        """Energy with zero-skipping over energy without it: `published`, mean over the batches; `fused`, of the sums."""
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
        """Sums over layers and batches, with zeros and without (`nonzero_...`); see `layers`. Rounded."""
        whole = sum_rows(self._rows)
        return {number: round(getattr(whole, number)) for number in NUMBERS}

    @cached_property
    def layers(self) -> "pd.DataFrame":
        """One row a layer call, in order: sums over all images in elements and operations; joules an image.

        `outputs` are what the layer writes to memory, `firing` is the share of it that is not zero; `operations` are the
        simulator's or MACs, `effective_operations` what zero-skipping leaves; `share` is the layer's of all energy.
        """
        import pandas as pd

        table = pd.DataFrame(self._rows)
        table.insert(6, "firing", [row.firing for row in self._rows])
        for column, dense in (("joules_per_image", False), ("dense_joules_per_image", True)):
            totals = [row.totals(len(self.batches), self.images) for row in self._rows]
            table[column] = [joules_per_image([row], self.hardware, dense=dense) for row in totals]
        table["share"] = table["joules_per_image"] / (self.joules_per_image or 1)
        return table

    def __str__(self) -> str:
        table = self.layers[["name", "kind", "firing", "operations", "joules_per_image", "share"]]
        table.insert(
            4, "left", self.layers["effective_operations"] / table["operations"].where(table["operations"] > 0)
        )
        percent = dict.fromkeys(("firing", "left", "share"), "{:.1%}".format)
        sizes = ", ".join(f"{batches} x {size}" for size, batches in self.batch_sizes.items())
        joules = (self.joules_per_image, self.dense_joules_per_image, self.ideal_joules_per_image)
        return (
            f"energy ratio {self.ratio:.4f} ({self.accounting}, {self.hardware.name})\n"
            "{:.3g} J an image with zero-skipping, {:.3g} J without, {:.3g} J with weights in place\n".format(*joules)
            + f"{self.images} images in batches of {sizes}\n"
            + table.to_string(index=False, na_rep="-", float_format="{:.3g}".format, formatters=percent)
            + f"\nnot counted: {'; '.join(self.uncounted) or 'nothing'}"
        )


class _Sums:
    """What a meter has seen so far, in one accounting."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.batches: dict[tuple[int, ...], Totals] = {}
        self.uncounted: dict[str, None] = {}

    def add(self, rows: list[Row], images: int, uncounted: dict[str, None]) -> None:
        """Add one batch; those of one size, which cost the same without zero-skipping, share their totals."""
        batch = sum_rows(rows).totals(1, images)
        size = images, batch.accesses, batch.operations
        before = self.batches.get(size, Totals(0, 0, 0, 0, 0, 0.0))
        self.batches[size] = Totals(*map(add, astuple(before), astuple(batch)))
        for row in rows:
            sums = self.rows.setdefault(row.name, Row(row.name, row.kind))
            sums += row
        self.uncounted |= uncounted


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

    def __init__(
        self, model: nn.Module, *, hardware: str | Hardware = "horowitz-45nm-float32", exact_macs: bool = False
    ) -> None:
        _check_model(model)
        self.hardware = find_hardware(hardware)
        self._model, self._exact_macs = model, exact_macs
        self._sums = {accounting: _Sums() for accounting in ACCOUNTINGS}

    def __enter__(self) -> "EnergyMeter":
        on = {"on_start": self._start, "on_layer": self._layer, "on_operator": self._operator, "on_end": self._end}
        self._trace = trace(self._model, **on)
        self._trace.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._trace.__exit__(*exception)

    def _start(self, arguments: Any) -> None:
        inputs = tensors(arguments)
        _check_inputs(inputs)
        self._images = len(inputs[0])
        counter = Counter()
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
        for accounting, seen in (("published", self._published), ("fused", self._fused)):
            self._sums[accounting].add(seen.rows, self._images, seen.uncounted)

    def report(self, accounting: Accounting = "published") -> EnergyReport:
        """The energy of all batches so far.

        Raises:
            EnergyError: unknown accounting; no forward pass yet; none with a layer that the accounting charges.
        """
        _check_accounting(accounting)
        sums = self._sums[accounting]
        if not sums.batches:
            raise EnergyError("no batch was measured: run the model within the meter, on one batch at least")
        if not sums.rows:
            seen = ", ".join(sums.uncounted) or "nothing that computes"
            raise EnergyError(f"the {accounting} accounting saw no layer that multiplies, only {seen}")
        rows = [replace(row) for row in sums.rows.values()]
        return EnergyReport(accounting, self.hardware, list(sums.batches.values()), list(sums.uncounted), rows)

    def firing(self) -> list[tuple[str, str, float]]:
        """(name, kind, share of outputs that are not zero) of each leaf module call, in the order of the calls."""
        return [(row.name, row.kind, row.firing) for row in self._sums["published"].rows.values() if row.outputs]


def energy_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    hardware: str | Hardware = "horowitz-45nm-float32",
    accounting: Accounting = "published",
    exact_macs: bool = False,
) -> EnergyReport:
    """Measure a model in evaluation mode; see `published` and `fused` for the two accountings.

    Args:
        batches: tensors (N, C, H, W), or (images, labels) pairs, as a data loader yields them; they are moved to the
            model's device.
        hardware, exact_macs: as for `EnergyMeter`.

    Raises:
        EnergyError: as `EnergyMeter`; unknown accounting; no batches, or batches of another kind.
    """
    _check_accounting(accounting)
    if isinstance(batches, Tensor):
        raise EnergyError(f"batches is one tensor {tuple(batches.shape)}: give a list of batches, [images]")
    meter = EnergyMeter(model, hardware=hardware, exact_macs=exact_macs)
    with evaluating(model), meter, torch.no_grad():
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(images, Tensor):
                kind = type(batch).__name__
                raise EnergyError(f"a batch is a {kind}: must be a tensor of images or an (images, labels) pair")
            model(images.to(next(model.parameters()).device))
    return meter.report(accounting)


def activation_cost(
    model: nn.Module, images: Tensor, hardware: str | Hardware = "horowitz-45nm-float32"
) -> dict[str, float]:
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
    seen, prices = meter._fused, meter.hardware
    dense = 1e12 * joules(*meter.report("fused").batches, prices, dense=True)
    return {
        row.name: (prices.memory_pj * seen.accesses[row.name] + prices.operation_pj * seen.macs[row.name])
        / (row.outputs * dense)
        for row in meter._published.rows
        if row.outputs
    }


def _check_accounting(accounting: str) -> None:
    if accounting not in ACCOUNTINGS:
        raise EnergyError(f"accounting = {accounting!r}: must be one of {', '.join(ACCOUNTINGS)}")


def _check_model(model: nn.Module) -> None:
    """Refuse a model without weights to charge, or one that hides its operators."""
    if not any(True for _ in model.parameters()):
        raise EnergyError(f"{type(model).__name__} has no parameters: there are no weights whose energy could count")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise EnergyError(f"{name} is not initialised yet: run the model on one batch before it is measured")
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
