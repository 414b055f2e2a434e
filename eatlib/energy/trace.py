"""What a model computes: calls of its leaf modules, and PyTorch's operators."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Operator(NamedTuple):
    """An operator that is about to run in the module `name` ("" is the model) of the class `kind`."""

    name: str
    kind: str
    in_leaf: bool
    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self) -> Any:
        return self.function(*self.arguments, **self.keywords)


@contextmanager
def trace(
    model: nn.Module,
    on_layer: Callable[[str, nn.Module, Any, Any], None],
    on_operator: Callable[[Operator], Any] = Operator.run,
    on_start: Callable[[Any], None] = lambda arguments: None,
    on_end: Callable[[Any], None] = lambda output: None,
) -> Iterator[None]:
    """Report the model's forward passes; what the callbacks compute themselves is not reported.

    Args:
        on_layer: called after each call of a leaf module with its dotted path (`path#2` for the second call in a pass),
            the module, its inputs as they are *after* the call, and its output.
        on_operator: called in place of each operator; runs it and returns its output. Functional calls (`F.relu`,
            `x += y`) reach no hook, but they are operators like any other.
        on_start, on_end: called with the arguments of a pass, and with what it returned. A pass that raises has no end.
    """
    paths = {module: path for path, module in model.named_modules()}
    running: list[tuple[str, str, bool]] = []  # from the model inwards
    calls: Counter[str] = Counter()
    quiet = False

    def quietly(callback: Callable[..., None], *arguments: Any) -> None:
        nonlocal quiet
        quiet = True
        try:
            callback(*arguments)
        finally:
            quiet = False

    def enter(module: nn.Module, arguments: Any, keywords: Any) -> None:
        if module is model:
            running.clear()
            calls.clear()
        kind, leaf = type(module).__name__, next(module.children(), None) is None
        name = paths[module] or (kind if leaf else "")
        calls[name] += 1
        running.append((f"{name}#{calls[name]}" if leaf and calls[name] > 1 else name, kind, leaf))
        if module is model:
            quietly(on_start, (arguments, keywords))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        name, _, leaf = running.pop()
        if output is None:  # it raised
            return
        if leaf:
            quietly(on_layer, name, module, inputs, output)
        if module is model:
            quietly(on_end, output)

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            keywords = keywords or {}
            if torch.is_inference_mode_enabled() and function._can_decompose():
                # Inference mode hands over conv2d and linear as they are; elsewhere PyTorch takes them apart first.
                with self:
                    return function.decompose(*arguments, **keywords)
            if quiet or not running:
                return function(*arguments, **keywords)
            return on_operator(Operator(*running[-1], function, arguments, keywords))

    with ExitStack() as stack:
        for module in paths:
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        stack.enter_context(Operators())
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
