"""The meter that watches a model's forward passes, and the report of what they cost."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eatlib.energy.count import NUMBERS, Row, tensors
from eatlib.energy.fused import ForwardPass
from eatlib.energy.trace import trace
from eatlib.hardware import (
    ACCOUNTINGS,
    Accounting,
    EnergyError,
    Hardware,
    Totals,
    energy_ratio,
    find_hardware,
    joules_per_image,
)

DEFAULT = "horowitz-45nm-float32"

if TYPE_CHECKING:
    import pandas as pd  # a slow import that a training run does without


class EnergyReport:
    """Energy of the forward passes that a meter saw, in one accounting; prints as a table.

    Attributes:
        accounting, hardware: what is charged, and at which prices.
        batches: the counts of all batches of one size each, which `eatlib.hardware` prices for any hardware.
        uncounted: what ran but is not in these numbers, by name. Element-wise work is never charged for its operations;
            `published` misses the memory accesses of what it lists.
        images: of all batches; `batch_sizes`: how many batches there were of each size; weights are read once a batch.
        ratio: energy with zero-skipping over energy without it, as `eatlib.hardware.energy_ratio` says.
        joules_per_image: with zero-skipping; `dense_joules_per_image` without it; `ideal_joules_per_image` with it and
            with ideal reuse: the weights are in place and no batch has to read them.
        totals: sums of the columns of `layers` with the same names, rounded.
    """

    def __init__(
        self, accounting: Accounting, hardware: Hardware, batches: list[Totals], rows: list[Row], uncounted: list[str]
    ) -> None:
        self.accounting, self.hardware, self.batches, self.uncounted = accounting, hardware, batches, uncounted
        self.images = sum(totals.images for totals in batches)
        sizes = [totals.images // totals.batches for totals in batches for _ in range(totals.batches)]
        self.batch_sizes = dict(Counter(sizes))
        self.ratio = energy_ratio(batches, accounting, hardware)
        self.joules_per_image = joules_per_image(batches, hardware)
        self.dense_joules_per_image = joules_per_image(batches, hardware, dense=True)
        whole = sum(rows, Row("all", ""))
        self.totals = {number: round(getattr(whole, number)) for number in NUMBERS}
        self.ideal_joules_per_image = self.joules_per_image - hardware.joules(whole.nonzero_parameters / self.images, 0)
        self._rows = rows

    @property
    def layers(self) -> "pd.DataFrame":
        """One row a layer call, in order: sums over all images in elements and operations; joules an image.

        `outputs` are what the layer writes to memory, `firing` is the share of it that is not zero; `operations` are
        the simulator's or MACs, `effective_operations` what zero-skipping leaves; `share` is the layer's of all energy.
        """
        import pandas as pd

        table = pd.DataFrame(self._rows)
        table.insert(6, "firing", table["nonzero_outputs"] / table["outputs"])
        accesses = table["inputs"] + table["outputs"] + table["parameters"]
        nonzero = table["nonzero_inputs"] + table["nonzero_outputs"] + table["nonzero_parameters"]
        table["joules_per_image"] = self.hardware.joules(nonzero, table["effective_operations"]) / self.images
        table["dense_joules_per_image"] = self.hardware.joules(accesses, table["operations"]) / self.images
        table["share"] = table["joules_per_image"] / (self.joules_per_image or 1)
        return table

    def __str__(self) -> str:
        columns = ["name", "kind", "firing", "operations", "effective_operations", "joules_per_image", "share"]
        sizes = ", ".join(f"{batches} x {size}" for size, batches in self.batch_sizes.items())
        table = self.layers[columns].to_string(index=False, na_rep="-", float_format="{:.3g}".format)
        return (
            f"energy ratio {self.ratio:.4f} ({self.accounting}, {self.hardware.name}), "
            f"{self.joules_per_image:.3g} J an image with zero-skipping, {self.dense_joules_per_image:.3g} J without\n"
            f"{self.images} images in batches of {sizes}\n{table}\n"
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
        EnergyError: unknown hardware; a model without parameters, or compiled. From a forward pass: no batch, an empty
            one or one without a batch dimension; NaN in the input or output.
    """

    def __init__(self, model: nn.Module, *, hardware: str | Hardware = DEFAULT, exact_macs: bool = False) -> None:
        if not list(model.parameters()):
            raise EnergyError(f"{type(model).__name__} has no parameters: there are no weights that cost energy")
        for module in model.modules():
            compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            if compiled or isinstance(module, torch.jit.ScriptModule):
                raise EnergyError("the model is compiled, which hides its operators: measure what it was made from")
        self.hardware = find_hardware(hardware)
        self._model, self._exact_macs = model, exact_macs
        # By accounting: the counts of all batches of one size each; the rows by name; the names of what is not counted.
        self._sums: dict[Accounting, tuple[dict[tuple[int, ...], Totals], dict[str, Row], dict[str, None]]]
        self._sums = {accounting: ({}, {}, {}) for accounting in ACCOUNTINGS}

    def __enter__(self) -> "EnergyMeter":
        self._trace = trace(self._model, self._start, self._end)
        self._trace.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._trace.__exit__(*exception)

    def _start(self, arguments: Any) -> ForwardPass:
        inputs = tensors(arguments)
        if not inputs or inputs[0].dim() < 2 or len(inputs[0]) == 0:
            shape = f"a tensor of shape {tuple(inputs[0].shape)}" if inputs else "no tensor"
            raise EnergyError(f"the model was called with {shape}: must be a batch, (N, ...) with N at least 1")
        _check_numbers(inputs, "input", "clean the images")
        self._images, self._pass = len(inputs[0]), ForwardPass(inputs, self._exact_macs)
        return self._pass

    def _end(self, output: Any) -> None:
        _check_numbers(tensors(output), "output", "look at its weights")
        self._pass.end(output)
        for accounting, (batches, rows, uncounted) in self._sums.items():
            for row in self._pass.rows[accounting]:
                rows[row.name] = rows[row.name] + row if row.name in rows else row
            uncounted |= self._pass.uncounted[accounting]
            whole = sum(self._pass.rows[accounting], Row("all", ""))
            accesses = whole.inputs + whole.outputs + whole.parameters
            nonzero = whole.nonzero_inputs + whole.nonzero_outputs + whole.nonzero_parameters
            batch = Totals(1, self._images, accesses, nonzero, whole.operations, whole.effective_operations)
            size = self._images, accesses, whole.operations
            batches[size] = batches[size] + batch if size in batches else batch

    def report(self, accounting: Accounting = "published") -> EnergyReport:
        """The energy of all batches so far.

        Raises:
            EnergyError: unknown accounting; no forward pass yet; none with a layer that the accounting charges.
        """
        if accounting not in ACCOUNTINGS:
            raise EnergyError(f"accounting = {accounting!r}: must be one of {', '.join(ACCOUNTINGS)}")
        batches, rows, uncounted = self._sums[accounting]
        if not batches:
            raise EnergyError("no batch was measured: run the model within the meter, on one batch at least")
        if not any(row.inputs for row in rows.values()):
            seen = ", ".join(uncounted) or "nothing that computes"
            raise EnergyError(f"the {accounting} accounting saw no layer that multiplies, only {seen}")
        return EnergyReport(accounting, self.hardware, list(batches.values()), list(rows.values()), list(uncounted))

    def firing(self) -> list[tuple[str, str, float]]:
        """(name, kind, share of outputs that are not zero) of each leaf module call, in the order of the calls."""
        rows = self._sums["published"][1].values()
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
    return _measure(model, batches, **options).report(accounting)


def _measure(model: nn.Module, batches: Iterable[Any], **options: Any) -> EnergyMeter:
    if isinstance(batches, Tensor):
        raise EnergyError(f"batches is one tensor {tuple(batches.shape)}: give a list of batches, [images]")
    modes = {module: module.training for module in model.modules()}
    try:
        with EnergyMeter(model.eval(), **options) as meter, torch.no_grad():
            for batch in batches:
                images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not isinstance(images, Tensor):
                    kind = type(batch).__name__
                    raise EnergyError(f"a batch is a {kind}: must be a tensor of images or an (images, labels) pair")
                model(images.to(next(model.parameters()).device))
    finally:
        for module, training in modes.items():
            module.training = training
    return meter


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
    meter = _measure(model, [images], hardware=hardware)
    cost: Counter[str] = Counter()
    for layers, accesses, macs in meter._pass.uses:
        cost.update(dict.fromkeys(layers, meter.hardware.joules(accesses, macs)))
    dense = meter.report("fused").batches[0].joules(meter.hardware, dense=True)
    return {row.name: cost[row.name] / row.outputs / dense for row in meter._pass.rows["published"] if row.outputs}


def silent_ratio(network: nn.Module, image_size: int, batch_size: int, hardware: str | Hardware) -> float:
    """The energy ratio of one of the paper's networks if no ReLU ever fired: the floor of this accounting.

    Convolution and batch-norm outputs are taken as dense. A network that lost whole layers can be below.
    """
    meter = _measure(network, [torch.zeros(1, 3, image_size, image_size)], hardware=hardware)
    rows = meter._pass.rows["published"]
    whole, first = sum(rows, Row("all", "")), next(row for row in rows if row.kind == "Conv2d")
    read = sum(row.inputs for row in rows if row.kind == "BatchNorm2d" or row is first)
    written = sum(row.outputs for row in rows if row.kind in ("Conv2d", "BatchNorm2d", "Linear"))
    accesses = batch_size * (whole.inputs + whole.outputs) + whole.parameters
    left = batch_size * (read + written) + whole.nonzero_parameters
    operations = batch_size * whole.operations
    share = read / whole.inputs * whole.nonzero_parameters / whole.parameters
    batch = Totals(1, batch_size, accesses, left, operations, operations * share)
    return energy_ratio([batch], "published", meter.hardware)


def _check_numbers(found: list[Tensor], what: str, advice: str) -> None:
    if any(x.is_floating_point() and x.isnan().any() for x in found):
        raise EnergyError(f"the model's {what} holds NaN, whose energy means nothing: {advice}")
