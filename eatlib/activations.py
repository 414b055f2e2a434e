"""The one place that sees what each layer computes: every forward hook of the library is set here."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of one leaf module.

    Attributes:
        name: dotted path in the model; the second call in one forward pass is `path#2`, and so on.
        kind: class name of the module, such as "Conv2d".
        inputs: positional arguments as they are *after* the call: an in-place module has changed them.
        output: what the module returned.
    """

    name: str
    kind: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have no children, by dotted path, in order of registration."""
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    }


class Watch:
    """Calls `on_call` after each call of the given leaf modules, until `close`; a context manager.

    A copy of the model takes the hooks along, but its calls are not seen.

    Args:
        on_call: gets a `LayerCall`; a tensor that it returns takes the place of the module's output.
        modules: paths to watch; all leaf modules if None.
        on_start, on_end: called before and after each forward pass of `model` as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[LayerCall], Tensor | None],
        *,
        modules: Iterable[str] | None = None,
        on_start: Callable[[], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._on_call = on_call
        self._calls: Counter[str] = Counter()
        leaves = leaf_modules(model)
        wanted = leaves if modules is None else {name: leaves[name] for name in modules}

        def start(module: nn.Module, inputs: Any) -> None:
            if module is model:
                self._calls.clear()
                if on_start is not None:
                    on_start()

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            if module is model and on_end is not None:
                on_end()

        self._handles = [model.register_forward_pre_hook(start)]
        self._handles += [module.register_forward_hook(self._hook(name, module)) for name, module in wanted.items()]
        self._handles += [model.register_forward_hook(end)]

    def _hook(self, name: str, watched: nn.Module) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
            if module is not watched:
                return None
            label = self.label(name)
            self._calls[name] += 1
            return self._on_call(LayerCall(label, type(module).__name__, module, inputs, output))

        return hook

    def label(self, name: str) -> str:
        """What the next call of the module `name` in this forward pass is called."""
        count = self._calls[name] + 1
        return name if count == 1 else f"{name}#{count}"

    def close(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """One call of one of PyTorch's operators while the model runs, about to happen.

    Attributes:
        name: label of the leaf module that runs (as in `LayerCall`), or dotted path of the innermost
            container, "" for the model itself.
        kind: class name of that module.
        in_leaf: whether it is a leaf module, whose call a `LayerCall` reports too.
        function: the operator, such as `torch.ops.aten.convolution.default`.
        arguments, keywords: what `run` will give it.
    """

    name: str
    kind: str
    in_leaf: bool
    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self) -> Any:
        return self.function(*self.arguments, **self.keywords)


class Trace:
    """All that a model computes, as modules and as operators; a context manager.

    Functional calls (`F.relu`, `x += y`) reach no hook, but they are operators like any other. Whatever the
    callbacks compute themselves is not traced.

    Args:
        on_start, on_end: called around each forward pass with the model's arguments, and with what it
            returned. A forward pass that raises has no end; its successor starts afresh.
        on_layer: called after each call of a leaf module.
        on_operator: called in place of each operator; runs it and returns its output.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_start: Callable[[Any], None],
        on_layer: Callable[[LayerCall], None],
        on_operator: Callable[[OperatorCall], Any],
        on_end: Callable[[Any], None],
    ) -> None:
        self._model = model
        self._on_start = on_start
        self._on_layer = on_layer
        self._on_operator = on_operator
        self._on_end = on_end
        self._scope: list[tuple[str, str, bool]] = []
        self._paused = False
        self._operators = _Operators(self)

    def __enter__(self) -> "Trace":
        leaves = leaf_modules(self._model)
        self._handles = [self._model.register_forward_pre_hook(self._start, with_kwargs=True)]
        for name, module in self._model.named_modules():
            leaf = next(module.children(), None) is None
            label = (name or type(module).__name__) if leaf else name
            self._handles.append(module.register_forward_pre_hook(self._enter(label, leaf)))
        # Hooks run in the order of registration: a leaf's report comes before its scope is left.
        self._watch = Watch(self._model, self._layer, modules=leaves)
        for module in self._model.modules():
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._handles.append(self._model.register_forward_hook(self._end))
        self._operators.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._operators.__exit__(*exception)
        self._watch.close()
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        self._scope.clear()
        self._call(self._on_start, (arguments, keywords))

    def _enter(self, name: str, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._scope.append((name, type(module).__name__, leaf))

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._scope:  # empty when `on_start` raised
            self._scope.pop()

    def _layer(self, call: LayerCall) -> None:
        self._call(self._on_layer, call)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._call(self._on_end, output)

    def _call(self, callback: Callable[[Any], None], value: Any) -> None:
        self._paused = True
        try:
            callback(value)
        finally:
            self._paused = False

    def operator(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not self._scope or self._paused:
            return function(*arguments, **keywords)
        name, kind, leaf = self._scope[-1]
        label = self._watch.label(name) if leaf else name
        return self._on_operator(OperatorCall(label, kind, leaf, function, arguments, keywords))


class _Operators(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if torch.is_inference_mode_enabled() and function._can_decompose():
            # Inference mode hands over conv2d and linear as they are; elsewhere PyTorch takes them apart
            # first.
            with self:
                return function.decompose(*arguments, **keywords)
        return self._trace.operator(function, arguments, keywords)


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill a stretch of memory, in whatever order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True
