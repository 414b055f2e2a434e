"""How long the runs of a study may take: from past runs, or from a few steps timed now."""

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from eatlib.config import RunConfig
from eatlib.results import DataInfo, ResultError, RunResult

TRAINING_IMAGES = {"digits": 1_438, "cifar10": 50_000, "gtsrb": 39_209, "celeba": 162_770}
"""Of the complete data sets, validation images included; for estimates."""


class EstimateError(RuntimeError):
    """A run that cannot be timed here; the message says why."""


def seconds_of(
    configs: Iterable[RunConfig], results: Path, *, device: str, threads: int, measure: bool
) -> dict[str, float]:
    """Seconds of training that runs may take on this machine, by name, where past runs or a trial can tell.

    Prints the throughput of each kind of run, and whence it is known.

    Args:
        results: the folder with a folder a study, whose results tell how long past runs took.
        device: "cpu" or "cuda", what `device: auto` is here.
        threads: of a run that does not say how many.
        measure: time a few training steps for each kind of run that has no past.

    Raises:
        EstimateError: a run cannot be measured, as its device is not there or has too little memory.
    """
    past: dict[tuple[str, ...], list[float]] = {}
    images: dict[str, int] = {}
    for path in sorted(results.glob("*/*.json")):
        try:
            result = RunResult.load(path)
        except (ResultError, OSError) as error:
            print("not used:", error, file=sys.stderr)
            continue
        trained_on = result.data.train * len(result.history)
        cost = sum(epoch.seconds for epoch in result.history) / trained_on
        past.setdefault(_kind(result.config, result.provenance.device), []).append(cost)
        images[result.config.dataset] = result.data.source_train
    costs: dict[tuple[str, ...], float] = {}
    seconds = {}
    for config in configs:
        kind = _kind(config, device if config.device == "auto" else config.device)
        if kind not in costs:
            if kind in past:
                costs[kind], source = statistics.median(past[kind]), f"in past runs ({len(past[kind])})"
            elif measure:
                costs[kind] = _measure(config, config.threads or threads)
                source = "measured now, on made-up images"
            else:
                continue
            print(f"{', '.join(kind)}: {1 / max(costs[kind], 1e-9):,.0f} images/s, {source}", flush=True)
        known = TRAINING_IMAGES | images if config.allow_partial else images | TRAINING_IMAGES
        count = config.train_samples or known.get(config.dataset)
        if count is not None:
            seconds[config.name] = config.epochs * count * (1 - config.validation_share) * costs[kind]
    return seconds


def _kind(config: RunConfig, device: str) -> tuple[str, ...]:
    """What decides how long a run takes for each image that it trains on."""
    return (
        f"{config.model} at width {config.width:g}",
        f"{config.image_size}x{config.image_size} images",
        config.precision + (" compiled" if config.compile else ""),
        "with penalty" if config.lambda_ else "without penalty",
        f"on {device.split(':')[0]}",
    )


def _measure(config: RunConfig, threads: int) -> float:
    """Seconds that `fit` takes here for each image that it trains on, from a few steps on made-up images.

    Its epochs end with what is read from the device, and so not before the device is done.
    """
    import torch  # slow imports, which past runs make needless

    from eatlib.data import Data, Split
    from eatlib.training import find_device, fit

    def made_up(count: int) -> Split:
        images = torch.randint(256, (count, 3, config.image_size, config.image_size), dtype=torch.uint8)
        return Split(images, torch.randint(len(classes), (count,)))

    classes = [str(label) for label in range(10)]
    try:
        steps = 30 if find_device(config.device).type == "cuda" else 3
        splits = {"train": made_up(steps * config.batch_size), "validation": made_up(2), "test": made_up(2)}
        facts = {name: len(split) for name, split in splits.items()} | {"source_train": 0, "source_test": 0}
        info = DataInfo(name="", complete=False, digest="", classes=classes, image_size=config.image_size, **facts)
        data = Data(config.dataset, **splits, classes=classes, mean=(0.5,) * 3, std=(0.5,) * 3, info=info)
        # The first of two epochs prepares memory and kernels. With hardly any learning rate, noise cannot diverge.
        changes = {"epochs": 2, "warmup_epochs": 0, "learning_rate": 1e-9, "threads": threads, "save_weights": False}
        history = fit(config.model_copy(update=changes), data=data).history
    except (ValueError, RuntimeError) as error:  # a device that is not there, or that has too little memory
        raise EstimateError(f"{config.name} cannot be measured: {error}") from None
    return max(history[-1].seconds, 1e-3) / len(splits["train"])


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
