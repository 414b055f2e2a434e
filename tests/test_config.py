"""What a configuration accepts, what it refuses and how it says so, and what names a run."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eatlib.config import EXECUTION_FIELDS, ConfigError, RunConfig, Study
from eatlib.results import ROOT


def test_defaults_are_the_paper_protocol():
    config = RunConfig()
    assert (config.epochs, config.batch_size, config.learning_rate) == (100, 512, 0.1)
    assert (config.momentum, config.weight_decay, config.learning_rate_decay) == (0.9, 5e-4, 0.95)
    assert (config.width, config.energy_batch_size) == (1.0, 512)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lambda", -1),
        ("lambda", float("nan")),
        ("lambda", "much"),
        ("sigma", 0),
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", "many"),
        ("model", "resnet1"),
        ("dataset", "mnist"),
        ("dataset", "folder:"),
        ("dataset", "folder:here"),
        ("penalty", "l2"),
        ("augmentation", "flip"),
        ("device", "tpu"),
        ("width", 0),
        ("momentum", 1),
        ("validation_share", 1),
    ],
)
def test_a_bad_value_is_refused_by_name_and_value(field, value):
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError, match=r"epochs.*unknown field 'lamda'; did you mean 'lambda'"):
        RunConfig.parse({"lamda": 1, "epochs": 0})


@pytest.mark.parametrize(
    "values",
    [{"epochs": 3, "warmup_epochs": 3}, {"momentum": 0, "nesterov": True}, {"model": "alexnet", "width": 0.5}],
)
def test_values_that_contradict_each_other_are_refused(values):
    with pytest.raises(ConfigError):
        RunConfig.parse(values)


def test_numbers_that_yaml_reads_as_strings_become_numbers():
    values = yaml.safe_load("{sigma: 1e-3, lambda: '2', epochs: 1e1}")
    assert isinstance(values["sigma"], str), "YAML 1.1 reads 1e-3 as a string"
    config = RunConfig.parse(values)
    assert (config.sigma, config.lambda_, config.epochs) == (1e-3, 2.0, 10)


def test_the_data_sets_own_values_are_written_out():
    assert RunConfig.parse({"dataset": "celeba"}).image_size == 64
    assert RunConfig.parse({"dataset": "gtsrb", "augmentation": None}).augmentation == "crop"
    explicit = RunConfig.parse({"dataset": "gtsrb", "augmentation": "crop", "image_size": 32})
    assert explicit.hash == RunConfig.parse({"dataset": "gtsrb"}).hash


def test_hash_is_stable():
    """A golden value: results on disk are found by it. It may only change together with CONFIG_VERSION."""
    assert RunConfig.parse({"lambda": 1, "sigma": 1e-4, "seed": 3}).hash == "56beab2aa0f4"


def test_hash_covers_what_is_computed_and_nothing_else():
    base = RunConfig.parse({"lambda": 1})
    other = {"seed": 7, "sigma": 0.5, "epochs": 3, "lambda": 2, "model": "vgg16", "precision": "bfloat16"}
    hashes = {RunConfig.parse({"lambda": 1} | {key: value}).hash for key, value in other.items()}
    assert len(hashes | {base.hash}) == len(other) + 1
    execution = {"data_dir": "/x", "download": True, "device": "cpu", "threads": 2}
    execution |= {"checkpoint_every": 5, "save_weights": True}
    assert execution.keys() == EXECUTION_FIELDS
    assert RunConfig.parse({"lambda": 1} | execution).hash == base.hash


def test_standard_training_is_one_run_whatever_the_penalty():
    assert RunConfig.parse({"lambda": 0, "sigma": 1e-2, "penalty": "l1"}).hash == RunConfig().hash


@given(
    lambda_=st.floats(0, 100),
    sigma=st.floats(1e-10, 1),
    epochs=st.integers(1, 500),
    seed=st.integers(0, 2**31),
    dataset=st.sampled_from(["digits", "cifar10", "gtsrb", "celeba", "folder:/a b/c"]),
)
def test_json_gives_the_same_configuration_back(lambda_, sigma, epochs, seed, dataset):
    config = RunConfig(lambda_=lambda_, sigma=sigma, epochs=epochs, seed=seed, dataset=dataset)
    again = RunConfig.model_validate_json(config.model_dump_json(by_alias=True))
    assert again == config
    assert again.hash == config.hash
    assert "/" not in config.name


def study(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return Study.load(path)


def test_a_grid_is_expanded_and_duplicates_merged(tmp_path):
    loaded = study(
        tmp_path,
        """
        label: test
        fixed: {epochs: 2}
        blocks:
          - grid: {lambda: [0, 1], sigma: [1.0e-2, 1e-3], seed: [0, 1]}
          - fixed: {sigma: 1.0e-2}
            grid: {lambda: [1, 2], seed: [0]}
        """,
    )
    found = [(run.lambda_, run.sigma if run.lambda_ else None, run.seed) for run in loaded.runs()]
    assert sorted(found, key=str) == sorted(
        [(0, None, 0), (0, None, 1)] + [(1, s, k) for s in (1e-2, 1e-3) for k in (0, 1)] + [(2, 1e-2, 0)], key=str
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: x\nblocks: []", "blocks"),
        ("label: x\nblock: []", "unknown field 'block'"),
        ("label: x\nblocks: [{grid: {lambda: []}}]", "'lambda' has no values"),
        ("label: x\nfixed: {seed: 1}\nblocks: [{grid: {seed: [1]}}]", "seed.*both fixed and in the grid"),
        ("label: x\nblocks: [{grid: {sigma: [-1]}}]", "sigma = -1"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "not a YAML file"),
    ],
)
def test_a_bad_study_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, text)


def test_an_overridden_study_has_another_name_and_the_asked_values(tmp_path):
    loaded = study(tmp_path, "label: x\nfixed: {epochs: 5}\nblocks: [{grid: {lambda: [0, 1], seed: [0, 1, 2]}}]")
    changed = loaded.override({"epochs": 2, "seed": [7]})
    assert changed.name != loaded.name
    assert "/" not in changed.name
    assert [(run.lambda_, run.epochs, run.seed) for run in changed.runs()] == [(0, 2, 7), (1, 2, 7)]
    assert loaded.override({}) is loaded
    assert loaded.override({"threads": 1}).name == loaded.name
    assert loaded.override({"threads": 1}).runs()[0].threads == 1
    folders = [loaded.override({"dataset": f"folder:/{name}"}).name for name in ("a/b", "a-b", "größe", "grüße")]
    assert len(set(folders)) == 4
    with pytest.raises(ConfigError, match="epochs = 0"):
        loaded.override({"epochs": 0})
    path = tmp_path / f"{changed.name}.yaml"
    path.write_text(changed.to_yaml())
    assert Study.load(path).runs() == changed.runs()


def test_the_readme_says_how_many_runs_a_study_has():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `([\w-]+)` \|.*\b(\d+) runs", readme, re.MULTILINE))
    assert {"quick", "paper-cpu", "fidelity", "paper", "ablation"} <= said.keys()
    for name, runs in said.items():
        assert len(Study.load(ROOT / "studies" / f"{name}.yaml").runs()) == int(runs), name
