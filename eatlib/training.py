"""Energy-aware training (paper, algorithm 1): train, measure, and survive an interruption."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eatlib import results
from eatlib.config import RunConfig
from eatlib.data import Data, Split, batches, load_data, training_batches
from eatlib.energy import ACCOUNTINGS, EnergyMeter, activation_cost, find_hardware
from eatlib.models import ImageClassifier, build_model, count_parameters
from eatlib.penalties import ActivationPenalty

CHECKPOINT = "checkpoint.safetensors"
"""Name of the one file that `fit` keeps in its checkpoint folder."""


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why."""


class EpochMeans(NamedTuple):
    """What an epoch of training saw, as means over its images, each with the weights of its own step."""

    loss: float
    penalty: float
    accuracy: float


# --- algorithm 1 ----------------------------------------------------------------------------------------------------


def train_one_epoch(
    model: nn.Module,
    training_images: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    penalty: ActivationPenalty | None,
    lambda_: float,
    *,
    device: torch.device,
    bfloat16: bool = False,
) -> EpochMeans:
    """Algorithm 1 of the paper, one pass over the training images, with the sign of its eq. 3.

    Args:
        penalty: attached to `model`; None for standard training.
        lambda_: the penalty's weight.
        bfloat16: run the network in bfloat16 where autocast does so; loss and penalty are float32 either way.
    """
    model.train()
    seen = 0
    sums = torch.zeros(3, device=device)  # read when the epoch is over: reading makes an accelerator wait
    for images, labels in training_images:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels)
        energy = penalty() if penalty is not None else torch.zeros_like(loss)
        objective = loss + lambda_ * energy if penalty is not None else loss
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()

        correct = (logits.argmax(1) == labels).float().mean()
        sums += len(labels) * torch.stack([loss.detach(), energy.detach(), correct])
        seen += len(labels)
    return EpochMeans(*(sums / seen).tolist())


def fit(
    config: RunConfig,
    *,
    checkpoint: Path | None = None,
    weights: Path | None = None,
    on_epoch: Callable[[results.Epoch], None] | None = None,
    data: Data | None = None,
) -> results.RunResult:
    """Train one configuration, then measure it on the validation and, for the first time, on the test images.

    The same configuration gives the same weights and the same result, timings aside, to the last bit on the same
    machine with the same number of threads; also if it was interrupted after any epoch and resumed.

    Args:
        checkpoint: a folder for this run alone. An interrupted run resumes from what it holds. It stays when the run
            is over, for the caller to remove once the result is safe; None: no checkpoints.
        weights: safetensors file for the trained weights, written if `config.save_weights`; beside the result, under
            its name, `load` finds it.
        on_epoch: called after each epoch, whose checkpoint is written by then; not for those before a resumption.
        data: the configuration's images, if the caller has loaded them already.

    Raises:
        TrainingError: the loss became infinite or NaN, or the checkpoint is not this run's.
        ValueError: the device, the hardware or the penalty's layers do not exist.
    """
    start = time.perf_counter()
    if config.save_weights and weights is None:
        raise ValueError("save_weights = True: fit needs the file to save them to, weights=PATH")
    find_hardware(config.hardware)
    device = find_device(config.device)
    if data is None:
        data = load_data(config)
    train, validation, test = (split.to(device) for split in (data.train, data.validation, data.test))
    with _execution(config, device):
        run = _Run(config, data, device)
        if checkpoint is not None:
            run.resume(checkpoint / CHECKPOINT)
        before = run.seconds
        model = run.model
        with _attach_penalty(config, model, train) as penalty:
            network = torch.compile(model) if config.compile else model
            for epoch in range(len(run.history) + 1, config.epochs + 1):
                epoch_start = time.perf_counter()
                for group in run.optimizer.param_groups:
                    group["lr"] = learning_rate_at(config, epoch)
                images = training_batches(train, config.batch_size, config.augmentation, run.generator)
                means = train_one_epoch(
                    network,
                    images,
                    run.optimizer,
                    penalty,
                    lambda_at(config, epoch),
                    device=device,
                    bfloat16=config.precision == "bfloat16",
                )
                validation_accuracy, validation_loss = validate(model, validation)
                _require_finite((means.loss, means.penalty, validation_loss), config, epoch)
                run.history.append(
                    results.Epoch(
                        epoch=epoch,
                        learning_rate=learning_rate_at(config, epoch),
                        **{"lambda": lambda_at(config, epoch)},
                        loss=means.loss,
                        penalty=means.penalty,
                        train_accuracy=means.accuracy,
                        validation_accuracy=validation_accuracy,
                        seconds=round(time.perf_counter() - epoch_start, 3),
                    )
                )
                run.seconds = before + time.perf_counter() - start
                if checkpoint is not None and _is_due(config, epoch):
                    run.save(checkpoint / CHECKPOINT)
                if on_epoch is not None:
                    on_epoch(run.history[-1])
        measured = [
            evaluate(model, split, batch_size=config.energy_batch_size, hardware=config.hardware, device=device)
            for split in (validation, test)
        ]
        if config.save_weights:
            save_weights(model, config, data.classes, weights)
        return results.RunResult(
            config_hash=config.hash,
            config=config,
            validation=measured[0],
            test=measured[1],
            history=run.history,
            data=data.info,
            provenance=results.provenance(
                device=str(device),
                threads=torch.get_num_threads(),
                wall_seconds=before + time.perf_counter() - start,
                parameters=count_parameters(model),
            ),
        )


def learning_rate_at(config: RunConfig, epoch: int) -> float:
    """The learning rate in an epoch, counted from 1: it decays exponentially."""
    return config.learning_rate * config.learning_rate_decay ** (epoch - 1)


def lambda_at(config: RunConfig, epoch: int) -> float:
    """The penalty's weight in an epoch, counted from 1: it rises linearly from 0 over the warm-up epochs."""
    return config.lambda_ * min(1.0, (epoch - 1) / config.warmup_epochs if config.warmup_epochs else 1.0)


def _is_due(config: RunConfig, epoch: int) -> bool:
    every = config.checkpoint_every
    return every > 0 and (epoch % every == 0 or epoch == config.epochs)


def _require_finite(losses: tuple[float, ...], config: RunConfig, epoch: int) -> None:
    bad = [loss for loss in losses if not math.isfinite(loss)]
    if bad:
        raise TrainingError(
            f"the loss became {bad[0]} in epoch {epoch} of {config.epochs}, with lambda = {config.lambda_:g}, "
            f"sigma = {config.sigma:g}, learning_rate = {config.learning_rate:g}: no result. A smaller lambda or "
            "learning_rate, a larger sigma, or warmup_epochs may help"
        )


# --- measuring ------------------------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 512,
    hardware: str = "horowitz-45nm-float32",
    device: torch.device | str = "cpu",
) -> results.Evaluation:
    """Accuracy, loss, energy in both accountings and the firing of every layer, all from one pass over a split.

    Leaves the model in evaluation mode.

    Args:
        batch_size: images in a forward pass; the energy ratio moves with it, as weights are charged once a batch.
        device: where the model is.
    """
    model.eval()
    loss, right, seen = 0.0, [], []
    with torch.no_grad(), EnergyMeter(model, hardware=hardware) as meter:
        for images, labels in batches(split, batch_size):
            labels = labels.to(device)
            logits = model(images.to(device))
            loss += F.cross_entropy(logits, labels, reduction="sum")
            right.append(labels[logits.argmax(1) == labels])
            seen.append(labels)
    count, classes = len(split), logits.shape[1]
    right_of_class = torch.cat(right).bincount(minlength=classes)
    of_class = torch.cat(seen).bincount(minlength=classes)
    present = of_class > 0
    reports = {accounting: meter.report(accounting) for accounting in ACCOUNTINGS}
    return results.Evaluation(
        samples=count,
        accuracy=int(right_of_class.sum()) / count,
        macro_accuracy=float((right_of_class[present] / of_class[present].double()).mean()),
        loss=float(loss) / count,
        energy={
            accounting: results.EnergyTotals(
                ratio=report.ratio,
                joules_per_image=report.joules_per_image,
                dense_joules_per_image=report.dense_joules_per_image,
            )
            for accounting, report in reports.items()
        },
        firing=[results.LayerFiring(name=name, kind=kind, firing=share) for name, kind, share in meter.firing()],
        uncounted={accounting: report.uncounted for accounting, report in reports.items()},
    )


def validate(model: nn.Module, split: Split, *, batch_size: int = 512) -> tuple[float, float]:
    """Accuracy and loss on a split that is where the model is; leaves the model in evaluation mode."""
    model.eval()
    sums = torch.zeros(2, device=split.labels.device)
    with torch.no_grad():
        for images, labels in batches(split, batch_size):
            logits = model(images)
            correct = (logits.argmax(1) == labels).sum()
            sums += torch.stack([correct, F.cross_entropy(logits, labels, reduction="sum")])
    accuracy, loss = (sums.double() / len(split)).tolist()
    return accuracy, loss


# --- a run and its state --------------------------------------------------------------------------------------------


class _Run:
    """All that changes while a configuration is trained, fresh from its seed, and its checkpoint.

    The checkpoint is a single safetensors file, so that it is whole or not there: weights, momentum and random states
    as tensors, everything else as JSON in its metadata.
    """

    def __init__(self, config: RunConfig, data: Data, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        """Draws the order and the augmentation of the images; PyTorch's own draws the weights and dropout."""
        model = build_model(
            config.model,
            classes=len(data.classes),
            image_size=config.image_size,
            width=config.width,
            mean=data.mean,
            std=data.std,
        )
        self.model = model.to(device).to(memory_format=memory_format(model))
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        self.history: list[results.Epoch] = []
        self.seconds = 0.0
        self._config = config
        self._digest = data.info.digest
        self._device = device

    def save(self, path: Path) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{index}"] = state["momentum_buffer"]
        tensors |= {"random.order": self.generator.get_state(), "random.torch": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self._device)
        facts = {
            "config_hash": self._config.hash,
            "config": self._config.to_dict(),
            "data_digest": self._digest,
            "code": self._code(),
            "seconds": self.seconds,
            "history": [epoch.model_dump(by_alias=True) for epoch in self.history],
        }
        _save_tensors(path, tensors, facts)

    def _code(self) -> str:
        return f"eatlib {results.git_state()[0] or 'outside git'} with PyTorch {torch.__version__}"

    def resume(self, path: Path) -> None:
        """Take on the state in a checkpoint, if there is one and the same code made it.

        Raises:
            TrainingError: it is damaged, or of another configuration or other images.
        """
        if not path.exists():
            return
        try:
            tensors, facts = _load_tensors(path)
            if facts["code"] != self._code():
                warnings.warn(f"{path} was made by {facts['code']}, not {self._code()}: training anew", stacklevel=3)
                return
            own = {"config_hash": self._config.hash, "data_digest": self._digest}
            other = [f"{key} {facts[key]}, not {value}" for key, value in own.items() if facts[key] != value]
            if other:
                raise TrainingError(f"{path} is the checkpoint of another run ({'; '.join(other)}): remove it")
            self.model.load_state_dict(_part(tensors, "model."))
            parameters = list(self.model.parameters())  # whose memory layout their momentum has
            momentum = {
                int(index): {"momentum_buffer": torch.empty_like(parameters[int(index)]).copy_(value)}
                for index, value in _part(tensors, "momentum.").items()
            }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": momentum, "param_groups": groups})
            self.generator.set_state(tensors["random.order"])
            torch.set_rng_state(tensors["random.torch"])
            if self._device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self._device)
            self.history = [results.Epoch.model_validate(epoch) for epoch in facts["history"]]
            self.seconds = facts["seconds"]
        except TrainingError:
            raise
        except (LookupError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{path} is not a whole checkpoint ({error}): remove it") from None


def save_weights(model: ImageClassifier, config: RunConfig, classes: list[str], path: Path) -> None:
    """Write trained weights, with what it takes to build their network, as a safetensors file."""
    _save_tensors(path, model.state_dict(), {"config": config.to_dict(), "classes": classes})


def load(path: str | Path) -> tuple[ImageClassifier, RunConfig]:
    """A trained network, in evaluation mode on the CPU, and its configuration.

    Args:
        path: of a result (JSON) with its weights beside it, or of the weights themselves (safetensors).

    Raises:
        FileNotFoundError: the run did not keep its weights (`save_weights: true`).
        TrainingError: the file is damaged, or holds something else.
    """
    path = Path(path).with_suffix(".safetensors")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weights; a run keeps them with save_weights: true")
    tensors, facts = _load_tensors(path)
    missing = [name for name, found in (("config", facts), ("classes", facts), ("mean", tensors)) if name not in found]
    if missing:
        raise TrainingError(f"{path} holds no trained weights of eatlib: it has no {', '.join(missing)}")
    config = RunConfig.parse(facts["config"], where=str(path))
    model = build_model(
        config.model,
        classes=len(facts["classes"]),
        image_size=config.image_size,
        width=config.width,
        mean=(0.0,) * tensors["mean"].numel(),
        std=(1.0,) * tensors["std"].numel(),
    )
    model.load_state_dict(tensors)
    return model.eval(), config


def _save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    dense = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    results.write_atomically(path, safetensors.torch.save(dense, {"facts": json.dumps(facts)}))


def _load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `_save_tensors` wrote.

    Raises:
        TrainingError: the file is damaged or foreign.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {})["facts"])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} is damaged, or not a file of eatlib ({error}): remove it") from None
    return tensors, facts


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.backends.cudnn.deterministic = True
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = deterministic


def _attach_penalty(config: RunConfig, model: nn.Module, train: Split) -> Any:
    """The configuration's penalty; none at all with lambda 0, which is standard training bit for bit."""
    if config.lambda_ == 0:
        return nullcontext()
    costs = None
    if config.penalty_normalization == "energy":
        images = train.images[: config.energy_batch_size]
        shares = activation_cost(model, images, config.hardware)
        costs = {name: share * len(images) for name, share in shares.items()}
    return ActivationPenalty(
        model,
        config.penalty,
        sigma=config.sigma,
        layers=config.penalty_layers,
        normalization=config.penalty_normalization,
        costs=costs,
    )
