"""What survives a process: the checkpoint of a run that is not done, and the weights of one that is."""

import io
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from eatlib.config import RunConfig, file_digest
from eatlib.models import ImageClassifier, build_model, count_parameters, leaf_modules
from eatlib.results import Epoch, code_digest, write_atomically


class CheckpointError(RuntimeError):
    """A file that holds no weights of eatlib; the message names it."""


@dataclass
class TrainingState:
    """All that changes while a configuration is trained.

    Attributes:
        generator: draws the order and the augmentation of the images; PyTorch's own draws weights and dropout.
        seconds: of work so far, all attempts added.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    device: torch.device
    history: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path, config: RunConfig, data_digest: str) -> None:
        """Write everything to `path`, whole or not at all."""
        content = io.BytesIO()
        state = {
            "made of": _made_of(config, data_digest, self.device),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": [epoch.model_dump(by_alias=True) for epoch in self.history],
            "seconds": self.seconds,
        }
        torch.save(state, content)
        write_atomically(path, content.getvalue())

    def resume(self, path: Path, config: RunConfig, data_digest: str) -> None:
        """Take on what `path` holds, if it is there; a file that is not this run's and this code's is set aside."""
        if not path.exists():
            return
        try:
            # Only tensors and plain values are read, so that no code is run.
            state = torch.load(path, map_location="cpu")
            for key, value in _made_of(config, data_digest, self.device).items():
                if state["made of"][key] != value:
                    raise CheckpointError(f"its {key} is {state['made of'][key]}, not {value}")
        except Exception as error:  # a damaged file can raise anything
            aside = path.with_suffix(".set-aside")
            path.replace(aside)
            reason = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(f"checkpoint moved to {aside}, training anew: {reason}", stacklevel=3)
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.history = [Epoch.model_validate(epoch) for epoch in state["history"]]
        self.seconds = state["seconds"]


def _made_of(config: RunConfig, data_digest: str, device: torch.device) -> dict[str, str]:
    """What must be the same, for a run to go on from a checkpoint to the same bits."""
    made_of = {"configuration": config.hash, "data digest": data_digest, "device": device.type}
    return made_of | {"code": code_digest(), "PyTorch": str(torch.__version__)}


def save_weights(model: ImageClassifier, config: RunConfig, classes: list[str], path: Path) -> None:
    """Write trained weights, with what it takes to build their network, as a safetensors file."""
    facts = {"config": json.dumps(config.to_dict()), "classes": json.dumps(classes)}
    write_atomically(path, safetensors.torch.save(copy_weights(model), facts))


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state on the CPU, each tensor in memory of its own."""
    whole = torch.contiguous_format
    return {name: x.detach().cpu().clone(memory_format=whole) for name, x in model.state_dict().items()}


def load_start(model: ImageClassifier, config: RunConfig, path: Path | None) -> None:
    """Give a network the weights that `config.start` names.

    Args:
        path: the file, if they are those of another run.

    Raises:
        CheckpointError: they are not there, or not of this network; with `config.new_head`, the last layer may differ.
    """
    kind, _, name = config.start.partition(":")
    if kind == "torchvision":
        tensors = _pretrained(model, config, name)
    else:
        path = path or Path(config.start.rpartition("@")[0])
        if not path.is_file() or (not config.starts_from_run and file_digest(path) != config.start.rpartition("@")[2]):
            raise CheckpointError(f"start = {config.start!r}: no such file, or another one by now")
        tensors = safetensors.torch.load_file(path)
    own = model.state_dict()
    head = [f"{name}." for name, module in leaf_modules(model).items() if count_parameters(module)][-1]
    tensors |= {key: own[key] for key in own if config.new_head and key.startswith(head)}
    shapes, own_shapes = ({key: list(tensor.shape) for key, tensor in part.items()} for part in (tensors, own))
    if other := [key for key in {**own_shapes, **shapes} if own_shapes.get(key) != shapes.get(key)]:
        facts = [f"{key} {shapes.get(key, 'missing')}, not {own_shapes.get(key, 'there')}" for key in other[:3]]
        raise CheckpointError(f"start = {config.start!r}: {len(other)} tensors differ: {'; '.join(facts)}")
    model.load_state_dict(tensors)


def _pretrained(model: ImageClassifier, config: RunConfig, name: str) -> dict[str, torch.Tensor]:
    from torchvision.models import get_model_weights  # a slow import

    try:
        weights = get_model_weights(config.model)[name]
    except (KeyError, ValueError):
        raise CheckpointError(f"start = {config.start!r}: torchvision has no such weights of {config.model}") from None
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not file.exists() and not config.download:
        raise CheckpointError(f"start = {config.start!r}: {file} is not there; download: true may fetch it")
    tensors = {f"network.{key}": tensor for key, tensor in weights.get_state_dict(check_hash=True).items()}
    return tensors | {"mean": model.mean, "std": model.std}


def load(path: str | Path) -> tuple[ImageClassifier, RunConfig]:
    """A trained network, in evaluation mode on the CPU, with its classes' names as `classes`, and its configuration.

    Args:
        path: of a result (JSON) with its weights beside it, or of the weights themselves (safetensors).

    Raises:
        FileNotFoundError: the run did not keep its weights (`save_weights: true`).
        CheckpointError: the file is damaged, or holds something else.
    """
    path = Path(path).with_suffix(".safetensors")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weights; a run keeps them with save_weights: true")
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = {name: json.loads(text) for name, text in file.metadata().items()}
            values, classes = facts["config"], facts["classes"]
    except (safetensors.SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no trained weights of eatlib ({error})") from None
    config = RunConfig.parse(values, where=str(path))
    model = build_model(config.model, classes=len(classes), image_size=config.image_size, width=config.width)
    model.classes = classes
    model.load_state_dict(tensors)
    return model.eval(), config
