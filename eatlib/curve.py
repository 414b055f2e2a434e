"""From a trained model to cheaper ones: the studies' path of rising lambda, for a model of one's own."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from operator import length_hint
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from eatlib.checkpoint import copy_weights
from eatlib.config import recipe
from eatlib.energy import EnergyReport
from eatlib.results import write_atomically
from eatlib.training import assess, attach_penalty, fine_tune


class Point(NamedTuple):
    """A model on the curve: its weights, on the CPU, its accuracy on validation data, and its energy by accounting."""

    lambda_: float
    state: dict[str, Tensor]
    accuracy: float
    reports: dict[str, EnergyReport]


def tradeoff(
    model: nn.Module,
    train_batches: Iterable[tuple[Tensor, Tensor]],
    validation_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    lambdas: Sequence[float],
    margin: float = 1.0,
    folder: str | Path | None = None,
    **settings: Any,
) -> Iterator[Point]:
    """Fine-tune a copy of a trained classifier at one rising lambda after another, each from the one before.

    Yields first the model as it is, which it stays, with lambda 0.

    Args:
        model: gives logits (N, classes), and has ReLUs; `eatlib.models.with_relus` can make some.
        train_batches, validation_batches: (inputs, labels), as often as asked for: a DataLoader, or a list.
        margin: the path ends with the first point whose accuracy has fallen by more than this share.
        folder: keeps each step's weights, by a hash of what made them: an interrupted path goes on, others share it.
        settings: of each step: epochs (1), learning_rate (0.01), sigma (0.01), ..., all of `RECIPE_FIELDS`.

    Raises:
        ValueError: an argument is not allowed, or no ReLU that the training could reach; at once.
    """
    configs = recipe(lambdas, {"threads": torch.get_num_threads()} | settings)
    if not 0 <= margin <= 1:
        raise ValueError(f"margin = {margin!r}: must be a share of the images, from 0 to 1")
    tried, device, state = deepcopy(model), next(model.parameters()).device, copy_weights(model)
    with torch.random.fork_rng([]):
        for name, batches in {"validation_batches": validation_batches, "train_batches": train_batches}.items():
            first = None if hasattr(batches, "__next__") else next(iter(batches), None)
            pair = isinstance(first, (tuple, list)) and [isinstance(part, Tensor) for part in first] == [True, True]
            if not pair or first[1].dim() != 1:
                raise ValueError(f"{name}: must be a DataLoader or a list, no iterator, of (inputs, labels (N,))")
        with attach_penalty(configs[0], tried.train(), first[0].to(device)) as penalty:
            tried(first[0].to(device))
            if not penalty().requires_grad:
                raise ValueError("the model's ReLUs do not depend on a parameter with requires_grad: nothing to train")
        steps = length_hint(train_batches) or sum(1 for _ in train_batches)

    def points(made_of: str) -> Iterator[Point]:
        tried.load_state_dict(state)
        yield (first := Point(0.0, state, *assess(tried, validation_batches)))
        with tqdm(total=len(configs) * configs[0].epochs * steps, unit="step") as bar:
            for number, config in enumerate(configs, 1):
                made_of = hashlib.sha256(f"{made_of} {config.hash}".encode()).hexdigest()[:12]
                file = Path(folder, f"lambda{config.lambda_:g}-{made_of}.safetensors") if folder else None
                if file and file.exists():
                    tried.load_state_dict(safetensors.torch.load_file(file))
                else:
                    fine_tune(config, tried, train_batches, steps, bar)
                    if file:
                        write_atomically(file, safetensors.torch.save(copy_weights(tried)))
                bar.update(number * config.epochs * steps - bar.n)
                yield (point := Point(config.lambda_, copy_weights(tried), *assess(tried, validation_batches)))
                if first.accuracy - point.accuracy > margin:
                    return

    return points(f"{hashlib.sha256(safetensors.torch.save(state)).hexdigest()[:12]} {steps} {first[0].shape}")
