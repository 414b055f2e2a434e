"""Thresholds after training: small activations become zeros, so that a network fires less without being trained again.

FATReLU (Kurtz et al., ICML 2020): behind a ReLU, what is at most t becomes 0. Each call of a ReLU has a t of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eatlib.data import Split
from eatlib.penalties import ZERO_FUNCTIONS
from eatlib.training import predict


@contextmanager
def thresholded(model: nn.Module, values: Sequence[float]) -> Iterator[None]:
    """While entered, what the model's ReLUs (and ReLU6) let through becomes 0 up to a threshold, as a report sees.

    They may be modules, reused ones too, or functional calls. Other models stay as they are.

    Args:
        values: a threshold for each ReLU call of a forward pass, in their order; ValueError if there are more or fewer.
    """
    mode = _Thresholds([*values])
    with model.register_forward_pre_hook(mode.start), model.register_forward_hook(mode.end, always_call=True), mode:
        yield


def share_thresholds(model: nn.Module, images: Tensor, share: float) -> list[float]:
    """Thresholds that make zeros of one share of every ReLU's non-zero outputs, when those before have theirs already.

    Args:
        images: one batch (N, ...) to find them on.
        share: from 0, no threshold, to 1, silence.
    """
    mode = _Thresholds([], share)
    with torch.no_grad(), model.register_forward_pre_hook(mode.start), mode:
        model(images)
    return mode.values


def find_thresholds(
    model: nn.Module, validation: Split, losses: Sequence[float], *, step: float = 0.02
) -> dict[float, list[float]]:
    """For each loss of accuracy, the thresholds of the largest share that costs no more of it.

    `share_thresholds` of the first 512 images are tried, in steps, until the largest loss is passed. Leaves the model
    in evaluation mode; ValueError: it calls no ReLU.

    Args:
        losses: of accuracy on the validation images, such as 0.01 for one point.
    """

    def accuracy(values: list[float]) -> float:
        with thresholded(model, values):
            logits = predict(model, validation)
        return (logits.argmax(1) == validation.labels.to(logits.device)).double().mean().item()

    images = validation.images[:512].to(next(model.parameters()).device)
    if not (values := share_thresholds(model.eval(), images, 0)):
        raise ValueError("the model calls no ReLU or ReLU6, behind which a threshold could be")
    whole, found = accuracy(values), dict.fromkeys(losses, values)
    for index in range(1, round(1 / step)):
        values = share_thresholds(model, images, index * step)
        lost = whole - accuracy(values)
        found |= {loss: values for loss in losses if lost <= loss + 1e-9}
        if lost > max(losses) + 1e-9:
            break
    return found


class _Thresholds(TorchFunctionMode):
    """Applies a threshold to each ReLU call of a model's forward pass or, with a share, finds it first."""

    def __init__(self, values: list[float], share: float | None = None) -> None:
        super().__init__()
        self.values, self._share = values, share
        self._calls: int | None = None  # of a ReLU in this pass; None: the model is not running

    def start(self, *_: object) -> None:
        self._calls = 0

    def end(self, _: nn.Module, __: object, output: object) -> None:
        calls, self._calls = self._calls, None
        if output is not None and calls != len(self.values):  # None: it raised
            raise ValueError(f"values: {len(self.values)} thresholds for the model's {calls} calls of a ReLU")

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        relu6 = function is F.hardtanh and (keywords or {}).get("min_val") == 0  # which nn.ReLU6 calls
        if self._calls is None or not (relu6 or ZERO_FUNCTIONS.get(function) in ("F.relu", "F.relu6")):
            return output
        if self._share is not None:
            positive = output[output > 0]
            count = round(self._share * positive.numel())
            self.values.append(positive.kthvalue(count).values.item() if count else 0.0)
        self._calls += 1
        threshold = self.values[self._calls - 1] if self._calls <= len(self.values) else 0.0
        # In place, as the ReLU itself may be; where there are gradients, it needs its own output for them.
        return F.threshold(output, threshold, 0.0, inplace=not torch.is_grad_enabled())
