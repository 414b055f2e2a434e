"""What a run leaves behind: one validated JSON, written whole or not at all, and a table of many."""

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eatlib.config import EXECUTION_FIELDS, PENALTY_FIELDS, RunConfig, Study, explain

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION: Literal[1] = 1
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("eatlib", "torch", "torchvision", "numpy")


class ResultError(ValueError):
    """A file that is not a whole, unaltered result; the message names it."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EnergyTotals(_Record):
    """Energy of one pass over a split, in one accounting (see `eatlib.energy`)."""

    ratio: float = Field(ge=0, description="energy with zero-skipping over energy without it")
    joules_per_image: float = Field(ge=0, description="with zero-skipping")
    dense_joules_per_image: float = Field(ge=0, description="without zero-skipping")


class LayerFiring(_Record):
    """Share of a layer's outputs that are not zero."""

    name: str = Field(description="dotted path of the module; `#2` for its second call")
    kind: str = Field(description="class of the module, such as ReLU")
    firing: float = Field(ge=0, le=1)


class Evaluation(_Record):
    """What one network does on one split."""

    samples: int = Field(ge=1, description="images")
    accuracy: float = Field(ge=0, le=1, description="share of images classified correctly")
    macro_accuracy: float = Field(ge=0, le=1, description="mean over the classes of the accuracy on each")
    loss: float = Field(description="mean cross-entropy")
    energy: dict[Literal["published", "fused"], EnergyTotals]
    firing: list[LayerFiring] = Field(description="in the order of the calls")
    uncounted: dict[Literal["published", "fused"], list[str]] = Field(
        description="by accounting, what it saw but could not count"
    )


class Epoch(_Record):
    """One epoch of training."""

    epoch: int = Field(ge=1)
    learning_rate: float
    lambda_: float = Field(alias="lambda", description="the penalty's weight in this epoch")
    loss: float = Field(description="mean cross-entropy over the epoch's training images")
    penalty: float = Field(description="mean of the penalty, before lambda; 0 where it is not computed")
    train_accuracy: float = Field(ge=0, le=1, description="of the predictions made while training")
    validation_accuracy: float = Field(ge=0, le=1)
    seconds: float = Field(ge=0)


class DataInfo(_Record):
    """Which images a run saw."""

    name: str
    complete: bool = Field(description="whether the source is the complete published data set")
    digest: str = Field(description="SHA-256 over the source's decoded pixels and labels")
    source_train: int = Field(description="training images of the source")
    source_test: int = Field(description="test images of the source")
    train: int = Field(description="images trained on")
    validation: int
    test: int
    classes: list[str]
    image_size: int = Field(description="side in pixels")


class Provenance(_Record):
    """Where a result comes from."""

    git_commit: str | None = Field(description="None: not run from a git checkout")
    git_clean: bool | None = Field(description="whether eatlib/ and notebooks/ had no uncommitted change")
    packages: dict[str, str]
    python: str
    device: str
    threads: int
    date: str = Field(description="UTC, when the run ended")
    wall_seconds: float = Field(ge=0, description="from the start of fit to its end, all attempts added")
    parameters: int = Field(description="trainable scalars of the network")


class RunResult(_Record):
    """One run: what was asked, what came out, where it comes from."""

    schema_version: Literal[1] = SCHEMA_VERSION
    config_hash: str
    config: RunConfig
    validation: Evaluation
    test: Evaluation
    history: list[Epoch]
    data: DataInfo
    provenance: Provenance

    @model_validator(mode="after")
    def _is_whole(self) -> "RunResult":
        if self.config_hash != self.config.hash:
            raise ValueError(f"config_hash {self.config_hash} is not its configuration's, {self.config.hash}")
        if len(self.history) != self.config.epochs:
            raise ValueError(f"history has {len(self.history)} of {self.config.epochs} epochs")
        return self

    def save(self, path: Path) -> None:
        """Write the JSON; `path` never holds a part of it, whatever happens meanwhile."""
        write_atomically(path, self.model_dump_json(indent=1, by_alias=True) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RunResult":
        """Read and validate a result.

        Raises:
            ResultError: the file is damaged, foreign, or altered.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ResultError(f"{path}: not a JSON file ({error})") from None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ResultError(explain(error, str(path), list(cls.model_fields))) from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path`, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@cache
def git_state() -> tuple[str | None, bool | None]:
    """The commit that the code is at, and whether the code has no uncommitted change; (None, None) outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--", "eatlib", "notebooks")
    except (OSError, subprocess.CalledProcessError):
        return None, None


def provenance(*, device: str, threads: int, wall_seconds: float, parameters: int) -> Provenance:
    """The facts about this machine and this code, and those given."""
    commit, clean = git_state()
    return Provenance(
        git_commit=commit,
        git_clean=clean,
        packages={name: metadata.version(name) for name in PACKAGES},
        python=platform.python_version(),
        device=device,
        threads=threads,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_seconds=round(wall_seconds, 3),
        parameters=parameters,
    )


@dataclass(frozen=True)
class StudyResults:
    """What the results folder of a study holds.

    Attributes:
        results: of the runs that the study consists of, in its order.
        missing: the runs that have no result.
        problems: one message for each file that is not a result.
    """

    study: Study
    results: list[RunResult]
    missing: list[RunConfig]
    problems: list[str]

    @classmethod
    def load(cls, folder: Path) -> "StudyResults":
        """Read `study.yaml` and every JSON in `folder`; results of other configurations are left out.

        Raises:
            ConfigError: `study.yaml` is not valid.
            FileNotFoundError: there is none.
        """
        study = Study.load(folder / "study.yaml")
        found, problems = {}, []
        for path in sorted(folder.glob("*.json")):
            try:
                result = RunResult.load(path)
            except ResultError as error:
                problems.append(str(error))
            else:
                found[result.config_hash] = result
        runs = study.runs()
        return cls(
            study=study,
            results=[found[run.hash] for run in runs if run.hash in found],
            missing=[run for run in runs if run.hash not in found],
            problems=problems,
        )

    def scale(self) -> list[str]:
        """For each data set and network, in a line: which images, whether all of them, what width, how long."""
        lines: dict[str, None] = {}
        for result in self.results:
            config, data = result.config, result.data
            source = "the complete data set"
            if not data.complete:
                source = f"a PARTIAL data set of {data.source_train:,} + {data.source_test:,} images"
            width = "" if config.width == 1 else f" at {config.width:g} of its width"
            lines[
                f"{config.model}{width}, {config.epochs} epochs on {data.name}: {data.train:,} training, "
                f"{data.validation:,} validation and {data.test:,} test images of {data.image_size}x{data.image_size} "
                f"pixels, from {source}"
            ] = None
        return list(lines)

    def code(self) -> str:
        """Which commits the results were made by, in a sentence; several are never mixed silently."""
        commits = {}
        for result in self.results:
            commit = result.provenance.git_commit
            name = "code outside git" if commit is None else f"commit {commit[:10]}"
            clean = "" if result.provenance.git_clean or commit is None else " with uncommitted changes"
            commits[name + clean] = commits.get(name + clean, 0) + 1
        if len(commits) == 1:
            return f"All runs were made by {next(iter(commits))}."
        parts = ", ".join(f"{count} by {name}" for name, count in commits.items())
        return f"MIXED: the runs were made by different versions of the code: {parts}."

    def digest(self) -> str:
        """SHA-256 over the results, by which a figure can be told to be of them."""
        return hashlib.sha256("".join(result.model_dump_json() for result in self.results).encode()).hexdigest()

    def table(self) -> "pd.DataFrame":
        """One row a run: the configuration's fields, and accuracies and energies as `<split>_<quantity>`.

        `test_relu_firing` is the mean over ReLUs of their firing share; `collapsed`: macro accuracy at most 5 % of the
        way from chance to perfect.
        """
        import pandas as pd  # a slow import that a training run does without

        return pd.DataFrame([table_row(result) for result in self.results])


def table_values(config: RunConfig) -> dict[str, Any]:
    """The fields of a configuration that say what is computed, as values that rows can be grouped by.

    The penalty's fields say nothing where lambda is 0: standard training has one value in each.
    """
    values = {key: value for key, value in config.to_dict().items() if key not in EXECUTION_FIELDS}
    if config.lambda_ == 0:
        values |= {key: RunConfig.model_fields[key].default for key in PENALTY_FIELDS}
    elif not isinstance(values["penalty_layers"], str):
        values["penalty_layers"] = ", ".join(values["penalty_layers"])  # a list could not be grouped by
    return values


def table_row(result: RunResult) -> dict[str, Any]:
    """One row of `StudyResults.table`."""
    row = table_values(result.config)
    for split in ("validation", "test"):
        evaluation: Evaluation = getattr(result, split)
        row[f"{split}_accuracy"] = evaluation.accuracy
        row[f"{split}_macro_accuracy"] = evaluation.macro_accuracy
        for accounting, totals in evaluation.energy.items():
            row[f"{split}_{accounting}_ratio"] = totals.ratio
            row[f"{split}_{accounting}_joules"] = totals.joules_per_image
    classes = len(result.data.classes)
    chance = 1 / classes
    relus = [layer.firing for layer in result.test.firing if layer.kind in ("ReLU", "ReLU6")]
    return row | {
        "hash": result.config_hash,
        "classes": classes,
        # Whatever the shares of the classes are: one that is always predicted gives exactly chance.
        "collapsed": result.test.macro_accuracy <= chance + 0.05 * (1 - chance),
        "validation_collapsed": result.validation.macro_accuracy <= chance + 0.05 * (1 - chance),
        "test_relu_firing": sum(relus) / len(relus) if relus else None,
        "complete": result.data.complete,
        "source_train": result.data.source_train,
        "source_test": result.data.source_test,
        "train_images": result.data.train,
        "validation_images": result.data.validation,
        "test_images": result.data.test,
        "git_commit": result.provenance.git_commit,
        "wall_seconds": result.provenance.wall_seconds,
    }
