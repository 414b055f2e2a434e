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
def trace(model: nn.Module, on_start: Callable[[Any], Any], on_end: Callable[[Any], None]) -> Iterator[None]:
    """Report the model's forward passes; what the callbacks compute themselves is not reported.

    Args:
        on_start: called with the arguments of a pass; returns an object that watches it. Its `layer` is called after
            each call of a leaf module with its dotted path (`path#2` for the second call in a pass), the module, its
            inputs as they are *after* the call, and its output. Its `operator` is called in place of each operator;
            it runs it and returns its output. Functional calls (`F.relu`, `x += y`) reach no hook, but they are
            operators like any other.
        on_end: called with what the model returned; not if the pass raises.
    """
    paths = {module: path for path, module in model.named_modules()}
    running: list[tuple[str, str, bool]] = []  # from the model inwards
    calls: Counter[str] = Counter()
    watcher: Any = None

    def enter(module: nn.Module, arguments: Any, keywords: Any) -> None:
        nonlocal watcher
        if module is model:
            running.clear()
            calls.clear()
        kind, leaf = type(module).__name__, next(module.children(), None) is None
        name = paths[module] or (kind if leaf else "")
        calls[name] += 1
        running.append((f"{name}#{calls[name]}" if leaf and calls[name] > 1 else name, kind, leaf))
        if module is model:
            with torch._C._DisableTorchDispatch():
                watcher = on_start((arguments, keywords))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        name, _, leaf = running.pop()
        if output is None:  # it raised
            return
        with torch._C._DisableTorchDispatch():
            if leaf:
                watcher.layer(name, module, inputs, output)
            if module is model:
                on_end(output)

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            keywords = keywords or {}
            if torch.is_inference_mode_enabled() and function._can_decompose():
                # Inference mode hands over conv2d and linear as they are; elsewhere PyTorch takes them apart first.
                with self:
                    return function.decompose(*arguments, **keywords)
            if not running:
                return function(*arguments, **keywords)
            return watcher.operator(Operator(*running[-1], function, arguments, keywords))

    with ExitStack() as stack:
        for module in paths:
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        stack.enter_context(Operators())
        yield
