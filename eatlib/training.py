"""Energy-aware training (paper, algorithm 1): train, measure, and survive an interruption."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eatlib import results
from eatlib.config import RunConfig
from eatlib.data import Data, Split, batches, load_data, training_batches
from eatlib.energy import EnergyMeter, activation_cost
from eatlib.models import ImageClassifier, build_model, count_parameters
from eatlib.penalties import ActivationPenalty

EVALUATION_BATCH = 512


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


@dataclass
class Totals:
    """Sums over the images of an epoch, kept on the device: reading them would make it wait."""

    loss: Tensor
    penalty: Tensor
    correct: Tensor
    samples: int = 0


def train_one_epoch(
    model: nn.Module,
    training_images: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    penalty: ActivationPenalty | None,
    lambda_: float,
    *,
    device: torch.device,
    precision: str = "float32",
) -> Totals:
    """Algorithm 1 of the paper, one pass over the training images, with the sign of its eq. 3."""
    model.train()
    totals = Totals(*torch.zeros(3, device=device))
    for images, labels in training_images:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        energy = penalty() if penalty is not None else torch.zeros_like(loss)
        objective = loss + lambda_ * energy if penalty is not None else loss
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()

        totals.samples += len(labels)
        totals.loss += loss.detach() * len(labels)
        totals.penalty += energy.detach() * len(labels)
        totals.correct += (logits.argmax(1) == labels).sum()
    return totals


def evaluate(
    model: nn.Module, split: Split, *, batch_size: int, hardware: str, device: torch.device | str = "cpu"
) -> results.Evaluation:
    """Accuracy, loss, energy (both accountings) and firing of every layer, in one pass over a split."""
    device = torch.device(device)
    model.eval()
    loss = torch.zeros((), device=device, dtype=torch.float64)
    right, seen = [], []
    with torch.no_grad(), EnergyMeter(model, hardware=hardware) as meter:
        for images, labels in batches(split, batch_size):
            labels = labels.to(device)
            logits = model(images.to(device, non_blocking=True)).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            right.append(labels[logits.argmax(1) == labels])
            seen.append(labels)
    correct = torch.bincount(torch.cat(right), minlength=logits.shape[1]).double()
    total = torch.bincount(torch.cat(seen), minlength=logits.shape[1]).double()
    reports = {accounting: meter.report(accounting) for accounting in ("published", "fused")}
    return results.Evaluation(
        samples=int(total.sum()),
        accuracy=float(correct.sum() / total.sum()),
        macro_accuracy=float((correct / total)[total > 0].mean()),
        loss=float(loss) / int(total.sum()),
        energy={
            accounting: results.EnergyTotals(
                ratio=report.ratio,
                joules_per_image=report.joules_per_image,
                dense_joules_per_image=report.dense_joules_per_image,
            )
            for accounting, report in reports.items()
        },
        firing=[results.LayerFiring(name=n, kind=k, firing=f) for n, k, f in meter.firing()],
        uncounted=reports["published"].uncounted,
    )


def fit(
    config: RunConfig,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[results.Epoch], None] | None = None,
    data: Data | None = None,
) -> results.RunResult:
    """Train, validate and test one configuration."""
    start = time.perf_counter()
    device = resolve_device(config.device)
    data = load_data(config) if data is None else data
    with _threads(config.threads):
        torch.manual_seed(config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        model = _network(config, data).to(device)
        model = model.to(memory_format=memory_format(model))
        optimizer = torch.optim.SGD(
            model.parameters(),
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        history = []
        with _penalty(config, model, data, device) as penalty:
            for epoch in range(1, config.epochs + 1):
                epoch_start = time.perf_counter()
                lambda_ = lambda_at(config, epoch)
                rate = config.learning_rate * config.learning_rate_decay ** (epoch - 1)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                images = training_batches(data.train, config.batch_size, config.augmentation, generator)
                totals = train_one_epoch(
                    model, images, optimizer, penalty, lambda_, device=device, precision=config.precision
                )
                loss, energy, correct = torch.stack([totals.loss, totals.penalty, totals.correct]).tolist()
                history.append(
                    results.Epoch(
                        epoch=epoch,
                        learning_rate=rate,
                        **{"lambda": lambda_},
                        loss=loss / totals.samples,
                        penalty=energy / totals.samples,
                        train_accuracy=correct / totals.samples,
                        validation_accuracy=accuracy(model, data.validation, device=device),
                        seconds=round(time.perf_counter() - epoch_start, 3),
                    )
                )
                if on_epoch is not None:
                    on_epoch(history[-1])
        validation, test = (
            evaluate(model, split, batch_size=config.energy_batch_size, hardware=config.hardware, device=device)
            for split in (data.validation, data.test)
        )
        return results.RunResult(
            config_hash=config.hash,
            config=config,
            validation=validation,
            test=test,
            history=history,
            data=data.info,
            provenance=results.provenance(
                device=str(device),
                threads=torch.get_num_threads(),
                wall_seconds=time.perf_counter() - start,
                parameters=count_parameters(model),
            ),
        )


def accuracy(model: nn.Module, split: Split, *, device: torch.device) -> float:
    """Share of a split's images that the model classifies correctly."""
    model.eval()
    correct = torch.zeros((), device=device, dtype=torch.int64)
    with torch.no_grad():
        for images, labels in batches(split, EVALUATION_BATCH):
            correct += (model(images.to(device, non_blocking=True)).argmax(1) == labels.to(device)).sum()
    return int(correct) / len(split)


def lambda_at(config: RunConfig, epoch: int) -> float:
    """The penalty's weight in an epoch (from 1): it rises linearly from 0 over the warm-up epochs."""
    return config.lambda_ * min(1.0, (epoch - 1) / config.warmup_epochs if config.warmup_epochs else 1.0)


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else Apple's MPS, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _network(config: RunConfig, data: Data) -> ImageClassifier:
    return build_model(
        config.model,
        classes=len(data.classes),
        image_size=config.image_size,
        width=config.width,
        mean=data.mean,
        std=data.std,
    )


def _penalty(config: RunConfig, model: nn.Module, data: Data, device: torch.device):
    """The configured penalty, or none with lambda 0: this is standard training bit for bit."""
    if config.lambda_ == 0:
        return nullcontext()
    costs = None
    if config.penalty_normalization == "energy":
        costs = activation_cost(model, data.train.images[: config.batch_size].to(device), config.hardware)
    return ActivationPenalty(
        model,
        config.penalty,
        sigma=config.sigma,
        layers=config.penalty_layers,
        normalization=config.penalty_normalization,
        costs=costs,
    )


def memory_format(model: nn.Module) -> torch.memory_format:
    """The faster layout of images and weights that is safe for a network: channels last, with one exception.

    oneDNN's weight gradient of a strided 1x1 convolution with fewer than 16 input channels writes past its
    workspace if channels come last (uxlfoundation/oneDNN#6035): wrong gradients, or a crash.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1 < max(module.stride):
            if module.in_channels // module.groups < 16:
                return torch.contiguous_format
    return torch.channels_last


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with a number of CPU threads."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
