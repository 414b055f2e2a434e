"""The paper's networks: sizes, shapes, and where the input is normalised."""

import pytest
import torch

from eatlib.models import build_model, count_parameters


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_173_962), ("vgg16", 14_728_266)])
def test_parameter_counts_with_10_classes(name, parameters):
    assert count_parameters(build_model(name, classes=10)) == parameters


def test_celeba_networks_have_the_larger_stem_and_one_more_pool():
    resnet = build_model("resnet18", classes=8, image_size=64, width=0.125)
    assert resnet.conv1.kernel_size == (7, 7)
    assert resnet.conv1.stride == (2, 2)
    vgg = build_model("vgg16", classes=8, image_size=64, width=0.125)
    assert sum(isinstance(module, torch.nn.MaxPool2d) for module in vgg.modules()) == 6


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in ("resnet18", "vgg16") for size in (16, 32, 64)] + [("squeezenet1_1", 64)],
)
def test_any_image_size_gives_one_logit_a_class(name, size):
    width = 1 if name == "squeezenet1_1" else 0.0625
    model = build_model(name, classes=7, image_size=size, width=width).eval()
    assert model(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_bytes_and_floats_are_the_same_image_and_are_normalised():
    model = build_model("vgg16", classes=3, width=0.0625, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.25)).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(model(images), model(images / 255), atol=1e-6)
    white = model.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert torch.allclose(white, torch.tensor([1.8, 1.6, 2.8]))


def test_the_same_seed_draws_the_same_weights():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model("resnet18", classes=3, width=0.0625).state_dict()["layer1.0.conv1.weight"])
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="resnet19"):
        build_model("resnet19", classes=3)
