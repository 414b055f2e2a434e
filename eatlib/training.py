"""Energy-aware training (paper, algorithm 1): train, measure, and survive an interruption."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from eatlib import results
from eatlib.checkpoint import TrainingState, load_start, save_weights
from eatlib.config import RunConfig
from eatlib.data import Data, Split, count_batches, load_data, training_batches
from eatlib.energy import ACCOUNTINGS, EnergyMeter, EnergyReport, activation_cost
from eatlib.models import build_model, count_parameters
from eatlib.penalties import ActivationPenalty


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


# --- algorithm 1 ----------------------------------------------------------------------------------------------------


def train_one_epoch(
    model: nn.Module,
    training_images: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    penalty: ActivationPenalty | None,
    settings: Iterable[tuple[float, float]],
    *,
    bfloat16: bool = False,
    label_smoothing: float = 0.0,
) -> dict[str, float]:
    """Algorithm 1 of the paper, one pass over the training images, with the sign of its eq. 3.

    Args:
        penalty: attached to `model`; None for standard training.
        settings: learning rate and lambda, the penalty's weight, of each step.
        bfloat16: run the network in bfloat16 where autocast does so; loss and penalty are float32 either way.

    Returns:
        Means over the images, each with the weights of its own step: `loss`, `penalty` and `train_accuracy`.
    """
    model.train()
    device = next(model.parameters()).device
    seen = 0
    sums = torch.zeros(3, device=device)  # read when the epoch is over: reading makes an accelerator wait
    for (images, labels), (rate, lambda_) in zip(training_images, settings, strict=True):
        images, labels = images.to(device), labels.to(device)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        penalty_term = penalty() if penalty is not None else torch.zeros_like(loss)
        optimizer.zero_grad()
        (loss + lambda_ * penalty_term).backward()
        optimizer.step()

        correct = (logits.argmax(1) == labels).float().mean()
        sums += len(labels) * torch.stack([loss.detach(), penalty_term.detach(), correct])
        seen += len(labels)
    return dict(zip(("loss", "penalty", "train_accuracy"), (sums / seen).tolist(), strict=True))


def fit(
    config: RunConfig,
    *,
    start: Path | None = None,
    checkpoint: Path | None = None,
    save_weights_to: Path | None = None,
    on_epoch: Callable[[results.Epoch], None] | None = None,
    data: Data | None = None,
    progress: bool = False,
) -> results.RunResult:
    """Train one configuration, then measure it on the validation and, for the first time, on the test images.

    The same configuration of the paper's networks gives the same weights and the same result, timings aside, to the
    last bit on the same machine (with the same TF32 flags, on a GPU); also if it was interrupted and resumed.

    Args:
        start: the weights of the run that `config.start` names, as `save_weights_to` has them.
        checkpoint: a file for this run alone, from which it resumes if it was interrupted. It stays when the run is
            over, for the caller to remove once the result is safe; None: no checkpoints.
        save_weights_to: safetensors file for the trained weights; beside the result, under its name, `load` finds it.
        on_epoch: called after each epoch, whose checkpoint is written by then; not for those before a resumption.
        data: the configuration's images, if the caller has loaded them already.
        progress: show a bar over all steps.

    Raises:
        TrainingError: the loss became infinite or NaN.
        ValueError: the device or the penalty's layers do not exist.
        CheckpointError: the weights to start from are not there, or do not fit.
    """
    began, _ = time.perf_counter(), (results.git_state(), results.code_digest())  # of the code that runs: both are kept
    device = find_device(config.device)
    data = data or load_data(config)
    train, validation, test = (split.to(device) for split in (data.train, data.validation, data.test))
    with _execution(config, device):
        state = _fresh_state(config, data, device, start)
        if checkpoint is not None:
            state.resume(checkpoint, config, data.info.digest)
        model, began = state.model, began - state.seconds
        steps = count_batches(len(train), config.batch_size)
        bar = tqdm(initial=steps * len(state.history), total=steps * config.epochs, unit="step", disable=not progress)
        with bar, attach_penalty(config, model, train.images[: config.energy_batch_size]) as penalty:
            # Dynamic code, for batches of any size, is slower.
            network = torch.compile(model, dynamic=False) if config.compile else model
            joules = joule_meter()
            for epoch in range(len(state.history) + 1, config.epochs + 1):
                epoch_start = time.perf_counter()
                settings = [setting(config, (epoch - 1) * steps + step, steps) for step in range(steps)]
                images = _counted(training_batches(train, config.batch_size, config.augmentation, state.generator), bar)
                means = train_one_epoch(network, images, state.optimizer, penalty, settings, **_options(config))
                logits = predict(model, validation)
                facts = means | {"validation_loss": F.cross_entropy(logits, validation.labels).item()}
                _require_finite(facts, config, epoch)
                record = results.Epoch(
                    epoch=epoch,
                    learning_rate=settings[-1][0],
                    lambda_=settings[-1][1],
                    **means,
                    validation_accuracy=(logits.argmax(1) == validation.labels).double().mean().item(),
                    seconds=round(time.perf_counter() - epoch_start, 3),
                    joules=joules(),
                )
                state.history.append(record)
                bar.set_postfix(epoch=epoch, loss=record.loss, validation_accuracy=record.validation_accuracy)
                state.seconds = time.perf_counter() - began
                if checkpoint is not None:
                    state.save(checkpoint, config, data.info.digest)
                if on_epoch is not None:
                    on_epoch(record)
        measure = {"batch_size": config.energy_batch_size, "hardware": config.hardware}
        validated, tested = (evaluate(model, split, **measure) for split in (validation, test))
        if save_weights_to is not None:
            save_weights(model, config, data.classes, save_weights_to)
        seconds = time.perf_counter() - began
        return results.RunResult(
            config_hash=config.hash,
            config=config,
            validation=validated,
            test=tested,
            history=state.history,
            data=data.info,
            provenance=results.provenance(str(device), wall_seconds=seconds, parameters=count_parameters(model)),
        )


def fine_tune(
    config: RunConfig, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, bar: tqdm
) -> None:
    """Train a model of one's own with a configuration's penalty and optimisation; `batches` has so many `steps`.

    Raises:
        TrainingError: the loss became infinite or NaN.
    """
    device, optimizer = next(model.parameters()).device, _optimizer(config, model)
    with _execution(config, device):
        torch.manual_seed(config.seed)
        first = next(iter(batches))[0].to(device) if config.penalty_normalization == "energy" else None
        with attach_penalty(config, model, first) as penalty:
            for epoch in range(config.epochs):
                settings = [setting(config, epoch * steps + step, steps) for step in range(steps)]
                counted = _counted(batches, bar)
                means = train_one_epoch(model, counted, optimizer, penalty, settings, **_options(config))
                _require_finite(means, config, epoch + 1)


def _counted(batches: Iterable[tuple[Tensor, Tensor]], bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield batch
        bar.update()


def _fresh_state(config: RunConfig, data: Data, device: torch.device, start: Path | None = None) -> TrainingState:
    """The network, its weights drawn by the configuration's seed or those it starts from, and its optimiser."""
    torch.manual_seed(config.seed)
    size = {"classes": len(data.classes), "image_size": config.image_size, "width": config.width}
    model = build_model(config.model, **size, mean=data.mean, std=data.std)
    if config.start is not None:
        load_start(model, config, start)
    model = model.to(device).to(memory_format=memory_format(model))
    return TrainingState(model, _optimizer(config, model), torch.Generator().manual_seed(config.seed), device)


def _optimizer(config: RunConfig, model: nn.Module) -> torch.optim.SGD:
    options = {"momentum": config.momentum, "weight_decay": config.weight_decay, "nesterov": config.nesterov}
    return torch.optim.SGD(model.parameters(), config.learning_rate, **options)


def _options(config: RunConfig) -> dict[str, Any]:
    """Of `train_one_epoch`."""
    return {"bfloat16": config.precision == "bfloat16", "label_smoothing": config.label_smoothing}


def _require_finite(facts: dict[str, float], config: RunConfig, epoch: int) -> None:
    for name, value in facts.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name.replace('_', ' ')} became {value} in epoch {epoch} of {config.epochs}, with lambda = "
                f"{config.lambda_:g}, sigma = {config.sigma:g}, learning_rate = {config.learning_rate:g}: no result. "
                "A smaller lambda or learning_rate, a larger sigma, or a longer warm-up may help"
            )


def setting(config: RunConfig, step: int, steps: int) -> tuple[float, float]:
    """Learning rate and lambda of a step, counted from 0, where an epoch has so many `steps`.

    `exponential` (the paper's): they change from epoch to epoch. The rate decays; lambda rises from 0 over the warm-up
    epochs. `triangular`: they change from step to step. Both rise over the first `warmup_share` of all steps; then the
    rate falls, to reach 0 after the last.
    """
    if config.schedule == "triangular":
        total = config.epochs * steps
        rise = config.warmup_share * total
        risen = min(1.0, (step + 1) / rise) if rise else 1.0
        return config.learning_rate * min(risen, (total - step) / (total - rise)), config.lambda_ * risen
    epoch = step // steps
    risen = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.learning_rate * config.learning_rate_decay**epoch, config.lambda_ * risen


# --- measuring ------------------------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 512,
    hardware: str = "horowitz-45nm-float32",
) -> results.Evaluation:
    """Accuracy, loss, energy in both accountings and the firing of every layer, all from one pass over a split.

    Leaves the model in evaluation mode.

    Args:
        batch_size: images in a forward pass; the energy ratio moves with it, as weights are charged once a batch.
    """
    with EnergyMeter(model, hardware=hardware) as meter:
        logits = predict(model, split, batch_size=batch_size)
    labels = split.labels.to(logits.device)
    right = logits.argmax(1) == labels
    right_of_class, of_class = (found.bincount(minlength=logits.shape[1]) for found in (labels[right], labels))
    present = of_class > 0
    reports = {accounting: meter.report(accounting) for accounting in ACCOUNTINGS}
    return results.Evaluation(
        samples=len(split),
        accuracy=int(right.sum()) / len(split),
        macro_accuracy=float((right_of_class[present] / of_class[present].double()).mean()),
        loss=float(F.cross_entropy(logits.double(), labels)),
        energy={accounting: results.Energy.of(report) for accounting, report in reports.items()},
        firing=[results.LayerFiring(name=name, kind=kind, firing=share) for name, kind, share in meter.firing()],
        uncounted={accounting: report.uncounted for accounting, report in reports.items()},
    )


def assess(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, EnergyReport]]:
    """The accuracy, from 0 to 1, and energy by accounting; leaves the model in evaluation mode."""
    device, right, total = next(model.parameters()).device, 0, 0
    with EnergyMeter(model.eval()) as meter, torch.no_grad():
        for inputs, labels in batches:
            right += int((model(inputs.to(device)).argmax(1) == labels.to(device)).sum())
            total += labels.numel()
    reports = {accounting: meter.report(accounting) for accounting in ACCOUNTINGS}
    return right / total, reports


def predict(model: nn.Module, split: Split, *, batch_size: int = 512) -> Tensor:
    """Logits (N, classes) of all images of a split, on the model's device; leaves the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(images.to(device)) for images in split.images.split(batch_size)])


def joule_meter() -> Callable[[], dict[str, float] | None]:
    """A function that gives the joules that this machine has used since its last call, read off the hardware by zeus.

    They are those of all GPUs in sight (`gpu`) and, where RAPL may be read, of the CPUs (`cpu`) and their memory
    (`memory`), whatever else ran there; None where zeus is not installed or can read nothing. Nothing is estimated.
    """
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return lambda: None
    monitor = ZeusMonitor()
    monitor.begin_window("joules")

    def joules() -> dict[str, float] | None:
        used = monitor.end_window("joules")
        monitor.begin_window("joules")
        parts = {"gpu": used.gpu_energy, "cpu": used.cpu_energy, "memory": used.dram_energy}
        return {part: sum(energy.values()) for part, energy in parts.items() if energy} or None

    return joules


# --- where it runs --------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device = {name!r}: not on this machine; auto takes what there is")
    return device


def memory_format(model: nn.Module) -> torch.memory_format:
    """The faster layout of images and weights that is safe for a network: channels last, with one exception.

    oneDNN's weight gradient of a strided 1x1 convolution with fewer than 16 input channels writes past its workspace
    if channels come last (uxlfoundation/oneDNN#6035): wrong gradients, or a crash.
    """
    for module in model.modules():
        strided = isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1 < max(module.stride)
        if strided and module.in_channels // module.groups < 16:
            return torch.contiguous_format
    return torch.channels_last


@contextmanager
def _execution(config: RunConfig, device: torch.device) -> Iterator[None]:
    """The number of threads, deterministic convolutions, and random states, for a while."""
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    try:
        torch.set_num_threads(config.threads)
        torch.backends.cudnn.deterministic = True
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = deterministic


def attach_penalty(config: RunConfig, model: nn.Module, images: Tensor | None) -> ActivationPenalty | nullcontext[None]:
    """The configuration's penalty, for "energy" with the costs of a batch; with lambda 0 none at all."""
    if config.lambda_ == 0:
        return nullcontext()
    costs = None
    if config.penalty_normalization == "energy":
        costs = {name: share * len(images) for name, share in activation_cost(model, images, config.hardware).items()}
    options = {"sigma": config.sigma, "layers": config.penalty_layers, "normalization": config.penalty_normalization}
    return ActivationPenalty(model, config.penalty, **options, costs=costs, share=config.penalty_share)
