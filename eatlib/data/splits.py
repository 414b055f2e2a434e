"""Images in memory, in a training, a validation and a test split: stratified, and the same for every run."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eatlib.config import RunConfig
from eatlib.data.cache import load_images
from eatlib.data.sources import DataError
from eatlib.results import ROOT, DataInfo

TEST_SHARE = 0.2
"""Share of the images kept for testing where the source has no test split of its own."""


@dataclass(frozen=True)
class Split:
    """Images of one split and their labels.

    Attributes:
        images: (N, 3, H, W), uint8; networks normalise them themselves (see `eatlib.models`).
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | slice) -> "Split":
        return Split(self.images[indices], self.labels[indices])

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

    def class_counts(self) -> dict[str, list[int]]:
        """Images of each class, by split."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split.labels.bincount(minlength=len(self.classes)).tolist() for name, split in splits.items()}


def load_data(config: RunConfig, *, progress: bool = False) -> Data:
    """The images of `config.dataset`, resized, in their splits.

    The validation split is carved out of the training images first, stratified and by `split_seed`.
    `train_samples` then thins both: it bounds the images trained on and validated together, and a reduced
    study never trains on what the whole one validates on.

    Args:
        progress: show a progress bar while images are decoded.

    Raises:
        DataError: the images are missing, damaged, incomplete without `allow_partial`, or too few.
    """
    source, decoded, complete = load_images(config, data_root(config), progress)
    images, groups, seed = Split(decoded.images, decoded.labels), decoded.groups, config.split_seed
    everything, test = images[: len(groups)], images[len(groups) :]
    if not len(test):
        kept, held_out = _part(everything.labels, groups, TEST_SHARE, seed)
        everything, test, groups = everything[kept], everything[held_out], groups[kept]
    facts = {"source_train": len(everything), "source_test": len(test), "classes": decoded.classes}
    kept, held_out = _part(everything.labels, groups, config.validation_share, seed)
    if not len(held_out):
        raise DataError(f"{config.dataset}: too few images for a validation split ({len(everything)})")
    if config.train_samples is not None:
        wanted = config.train_samples
        if not 3 <= wanted <= len(everything):
            raise DataError(f"train_samples = {wanted}: {config.dataset} allows 3 to {len(everything)}")
        share = max(1, round(wanted * config.validation_share))
        share = max(wanted - len(kept), min(share, len(held_out)))
        kept = kept[_subset(everything.labels[kept], wanted - share, seed)]
        held_out = held_out[_subset(everything.labels[held_out], share, seed)]
    if len(kept) < 2:
        raise DataError(f"validation_share = {config.validation_share:g}: leaves {len(kept)} images to train on")
    if config.test_samples is not None:
        if config.test_samples > len(test):
            raise DataError(f"test_samples = {config.test_samples}: {config.dataset} allows 1 to {len(test)}")
        test = test[_subset(test.labels, config.test_samples, seed)]
    splits = {"train": everything[kept], "validation": everything[held_out], "test": test}
    facts |= {name: len(split) for name, split in splits.items()}
    info = DataInfo(
        name=config.dataset, digest=decoded.digest, complete=complete, image_size=config.image_size, **facts
    )
    mean, std = source.moments or _moments(splits["train"].images)
    return Data(config.dataset, **splits, classes=decoded.classes, mean=mean, std=std, info=info)


def data_root(config: RunConfig) -> Path:
    """`data_dir`, else `$EATLIB_DATA`, else the repository's data/ folder."""
    chosen = config.data_dir or os.environ.get("EATLIB_DATA") or ROOT / "data"
    return Path(chosen).expanduser()


def _part(labels: Tensor, groups: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint parts, the second with about `share` of each class, in random order.

    Images of one group stay together. A class with two groups or more is in both parts.
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = labels == label
        units = groups[members].unique()
        count = min(max(1, round(share * len(units))), len(units) - 1)
        chosen = units[torch.randperm(len(units), generator=generator)[:count]]
        second |= members & torch.isin(groups, chosen)
    held_out = second.nonzero().flatten()
    held_out = held_out[torch.randperm(len(held_out), generator=generator)]
    return (~second).nonzero().flatten(), held_out


def _subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of `count` images, classes in proportion; a smaller subset is a part of each larger one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # With each class's images spread evenly over [0, 1), any first stretch has the classes in proportion.
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return order[position[order].argsort(stable=True)[:count]]


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1], from exact counts of each value."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = (share * values).sum(1)
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) or 1.0 for value in std.tolist())
