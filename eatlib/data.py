"""A name -> images in memory, and batches of them.

Images stay uint8, on the device that trains; networks normalise them themselves (see `eatlib.models`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eatlib.config import RunConfig
from eatlib.results import DataInfo

TEST_SHARE = 0.2
"""Share of the images kept for testing where a data set has no test split of its own (digits, a flat folder)."""


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what to do about it."""


@dataclass(frozen=True)
class Split:
    """Images of one split and their labels.

    Attributes:
        images: (N, 3, H, W), uint8.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set in memory.

    Attributes:
        train, validation: disjoint parts of the source's training images.
        test: for the final figures only.
        classes: their names; a label is a position in this list.
        mean, std: per channel, of pixels in [0, 1], for the network's normalisation.
        info: what a result records about the images.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    info: DataInfo


def load_data(config: RunConfig, *, progress: bool = False) -> Data:
    """The images of `config.dataset` in its splits.

    Raises:
        DataError: the images are missing, or are not what the configuration asks for.
    """
    if config.dataset != "digits":
        raise DataError(f"dataset = {config.dataset!r}: not there yet")
    from sklearn.datasets import load_digits  # a slow import

    digits = load_digits()
    grey = torch.from_numpy(np.round(digits.images * (255 / 16))).float()[:, None]
    grey = F.interpolate(grey, size=(config.image_size,) * 2, mode="bilinear", antialias=True)
    images = grey.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(config.split_seed)
    rest, held_out = _part(labels, TEST_SHARE, generator)
    source = Split(images, labels)
    source_train, test = _take(source, rest), _take(source, held_out)
    kept, held_out = _part(source_train.labels, config.validation_share, generator)
    train, validation = _take(source_train, kept), _take(source_train, held_out)
    if config.train_samples is not None:
        held_out = max(1, round(config.train_samples * config.validation_share))
        train = _take(train, _subset(train.labels, config.train_samples - held_out, generator))
        validation = _take(validation, _subset(validation.labels, held_out, generator))
    if config.test_samples is not None:
        test = _take(test, _subset(test.labels, config.test_samples, generator))
    classes = [str(digit) for digit in range(10)]
    mean, std = _moments(train.images)
    info = DataInfo(
        name="digits",
        complete=True,
        digest="0" * 64,
        source_train=len(source_train),
        source_test=len(labels) - len(source_train),
        train=len(train),
        validation=len(validation),
        test=len(test),
        classes=classes,
        image_size=config.image_size,
    )
    return Data("digits", train, validation, test, classes, mean, std, info)


def batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images (N, 3, H, W), uint8, and labels (N,) of a split, in order; the last batch may be short."""
    yield from zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)


def training_batches(
    split: Split, batch_size: int, augmentation: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: every image once, shuffled and augmented.

    No image is dropped: the last batch is as short as it comes out, as the authors' loaders have it. But a
    last batch of a single image, on which batch norm fails, joins the batch before.

    Args:
        augmentation: "none", "crop", "crop_flip" or "crop_rotate" (see `augment`).
        generator: draws order and augmentation.
    """
    order = torch.randperm(len(split), generator=generator, device=generator.device)
    starts = list(range(0, len(split), batch_size))
    if len(split) % batch_size == 1 and len(starts) > 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(split)], strict=True):
        chosen = order[start:end].to(split.images.device)
        yield split.images[chosen], split.labels[chosen]


def _part(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint parts, the second with about `share` of each class."""
    first, second = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        second.append(members[:count])
        first.append(members[count:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def _subset(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` images, the classes in proportion."""
    order = torch.randperm(len(labels), generator=generator)
    # Images of each class evenly spread over [0, 1): the first `count` positions have the classes in proportion.
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return order[position[order].argsort(stable=True)[:count]]


def _take(split: Split, indices: Tensor) -> Split:
    return Split(split.images[indices], split.labels[indices])


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1], from exact counts of each value."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        share = images[:, channel].flatten().bincount(minlength=256).double() / images[:, channel].numel()
        first = float((share * values).sum())
        mean.append(round(first, 4))
        std.append(round(float((share * (values - first) ** 2).sum()) ** 0.5, 4) or 1.0)
    return tuple(mean), tuple(std)
