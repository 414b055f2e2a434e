"""The penalties against their definitions, and their sum over a model against plain hooks, in every place."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eatlib import penalties
from eatlib.models import build_model, count_parameters
from eatlib.penalties import ActivationPenalty, choose_layers, hoyer, l0, l1, transformed_l1

FUNCTIONS = {"l0": l0, "l1": l1, "hoyer": hoyer, "transformed_l1": transformed_l1}


def definition(name: str, x: Tensor, sigma: float) -> Tensor:
    """As in the papers, in the precision of `x`."""
    if name == "l0":
        return (x**2 / (x**2 + sigma)).sum()
    if name == "l1":
        return x.abs().sum()
    if name == "hoyer":
        return x.abs().sum() ** 2 / (x**2).sum()
    return ((1 + sigma) * x.abs() / (sigma + x.abs())).sum()


def value_and_gradient(function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def fast(name: str, sigma: float):
    """The penalty as `ActivationPenalty` computes it, without a model around."""
    return lambda x: penalties._Penalize.apply(x, penalties.PENALTIES[name], sigma, False, False)[1]


class Net(nn.Module):
    """A residual block with everything awkward: one ReLU used three times, in-place modules and additions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.0)
        self.relu6 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(32, 16)
        self.fc = nn.Linear(16, 5)

    def block(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(x))
        y += x
        return self.relu(y)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu(self.bn1(self.conv1(x))))
        x = self.relu6(3 * self.dropout(x))
        x = self.flatten(self.pool(x))
        x += 0.1
        return self.fc(self.relu(self.hidden(x)))


def batch(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, 8, 8, generator=generator)
    return images, torch.arange(size) % 5


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().train()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradients_are_finite(model: nn.Module) -> bool:
    return all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def by_plain_hooks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    name: str,
    sigma: float,
    layers="relu",
    normalization: str = "layer_mean",
    costs=None,
    autocast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Penalty and gradients of cross-entropy + 2 x penalty, with the definitions, clones and autograd alone."""
    model = copy.deepcopy(model)
    values, calls = [], {}
    modules = dict(model.named_modules())
    parameters = count_parameters(model)

    def hook(path):
        def on_output(module, inputs, output):
            calls[path] = calls.get(path, 0) + 1
            call = path if calls[path] == 1 else f"{path}#{calls[path]}"
            value = definition(name, output.clone().float(), sigma)
            if normalization == "layer_mean":
                values.append(value / output.numel())
            elif normalization == "parameters":
                values.append(value / len(output) / parameters)
            else:
                values.append(value / len(output) * costs[call])

        return on_output

    for path in choose_layers(model, layers):
        modules[path].register_forward_hook(hook(path))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels)
    penalty = torch.stack(values)
    penalty = penalty.mean() if normalization == "layer_mean" else penalty.sum()
    (loss + 2 * penalty).backward()
    return penalty.detach(), gradients(model)


def by_penalty(model: nn.Module, images: Tensor, labels: Tensor, *arguments, **keywords) -> tuple[Tensor, Tensor]:
    model = copy.deepcopy(model)
    with ActivationPenalty(model, *arguments, **keywords) as penalty:
        logits = model(images)
        value = penalty()
    (F.cross_entropy(logits, labels) + 2 * value).backward()
    return value.detach(), gradients(model)


# --- the functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", ["formula", "fast"])
def test_value_and_gradient_are_the_definitions(name, sigma, way):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 11, generator=generator) * torch.logspace(-6, 2, 11)
    function = fast(name, sigma) if way == "fast" else lambda x: FUNCTIONS[name](x, sigma)
    value, gradient = value_and_gradient(function, x)
    exact, exact_gradient = value_and_gradient(lambda x: definition(name, x, sigma), x.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2e-5, atol=1e-6 * exact_gradient.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_computed_in_float32_whatever_comes_in(name, dtype):
    x = torch.randn(300, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected, expected_gradient = value_and_gradient(lambda x: FUNCTIONS[name](x, 1e-3), x.float())
    for function in (lambda x: FUNCTIONS[name](x, 1e-3), fast(name, 1e-3)):
        value, gradient = value_and_gradient(function, x)
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 1e-4, 1e-10])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_zeros_infinities_and_extremes_make_no_nan(name, sigma):
    infinite = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65504.0, 6e-8], dtype=torch.float16)
    tiny = torch.tensor([0.0, 1e-38, -1e-30, 1e-20, 1e-10, 1e15], dtype=torch.float32)
    for x in (infinite, infinite.bfloat16(), tiny, torch.zeros(5), torch.zeros(0)):
        for function in (lambda x: FUNCTIONS[name](x, sigma), fast(name, sigma)):
            value, gradient = value_and_gradient(function, x)
            assert value.isfinite(), (name, x)
            assert gradient.isfinite().all(), (name, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan(name):
    x = torch.tensor([1.0, float("nan")])
    assert FUNCTIONS[name](x, 1e-4).isnan()
    assert fast(name, 1e-4)(x).isnan()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x[:, :1, :, :1],
    ],
    ids=["contiguous", "channels_last", "transposed", "strided", "expanded", "thin"],
)
def test_any_memory_layout(name, layout, monkeypatch):
    monkeypatch.setattr(penalties, "_BLOCK", 100)  # several blocks, the last one short
    images = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(layout(images).shape, generator=torch.Generator().manual_seed(4))
    own = penalties._Penalize

    def objective(function):
        leaf = images.clone().requires_grad_()
        x = layout(leaf * 1)
        assert x.stride() == layout(images).stride()
        rectified, value = function(x)
        return torch.autograd.grad((rectified * weight).sum() + 3 * value, leaf)[0]

    def plain(x):
        x = x.relu()
        return x, definition(name, x, 1e-2)

    expected = objective(plain)
    fused = objective(lambda x: own.apply(x, penalties.PENALTIES[name], 1e-2, True, False))
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)


def test_sums_over_many_elements_stay_exact():
    x = torch.zeros(6_000_000)
    x[::1000] = 1e-2  # each counts half
    for value in (l0(x, 1e-4), fast("l0", 1e-4)(x)):
        assert value.item() == pytest.approx(3000, rel=1e-4)


# --- in a model -----------------------------------------------------------------------------------------------------

PLACES = ["relu", "all", ["conv?", "relu", "fc"]]


@pytest.mark.parametrize("normalization", ["layer_mean", "parameters", "energy"])
@pytest.mark.parametrize("layers", PLACES, ids=["relu", "all", "patterns"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_penalty_and_gradients_as_plain_hooks(name, layers, normalization):
    model, (images, labels) = net(), batch()
    costs = None
    if normalization == "energy":
        names = [*dict(model.named_modules()), "relu#2", "relu#3"]
        costs = {name: 1e-3 * (index + 1) for index, name in enumerate(names)}
    arguments = (name, 1e-2, layers, normalization, costs)
    expected, expected_gradients = by_plain_hooks(model, images, labels, *arguments)
    value, found = by_penalty(
        model, images, labels, name, sigma=1e-2, layers=layers, normalization=normalization, costs=costs
    )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, expected_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layers", PLACES, ids=["relu", "all", "patterns"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_way_of_other_devices(name, layers, monkeypatch):
    monkeypatch.setattr(penalties, "_on_cpu", lambda x: False)
    model, (images, labels) = net(), batch()
    expected, expected_gradients = by_plain_hooks(model, images, labels, name, 1e-2, layers)
    value, found = by_penalty(model, images, labels, name, sigma=1e-2, layers=layers)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, expected_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_accelerator_never_waits(name, dtype):
    """A meta tensor has no numbers: to read one raises. All else of the way of other devices runs."""
    images, labels = (x.to("meta") for x in batch())
    model = net().to("meta", dtype)
    with ActivationPenalty(model, name, layers="all") as penalty:
        loss = F.cross_entropy(model(images.to(dtype)).float(), labels) + penalty()
        loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
    assert gradients(model).dtype == dtype


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_the_papers_networks(name, memory_format):
    torch.manual_seed(0)
    model = build_model(name, classes=5, image_size=16, width=0.25).to(memory_format=memory_format).train()
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    expected, expected_gradients = by_plain_hooks(model, images, labels, "l0", 1e-4)
    value, found = by_penalty(model, images, labels)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert (found - expected_gradients).norm() < 1e-4 * expected_gradients.norm()
    assert len(choose_layers(model)) == {"resnet18": 17, "vgg16": 13}[name]


def test_the_network_computes_what_it_did_before():
    model, (images, _) = net(), batch()
    before = copy.deepcopy(model)(images)
    with ActivationPenalty(model, layers="all") as penalty:
        attached = copy.deepcopy(model.state_dict()), model(images)
        penalty()
    assert torch.equal(before, attached[1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_pass_is_counted_once():
    model, (images, _) = net(), batch()
    with ActivationPenalty(model) as penalty:
        with pytest.raises(RuntimeError, match="no activations"):
            penalty()
        model(images)
        first = penalty()
        with pytest.raises(RuntimeError, match="no activations"):
            penalty()
        model(images)  # forgotten
        model(images)
        assert torch.equal(first, penalty())
        model.eval()
        model(images)
        with pytest.raises(RuntimeError, match="training mode"):
            penalty()
        model.train()
        model(images)
        assert torch.equal(first, penalty())


def test_a_forward_pass_that_fails_leaves_nothing_behind():
    model, (images, _) = net(), batch()
    with ActivationPenalty(model) as penalty:
        model(images)
        expected = penalty()
        with pytest.raises(RuntimeError):
            model(torch.rand(6, 3, 3, 3, 3))
        with pytest.raises(RuntimeError):
            model.fc(model.relu(torch.rand(1, 7)))
        model(images)
        assert torch.equal(expected, penalty())


def test_a_pass_that_was_not_finished_has_no_penalty():
    model, (images, _) = net(), batch()
    with ActivationPenalty(model, layers="all") as penalty:
        model(images)
        expected = penalty()
        fails = model.relu.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images)
        with pytest.raises(RuntimeError, match="no activations"):
            penalty()
        fails.remove()
        model.relu.forward(images)  # reaches no hook
        model(images)
        with torch.no_grad():
            model.conv1(images)  # a part of the model, on its own
        assert torch.equal(expected, penalty())


def test_what_a_users_hook_makes_of_an_output_is_penalised():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.rand(5, 3)
    with ActivationPenalty(model, "l1") as penalty:
        output = model(x)
        assert penalty().item() == pytest.approx(output.abs().mean().item())


def test_in_inference_mode_by_keyword_and_with_another_default_dtype():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    x = torch.rand(5, 3)
    with ActivationPenalty(model) as penalty:
        with torch.inference_mode():
            model(x)
        model(x)
        expected = penalty()
        expected.backward()
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            model(x)
            assert torch.equal(penalty(), expected)
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(model[1](input=x), x)


def test_two_threads_run_backward_through_one_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    with ActivationPenalty(model, sigma=1e-2) as penalty:

        def prepared(seed: int) -> tuple[Tensor, Tensor]:
            x = torch.rand(600, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            return model(x).mean() + penalty(), x

        alone = [torch.autograd.grad(*prepared(seed))[0] for seed in range(8)]
        graphs = [prepared(seed) for seed in range(8)]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda graph: torch.autograd.grad(*graph)[0], graphs))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_second_penalty_is_refused_until_the_first_is_detached():
    model = net()
    penalty = ActivationPenalty(model)
    with pytest.raises(ValueError, match="detach"):
        ActivationPenalty(model, "l1")
    penalty.detach()
    penalty.detach()
    with ActivationPenalty(model, "l1"):
        pass


def test_no_memory_is_kept():
    model, (images, labels) = net(), batch()
    alive: list[weakref.ref] = []
    model.conv2.register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(inputs[0])))
    with ActivationPenalty(model) as penalty:
        for _ in range(3):
            model(images)  # without backward
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 1
        loss = F.cross_entropy(model(images), labels) + penalty()
        loss.backward()
        del loss
        assert sum(reference() is not None for reference in alive) == 0
    reference = weakref.ref(model)
    del model, penalty
    gc.collect()
    assert reference() is None


def test_gradient_accumulation():
    model, (images, labels) = net(), batch(size=4)
    model.bn1.eval(), model.bn2.eval()
    expected, _ = by_plain_hooks(model, images, labels, "l0", 1e-2)
    whole = by_penalty(model, images, labels, sigma=1e-2)
    assert whole[0] == pytest.approx(expected.item(), rel=1e-5)
    with ActivationPenalty(model, sigma=1e-2) as penalty:
        for part in (slice(0, 2), slice(2, 4)):
            loss = F.cross_entropy(model(images[part]), labels[part]) + 2 * penalty()
            (loss / 2).backward()
    torch.testing.assert_close(gradients(model), whole[1], rtol=1e-3, atol=1e-5)


def test_backward_in_two_parts():
    model, (images, labels) = net(), batch()
    _, expected = by_penalty(model, images, labels)
    with ActivationPenalty(model) as penalty:
        loss = F.cross_entropy(model(images), labels)
        (2 * penalty()).backward(retain_graph=True)
        loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layers", ["relu", "all"])
def test_gradient_checkpointing(layers):
    model, (images, labels) = net(), batch()
    expected = by_penalty(model, images, labels, layers=layers)
    block = model.block
    model.block = lambda x: checkpoint(block, x, use_reentrant=False)
    with ActivationPenalty(model, layers=layers) as penalty:
        for _ in range(2):
            model.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            value = penalty()
            (loss + 2 * value).backward()
            with pytest.raises(RuntimeError, match="no activations"):
                penalty()
            model.bn1.reset_running_stats(), model.bn2.reset_running_stats()
    assert torch.equal(value.detach(), expected[0])
    torch.testing.assert_close(gradients(model), expected[1], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused():
    model, (images, _) = net(), batch()
    block = model.block
    model.block = lambda x: checkpoint(block, x, use_reentrant=True)
    with ActivationPenalty(model), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(images)


def test_without_gradients():
    model, (images, _) = net(), batch()
    with ActivationPenalty(model) as penalty, torch.no_grad():
        model(images)
        assert not penalty().requires_grad


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "other devices"])
@pytest.mark.parametrize("layers", ["relu", "all"])
def test_autocast(layers, on_cpu, monkeypatch):
    monkeypatch.setattr(penalties, "_on_cpu", lambda x: on_cpu)
    monkeypatch.setattr(penalties, "_DEVICE_BLOCK", 100)
    model, (images, labels) = net(), batch()
    expected = by_plain_hooks(model, images, labels, "l0", 1e-2, layers, autocast=True)
    with ActivationPenalty(model, sigma=1e-2, layers=layers) as penalty:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
            value = penalty()
        assert value.dtype == torch.float32
        (F.cross_entropy(logits.float(), labels) + 2 * value).backward()
    torch.testing.assert_close(value.detach(), expected[0])
    assert (gradients(model) - expected[1]).norm() < 0.02 * expected[1].norm()


def test_double_backward_is_refused():
    model, (images, _) = net(), batch()
    with ActivationPenalty(model) as penalty:
        model(images)
        (gradient,) = torch.autograd.grad(penalty(), model.conv1.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_in_place_relu_on_a_view():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 8)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            self.relu(x[:, :4])
            return x

    torch.manual_seed(0)
    model, x = Halves(), torch.rand(3, 6)
    with ActivationPenalty(model, "l1") as penalty:
        output = model(x)
        (output.sum() + penalty()).backward()
    expected = model.linear(x)
    weight = model.linear.weight.grad.clone()
    model.zero_grad()
    rectified = expected[:, :4].relu()
    assert torch.equal(output[:, :4], rectified)
    (rectified.sum() + expected[:, 4:].sum() + rectified.mean()).backward()
    torch.testing.assert_close(weight, model.linear.weight.grad)


def test_relu_on_its_own_and_frozen_layers():
    with ActivationPenalty(nn.ReLU(), "l1") as penalty:
        x = torch.tensor([-1.0, 1.0, 2.0], requires_grad=True)
        penalty._model(x)
        penalty().backward()
        torch.testing.assert_close(x.grad, torch.tensor([0.0, 1 / 3, 1 / 3]))
    model, (images, labels) = net(), batch()
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    with ActivationPenalty(model) as penalty:
        (F.cross_entropy(model(images), labels) + penalty()).backward()
    assert model.conv1.weight.grad is None
    assert model.conv2.weight.grad.isfinite().all()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"penalty": "l2"}, "penalty = 'l2': must be one of l0, l1, hoyer, transformed_l1"),
        ({"sigma": 0}, "sigma = 0: must be"),
        ({"sigma": float("nan")}, "sigma = nan: must be"),
        ({"layers": "relus"}, "layers = 'relus': must be 'relu', 'all' or a list"),
        ({"layers": ["conv?", "rleu"]}, "'rleu' fits none of conv1, bn1, relu"),
        ({"layers": []}, "at least one layer"),
        ({"normalization": "mean"}, "normalization = 'mean': must be one of layer_mean, parameters, energy"),
        ({"normalization": "energy"}, "costs go with 'energy'"),
        ({"costs": {"relu": 1.0}}, "costs go with 'energy'"),
    ],
)
def test_bad_arguments_are_named(keywords, message):
    model = net()
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        ActivationPenalty(model, **keywords)
    with ActivationPenalty(model):  # and nothing is left attached
        pass


def test_a_layer_without_a_price_is_named():
    model, (images, _) = net(), batch()
    with (
        ActivationPenalty(model, normalization="energy", costs={"relu": 1.0}),
        pytest.raises(ValueError, match="relu#2"),
    ):
        model(images)


def test_smooth_activations():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    with pytest.raises(ValueError, match=r"GELU.*make no zeros"):
        ActivationPenalty(model)
    with pytest.warns(UserWarning, match="1: these activation functions make small values, not zeros"):
        penalty = ActivationPenalty(model, layers=["1"])
    model(torch.rand(2, 3))
    assert penalty() > 0


def test_outputs_that_are_no_tensor_are_refused():
    model = nn.Sequential(nn.LSTM(3, 4))
    with ActivationPenalty(model, layers="all"), pytest.raises(TypeError, match=r"LSTM.*tuple"):
        model(torch.rand(2, 5, 3))


@pytest.mark.parametrize("inplace", [nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Dropout])
def test_in_place_modules_before_in_place_additions(inplace):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 8)
            self.act = inplace(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(2 * self.linear(x))
            y += 1
            return y.square()

    torch.manual_seed(0)
    model, x = Sum(), torch.randn(5, 6)
    torch.manual_seed(1)
    with ActivationPenalty(model, sigma=1e-2, layers=["act"]) as penalty:
        (model(x).sum() + 50 * penalty()).backward()
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    activations = inplace()(2 * model.linear(x))
    ((activations + 1).square().sum() + 50 * l0(activations, 1e-2) / activations.numel()).backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-4)


def test_mobilenet_v3_with_an_in_place_dropout_after_hardswish():
    model = build_model("mobilenet_v3_small", classes=5).train()
    with ActivationPenalty(model) as penalty:
        (model(torch.rand(2, 3, 32, 32)).sum() + penalty()).backward()
    assert gradients_are_finite(model)


def test_relu6_and_mobilenet():
    model = build_model("mobilenet_v2", classes=5)
    model.train()
    images, labels = torch.rand(2, 3, 32, 32), torch.arange(2)
    model.network.classifier[0].p = 0.0  # dropout, which would differ from pass to pass
    expected, expected_gradients = by_plain_hooks(model, images, labels, "l0", 1e-2)
    value, found = by_penalty(model, images, labels, sigma=1e-2)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert (found - expected_gradients).norm() < 1e-3 * expected_gradients.norm()
    assert len(choose_layers(model)) == 35


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    model, (images, labels) = net(), batch()
    expected = by_penalty(model, images, labels)
    with ActivationPenalty(model) as penalty:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            model.zero_grad()
            logits = compiled(images)
            value = penalty()
            (F.cross_entropy(logits, labels) + 2 * value).backward()
            model.bn1.reset_running_stats(), model.bn2.reset_running_stats()
    torch.testing.assert_close(value.detach(), expected[0])
    torch.testing.assert_close(gradients(model), expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_in_one_piece(memory_format):
    torch._dynamo.reset()
    model = build_model("resnet18", classes=5, image_size=16, width=0.0625).to(memory_format=memory_format).train()
    with ActivationPenalty(model) as penalty:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.rand(2, 3, 16, 16))
        assert penalty().requires_grad


def test_a_copy_of_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    with ActivationPenalty(model) as penalty:
        copied = copy.deepcopy(model)
        output = model(x)
        with torch.no_grad():
            assert torch.equal(copied(x), output)
            assert torch.equal(copied.eval()(x), output)
        value = penalty()
        model(x)
        assert torch.equal(penalty(), value)
    assert torch.equal(copied(x), output)


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="then compile"):
        ActivationPenalty(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager"))
