"""From a trained model to cheaper ones: the studies' path of rising lambda, for a model of one's own."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from eatlib.checkpoint import copy_weights, keep_step, take_step, weights_digest
from eatlib.config import RECIPE_FIELDS, recipe
from eatlib.energy import EnergyReport
from eatlib.penalties import ActivationPenalty
from eatlib.training import assess, fine_tune


@dataclass(frozen=True)
class Point:
    """A model on the curve: its weights, on the CPU, its validation accuracy, and its energy, by accounting."""

    lambda_: float
    state: dict[str, Tensor]
    accuracy: float
    reports: dict[str, EnergyReport]


def tradeoff(
    model: nn.Module,
    train_batches: Iterable[tuple[Tensor, Tensor]],
    validate: Iterable[tuple[Tensor, Tensor]],
    *,
    lambdas: Sequence[float],
    margin: float = 1.0,
    folder: str | Path | None = None,
    **settings: Any,
) -> Iterator[Point]:
    """Fine-tune a trained classifier at one rising lambda after another, each from the weights of the one before.

    Yields the model as it is, lambda 0, then each lambda's point, whose weights the model has at that time.

    Args:
        model: gives logits (N, classes), and has ReLUs; `eatlib.models.with_relus` can make some.
        train_batches, validate: (inputs, labels), as often as asked for: a DataLoader, or a list.
        margin: the path ends with the first point whose accuracy has fallen by more than this share.
        folder: keeps each step's weights, so that an interrupted path goes on with the first step that is missing.
        settings: of each step, `RECIPE_FIELDS` of `RunConfig`; defaults: `eatlib.config.recipe`.

    Raises:
        ValueError: an argument is not allowed, or nothing in the model makes zeros; before any work.
        CheckpointError: a step in the folder was made with something else.
    """
    if any(hasattr(batches, "__next__") for batches in (train_batches, validate)):
        raise ValueError("train_batches, validate: give a DataLoader or a list, as an iterator can be read only once")
    if not 0 <= margin <= 1:
        raise ValueError(f"margin = {margin!r}: must be a share of the images, from 0 to 1")
    configs = recipe(lambdas, settings | {"threads": torch.get_num_threads()})
    tried = deepcopy(model).train()
    with torch.random.fork_rng([]), ActivationPenalty(tried, layers=configs[0].penalty_layers) as penalty:
        tried(next(iter(train_batches))[0].to(next(tried.parameters()).device))
        penalty()  # raises if nothing makes zeros
        steps = length_hint(train_batches) or sum(1 for _ in train_batches)
    made_of = {"start": weights_digest(state := copy_weights(model)), "steps": steps}
    yield (first := Point(0.0, state, *assess(model, validate)))
    with tqdm(total=len(configs) * configs[0].epochs * steps, unit="step") as bar:
        for number, config in enumerate(configs, 1):
            made_of |= {"lambdas": [other.lambda_ for other in configs[:number]]}
            made_of |= {name: getattr(config, name) for name in RECIPE_FIELDS}
            file = Path(folder, f"lambda{config.lambda_:g}.safetensors") if folder else None
            model.load_state_dict(state)  # whatever became of the model meanwhile
            if not take_step(model, file, made_of):
                fine_tune(config, model, train_batches, steps, bar)
                keep_step(model, file, made_of)
            bar.update(number * config.epochs * steps - bar.n)
            yield (point := Point(config.lambda_, state := copy_weights(model), *assess(model, validate)))
            if first.accuracy - point.accuracy > margin:
                return
