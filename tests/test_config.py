"""What a configuration accepts, what it refuses and how it says so, and what names a run."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eatlib.config import EXECUTION_FIELDS, LATER_FIELDS, ConfigError, RunConfig, Study
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
        ("lambda", True),
        ("sigma", 0),
        ("sigma", 1e-31),
        ("learning_rate", 1e300),
        ("seed", 2**64),
        ("hardware", "abacus"),
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
    [
        {"epochs": 3, "warmup_epochs": 3},
        {"warmup_epochs": 1, "schedule": "triangular"},
        {"momentum": 0, "nesterov": True},
        {"model": "alexnet", "width": 0.5},
    ],
)
def test_values_that_contradict_each_other_are_refused(values):
    with pytest.raises(ConfigError):
        RunConfig.parse(values)


def test_numbers_that_yaml_reads_as_strings_become_numbers():
    values = yaml.safe_load("{sigma: 1e-3, lambda: '2', epochs: 10.0}")
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
    assert RunConfig.parse({"lambda": 1, "sigma": 1e-4, "seed": 3}).hash == "8c7b85bbb1b8"


def test_hash_covers_what_is_computed_and_nothing_else():
    base = RunConfig.parse({"lambda": 1})
    other = {"seed": 7, "sigma": 0.5, "epochs": 3, "lambda": 2, "model": "vgg16", "precision": "bfloat16", "threads": 2}
    hashes = {RunConfig.parse({"lambda": 1} | {key: value}).hash for key, value in other.items()}
    assert len(hashes | {base.hash}) == len(other) + 1
    execution = {"data_dir": "/x", "download": True, "device": "cpu", "save_weights": True}
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


def study(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    assert Study.load(str(path)) == Study.load(path)
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
    runs = loaded.runs()
    found = [(run.lambda_, run.sigma if run.lambda_ else None, run.seed) for run in runs.values()]
    assert sorted(found, key=str) == sorted(
        [(0, None, 0), (0, None, 1)] + [(1, s, k) for s in (1e-2, 1e-3) for k in (0, 1)] + [(2, 1e-2, 0)], key=str
    )
    assert next(iter(runs)) == "digits_resnet18_lambda0_seed0"
    assert list(runs)[-1] == "digits_resnet18_lambda2_sigma0.01_seed0"


def test_a_field_that_only_some_runs_change_is_in_their_names(tmp_path):
    loaded = study(
        tmp_path,
        """
        label: test
        blocks:
          - grid: {lambda: [0, 1]}
          - grid: {lambda: [0, 1]}
            fixed: {penalty_share: 0.5}
          - fixed: {lambda: 1.0e+9}
        """,
    )
    shared, part = "digits_resnet18_lambda1_seed0", "digits_resnet18_lambda1_penalty_share0.5_seed0"
    large = "digits_resnet18_lambda1e+09_seed0"
    assert list(loaded.runs()) == ["digits_resnet18_lambda0_seed0", shared, part, large]


def test_a_runs_name_says_what_varies_among_the_runs_of_its_data_set_and_network(tmp_path):
    text = """
        label: test
        blocks:
          - fixed: {model: vgg16, epochs: 2}
            grid: {penalty_layers: [relu, all, [features.*, fc]], lambda: [0.5]}
          - fixed: {model: resnet18, epochs: 3, dataset: "folder:/a b/c d"}
            grid: {learning_rate: [0.1, 0.10000001]}
        """
    first, second, third, *last = study(tmp_path, text).runs()
    assert (first, second) == ("digits_vgg16_lambda0.5_relu_seed0", "digits_vgg16_lambda0.5_all_seed0")
    assert re.fullmatch(r"digits_vgg16_lambda0\.5_penalty_layers-features\.-,-fc_seed0", third)
    assert re.fullmatch(r"c-d_resnet18_lambda0_learning_rate0\.1_seed0", last[0])
    assert re.fullmatch(last[0] + r"_\w{12}", last[1]), "what is written alike is told apart by its hash"


def test_a_path_is_a_chain_of_runs_of_which_each_starts_from_the_one_before(tmp_path):
    text = """
        label: test
        blocks:
          - grid: {seed: [0, 1], sigma: [1.0e-2, 1.0e-4]}
            fixed: {schedule: triangular}
            path: [{lambda: 0, epochs: 10}, {lambda: 1, epochs: 3}, {lambda: 2}]
          - grid: {lambda: [2]}
            fixed: {schedule: triangular, epochs: 3}
        """
    runs = study(tmp_path, text).runs()
    assert list(runs)[:5] == [
        "digits_resnet18_lambda0_epochs10_seed0",
        "digits_resnet18_path_lambda1_sigma0.01_epochs3_seed0",
        "digits_resnet18_path_lambda2_sigma0.01_epochs3_seed0",
        "digits_resnet18_path_lambda1_sigma0.0001_epochs3_seed0",
        "digits_resnet18_path_lambda2_sigma0.0001_epochs3_seed0",
    ]
    st, first, second, other, _, *_ = runs.values()
    assert (st.start, first.start, second.start, other.start) == (None, st.hash, first.hash, st.hash)
    assert len(runs) == 2 * (1 + 2 * 2) + 1
    assert len({run.hash for run in runs.values()}) == len(runs)
    with pytest.raises(ConfigError, match=r"'seed'.*both in the grid and fixed, or in the path"):
        study(tmp_path, "label: x\nblocks: [{grid: {seed: [1]}, path: [{seed: 2}]}]")


def test_fields_that_came_later_leave_older_hashes_as_they_were():
    older = RunConfig(seed=1)
    assert older.hash == RunConfig(seed=1, schedule="exponential", penalty_share=1.0, start=None).hash
    assert older.hash != RunConfig(seed=1, label_smoothing=0.1).hash
    assert not LATER_FIELDS & older.computed().keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: x\nblocks: []", "blocks"),
        ("label: x\nblock: []", "unknown field 'block'"),
        ("label: x\nblocks: [{pth: [{lambda: 0}]}]", r"unknown field 'blocks\.0\.pth'; did you mean 'path'\?"),
        ("label: x\nblocks: [{grid: {lambda: []}}]", r"blocks.0.grid.lambda = \[\]: List should have at least 1 item"),
        ("label: x\nfixed: {seed: 1}\nblocks: [{grid: {seed: [1]}}]", "seed.*both in the grid and fixed"),
        ("label: x\nblocks: [{grid: {sigma: [-1]}}]", "sigma = -1"),
        ("label: x\nblocks: [{path: []}]", "blocks.0.path"),
        ("label: x\nblocks: [{path: [{start: '0123456789ab'}]}]", "start = '0123456789ab': must be the hash of one"),
        ("[1, 2]", "not a readable YAML file .*'list' object is not a mapping"),
        ("a: [", "not a readable YAML file"),
        ("label: x\nlabel: y\nblocks: []", "line 1: 'label' stands twice in one mapping"),
        ("label: x\nblocks: [{grid: {seed: [1], seed: [2]}}]", "line 2: 'seed' stands twice"),
        ("[" * 10_000, "not a readable YAML file"),
        (f"label: x\nblocks: [{{grid: {{lambda: {list(range(101))}, seed: {list(range(100))}}}}}]", "more than 10,000"),
        (f"label: x\nblocks: [{{grid: {{lambda: {[1] * 101}, seed: {[1] * 100}}}}}]", "more than 10,000"),
        ("label: 2001-99-99\nblocks: [{}]", "not a readable YAML file"),
    ],
)
def test_a_bad_study_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, text)


def test_all_penalties_start_from_the_standard_training_of_their_seed():
    runs = {run.hash: run for run in Study.load(ROOT / "studies" / "rivals.yaml").runs().values()}
    starts, ends = {}, {}
    for run in runs.values():
        first = run
        while first.start:
            first = runs[first.start]
        if run.lambda_ > 0:
            cell = run.dataset, run.model, run.seed, run.width
            starts.setdefault(cell, set()).add(first.hash)
            kind = run.penalty, run.sigma, run.penalty_normalization
            by_itself = runs[run.start].lambda_ == 0 and run.epochs > 2
            ends.setdefault((*cell, kind, by_itself), []).append(run.epochs)
            assert (first.lambda_, first.seed, first.width) == (0, run.seed, run.width)
    assert len(starts) == 2 * 2 * 3 * 2  # half as wide: the paper's penalty alone
    assert all(len(hashes) == 1 for hashes in starts.values())
    assert {(dataset, len(steps), *set(steps)) for (dataset, *_), steps in ends.items()} == {
        ("cifar10", 3, 2),
        ("cifar10", 3, 6),  # without a path
        ("gtsrb", 3, 1),
        ("gtsrb", 3, 3),
    }
    # What they are compared with takes as many epochs: standard training that goes on, and smaller networks.
    longest, first_runs = {}, set.union(*starts.values())
    for run in runs.values():
        if run.lambda_ == 0 and run.hash not in first_runs:
            before = runs[run.start].epochs if run.start else 0
            longest.setdefault(run.dataset, set()).add(before + run.epochs)
    assert longest == {"cifar10": {8 + 3 * 2}, "gtsrb": {4 + 3 * 1}}


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_valid_and_its_runs_have_names_of_their_own(path):
    names = Study.load(path).runs()
    assert len({run.hash for run in names.values()}) == len(names)
