"""The sum of a penalty over a model against plain hooks, in every place where it may be attached."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eatlib.models import build_model, count_parameters
from eatlib.penalties import PENALTIES, ActivationPenalty, choose_layers


class Net(nn.Module):
    """A residual block with everything awkward: one ReLU used three times, in-place modules and additions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu6 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(32, 16)
        self.fc = nn.Linear(16, 5)

    def block(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(x))
        y += x
        return self.relu(y)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu(self.bn1(self.conv1(x))))
        x = self.pool(self.relu6(3 * x))
        x += 0.1
        return self.fc(self.relu(self.hidden(x.flatten(1))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(size) % 5


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_penalty(model: nn.Module, images: Tensor, labels: Tensor, *arguments, **keywords) -> tuple[Tensor, Tensor]:
    """Penalty and gradients of cross-entropy + 2 x penalty."""
    model = copy.deepcopy(model)
    with ActivationPenalty(model, *arguments, **keywords) as penalty:
        logits = model(images)
        value = penalty()
    (F.cross_entropy(logits, labels) + 2 * value).backward()
    return value.detach(), gradients(model)


def by_plain_hooks(
    model: nn.Module, images, labels, name="l0", *, sigma=1e-4, layers="relu", normalization="layer_mean", costs=None
) -> tuple[Tensor, Tensor]:
    """The same with nothing but clones and the formulas, which test_penalty_formulas.py checks."""
    model, values, calls = copy.deepcopy(model), [], []

    def hook(path):
        def on_output(module, inputs, output):
            calls.append(path)
            label = path if calls.count(path) == 1 else f"{path}#{calls.count(path)}"
            share = costs[label] if costs else 1 / count_parameters(model)
            scale = 1 / output.numel() if normalization == "layer_mean" else share / len(output)
            values.append(PENALTIES[name](output.clone().float(), sigma) * scale)

        return on_output

    for path in choose_layers(model, layers):
        model.get_submodule(path).register_forward_hook(hook(path))
    logits = model(images)
    penalty = sum(values) / (len(values) if normalization == "layer_mean" else 1)
    (F.cross_entropy(logits, labels) + 2 * penalty).backward()
    return penalty.detach(), gradients(model)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found[0].detach(), expected[0], rtol=1e-5, atol=1e-7)
    assert (found[1] - expected[1]).norm() < tolerance * expected[1].norm()


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["layer_mean", "parameters", "energy"])
@pytest.mark.parametrize("layers", ["relu", "all", ["conv?", "relu", "fc"]], ids=["relu", "all", "patterns"])
@pytest.mark.parametrize("name", PENALTIES)
def test_same_penalty_and_gradients_as_plain_hooks(name, layers, normalization):
    model, (images, labels) = net(), batch()
    keywords = {"sigma": 1e-2, "layers": layers, "normalization": normalization}
    if normalization == "energy":
        names = [*dict(model.named_modules()), "relu#2", "relu#3"]
        keywords["costs"] = {name: 1e-3 * (index + 1) for index, name in enumerate(names)}
    found = by_penalty(model, images, labels, name, **keywords)
    assert_same(found, by_plain_hooks(model, images, labels, name, **keywords))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("name", "size", "layers"), [("resnet18", 16, 17), ("vgg16", 16, 13), ("shufflenet_v2_x0_5", 64, 37)]
)
def test_whole_networks(name, size, layers, memory_format):
    torch.manual_seed(0)
    model = build_model(name, classes=5, image_size=size, width=0.25).to(memory_format=memory_format).train()
    images, labels = torch.rand(4, 3, size, size), torch.arange(4)
    assert_same(by_penalty(model, images, labels), by_plain_hooks(model, images, labels))
    assert len(choose_layers(model)) == layers


@pytest.mark.parametrize("module", [nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Dropout])
def test_in_place_modules_before_in_place_additions(module):
    class Sum(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y += 1
            return y.square()

    torch.manual_seed(0)
    model, x, labels = Sum(nn.Linear(6, 8), module(inplace=True)), 2 * torch.randn(5, 6), torch.arange(5)
    torch.manual_seed(1)
    found = by_penalty(model, x, labels, sigma=1e-2, layers=["1"])
    torch.manual_seed(1)
    assert_same(found, by_plain_hooks(model, x, labels, sigma=1e-2, layers=["1"]))


def test_in_place_relus_of_views():
    """A linear layer gives a view where its input has more than two dimensions, and so does Flatten."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.Flatten(), nn.ReLU(inplace=True))
    x, labels = torch.randn(5, 3, 6), torch.arange(5)
    assert_same(by_penalty(model, x, labels, sigma=1e-2), by_plain_hooks(model, x, labels, sigma=1e-2))


@pytest.mark.parametrize("forward", [lambda x: x.clamp(0), F.relu, lambda x: F.relu(x) * 2], ids=["clamp", "relu", "2"])
def test_a_kind_of_relu_with_a_forward_of_its_own(forward):
    """Its output is penalised, once, whatever it calls."""

    class Own(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    torch.manual_seed(0)
    model, x, labels = nn.Sequential(nn.Linear(6, 8), Own()), torch.randn(5, 6), torch.arange(5)
    assert_same(by_penalty(model, x, labels, sigma=1e-2), by_plain_hooks(model, x, labels, sigma=1e-2))


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_model_may_put_more_than_its_batch_into_the_first_dimension(share, keyword):
    """(N, T, F) as (N T, F) inside: sums are of an image all the same."""

    class Folded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain(x.flatten(0, 1))

    torch.manual_seed(0)
    x, values, plain, folded = torch.randn(4, 3, 6), [], nn.Sequential(nn.Linear(6, 8), nn.ReLU()), Folded()
    folded.plain = plain
    for model in (folded, plain):
        for normalization, costs in {"parameters": None, "energy": {"plain.1": 0.5, "1": 0.5}}.items():
            with ActivationPenalty(model, share=share, normalization=normalization, costs=costs) as penalty:
                model(x=x) if keyword and model is folded else model(x)
                values.append(penalty().item())
    assert values[:2] == pytest.approx(values[2:])


def test_a_function_of_ones_own():
    def smooth_count(x: Tensor, sigma: float) -> Tensor:
        return (x.square() / (x.square() + sigma)).sum()

    model, (images, labels) = net(), batch()
    assert_same(by_penalty(model, images, labels, smooth_count), by_penalty(model, images, labels, "l0"))
    with ActivationPenalty(model.eval(), lambda x, sigma: pytest.fail("computed in evaluation mode")):
        model(images)


def test_less_penalty_is_less_firing():
    model = nn.Sequential(nn.Linear(10, 50), nn.ReLU())
    images, optimizer = torch.randn(100, 10), torch.optim.SGD(model.parameters(), 10)
    before = (model(images) > 0).float().mean()
    with ActivationPenalty(model, sigma=0.1) as penalty:
        for _ in range(50):
            optimizer.zero_grad()
            model(images)
            penalty().backward()
            optimizer.step()
    assert (model(images) > 0).float().mean() < 0.8 * before


def test_no_memory_is_kept_for_the_backward_pass_but_what_relu_keeps():
    def kept() -> int:
        memory: dict[int, Tensor] = {}
        keep = memory.setdefault
        with torch.autograd.graph.saved_tensors_hooks(lambda x: keep(x.untyped_storage().data_ptr(), x), lambda x: x):
            model(images)
        return sum(x.untyped_storage().nbytes() for x in memory.values())

    model, images = build_model("resnet18", classes=5, image_size=16, width=0.25).train(), torch.rand(2, 3, 16, 16)
    alone = kept()
    with ActivationPenalty(model):
        assert kept() < 1.001 * alone


def test_only_the_latest_whole_training_pass_counts_and_only_once():
    model, (images, _) = net(), batch()
    before = copy.deepcopy(model)(images)
    with ActivationPenalty(model) as penalty:
        assert torch.equal(model(images), before)
        first = penalty()
        with pytest.raises(RuntimeError, match="no activations"):
            penalty()
        with torch.no_grad():
            model(images)
        model(images)
        model.relu(images.clone())  # a part of the model, on its own
        assert torch.equal(penalty(), first)
        with pytest.raises(RuntimeError, match="channels"):
            model(images[:, :2])
        fails = model.fc.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images)
        with pytest.raises(RuntimeError, match="no activations"):
            penalty()
        fails.remove()
        with torch.no_grad():
            model(images)
            assert torch.equal(penalty(), first)
        model(images)
        model.eval()
        model(images)
        assert torch.equal(penalty(), first), "in evaluation mode nothing is attached"
        with pytest.raises(RuntimeError, match="training mode"):
            penalty()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_that_is_interrupted_leaves_nothing_behind():
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model, (images, _) = net(), batch()
    with ActivationPenalty(model) as penalty:
        model(images)
        value = penalty()
        for _ in range(2):
            handle = model.pool.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(images)
            handle.remove()
            model(images)
            assert penalty() == value
        model.pool.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(images)
    assert torch.overrides._get_current_function_mode() is None
    with pytest.raises(RuntimeError, match="no activations to penalise"):
        penalty()


def test_neither_activations_nor_the_model_are_kept_alive():
    model, (images, _) = net(), batch()
    alive: list[weakref.ref] = []
    model.conv2.register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(inputs[0])))
    with ActivationPenalty(model) as penalty:
        model(images)  # without backward
        (model(images).sum() + penalty()).backward()
    alive.append(weakref.ref(model))
    del model, penalty
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]


def test_gradient_accumulation_and_backward_in_two_parts():
    model, (images, labels) = net(), batch(4)
    model.bn1.eval(), model.bn2.eval()
    expected = by_plain_hooks(model, images, labels)
    with ActivationPenalty(model) as penalty:
        for part in (slice(0, 2), slice(2, 4)):
            loss = F.cross_entropy(model(images[part]), labels[part])
            penalty().backward(retain_graph=True)
            (loss / 2).backward()
    assert_same((expected[0], gradients(model)), expected)


@pytest.mark.parametrize("layers", ["relu", "all"])
def test_gradient_checkpointing(layers):
    model, (images, labels) = net(), batch()
    expected = by_penalty(model, images, labels, layers=layers)
    block = model.block
    model.block = lambda x: checkpoint(block, x, use_reentrant=False)
    with ActivationPenalty(model, layers=layers) as penalty:
        loss = F.cross_entropy(model(images), labels)
        value = penalty()
        (loss + 2 * value).backward()
        with pytest.raises(RuntimeError, match="no activations"):
            penalty()
        assert_same((value, gradients(model)), expected)
        model.block = lambda x: checkpoint(block, x, use_reentrant=True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model(images)


@pytest.mark.parametrize("layers", ["relu", "all"])
def test_autocast(layers):
    model, (images, labels) = net(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_plain_hooks(model, images, labels, layers=layers)
        found = by_penalty(model, images, labels, layers=layers)
    assert found[0].dtype == torch.float32
    assert_same(found, expected, 0.02)


@pytest.mark.parametrize("name", PENALTIES)
def test_half_precision_on_an_accelerator_that_need_not_wait(name):
    """A meta tensor has no numbers: to read one raises."""
    images, labels = (x.to("meta") for x in batch())
    model = net().to("meta", torch.float16)
    with ActivationPenalty(model, name, layers="all") as penalty:
        (F.cross_entropy(model(images.half()).float(), labels) + penalty()).backward()
    assert gradients(model).dtype == torch.float16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "fullgraph"), [("aot_eager", False), ("eager", True)])
def test_compiled(backend, fullgraph):
    torch._dynamo.reset()
    model, (images, labels) = net(), batch()
    expected = by_penalty(model, images, labels)
    torch.compile(copy.deepcopy(model), backend=backend, fullgraph=fullgraph)(images)  # what comes is no such model
    with ActivationPenalty(model) as penalty:
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        for _ in range(2):
            model.zero_grad()
            logits = compiled(images)
            value = penalty()
            (F.cross_entropy(logits, labels) + 2 * value).backward()
    assert_same((value, gradients(model)), expected)
    with pytest.raises(ValueError, match="the model is compiled: give the network that it was made from"):
        ActivationPenalty(compiled)


def test_a_copy_of_the_model_is_left_alone():
    model, (images, _) = net(), batch()
    with ActivationPenalty(model) as penalty:
        copied = copy.deepcopy(model)
        model(images)
        copied(images)
        value = penalty()
        with ActivationPenalty(copied) as other:
            copied(images)
            assert torch.equal(other(), value)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"penalty": "l2"}, "penalty = 'l2': must be one of l0, l1, hoyer, transformed_l1, or a function"),
        ({"sigma": 0}, "sigma = 0: must be"),
        ({"sigma": float("nan")}, "sigma = nan: must be"),
        ({"layers": "relus"}, "layers = 'relus': must be 'relu', 'all' or a list"),
        ({"layers": []}, r"layers = \[\]: must be 'relu', 'all' or a list"),
        ({"layers": ["conv?", "rleu"]}, "'rleu' fits none of conv1, bn1, relu"),
        ({"normalization": "mean"}, "normalization = 'mean': must be one of layer_mean, parameters, energy"),
        ({"normalization": "energy"}, "costs go with 'energy'"),
        ({"costs": {"relu": 1.0}}, "costs go with 'energy'"),
    ],
)
def test_bad_arguments_are_named(keywords, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        ActivationPenalty(model, **keywords)
    with ActivationPenalty(model), pytest.raises(ValueError, match="detach"):  # nothing was left attached
        ActivationPenalty(model, "l1")


def test_layers_without_a_price_or_a_tensor_are_named():
    model, lstm = net(), nn.LSTM(3, 4)
    with ActivationPenalty(model, normalization="energy", costs={"relu": 1}), pytest.raises(ValueError, match="relu#2"):
        model(batch()[0])
    with ActivationPenalty(lstm, layers="all"), pytest.raises(TypeError, match="LSTM returns tuple"):
        lstm(torch.rand(2, 5, 3))
