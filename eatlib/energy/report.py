"""The meter that watches a model's forward passes, and the report of what they cost."""

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eatlib.energy.count import Row, tensors
from eatlib.energy.fused import ForwardPass
from eatlib.hardware import Accounting, EnergyError, Hardware, Totals, energy_ratio, find_hardware, joules_per_image

if TYPE_CHECKING:
    import pandas as pd  # a slow import that a training run does without


class EnergyReport:
    """Energy of the forward passes that a meter saw, in one accounting; prints as a table.

    Attributes:
        accounting, hardware: what is charged, and at which prices.
        batches: the counts of all batches of one size each, which `eatlib.hardware` prices for any hardware.
        uncounted: what ran but is not in these numbers, by name. Element-wise work is never charged for its operations;
            `published` misses the memory accesses of what it lists.
        images: of all batches.
        ratio: energy with zero-skipping over energy without it, as `eatlib.hardware.energy_ratio` says.
        joules_per_image: with zero-skipping; `dense_joules_per_image` without it. Weights are read once a batch.
    """

    def __init__(
        self, accounting: Accounting, hardware: Hardware, batches: list[Totals], rows: list[Row], uncounted: list[str]
    ) -> None:
        self.accounting, self.hardware, self.batches, self.uncounted = accounting, hardware, batches, uncounted
        self.images = sum(totals.images for totals in batches)
        self.ratio = energy_ratio(batches, accounting, hardware)
        self.joules_per_image = joules_per_image(batches, hardware)
        self.dense_joules_per_image = joules_per_image(batches, hardware, dense=True)
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

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready values, the layers as a list of rows."""
        facts = ("accounting", "ratio", "joules_per_image", "dense_joules_per_image", "images", "uncounted")
        rest = {"hardware": asdict(self.hardware), "batches": [asdict(size) for size in self.batches]}
        layers = self.layers.astype(object).where(self.layers.notna(), None)
        return {fact: getattr(self, fact) for fact in facts} | rest | {"layers": layers.to_dict("records")}

    def __str__(self) -> str:
        above, table, below = self._texts()
        return f"{above}\n{table.to_string(index=False, na_rep='-', float_format='{:.3g}'.format)}\n{below}"

    def _repr_html_(self) -> str:
        above, table, below = self._texts()
        cells = table.to_html(index=False, na_rep="-", float_format="{:.3g}".format, border=0)
        return f"<p>{escape(above)}</p>{cells}<p>{escape(below)}</p>"

    def _texts(self) -> tuple[str, "pd.DataFrame", str]:
        columns = ["name", "kind", "firing", "operations", "effective_operations", "joules_per_image", "share"]
        sizes = ", ".join(f"{size.batches} x {size.images // size.batches}" for size in self.batches)
        above = (
            f"energy ratio {self.ratio:.4f} ({self.accounting}, {self.hardware.name}), "
            f"{self.joules_per_image:.3g} J an image with zero-skipping, {self.dense_joules_per_image:.3g} J without\n"
            f"{self.images} images in batches of {sizes}"
        )
        return above, self.layers[columns], f"not counted: {'; '.join(self.uncounted) or 'nothing'}"


class EnergyMeter:
    """Counts what a model's forward passes cost, in both accountings at once; a context manager.

    Each forward pass of the model within it is one batch. The model is as it was afterwards, also when a pass raises;
    such a pass is not counted. Between passes only counts are kept.

    Args:
        model: anything that is called with a batch first: (N, ...).
        hardware: a name of `HARDWARE`, or prices of your own.
        exact_macs: count effective MACs (`fused`) from the places of the zeros, not from each layer's shares of zeros.

    Raises:
        EnergyError: unknown hardware; a compiled model. From a forward pass: no batch, an empty one or one without a
            batch dimension; NaN in the output.
    """

    def __init__(
        self, model: nn.Module, *, hardware: str | Hardware = "horowitz-45nm-float32", exact_macs: bool = False
    ) -> None:
        for module in model.modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl or isinstance(module, torch.jit.ScriptModule):
                raise EnergyError("the model is compiled, which hides its operators: measure what it was made from")
        self.hardware = find_hardware(hardware)
        self._model, self._pass, self._hooks = model, ForwardPass(exact_macs), ExitStack()
        # By accounting: the counts of all batches of one size each; the rows by name; the names of what is not counted.
        self._sums: dict[Accounting, tuple[dict[tuple[int, ...], Totals], dict[str, Row], dict[str, None]]]
        self._sums = {"published": ({}, {}, {}), "fused": ({}, {}, {})}

    def __enter__(self) -> "EnergyMeter":
        paths = {module: path for path, module in self._model.named_modules()}

        def enter(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if module is self._model:
                self._pass.start(tensors((arguments, keywords)))
            elif not self._pass.running or module not in paths:  # a copy of the model has the hooks too
                return
            self._pass.enter(paths[module], module)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._pass.running and module in paths:
                self._pass.leave(module, inputs, output)
                if module is self._model and output is not None:  # None: it raised
                    self._add_pass()

        # Attention in kernels of its own would hide its products: it takes PyTorch's plain way while it is measured.
        self._hooks.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        self._hooks.enter_context(sdpa_kernel(SDPBackend.MATH))
        for module in paths:
            self._hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        self._hooks.enter_context(self._pass)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def _add_pass(self) -> None:
        for accounting, (batches, rows, uncounted) in self._sums.items():
            for row in self._pass.rows[accounting]:
                rows[row.name] = rows[row.name] + row if row.name in rows else row
            uncounted |= self._pass.uncounted[accounting]
            whole = sum(self._pass.rows[accounting], Row("all", ""))
            accesses = whole.inputs + whole.outputs + whole.parameters
            nonzero = whole.nonzero_inputs + whole.nonzero_outputs + whole.nonzero_parameters
            batch = Totals(1, self._pass.images, accesses, nonzero, whole.operations, whole.effective_operations)
            size = batch.images, accesses, batch.operations
            batches[size] = batches[size] + batch if size in batches else batch

    def report(self, accounting: Accounting = "published") -> EnergyReport:
        """The energy of all batches so far.

        Raises:
            EnergyError: unknown accounting; no forward pass yet, or none with a layer that the accounting charges.
        """
        if accounting not in self._sums:
            raise EnergyError(f"accounting = {accounting!r}: must be one of {', '.join(self._sums)}")
        batches, rows, uncounted = self._sums[accounting]
        if not any(row.inputs for row in rows.values()):
            raise EnergyError(f"the {accounting} accounting saw no {'layer that multiplies' if batches else 'batch'}")
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
    return meter_batches(EnergyMeter(model, **options), batches).report(accounting)


def meter_batches(meter: EnergyMeter, batches: Iterable[Any]) -> EnergyMeter:
    """Send the batches of `energy_report` through the meter's model in evaluation mode, and return the meter."""
    model = meter._model
    if isinstance(batches, Tensor):
        raise EnergyError(f"batches is one tensor {tuple(batches.shape)}: give a list of batches, [images]")
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()  # that of an exported model returns nothing
        with meter, torch.no_grad():
            for batch in batches:
                images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not isinstance(images, Tensor):
                    raise EnergyError(f"a batch is a {type(batch).__name__}: must be images or (images, labels)")
                model(images.to(next(model.parameters(), images).device))
    finally:
        for module, training in modes.items():
            module.training = training
    return meter


def activation_cost(model: nn.Module, images: Tensor, hardware: str | Hardware) -> dict[str, float]:
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
    meter = meter_batches(EnergyMeter(model, hardware=hardware), [images])
    cost: Counter[str] = Counter()
    for shares, accesses, macs in meter._pass.uses:
        cost.update({layer: share * meter.hardware.joules(accesses, macs) for layer, share in shares.items()})
    dense = meter.report("fused").batches[0].joules(meter.hardware, dense=True)
    return {row.name: cost[row.name] / row.outputs / dense for row in meter._pass.rows["published"] if row.outputs}


def silent_ratio(network: nn.Module, image_size: int, batch_size: int, hardware: str | Hardware) -> float:
    """The energy ratio of one of the paper's networks if no ReLU ever fired: the floor of this accounting.

    Convolution and batch-norm outputs are taken as dense: a network in which they are not can be below.
    """
    images = torch.zeros(1, 3, image_size, image_size)
    meter = meter_batches(EnergyMeter(network, hardware=hardware), [images])
    rows, joules = meter._pass.rows["published"], meter.hardware.joules
    whole, first = sum(rows, Row("all", "")), next(row for row in rows if row.kind == "Conv2d")
    read = sum(row.inputs for row in rows if row.kind == "BatchNorm2d" or row is first)
    written = sum(row.outputs for row in rows if row.kind in ("Conv2d", "BatchNorm2d", "Linear"))
    operations = batch_size * whole.operations
    share = read / whole.inputs * whole.nonzero_parameters / whole.parameters
    left = joules(batch_size * (read + written) + whole.nonzero_parameters, operations * share)
    return left / joules(batch_size * (whole.inputs + whole.outputs) + whole.parameters, operations)
