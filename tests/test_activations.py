"""What the library sees of a model: module calls and operators."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eatlib.activations import LayerCall, OperatorCall, Trace, Watch, leaf_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(self.block(x)) + x)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_leaf_modules_are_those_without_children() -> None:
    assert list(leaf_modules(Net())) == ["block.0", "block.1"]
    assert list(leaf_modules(nn.Linear(2, 2))) == ["Linear"]


def test_watch_sees_calls_in_order_and_numbers_them() -> None:
    calls: list[LayerCall] = []
    net, events = Net(), []
    with Watch(
        net,
        calls.append,
        on_start=lambda: events.append("start"),
        on_end=lambda: events.append("end"),
    ):
        net(torch.ones(1, 4))
        net(torch.ones(1, 4))
    names = ["block.0", "block.1", "block.0#2", "block.1#2"]
    assert [call.name for call in calls] == 2 * names
    assert [call.kind for call in calls[:2]] == ["Linear", "ReLU"]
    assert torch.equal(calls[1].inputs[0], calls[1].output)  # in place
    assert events == ["start", "end"] * 2
    assert hooks(net) == 0


def test_watch_can_replace_an_output() -> None:
    net = Net()
    with Watch(net, lambda call: torch.zeros_like(call.output), modules=["block.1"]):
        assert torch.equal(net(torch.ones(1, 4)), torch.ones(1, 4))


def traced(net: nn.Module, x: Tensor, seen: list[tuple[str, bool, str]]) -> Tensor:
    def operator(call: OperatorCall) -> object:
        seen.append((call.name, call.in_leaf, call.function.overloadpacket.__name__))
        return call.run()

    def layer(call: LayerCall) -> None:
        seen.append((call.name, True, "call"))
        call.output.sum()  # what a callback computes is not traced

    trace = Trace(net, on_start=lambda _: None, on_layer=layer, on_operator=operator, on_end=lambda _: None)
    with trace, torch.no_grad():
        output = net(x)
        output + 1  # outside of the model
    return output


def test_trace_sees_functions_and_where_they_ran() -> None:
    net, x = Net(), torch.randn(2, 4)
    seen: list[tuple[str, bool, str]] = []
    assert torch.equal(traced(net, x, seen), net(x).detach())
    assert seen == [
        ("block.0", True, "t"),
        ("block.0", True, "addmm"),
        ("block.0", True, "call"),
        ("block.1", True, "relu_"),
        ("block.1", True, "call"),
        ("block.0#2", True, "t"),
        ("block.0#2", True, "addmm"),
        ("block.0#2", True, "call"),
        ("block.1#2", True, "relu_"),
        ("block.1#2", True, "call"),
        ("", False, "add"),
        ("", False, "relu"),
    ]
    assert hooks(net) == 0


def test_trace_leaves_nothing_behind_when_the_model_raises() -> None:
    net = Net()
    seen: list[tuple[str, bool, str]] = []
    with pytest.raises(RuntimeError):
        traced(net, torch.ones(1, 3), seen)
    assert hooks(net) == 0
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
