"""The penalty of models as people have them: functional calls, smooth activations, pickled, in threads."""

import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from test_penalties import Net, assert_same, batch, by_penalty, by_plain_hooks, gradients, net
from torch import Tensor, nn
from torch.nn import functional as F

from eatlib.models import build_model, with_relus
from eatlib.penalties import ActivationPenalty, choose_layers


def test_smooth_activations_are_refused_and_can_be_swapped():
    model, images = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.GELU(), nn.SiLU())), torch.rand(2, 3)
    with ActivationPenalty(model) as penalty:
        model(images)
        with pytest.raises(ValueError, match=r"GELU, SiLU .* small values, not zeros.* eatlib\.models\.with_relus"):
            penalty()
    with pytest.warns(UserWarning, match="1 GELU, 1 SiLU became ReLU: fine-tune"):
        assert choose_layers(with_relus(model)) == ["1.0", "1.1"]


class Functional(Net):
    """`Net` without a module that makes zeros."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(x))
        y += x
        x = self.pool(F.relu6(3 * y.relu_()))
        x += 0.1
        return self.fc(torch.relu(self.hidden(x.flatten(1))))


def test_functional_calls_are_layers():
    model, functional, (images, labels) = net(), Functional(), batch()
    functional.load_state_dict(model.state_dict())
    assert_same(by_penalty(functional, images, labels), by_plain_hooks(model, images, labels))
    del functional.relu, functional.relu6
    with ActivationPenalty(functional) as penalty:
        functional(images)
        value = penalty()
        assert list(penalty.values()) == ["F.relu", "F.relu#2", "F.relu6", "F.relu#3"]
        assert sum(penalty.values().values()) / 4 == pytest.approx(value.item())
        assert (
            repr(penalty) == "ActivationPenalty(l0 of 0 modules of Functional and its functional calls, sigma=0.0001, "
            "normalization='layer_mean')"
        )


@pytest.mark.filterwarnings("ignore")
def test_functional_calls_are_layers_of_a_compiled_model_too():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, (images, labels) = Functional().train(), batch()
    del model.relu, model.relu6
    expected = by_penalty(model, images, labels)
    with ActivationPenalty(model) as penalty:
        logits = torch.compile(model, backend="eager", fullgraph=True)(images)
        value = penalty()
        (F.cross_entropy(logits, labels) + 2 * value).backward()
    assert_same((value, gradients(model)), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "size", "calls"), [("densenet121", 32, 121), ("googlenet", 32, 57), ("inception_v3", 75, 94)]
)
def test_torchvisions_networks_with_functional_calls(name, size, calls):
    model = build_model(name, classes=3, image_size=size)
    with ActivationPenalty(model.train()) as penalty:
        loss = model(torch.rand(2, 3, size, size)).square().mean() + penalty()
        loss.backward()
        assert len(penalty.values()) == calls


def test_a_pickled_model_is_left_alone():
    model, (images, _) = net(), batch()
    with ActivationPenalty(model) as penalty:
        copied = pickle.loads(pickle.dumps(model))
        model(images)
        copied(images)
        assert penalty() > 0
    assert torch.equal(copied(images), model(images))


def test_two_threads_at_once_are_one_clear_error():
    model, (images, _) = net(), batch()
    errors = []

    def other_pass(*_: object) -> None:
        try:
            model(images)
        except RuntimeError as error:
            errors.append(str(error))

    with ActivationPenalty(model) as penalty:
        handle = model.conv2.register_forward_hook(lambda *_: handle.remove() or run_in_a_thread(other_pass))
        model(images)
        assert penalty() > 0
        run_in_a_thread(other_pass)
        assert penalty() > 0, "one after the other is all right"
    assert errors == ["the model runs in two threads at once, whose activations the penalty cannot tell apart"]


def run_in_a_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize("normalization", ["layer_mean", "parameters"])
def test_a_share_of_the_images_is_an_unbiased_estimate_of_the_whole(normalization):
    """Over all rotations of a batch every image is once in the share: the mean of the estimates is the whole."""
    model, (images, _) = net(), batch(8)
    model.bn1.eval(), model.bn2.eval()
    options = {"sigma": 1e-2, "normalization": normalization}
    with ActivationPenalty(model, **options) as penalty:
        model(images)
        whole = penalty()
    with ActivationPenalty(model, share=0.25, **options) as penalty:
        parts = [(model(images.roll(shift, 0)), penalty())[1] for shift in range(8)]
    assert max(parts) > 1.02 * min(parts)
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="share = 0: must be above 0, and at most 1"):
        ActivationPenalty(model, share=0)
