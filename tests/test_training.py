"""Training: reproducible, interruptible, honest about failure; and the penalty does what it is for."""

import functools
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from eatlib import results, training
from eatlib.config import RunConfig
from eatlib.data import load_data, training_batches
from eatlib.energy import energy_report
from eatlib.models import build_model
from eatlib.penalties import ActivationPenalty
from eatlib.training import TrainingError, evaluate, fit


@pytest.fixture(autouse=True)
def one_thread():
    """The last bits depend on the number of threads: loops written out here use as many as the configurations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configuration(**changes) -> RunConfig:
    """A run of a second."""
    values = {
        "model": "vgg16",
        "width": 0.0625,
        "image_size": 16,
        "augmentation": "crop",
        "epochs": 3,
        "batch_size": 64,
        "learning_rate": 0.05,
        "train_samples": 300,
        "test_samples": 100,
        "energy_batch_size": 64,
        "lambda": 1.0,
        "device": "cpu",
    }
    return RunConfig.parse(values | changes)


def without_timings(result: results.RunResult) -> dict:
    values = json.loads(result.model_dump_json(by_alias=True))
    del values["provenance"]["date"], values["provenance"]["wall_seconds"]
    del values["config"]["save_weights"]
    for epoch in values["history"]:
        epoch.update(seconds=None, joules=None)
    return values


def weights_of(path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_weights(first, second) -> None:
    first, second = weights_of(first), weights_of(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- algorithm 1 ----------------------------------------------------------------------------------------------------


def plain_loop(config: RunConfig, data) -> nn.Module:
    """Standard training or EAT, as anyone would write it down with PyTorch alone."""
    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        classes=len(data.classes),
        image_size=config.image_size,
        width=config.width,
        mean=data.mean,
        std=data.std,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, 0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, config.learning_rate_decay)
    generator = torch.Generator().manual_seed(config.seed)
    penalised: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU) and config.lambda_:
            module.register_forward_hook(
                lambda _, inputs, output: penalised.append((output**2 / (output**2 + config.sigma)).mean())
            )
    model.train()
    for _ in range(config.epochs):
        for images, labels in training_batches(data.train, config.batch_size, config.augmentation, generator):
            loss = F.cross_entropy(model(images), labels)
            if config.lambda_:
                loss = loss + config.lambda_ * torch.stack(penalised).mean()
                penalised.clear()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model


def test_lambda_0_is_standard_training_bit_for_bit(tmp_path):
    config = configuration(**{"lambda": 0.0, "sigma": 1e-2, "save_weights": True})
    data = load_data(config)
    result = fit(config, data=data, save_weights_to=tmp_path / "w.safetensors")
    assert all(epoch.penalty == 0 and epoch.lambda_ == 0 for epoch in result.history)
    expected = plain_loop(config, data).state_dict()
    found = weights_of(tmp_path / "w.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_eat_is_the_papers_objective(tmp_path):
    # Two steps: more of them blow the last bit up, by one neuron that fires on one side only.
    changes = {"sigma": 1e-2, "epochs": 1, "learning_rate": 1e-3, "train_samples": 140, "save_weights": True}
    config = configuration(**changes)
    data = load_data(config)
    fit(config, data=data, save_weights_to=tmp_path / "w.safetensors")
    found = weights_of(tmp_path / "w.safetensors")
    expected = plain_loop(config, data).state_dict()
    standard = plain_loop(config.model_copy(update={"lambda_": 0.0}), data).state_dict()
    error, effect = (
        sum((other[name] - expected[name]).square().sum() for name in expected) for other in (found, standard)
    )
    assert error < 1e-6 * effect


def test_the_penalty_lowers_firing_and_energy():
    for seed in range(3):
        changes = {"seed": seed, "model": "resnet18", "epochs": 6, "sigma": 1e-2, "batch_size": 32}
        changes |= {"learning_rate": 0.02, "train_samples": 600, "augmentation": "none"}
        standard, energy_aware = (fit(configuration(**changes, **{"lambda": weight})) for weight in (0, 4))
        firing = [
            sum(layer.firing for layer in result.test.firing if layer.kind == "ReLU") / 17
            for result in (standard, energy_aware)
        ]
        assert firing[1] < 0.85 * firing[0]
        for accounting in ("published", "fused"):
            ratios = [result.test.energy[accounting].ratio for result in (standard, energy_aware)]
            assert ratios[1] < ratios[0] - 0.05
        assert energy_aware.history[-1].penalty < 0.85 * energy_aware.history[0].penalty


def test_schedules():
    config = configuration(**{"epochs": 5, "warmup_epochs": 3, "lambda": 0.6, "learning_rate": 0.01})
    history = fit(config).history
    assert [epoch.lambda_ for epoch in history] == pytest.approx([0, 0.2, 0.4, 0.6, 0.6])
    assert [epoch.learning_rate for epoch in history] == pytest.approx([0.01 * 0.95**k for k in range(5)])
    assert all(epoch.penalty > 0 for epoch in history)


def test_a_triangular_schedule_by_hand():
    config = RunConfig(schedule="triangular", epochs=2, learning_rate=0.6, lambda_=4, warmup_share=0.4)
    # 10 steps: up over 4, then down from .6 to nothing over 6.
    rates = [0.15, 0.3, 0.45, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    settings = [training.setting(config, step, 5) for step in range(10)]
    assert [rate for rate, _ in settings] == pytest.approx(rates)
    assert [weight for _, weight in settings] == pytest.approx([1, 2, 3, *[4] * 7])
    history = fit(configuration(epochs=2, schedule="triangular", learning_rate=0.01)).history
    assert history[1].learning_rate < 0.002


@pytest.mark.parametrize(
    "changes",
    [
        {"penalty": "l1", "lambda": 0.1},
        {"penalty": "hoyer"},
        {"penalty": "transformed_l1", "sigma": 1.0},
        {"penalty_layers": "all"},
        {"penalty_layers": ["features.relu*"]},
        {"penalty_normalization": "parameters"},
        {"penalty_normalization": "energy"},
        {"nesterov": False, "momentum": 0.0},
        {"precision": "bfloat16"},
        {"schedule": "triangular", "label_smoothing": 0.1, "penalty_share": 0.25},
    ],
    ids=str,
)
def test_every_kind_of_run(changes):
    result = fit(configuration(epochs=1, **changes))
    assert result.history[0].penalty > 0
    assert results.RunResult.model_validate_json(result.model_dump_json(by_alias=True)) == result


def test_energy_normalization_estimates_the_energy_ratio():
    """With a tiny sigma the penalty is what the non-zero activations cost, weights and the input aside."""
    config = configuration(penalty_normalization="energy", sigma=1e-20)
    data = load_data(config)
    model = training._fresh_state(config, data, torch.device("cpu")).model
    images = data.train.images[:64]
    with training.attach_penalty(config, model, data.train.images[:512]) as penalty:
        model(images)
        term = penalty().item()
        model(images[:16])
        smaller = penalty().item()
    assert 0 < term < 1
    assert smaller == pytest.approx(term, rel=0.2)  # a share: it does not grow with the batch
    # Silencing the ReLUs lowers the measured ratio by what the penalty said they cost.
    model.eval()
    before = energy_report(model, [images], accounting="fused")
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, inputs, output: output.mul_(0))
    after = energy_report(model, [images], accounting="fused")
    assert before.ratio - after.ratio == pytest.approx(term, rel=0.25)


def test_compiled_training_is_the_same_up_to_rounding(monkeypatch):
    # The tracing without the C++ compiler, which takes half a minute; benchmarks/training.py has it all.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    changes = {"epochs": 1, "learning_rate": 1e-3, "train_samples": 142}
    plain, compiled = (fit(configuration(**changes, compile=flag)) for flag in (False, True))
    assert compiled.history[0].loss == pytest.approx(plain.history[0].loss, rel=1e-3)
    assert compiled.history[0].penalty == pytest.approx(plain.history[0].penalty, rel=1e-3)


# --- the same again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vgg16", "resnet18"])
def test_same_configuration_same_bits(tmp_path, model):
    config = configuration(epochs=2, model=model, save_weights=True)
    torch.manual_seed(7)
    first = fit(config, save_weights_to=tmp_path / "1.safetensors")
    torch.rand(5)  # whatever the caller drew
    second = fit(config, save_weights_to=tmp_path / "2.safetensors")
    assert without_timings(first) == without_timings(second)
    assert_same_weights(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    other = fit(configuration(epochs=2, model=model, seed=1))
    assert other.test.loss != first.test.loss


def test_the_callers_random_state_and_threads_stay_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    fit(configuration(epochs=1, train_samples=40, test_samples=20, threads=2 if threads == 1 else 1))
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"learning_rate": 1e6}, {"lambda": 1e9, "penalty": "l1", "learning_rate": 1e3}])
def test_divergence_stops_the_run(tmp_path, changes):
    seen = []
    config = configuration(save_weights=True, **changes)
    with pytest.raises(
        TrainingError,
        match=rf"(nan|inf) in epoch 1 of 3, with lambda = {config.lambda_:g}, sigma = 0.0001".replace("+", r"\+"),
    ):
        fit(config, checkpoint=tmp_path / "c", save_weights_to=tmp_path / "w.safetensors", on_epoch=seen.append)
    assert not seen
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"device": "cuda:99"}, ValueError, "device = 'cuda:99'"),
        ({"penalty_layers": ["relu99"]}, ValueError, "'relu99' fits none of"),
    ],
)
def test_impossible_configurations_are_refused_before_training(changes, error, message):
    with pytest.raises(error, match=message):
        fit(configuration(**changes))


def test_no_penalty_is_left_on_the_network_after_a_failure():
    model = build_model("vgg16", classes=10, image_size=16, width=0.0625)
    data = load_data(configuration())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrong = [(data.train.images[:4], torch.full((4,), 99))]
    with pytest.raises(IndexError), ActivationPenalty(model) as penalty:
        training.train_one_epoch(model, wrong, optimizer, penalty, [(0.1, 1.0)])
    with ActivationPenalty(model):
        pass


# --- measuring ------------------------------------------------------------------------------------------------------


def test_evaluation_against_a_plain_loop():
    config = configuration()
    data = load_data(config)
    torch.manual_seed(0)
    model = build_model("resnet18", classes=10, image_size=16, width=0.0625).train()
    found = evaluate(model, data.test, batch_size=33, hardware=config.hardware)
    assert not model.training
    with torch.no_grad():
        logits = model(data.test.images)
    right = (logits.argmax(1) == data.test.labels).double()
    assert found.samples == len(data.test)
    assert found.accuracy == pytest.approx(right.mean().item())
    by_class = [right[data.test.labels == label].mean().item() for label in range(10)]
    assert found.macro_accuracy == pytest.approx(sum(by_class) / 10)
    assert found.loss == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), rel=1e-5)
    for accounting, totals in found.energy.items():
        report = energy_report(model, (image for image in data.test.images.split(33)), accounting=accounting)
        assert totals.ratio == pytest.approx(report.ratio)
    relu = next(layer for layer in found.firing if layer.name == "relu")
    shares = []
    model.relu.register_forward_hook(lambda module, inputs, output: shares.append((output != 0).double().mean()))
    with torch.no_grad():
        model(data.test.images)
    assert relu.firing == pytest.approx(shares[0].item(), abs=1e-4)


def test_macro_accuracy_ignores_classes_without_images():
    config = configuration()
    data = load_data(config)
    model = build_model("vgg16", classes=12, image_size=16, width=0.0625)
    assert 0 <= evaluate(model, data.test).macro_accuracy <= 1


# --- channels last --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "width", "expected"),
    [
        ("resnet18", 0.25, torch.channels_last),
        ("resnet18", 0.125, torch.contiguous_format),
        ("vgg16", 0.0625, torch.channels_last),
    ],
)
def test_channels_last_only_where_onednn_gets_it_right(model, width, expected):
    assert training.memory_format(build_model(model, classes=10, width=width)) == expected
