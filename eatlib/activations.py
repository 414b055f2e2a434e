"""The one place that sees what each layer computes: every forward hook of the library is set here."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
        self._on_start = on_start
        self._on_end = on_end
        self._calls: Counter[str] = Counter()
        leaves = leaf_modules(model)
        wanted = leaves if modules is None else {name: leaves[name] for name in modules}
        self._handles = [model.register_forward_pre_hook(self._start)]
        self._handles += [module.register_forward_hook(self._hook(name)) for name, module in wanted.items()]
        self._handles += [model.register_forward_hook(self._end)]

    def _start(self, module: nn.Module, inputs: Any) -> None:
        self._calls.clear()
        if self._on_start is not None:
            self._on_start()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._on_end is not None:
            self._on_end()

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
            self._calls[name] += 1
            count = self._calls[name]
            label = name if count == 1 else f"{name}#{count}"
            return self._on_call(LayerCall(label, type(module).__name__, module, inputs, output))

        return hook

    def close(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
