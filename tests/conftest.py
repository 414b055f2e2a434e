"""Results made up for tests: real in form, invented in content."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eatlib.config import RunConfig, Study
from eatlib.results import RunResult


def _energy(ratio: float, products: float) -> dict[str, Any]:
    totals = {"batches": 1, "images": 10, "accesses": 1000, "nonzero_accesses": round(1000 * ratio)}
    totals |= {"operations": 1000, "effective_operations": 1000 * products}
    return {"ratio": ratio, "joules_per_image": ratio, "dense_joules_per_image": 1.0, "totals": [totals]}


def made_up_result(
    accuracy: float = 0.9,
    ratio: float = 0.7,
    *,
    fused: float | None = None,
    products: float | None = None,
    validation: tuple[float, float] | None = None,
    digest: str = "0" * 64,
    **config: Any,
) -> RunResult:
    """A valid result with the given accuracy and `published` energy ratio (of three decimals), the same at any prices.

    Args:
        fused: energy ratio in that accounting; None: as `published`.
        products: the share of the multiplications that zero-skipping leaves; None: that of the accesses.
        validation: accuracy and energy ratio on the validation images; None: as on the test images.
        digest: of the images.
    """
    run = RunConfig.parse({"epochs": 1} | config)

    def evaluation(accuracy: float, ratio: float) -> dict[str, Any]:
        ratios = {"published": ratio, "fused": ratio if fused is None else fused}
        firing = {"conv1": ("Conv2d", 1.0), "relu": ("ReLU", ratio / 2), "avgpool": ("AdaptiveAvgPool2d", ratio)}
        return {
            "samples": 10,
            "accuracy": accuracy,
            "macro_accuracy": accuracy,
            "loss": 0.1,
            "energy": {key: _energy(value, value if products is None else products) for key, value in ratios.items()},
            "firing": [{"name": name, "kind": kind, "firing": share} for name, (kind, share) in firing.items()],
            "uncounted": {"published": [], "fused": []},
        }

    epoch = {
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
            "validation": evaluation(*(validation or (accuracy, ratio))),
            "test": evaluation(accuracy, ratio),
            "history": [epoch | {"epoch": number} for number in range(1, run.epochs + 1)],
            "data": {
                "name": run.dataset,
                "complete": True,
                "digest": digest,
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
                "code": "0" * 12,
                "packages": {},
                "python": "3.11.0",
                "device": "cpu",
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


@pytest.fixture(scope="session")
def make_study() -> Callable[[Path, Sequence[RunConfig]], dict[str, str]]:
    """Makes a folder with a study of some runs; gives their file names by hash."""

    def make(folder: Path, runs: Sequence[RunConfig]) -> dict[str, str]:
        study = Study(name=folder.name, label="a label", blocks=[{"fixed": run.to_dict()} for run in runs])
        folder.mkdir()
        (folder / "study.yaml").write_text(study.to_yaml())
        return {run.hash: name for name, run in study.runs().items()}

    return make
