"""What a study's trained networks do after treatments that train nothing: thresholds, pruning, int8, and all three.

    python studies/derive.py results/rivals

Each network whose weights the study keeps (`save_weights`), and each treatment, is a line of derived.jsonl in the
folder. What has a line is not done again, so that an interrupted call can be repeated.
"""

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from eatlib import ConfigError, RunConfig, load, load_data
from eatlib.data import Data, Split, training_batches
from eatlib.energy import ACCOUNTINGS, EnergyError, EnergyMeter
from eatlib.models import count_parameters
from eatlib.results import Energy, StudyResults, provenance, write_atomically
from eatlib.thresholds import find_thresholds, thresholded
from eatlib.training import predict

LOSS = 0.01
LOSSES = (0.005, LOSS, 0.02, 0.05)
"""Of validation accuracy, that thresholds may cost: `LOSS` for every network, all for standard training."""
OTHERS: list[dict[str, Any]] = [{"pruned": share} for share in (0.0, 0.3, 0.5, 0.7)]
OTHERS += [{"int8": True}, {"pruned": 0.5, "thresholds": LOSS, "int8": True}]
"""`pruned` is the share of all weights; int8 comes last."""
CALIBRATION = 2048  # training images for the ranges of int8
BATCHES = 24  # of training images, for batch norm's statistics


def losses_of(config: RunConfig) -> tuple[float, ...]:
    """What thresholds may cost a network: they are a way of their own only for standard training."""
    return (LOSS,) if config.lambda_ else LOSSES


def treatments(config: RunConfig) -> list[dict[str, Any]]:
    """What is done to a network, each by itself."""
    return [{"thresholds": loss} for loss in losses_of(config)] + OTHERS


def prune_weights(model: nn.Module, share: float, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> None:
    """Make the smallest weights of all convolutions and linear layers zero, then take batch norm's statistics anew.

    A share of 0 does only the latter, so that one can tell which of the two changed something.

    Args:
        batches: images, alone or with labels, as training has them: augmented and of all classes.
    """
    weights = [(module, "weight") for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
    for module, name in weights:
        prune.remove(module, name)
    update_bn(batches, model)


def to_int8(model: nn.Module, images: Tensor) -> nn.Module:
    """The network with 8-bit weights and activations, by torchao's static quantisation for x86 after an export.

    Batch norm is folded into the convolutions. The graph computes with what the integers stand for, so that the zero
    point is zero; it has operators but no modules, which the `published` accounting would charge.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch")
    exported = torch.export.export(model.eval(), (images[:2],), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for part in images.split(256):
            prepared(part)
    converted = convert_pt2e(prepared)
    allow_exported_model_train_eval(converted)
    return converted


def calibration_images(images: Tensor) -> Tensor:
    """Evenly from all images: the first ones can be of one class, as GTSRB's are."""
    return images[:: max(1, len(images) // CALIBRATION)][:CALIBRATION]


def measure(model: nn.Module, split: Split, batch_size: int) -> dict[str, Any]:
    """Accuracy, and energy in each accounting that sees a layer; `weights` that are not zero are read once a batch."""
    with EnergyMeter(model) as meter:
        logits = predict(model, split, batch_size=batch_size)
    energy = {}
    for accounting in ACCOUNTINGS:
        with suppress(EnergyError):
            report = meter.report(accounting)
            weights = report.layers["nonzero_parameters"].sum() / sum(size.batches for size in report.batches)
            energy[accounting] = {"weights": float(weights), "uncounted": report.uncounted}
            energy[accounting] |= Energy.of(report).model_dump()
    return {"accuracy": (logits.argmax(1) == split.labels).double().mean().item(), "energy": energy}


def treat(
    model: nn.Module,
    treatment: dict[str, Any],
    data: Data,
    config: RunConfig,
    chosen: Callable[[], dict[float, list[float]]],
) -> dict[str, Any]:
    """Measure a copy of the model after a treatment; `chosen` are the model's own thresholds."""
    model, images = copy.deepcopy(model), calibration_images(data.train.images)
    with ExitStack() as stack:
        if "pruned" in treatment:
            generator = torch.Generator().manual_seed(config.seed)
            batches = training_batches(data.train, config.batch_size, config.augmentation, generator)
            prune_weights(model, treatment["pruned"], islice(batches, BATCHES))
        if loss := treatment.get("thresholds"):
            own = find_thresholds(model, data.validation, [loss]) if "pruned" in treatment else chosen()
            stack.enter_context(thresholded(model, own[loss]))
        if "int8" in treatment:  # with the thresholds, which the export sees
            model = to_int8(model, images)
        return {name: measure(model, getattr(data, name), config.energy_batch_size) for name in ("validation", "test")}


def main(folder: Path) -> None:
    """Add to derived.jsonl what is missing there."""
    logging.disable(logging.WARNING)  # torch.export tells about its own future
    found, path, lines = StudyResults.load(folder), folder / "derived.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        lines[record["hash"], json.dumps(record["treatment"])] = line
    kept = {name: run for name, run in found.runs.items() if found.configs[name].save_weights}
    if not kept:
        raise ConfigError(f"{folder}: no run of the study with save_weights: true has a result")
    if missing := [name for name in kept if not (folder / f"{name}.safetensors").exists()]:
        print(f"no weights, left out: {', '.join(missing)}", file=sys.stderr)
    todo = [(name, t) for name in kept if name not in missing for t in treatments(kept[name].config)]
    todo = [(name, t) for name, t in todo if (kept[name].config_hash, json.dumps(t)) not in lines]
    network = ""
    for name, treatment in tqdm(todo, unit="treatment"):
        began, config = time.perf_counter(), kept[name].config
        if name != network:
            network, model, data = name, load(folder / f"{name}.json")[0], load_data(config)
            losses = losses_of(config)
            chosen = cache(
                lambda model=model, data=data, losses=losses: find_thresholds(model, data.validation, losses)
            )
        after = treat(model, treatment, data, config, chosen)
        facts = {"wall_seconds": time.perf_counter() - began, "parameters": count_parameters(model)}
        record = {"run": name, "hash": config.hash, "treatment": treatment, **after}
        record["provenance"] = provenance("cpu", **facts).model_dump()
        lines[config.hash, json.dumps(treatment)] = json.dumps(record)
        write_atomically(path, "".join(f"{line}\n" for line in lines.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of a study's results, such as results/rivals")
    try:
        main(parser.parse_args().folder)
    except ConfigError as error:
        sys.exit(f"error: {error}")
