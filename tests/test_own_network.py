"""A trained network of one's own: its curve of cheaper ones, with the networks that people have."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer, mobilenet_v2

from eatlib import EnergyMeter, energy_report, tradeoff
from eatlib.curve import Point
from eatlib.models import with_relus
from eatlib.results import ROOT
from eatlib.training import TrainingError, fine_tune


class Functional(nn.Module):
    """A network whose ReLUs are functional calls, with dropout, and batch norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.fc = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.dropout(F.relu(self.second(x)), 0.1, self.training)
        return self.fc(x.mean((2, 3)))


def small_vit() -> VisionTransformer:
    """16 patches and the class token are 17 tokens of 64 numbers; 4 heads of 16."""
    size = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    return VisionTransformer(**size, num_classes=3)


class Batches:
    """Three colours to tell apart; like a loader, it draws the order of its batches from PyTorch's random numbers."""

    def __init__(self, size: int = 8, batches: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(16 * batches) % 3
        self.images = torch.rand(16 * batches, 3, size, size, generator=generator)
        self.images += F.one_hot(self.labels, 3)[:, :, None, None]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.randperm(len(self.labels)).split(16):
            yield self.images[part], self.labels[part]


def trained(model: nn.Module, batches: Batches, epochs: int = 4) -> nn.Module:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
    return model


def functional() -> tuple[Functional, dict[str, Any]]:
    """A trained network, and the batches for it."""
    torch.manual_seed(0)
    batches = Batches()
    return trained(Functional(), batches), {"train_batches": batches, "validation_batches": list(batches)}


SETTINGS = {"lambdas": [1, 4, 16], "epochs": 2, "learning_rate": 0.05}


def same(left: Point, right: Point) -> bool:
    """To the last bit."""
    reports = [{name: report.to_dict() for name, report in point.reports.items()} for point in (left, right)]
    weights = all(torch.equal(left.state[name], right.state[name]) for name in left.state | right.state)
    return weights and reports[0] == reports[1] and (left.lambda_, left.accuracy) == (right.lambda_, right.accuracy)


# --- the curve ----------------------------------------------------------------------------------------------------


def test_the_curve_begins_with_the_model_as_it_is_and_falls_in_energy():
    model, batches = functional()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reports = {
        name: energy_report(model, batches["validation_batches"], accounting=name) for name in ("published", "fused")
    }
    points = []
    for point in tradeoff(model, **batches, **SETTINGS):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.training
        points.append(point)
    assert [point.lambda_ for point in points] == [0, 1, 4, 16]
    assert all(torch.equal(tensor, points[0].state[name]) for name, tensor in before.items())
    assert {name: report.to_dict() for name, report in points[0].reports.items()} == {
        name: report.to_dict() for name, report in reports.items()
    }
    joules = [point.reports["fused"].joules_per_image for point in points]
    assert max(joules[1:]) < 0.95 * joules[0]
    model.eval().load_state_dict(points[2].state)
    hits = [(model(images).argmax(1) == labels).sum().item() for images, labels in batches["validation_batches"]]
    assert points[2].accuracy == sum(hits) / 64
    assert energy_report(model, batches["validation_batches"], accounting="fused").joules_per_image == joules[2]


def test_each_step_starts_from_the_one_before_whatever_is_done_to_the_model_meanwhile():
    (model, batches), points = functional(), []
    for point in tradeoff(model, **batches, **SETTINGS):
        points.append(point)
        nn.init.zeros_(model.fc.weight)
    (again, _), state = functional(), torch.get_rng_state()
    assert all(map(same, points, tradeoff(again, **batches, **SETTINGS)))
    assert torch.equal(torch.get_rng_state(), state)
    last, _ = functional()
    last.load_state_dict(points[2].state)
    *_, point = tradeoff(last, **batches, **SETTINGS | {"lambdas": [16]})
    assert all(torch.equal(point.state[name], tensor) for name, tensor in points[3].state.items())


def test_the_path_ends_when_too_much_accuracy_is_lost():
    model, batches = functional()
    batches["train_batches"] = [(images, labels.roll(1)) for images, labels in batches["validation_batches"]]
    points = list(tradeoff(model, **batches, **SETTINGS | {"epochs": 4}, margin=0.1))
    assert points[0].accuracy > 0.9
    assert points[0].accuracy - points[-1].accuracy > 0.1
    assert all(points[0].accuracy - point.accuracy <= 0.1 for point in points[:-1])
    assert len(points) < 4


def test_an_interrupted_path_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    model, batches = functional()
    whole = list(tradeoff(model, **batches, **SETTINGS, folder=tmp_path / "a"))
    model, _ = functional()
    for point in tradeoff(model, **batches, **SETTINGS, folder=tmp_path / "b"):
        if point.lambda_ == 4:
            break
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "b").iterdir()) == ["lambda1", "lambda4"]
    model, _ = functional()
    steps = []
    monkeypatch.setattr(
        "eatlib.curve.fine_tune", lambda config, *rest: steps.append(config.lambda_) or fine_tune(config, *rest)
    )
    resumed = list(tradeoff(model, **batches, **SETTINGS, folder=tmp_path / "b"))
    assert steps == [16]
    assert all(map(same, whole, resumed))
    longer = list(tradeoff(functional()[0], **batches, **SETTINGS | {"lambdas": [1, 4, 16, 32]}, folder=tmp_path / "b"))
    assert steps == [16, 32]
    assert all(map(same, whole, longer))
    finer = list(
        tradeoff(functional()[0], **batches, **SETTINGS | {"lambdas": np.array([1, 2, 4])}, folder=tmp_path / "b")
    )
    assert steps == [16, 32, 2, 4]
    assert all(map(same, whole[:2], finer))


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 3},
        {"sigma": 0.1},
        {"lambdas": [0.5, 1]},
        {"lambdas": [1 + 1e-9]},
        {"train_batches": Batches(batches=3)},
        {"train_batches": [(images[..., :6], labels) for images, labels in Batches()]},
    ],
    ids=str,
)
def test_a_folder_serves_other_paths_too(changes, tmp_path):
    """Nothing that another path left is taken or lost."""
    model, batches = functional()
    settings = SETTINGS | batches | {"folder": tmp_path, "lambdas": [1]}
    first = list(tradeoff(model, **settings))
    (kept,) = tmp_path.iterdir()
    made = kept.stat().st_mtime_ns, kept.read_bytes()
    other = list(tradeoff(model, **settings | changes))
    assert len(list(tmp_path.iterdir())) == len(other)
    assert all(map(same, other, tradeoff(model, **settings | changes | {"folder": None})))
    with torch.no_grad():
        model.fc.bias += 1
    list(tradeoff(model, **settings))
    assert len(list(tmp_path.iterdir())) == len(other) + 1
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == made
    assert all(map(same, first, tradeoff(functional()[0], **settings)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambdas": []}, r"lambdas = \[\]: must be a list of numbers above 0, each larger than the one before"),
        ({"lambdas": 6}, "lambdas = 6: must be a list"),
        ({"lambdas": [0, 1]}, r"lambdas = \[0, 1\]: must be"),
        ({"lambdas": [1, 4, 4]}, r"lambdas = \[1, 4, 4\]: must be"),
        ({"lambdas": ["1"]}, r"lambdas = \['1'\]: must be"),
        ({"lambdas": [1, float("nan")]}, "lambda = nan: "),
        ({"epochs": -1}, "epochs = -1: "),
        ({"learning_rate": 0}, "learning_rate = 0: "),
        ({"margin": -0.1}, "margin = -0.1: must be a share"),
        ({"epoch": 1}, "unknown setting 'epoch': must be one of .*epochs"),
        ({"batch_size": 1}, "unknown setting 'batch_size'"),
        ({"penalty_layers": ["relu*"]}, "'relu.*' fits none of first, norm, second, fc"),
        (
            {"train_batches": iter(Batches())},
            r"train_batches: must be a DataLoader or a list, no iterator, of \(inputs, ",
        ),
        ({"validation_batches": []}, "validation_batches: must be a DataLoader or a list"),
        (
            {"validation_batches": [(torch.rand(2, 3), torch.zeros(2, 1))]},
            r"validation_batches: must be .*labels \(N,\)",
        ),
        ({"train_batches": [{"images": 1, "labels": 2}]}, "train_batches: must be"),
        ({"train_batches": [(torch.ones(2), torch.ones(2), torch.ones(2))]}, "train_batches: must be"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_any_work(changes, message):
    (model, batches), worked = functional(), []
    handle = model.register_forward_pre_hook(lambda *_: worked.append(1))
    with pytest.raises(ValueError, match=message) as caught:
        tradeoff(model, **batches | SETTINGS | changes)
    assert "\n" not in str(caught.value)
    assert not worked
    handle.remove()


def test_a_model_in_which_nothing_makes_zeros_is_refused_and_left_as_it_is():
    model, batches = (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)),
        Batches(),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"nothing that makes zeros.*with_relus"):
        next(tradeoff(model.eval(), batches, batches, lambdas=[1]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_whose_relus_training_cannot_reach_is_refused():
    model, batches = functional()
    model.first.requires_grad_(False), model.norm.requires_grad_(False), model.second.requires_grad_(False)
    with pytest.raises(ValueError, match="ReLUs do not depend on a parameter with requires_grad"):
        next(tradeoff(model, **batches, **SETTINGS))
    model.second.requires_grad_(True)
    with pytest.raises(ValueError, match="costs has no entry for F"):
        next(tradeoff(model, **batches, **SETTINGS, penalty_normalization="energy"))
    before, after = tradeoff(model, **batches, **SETTINGS | {"lambdas": [1]})
    assert torch.equal(before.state["first.weight"], after.state["first.weight"])


def test_a_loss_that_is_no_number_ends_the_path(tmp_path):
    model, batches = functional()
    with pytest.raises(TrainingError, match=r"loss became .* in epoch 1 of 2, with lambda = 1"):
        list(tradeoff(model, **batches, **SETTINGS | {"learning_rate": 1e6}, folder=tmp_path))
    assert not list(tmp_path.iterdir())


# --- networks as people have them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit"])
def test_torchvisions_networks_have_a_curve(name):
    torch.manual_seed(0)
    if name == "vit":
        with pytest.warns(UserWarning, match="2 GELU became ReLU"):
            model = with_relus(small_vit())
    else:
        model = mobilenet_v2(num_classes=3, width_mult=0.25)
    batches = Batches(size=32)
    model = trained(model, batches, epochs=1)
    options = {"epochs": 2, "penalty_share": 0.25, "learning_rate": 0.02}
    before, after = tradeoff(model, list(batches), batches, lambdas=[8], **options)
    assert any(not torch.equal(before.state[name], after.state[name]) for name in before.state)
    assert all(point.reports["fused"].uncounted == [] for point in (before, after))


def test_an_encoders_products_are_counted_attention_too():
    """5 images of 17 tokens (16 patches of 8x8x3 and the class token), 64 numbers each, 4 heads, an MLP of 128."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = with_relus(small_vit())
    report = energy_report(model, [torch.rand(5, 3, 32, 32)], accounting="fused")
    layer = [5 * 17 * 64 * 3 * 64, 5 * 4 * 17 * 17 * 16, 5 * 4 * 17 * 16 * 17, 5 * 17 * 64 * 64, 0]
    layer += [5 * 17 * 64 * 128, 5 * 17 * 128 * 64, 0]
    assert list(report.layers["operations"]) == [5 * 16 * 192 * 64, *layer, *layer, 5 * 64 * 3]
    assert report.uncounted == []
    at = "encoder.layers.encoder_layer_1"
    names = [f"{at}.self_attention.{name}" for name in ("mm", "bmm", "bmm#2", "addmm")]
    names += [f"{at}.{name}" for name in ("add", "mlp.0", "mlp.3", "add#2")]
    assert list(report.layers["name"])[9:17] == names
    rows = report.layers.set_index("name")
    weights = 5 * 4 * 17 * 17  # of attention, softmax applied: written by one product, read by the other
    assert rows.loc[names[1], "outputs"] == weights
    assert rows.loc[names[2], "inputs"] == weights + 5 * 17 * 64
    published = energy_report(model, [torch.rand(5, 3, 32, 32)]).uncounted
    assert {f"{at}.self_attention: {name}" for name in ("mm", "bmm", "addmm")} <= set(published)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_pytorchs_own_encoder_is_counted_in_every_mode(norm_first):
    """No kernel of its own hides a product, nor is a weight that is expanded over the batch read more than once."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.rand(3, 5, 8)
    switch, found = torch.backends.mha.get_fastpath_enabled(), []
    for mode, trainable in ((torch.no_grad, True), (torch.inference_mode, True), (torch.no_grad, False)):
        model.requires_grad_(trainable)
        with mode(), EnergyMeter(model) as meter:
            model(x)
        report = meter.report("fused")
        found.append(report.layers[["inputs", "outputs", "parameters", "operations"]].sum().to_dict())
        assert report.uncounted == []
    assert found[0] == found[1] == found[2]
    tokens, weights = 3 * 5, 3 * 2 * 5 * 5
    assert found[0]["operations"] == 2 * (tokens * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * weights * 4)
    assert torch.backends.mha.get_fastpath_enabled() == switch
    assert torch.backends.cuda.flash_sdp_enabled()


# --- activations that make no zeros -------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def test_activations_are_swapped_wherever_they_are():
    shared = nn.SiLU(inplace=True)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Sequential(nn.Linear(4, 4), shared), QuickGELU(), nn.Sigmoid())
    model.extend([nn.Hardswish(), nn.Mish(), nn.GELU("tanh"), nn.LeakyReLU(), nn.Tanh(), nn.Hardsigmoid()])
    with pytest.warns(
        UserWarning, match="2 SiLU, 1 QuickGELU, 1 Hardswish, 1 Mish, 1 GELU, 1 LeakyReLU became ReLU: fine"
    ):
        assert with_relus(model) is model
    kinds = [type(module).__name__ for module in model.modules() if not [*module.children()]]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "ReLU", "Sigmoid", *["ReLU"] * 4, "Tanh", "Hardsigmoid"]
    assert model[1].inplace
    assert not model[7].inplace
    with pytest.warns(UserWarning, match="nothing to swap was found; calls such as F.gelu"):
        with_relus(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["gelu", nn.GELU()], ids=str)
def test_an_encoder_layer_computes_with_relu_in_evaluation_too(activation):
    torch.manual_seed(0)
    layer = with_relus(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=activation))
    x, plain = torch.randn(2, 3, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), plain(x))


# --- what notebook 3 says of torchvision's networks ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*became ReLU")
def test_the_notebooks_lines_for_pretrained_networks_run_but_for_the_download(tmp_path, monkeypatch):
    for part in ("train", "validation", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / "photos" / part / kind).mkdir(parents=True)
            Image.new("RGB", (300, 250), "brown").save(tmp_path / "photos" / part / kind / "1.png")
    notebook = nbformat.read(ROOT / "notebooks" / "3_your_network.ipynb", as_version=4)
    first, second = re.findall(r"```python\n(.*?)```", notebook.cells[-1].source, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"DataLoader": DataLoader, "nn": nn}
    exec(first.replace("weights=weights", "weights=None").replace(", num_workers=2", ""), known)
    for batches in ("train_batches", "validation_batches", "test_batches"):
        (images, labels) = next(iter(known[batches]))
        assert (images.shape, sorted(labels.tolist())) == ((2, 3, 224, 224), [0, 1])
    assert known["model"].eval()(images).shape == (2, 2)
    with torch.device("meta"):
        exec(re.sub(r"weights=[\w.]+", "weights=None", second), known)
    assert known["model"].heads.head.out_features == 2
    assert "GELU" not in str(known["model"])
