"""What a run is: one flat, validated set of fields, and a hash that names it.

`RunConfig` is one training run. Its defaults are the paper's protocol (arXiv 2307.00368, section 4).
`Study` is a file of `studies/`: a grid of runs.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from eatlib.hardware import HARDWARE
from eatlib.sources import SOURCES

CONFIG_VERSION = 2
"""Part of every configuration hash: raised when a field's meaning changes."""


EXECUTION_FIELDS = frozenset({"data_dir", "download", "device", "save_weights"})
"""Where and how a run is executed. They do not say what is computed, so the hash leaves them out."""

PENALTY_FIELDS = ("penalty", "penalty_layers", "penalty_normalization", "penalty_share", "sigma", "warmup_epochs")
"""Which penalty it is that lambda weighs: they say nothing where lambda is 0."""

RECIPE_FIELDS = (*PENALTY_FIELDS, "epochs", "schedule", "learning_rate", "learning_rate_decay", "warmup_share")
RECIPE_FIELDS += ("label_smoothing", "momentum", "nesterov", "weight_decay", "precision", "seed")
"""How a network is trained, whatever it is: lambda aside, what `eatlib.tradeoff` takes."""

LATER_FIELDS = frozenset({"schedule", "warmup_share", "label_smoothing", "penalty_share", "start", "new_head"})
"""Fields that came when there were results: at their defaults, the hash leaves them out, and these stay valid."""

MAX_RUNS = 10_000
"""Runs that a study may have: more are a slip in a grid."""


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Real = Annotated[float, BeforeValidator(_no_truth_value)]
Whole = Annotated[int, BeforeValidator(_no_truth_value)]


def file_digest(path: Path) -> str:
    """12 hex digits of a SHA-256 over what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and what is allowed."""


class Record(BaseModel):
    """Named values that do not change; unknown names and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class RunConfig(Record):
    """One training run: data, network, penalty, optimisation, measurement.

    In YAML and JSON the penalty's weight is called `lambda`; in Python, where that word is taken, `lambda_`.
    """

    # Data
    dataset: str = Field("digits", description="digits, cifar10, gtsrb, celeba, or folder:/path (ImageFolder)")
    image_size: Whole | None = Field(None, ge=8, le=512, description="side in pixels; null: the data set's own")
    train_samples: Whole | None = Field(None, ge=1, description="stratified subset of the training images; null: all")
    test_samples: Whole | None = Field(None, ge=1, description="stratified subset of the test images; null: all")
    validation_share: Real = Field(0.1, gt=0, lt=1, description="share of the training images kept for validation")
    split_seed: Whole = Field(0, ge=0, lt=2**63, description="seed of the splits and subsets, the same for all runs")
    augmentation: Literal["none", "crop", "crop_flip", "crop_rotate"] | None = Field(
        None, description="null: the data set's own"
    )
    allow_partial: bool = Field(False, description="accept a data set that lacks some of its images")

    # Network
    model: str = Field("resnet18", description="resnet18, vgg16 (the paper's), or a torchvision classifier")
    width: Real = Field(1.0, gt=0, le=4, description="factor on the channels of every layer of the paper's networks")

    # Penalty: loss = cross-entropy + lambda * penalty (paper, eq. 3)
    lambda_: Real = Field(0.0, ge=0, le=1e9, alias="lambda", description="weight of the penalty; 0: standard training")
    sigma: Real = Field(1e-4, ge=1e-30, le=1e9, description="softness of the l0 surrogate (paper, eq. 1)")
    penalty: Literal["l0", "l1", "hoyer", "transformed_l1"] = "l0"
    penalty_layers: Literal["relu", "all"] | tuple[str, ...] = Field(
        "relu", description="relu, all (every leaf module), or a list of layer name patterns (fnmatch)"
    )
    penalty_normalization: Literal["layer_mean", "parameters", "energy"] = "layer_mean"
    penalty_share: Real = Field(
        1.0, gt=0, le=1, description="share of each batch's images that the penalty is taken on"
    )
    warmup_epochs: Whole = Field(0, ge=0, description="exponential: lambda rises from 0 over these first epochs")

    # Optimisation
    epochs: Whole = Field(100, ge=1, le=1_000_000)
    batch_size: Whole = Field(512, ge=2)
    schedule: Literal["exponential", "triangular"] = Field(
        "exponential",
        description="triangular: rate and lambda rise over warmup_share of the steps; the rate falls to 0",
    )
    learning_rate: Real = Field(0.1, gt=0, le=1e6, description="triangular: at its peak")
    learning_rate_decay: Real = Field(0.95, gt=0, le=1, description="exponential: factor after each epoch")
    warmup_share: Real = Field(0.2, ge=0, lt=1, description="triangular: share of the steps with a rising rate")
    label_smoothing: Real = Field(0.0, ge=0, lt=1, description="share of each label that goes to all classes alike")
    momentum: Real = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: Real = Field(5e-4, ge=0, le=1e6)
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast in training")
    start: str | None = Field(
        None, description="weights to begin with: another run's hash, a path of safetensors, or torchvision:WEIGHTS"
    )
    new_head: bool = Field(False, description="with start: draw the last layer anew, for other classes")
    compile: bool = Field(False, description="torch.compile the network in training")
    seed: Whole = Field(0, ge=0, lt=2**63, description="drives weights, order and augmentation")
    threads: Whole = Field(1, ge=1, le=1024, description="PyTorch's CPU threads, which decide the order of sums")

    # Measurement
    energy_batch_size: Whole = Field(512, ge=1, description="images a batch when energy is measured (paper: 512)")
    hardware: Literal[*HARDWARE] = Field("horowitz-45nm-float32", description="prices that the energies are at")

    # Execution: not part of the hash
    data_dir: Path | None = Field(None, description="null: $EATLIB_DATA, else the repository's data/")
    download: bool = Field(False, description="may fetch a data set that is not there")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1")
    save_weights: bool = Field(False, description="keep the trained weights beside the result")

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        known = [name for name in SOURCES if name != "folder"]
        if value not in known and not re.match("folder:/.", value):
            raise ValueError(f"must be one of {', '.join(known)}, or folder:/path, from the root")
        return value

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        if value not in ("resnet18", "vgg16"):
            import torchvision.models  # a slow import, only for other networks

            known = torchvision.models.list_models(module=torchvision.models)
            if value not in known:
                close = difflib.get_close_matches(value, known, n=3)
                hint = f" (close: {', '.join(close)})" if close else ""
                raise ValueError(f"must be resnet18, vgg16 or a torchvision classifier{hint}")
        return value

    @field_validator("start")
    @classmethod
    def _known_start(cls, value: str | None) -> str | None:
        """A file's digest becomes a part of the value, as PATH@DIGEST."""
        if value is None or re.fullmatch(r"[0-9a-f]{12}|torchvision:\w+|.+\.safetensors@[0-9a-f]{12}", value):
            return value
        if not value.endswith(".safetensors") or not Path(value).is_file():
            raise ValueError("must be a run's hash, the path of a safetensors file, or torchvision:WEIGHTS")
        return f"{value}@{file_digest(Path(value))}"

    @model_validator(mode="before")
    @classmethod
    def _fill_dataset_defaults(cls, values: Any) -> Any:
        """Write the data set's own image size and augmentation out, so that the hash covers them."""
        if isinstance(values, dict):
            own = SOURCES.get(str(values.get("dataset", cls.model_fields["dataset"].default)).split(":")[0])
            for key in ("image_size", "augmentation"):
                if own and values.get(key) is None:
                    values = values | {key: getattr(own, key)}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs a momentum above 0")
        if self.warmup_epochs >= (self.epochs if self.schedule == "exponential" else 1):
            allowed = f"less than epochs ({self.epochs}), and 0 with schedule: triangular"
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be {allowed}")
        if self.model not in ("resnet18", "vgg16") and self.width != 1:
            raise ValueError(f"width ({self.width}) can only be changed for resnet18 and vgg16")
        return self

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "configuration") -> "RunConfig":
        """Validate `values`; raise a `ConfigError` that names each bad field, its value and what is allowed."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, where, list(cls().to_dict()))) from None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values."""
        return self.model_dump(mode="json", by_alias=True)

    def computed(self) -> dict[str, Any]:
        """The fields that say what is computed: no `EXECUTION_FIELDS`; with lambda 0, no `PENALTY_FIELDS` either."""
        silent = EXECUTION_FIELDS | (set(PENALTY_FIELDS) if self.lambda_ == 0 else set())
        silent |= {key for key in LATER_FIELDS if getattr(self, key) == type(self).model_fields[key].default}
        values = {key: value for key, value in self.to_dict().items() if key not in silent}
        if "start" in values:
            values["start"] = values["start"].rpartition("@")[2]  # what a file holds, wherever it lies
        return values

    @property
    def starts_from_run(self) -> bool:
        """Whether `start` is the hash of another run."""
        return bool(self.start and re.fullmatch("[0-9a-f]{12}", self.start))

    @property
    def hash(self) -> str:
        """12 hex digits of a SHA-256 over what is computed; standard training has one, whatever its penalty fields."""
        text = json.dumps([CONFIG_VERSION, self.computed()], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Block(Record):
    """A grid within a study: the product of the axes in `grid`, each run with the values in `fixed`.

    With a `path`, each point of the grid is a chain of runs: every step starts from the weights of the one before, and
    has its values where it sets no others.
    """

    fixed: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    path: list[dict[str, Any]] = Field([{}], min_length=1)


class Study(Record):
    """A set of runs and how to read them; a YAML file, those of this project in `studies/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.@=,-]*$", description="of the file, and of its folder of results")
    label: str = Field(description="what the study is and at what scale; stands on every table and figure")
    margin: Real = Field(
        0.03, ge=0, lt=1, description="validation accuracy that EAT may lose against standard training"
    )
    fixed: dict[str, Any] = Field({}, description="values that all runs share")
    blocks: list[Block] = Field(min_length=1)

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read and validate a study file, all its runs included.

        Raises:
            ConfigError: the file is not there, is not YAML, or has an unknown field, a value out of range, ...
        """
        try:
            values = {"name": Path(path).stem, **yaml.load(Path(path).read_text("utf-8"), _UniqueKeys)}  # a safe loader
        except Exception as error:  # YAML makes dates and long numbers of a text, which can raise anything
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path}: not a readable YAML file ({reason})") from None
        try:
            study = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, str(path), [*cls.model_fields, *Block.model_fields])) from None
        study.runs()
        return study

    def runs(self) -> dict[str, RunConfig]:
        """The runs in the order of the file, each once (by hash), by a name that says what varies among them."""
        runs: dict[str, RunConfig] = {}
        for index, block in enumerate(self.blocks, start=1):
            where = f"study {self.name}, block {index}"
            own = self.fixed | block.fixed
            if twice := block.grid.keys() & {*own, *itertools.chain(*block.path)}:
                raise ConfigError(f"{where}: {sorted(twice)} both in the grid and fixed, or in the path")
            if len(runs) + math.prod(map(len, block.grid.values())) * len(block.path) > MAX_RUNS:
                raise ConfigError(f"{where}: more than {MAX_RUNS:,} runs")
            for values in itertools.product(*block.grid.values()):
                point, before = own | dict(zip(block.grid, values, strict=True)), None
                for step in block.path:
                    point |= step if before is None else {"start": before} | step
                    run = RunConfig.parse(point, where)
                    before = run.hash
                    runs[before] = max(runs.get(before, run), run, key=lambda same: same.save_weights)
        for run in runs.values():
            if run.starts_from_run and run.start not in runs:
                raise ConfigError(f"study {self.name}: start = {run.start!r}: must be the hash of one of its runs")
        return _named(runs.values())

    def to_yaml(self) -> str:
        """The study as the text of a study file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {key!r} stands twice in one mapping")
        return node


def _named(runs: Collection[RunConfig]) -> dict[str, RunConfig]:
    """Runs by file name: data set, network, what differs among the runs of these two, lambda and seed."""
    seen: dict[tuple[str, str, str], set[str]] = {}
    for run in runs:
        unnamed = LATER_FIELDS - (set(PENALTY_FIELDS) if run.lambda_ == 0 else set())  # at a default, which counts too
        for key, value in (dict.fromkeys(unnamed) | run.computed()).items():
            seen.setdefault((run.dataset, run.model, key), set()).add(str(value))
    named: dict[str, RunConfig] = {}
    for run in runs:
        parts = [Path(run.dataset).name, run.model]
        if run.start:
            parts.append("path" if run.starts_from_run else Path(run.start.rpartition("@")[0] or run.start).stem)
        for key, value in run.computed().items():
            if key in ("lambda", "seed") or (key != "start" and len(seen[run.dataset, run.model, key]) > 1):
                text = f"{value:g}" if isinstance(value, float) else str(value)
                parts.append(text if isinstance(value, str) else f"{key}{text}")
        name = "_".join(re.sub(r"[^A-Za-z0-9._=,+-]+", "-", part)[:60].strip("-") for part in parts)
        named[name if name not in named else f"{name}_{run.hash}"] = run
    return named


def recipe(lambdas: Sequence[float], settings: dict[str, Any]) -> list[RunConfig]:
    """The steps of a path of rising lambdas: for each, `settings` of `RECIPE_FIELDS`.

    Those not given are the paper's, but for one epoch a step at a rate that rises to 0.01 and falls to 0, and a sigma
    of 0.01.

    Raises:
        ConfigError: a lambda or a setting that is not allowed.
    """
    given = [*lambdas] if isinstance(lambdas, Iterable) else []
    if not (given and all(hasattr(x, "__float__") for x in given) and sorted({0, *given}) == [0, *given]):
        allowed = "a list of numbers above 0, each larger than the one before"
        raise ConfigError(f"lambdas = {given or lambdas}: must be {allowed}")
    if unknown := [name for name in settings if name not in (*RECIPE_FIELDS, "threads")]:
        raise ConfigError(f"unknown setting {unknown[0]!r}: must be one of {', '.join(RECIPE_FIELDS)}")
    values = {"schedule": "triangular", "epochs": 1, "learning_rate": 0.01, "sigma": 0.01} | settings
    return [RunConfig.parse(values | {"lambda": lambda_}, "settings") for lambda_ in given]


def explain(error: ValidationError, where: str, known: list[str]) -> str:
    """Pydantic's findings as one readable line each."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"] if "[" not in str(part))  # one of several types
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            line = f"unknown field {field!r}; {hint}"
        else:
            value = "" if item["type"] == "missing" else f" = {item['input']!r}"
            message = item["msg"].removeprefix("Value error, ")
            line = f"{field}{value}: {message}" if field else message
        if line not in lines:
            lines.append(line)
    return f"{where}: " + "; ".join(lines)
