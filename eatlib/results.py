"""What a run leaves behind: one validated JSON, written whole or not at all, and a table of many."""

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from eatlib.config import PENALTY_FIELDS, Record, RunConfig, Study, explain
from eatlib.hardware import Accounting, Hardware, Totals, energy_ratio, find_hardware, joules_per_image

if TYPE_CHECKING:
    import pandas as pd

_CHECKOUT = Path(__file__).resolve().parent.parent
ROOT = _CHECKOUT if (_CHECKOUT / "Snakefile").exists() else Path.cwd()
"""The repository; where eatlib is installed without one, the current folder, for `data/`."""
PACKAGES = ("eatlib", "torch", "torchvision", "numpy")
NUMBERS = ("hardware", "sources", "config", "data", "models", "penalties", "energy", "checkpoint", "training")
"""The modules that decide the numbers in a result."""


class ResultError(ValueError):
    """A file that is not a whole, unaltered result; the message names it."""


class Energy(Record):
    """Energy of one pass over a split in one accounting (see `eatlib.energy`), at the prices of `config.hardware`."""

    ratio: float = Field(ge=0, description="energy with zero-skipping over energy without it")
    joules_per_image: float = Field(ge=0, description="with zero-skipping")
    dense_joules_per_image: float = Field(ge=0, description="without zero-skipping")
    totals: list[Totals] = Field(min_length=1, description="one for each size of batch, to which any prices apply")

    @classmethod
    def of(cls, report: Any) -> "Energy":
        """What an `EnergyReport` says, without its layers."""
        joules = {key: getattr(report, key) for key in ("joules_per_image", "dense_joules_per_image")}
        return cls(ratio=report.ratio, **joules, totals=report.batches)


class LayerFiring(Record):
    """Share of a layer's outputs that are not zero."""

    name: str = Field(description="dotted path of the module; `#2` for its second call")
    kind: str = Field(description="class of the module, such as ReLU")
    firing: float = Field(ge=0, le=1)


class Evaluation(Record):
    """What one network does on one split."""

    samples: int = Field(ge=1, description="images")
    accuracy: float = Field(ge=0, le=1, description="share of images classified correctly")
    macro_accuracy: float = Field(ge=0, le=1, description="mean over the classes of the accuracy on each")
    loss: float = Field(description="mean cross-entropy")
    energy: dict[Accounting, Energy]
    firing: list[LayerFiring] = Field(description="in the order of the calls")
    uncounted: dict[Accounting, list[str]] = Field(description="by accounting, what it saw but could not count")


class Epoch(Record):
    """One epoch of training."""

    epoch: int = Field(ge=1)
    learning_rate: float
    lambda_: float = Field(alias="lambda", description="the penalty's weight in this epoch")
    loss: float = Field(description="mean cross-entropy over the epoch's training images")
    penalty: float = Field(description="mean of the penalty, before lambda; 0 where it is not computed")
    train_accuracy: float = Field(ge=0, le=1, description="of the predictions made while training")
    validation_accuracy: float = Field(ge=0, le=1)
    seconds: float = Field(ge=0)
    joules: dict[str, float] | None = Field(
        default=None,
        exclude_if=lambda joules: joules is None,
        description="measured, of whole devices, by part: gpu, cpu, memory; no field where zeus could measure none",
    )


class DataInfo(Record):
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


class Provenance(Record):
    """Where a result comes from."""

    git_commit: str | None = Field(description="None: not run from a git checkout")
    git_clean: bool | None = Field(description="whether the code had no uncommitted change")
    code: str = Field(description="12 hex digits of a SHA-256 over the modules that decide the numbers")
    packages: dict[str, str]
    python: str
    device: str
    date: str = Field(description="UTC, when the run ended")
    wall_seconds: float = Field(ge=0, description="from the start of fit to its end, all attempts added")
    parameters: int = Field(description="trainable scalars of the network")


class RunResult(Record):
    """One run: what was asked, what came out, where it comes from."""

    schema_version: Literal[2] = 2
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

    def history_table(self) -> "pd.DataFrame":
        """One row an epoch."""
        import pandas as pd  # a slow import that a training run does without

        return pd.DataFrame([epoch.model_dump() for epoch in self.history]).set_index("epoch")

    def save(self, path: str | Path) -> None:
        """Write the JSON; `path` never holds a part of it, whatever happens meanwhile."""
        write_atomically(Path(path), self.model_dump_json(indent=1, by_alias=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "RunResult":
        """Read and validate a result.

        Raises:
            ResultError: the file is damaged, foreign, or altered.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            raise ResultError(explain(error, str(path), list(cls.model_fields))) from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path`, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def git_state() -> tuple[str | None, bool | None]:
    """The commit, and whether eatlib/ and the code of the training notebook are as in it; (None, None) outside git."""
    notebook = "notebooks/1_train.ipynb"
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "eatlib"], ["show", f"HEAD:{notebook}"])
    git = {"stderr": subprocess.DEVNULL, "text": True}
    if ROOT != _CHECKOUT:  # the commit would be another project's
        return None, None
    try:
        commit, changes, committed = (subprocess.check_output(["git", "-C", ROOT, *c], **git) for c in commands)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit.strip(), not changes and computing(committed) == computing((ROOT / notebook).read_text("utf-8"))


def computing(notebook: str) -> list[Any]:
    """The code in a notebook's JSON, but for its parameters."""
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    return [cell["source"] for cell in cells if "parameters" not in cell["metadata"].get("tags", [])]


@cache
def code_digest() -> str:
    """12 hex digits that change with the code of the modules that decide the numbers in a result."""
    folder = Path(__file__).parent
    files = [path for name in NUMBERS for path in [folder / f"{name}.py", *sorted((folder / name).glob("*.py"))]]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.exists())).hexdigest()[:12]


def provenance(device: str, *, wall_seconds: float, parameters: int) -> Provenance:
    """The facts about this machine and this code, and those given."""
    commit, clean = git_state()
    return Provenance(
        git_commit=commit,
        git_clean=clean,
        code=code_digest(),
        packages={name: metadata.version(name) for name in PACKAGES},
        python=platform.python_version(),
        device=device,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_seconds=round(wall_seconds, 3),
        parameters=parameters,
    )


@dataclass(frozen=True)
class StudyResults:
    """What the results folder of a study holds.

    Attributes:
        configs: the study's runs by the name of the file that has their result, or will have it.
        runs: the results by the same names, in the study's order.
        missing: names of the runs that have no result.
        problems: one message for each file that is not a result.
    """

    study: Study
    configs: dict[str, RunConfig]
    runs: dict[str, RunResult]
    missing: list[str]
    problems: list[str]

    @classmethod
    def load(cls, folder: str | Path, study: Study | None = None) -> "StudyResults":
        """Read every JSON in `folder`. A result is known by its configuration's hash, whatever its file is called.

        Args:
            study: whose results these are; None: the folder's `study.yaml`. Results of other runs are left out.

        Raises:
            ConfigError: there is no `study.yaml`, or it is not valid.
        """
        folder = Path(folder)
        study = study or Study.load(folder / "study.yaml")
        found, problems = {}, []
        for path in sorted(folder.glob("*.json")):
            try:
                result = RunResult.load(path)
                found[result.config_hash] = path.stem, result
            except (ResultError, OSError) as error:  # the latter: a link to nowhere, or a file that may not be read
                problems.append(str(error))
        known = {run.hash: found[run.hash][0] for run in study.runs().values() if run.hash in found}
        configs = {}
        for name, run in study.runs().items():
            configs[known.get(run.hash) or (f"{name}_{run.hash}" if name in known.values() else name)] = run
        return cls(
            study=study,
            configs=configs,
            runs=dict(found[run.hash] for run in configs.values() if run.hash in found),
            missing=[name for name, run in configs.items() if run.hash not in found],
            problems=problems,
        )

    def table(self, hardware: str | Hardware | None = None) -> "pd.DataFrame":
        """One row a run: its file name, its configuration, and accuracies and energies as `<split>_<quantity>`.

        With lambda 0 the penalty's fields have their defaults, so that standard training is one group. `path` has the
        lambdas of the runs from which a run started, the first one first; `total_epochs` and `total_seconds` count
        theirs too. `test_relu_firing` is the mean over ReLUs of their firing share; `collapsed`: macro accuracy at
        most 5 % of the way from chance to perfect.

        Args:
            hardware: prices for the energies; None: those of each run's configuration.
        """
        import pandas as pd

        known = {result.config_hash: result for result in self.runs.values()}
        return pd.DataFrame([_row(name, result, known, hardware) for name, result in self.runs.items()])


def _row(name: str, result: RunResult, known: dict[str, RunResult], hardware: str | Hardware | None) -> dict[str, Any]:
    config, data, chain = result.config, result.data, [result]
    while before := known.get(chain[0].config.start or ""):
        chain.insert(0, before)
    row = {"run": name} | {key: RunConfig.model_fields[key].default for key in PENALTY_FIELDS} | config.computed()
    if config.starts_from_run:
        del row["start"]  # another one for each seed
    if not isinstance(row["penalty_layers"], str):
        row["penalty_layers"] = ", ".join(row["penalty_layers"])  # a list could not be grouped by
    prices = find_hardware(hardware or config.hardware)
    row["hardware"] = prices.name
    chance = 1 / len(data.classes)
    for split, evaluation in (("validation", result.validation), ("test", result.test)):
        row[f"{split}_accuracy"] = evaluation.accuracy
        row[f"{split}_macro_accuracy"] = evaluation.macro_accuracy
        # Whatever the shares of the classes are: one that is always predicted gives exactly chance.
        row[f"{split}_collapsed"] = evaluation.macro_accuracy <= chance + 0.05 * (1 - chance)
        for accounting, energy in evaluation.energy.items():
            row[f"{split}_{accounting}_ratio"] = energy_ratio(energy.totals, accounting, prices)
            row[f"{split}_{accounting}_joules"] = joules_per_image(energy.totals, prices)
    relus = [layer.firing for layer in result.test.firing if layer.kind in ("ReLU", "ReLU6")]
    return row | {
        "test_relu_firing": sum(relus) / len(relus) if relus else None,
        "classes": len(data.classes),
        "complete": data.complete,
        "train_images": data.train,
        "path": ", ".join(f"{before.config.lambda_:g}" for before in chain[:-1]),
        "total_epochs": sum(step.config.epochs for step in chain),
        "total_seconds": sum(step.provenance.wall_seconds for step in chain),
    }
