"""Results made up for tests: real in form, invented in content."""

from collections.abc import Callable
from typing import Any

import pytest

from eatlib.config import RunConfig
from eatlib.results import RunResult


def made_up_result(accuracy: float = 0.9, ratio: float = 0.7, **config: Any) -> RunResult:
    """A valid result with the given accuracy and `published` energy ratio on both splits."""
    run = RunConfig.parse({"epochs": 1} | config)
    energy = {
        name: {"ratio": ratio, "joules_per_image": ratio, "dense_joules_per_image": 1.0}
        for name in ("published", "fused")
    }
    evaluation = {
        "samples": 10,
        "accuracy": accuracy,
        "macro_accuracy": accuracy,
        "loss": 0.1,
        "energy": energy,
        "firing": [
            {"name": "conv1", "kind": "Conv2d", "firing": 1.0},
            {"name": "relu", "kind": "ReLU", "firing": ratio / 2},
        ],
        "uncounted": {"published": [], "fused": []},
    }
    epoch = {
        "epoch": 1,
        "learning_rate": 0.1,
        "lambda": run.lambda_,
        "loss": 0.1,
        "penalty": 0.2,
        "train_accuracy": accuracy,
        "validation_accuracy": accuracy,
        "seconds": 1.0,
    }
    return RunResult.model_validate(
        {
            "config_hash": run.hash,
            "config": run.to_dict(),
            "validation": evaluation,
            "test": evaluation,
            "history": [epoch | {"epoch": number} for number in range(1, run.epochs + 1)],
            "data": {
                "name": run.dataset,
                "complete": True,
                "digest": "0" * 64,
                "source_train": 80,
                "source_test": 10,
                "train": 70,
                "validation": 10,
                "test": 10,
                "classes": ["0", "1"],
                "image_size": 16,
            },
            "provenance": {
                "git_commit": None,
                "git_clean": None,
                "packages": {},
                "python": "3.11.0",
                "device": "cpu",
                "threads": 1,
                "date": "2026-01-01T00:00:00+00:00",
                "wall_seconds": 1.0,
                "parameters": 1000,
            },
        }
    )


@pytest.fixture
def make_result() -> Callable[..., RunResult]:
    """`made_up_result`, for tests that need results but no training."""
    return made_up_result
