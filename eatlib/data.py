"""The files of a data set -> its images in memory, decoded once, in their splits -> augmented batches of them.

`eatlib.sources` says where a data set lies and what is in it; data/README.md, how to add one's own.
"""

import hashlib
import math
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from eatlib.config import RunConfig
from eatlib.results import ROOT, DataInfo
from eatlib.sources import SOURCES, DataError, Listing, Source, about

TEST_SHARE = 0.2
"""Share of the images kept for testing where the source has no test split of its own."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What a file may hold, whatever it is called: Pillow knows others too, of which PostScript runs as a program."""

PADDING = 4
"""Black pixels around the image that a random crop may reach into, on each side (the authors' code)."""

ROTATION = 15.0
"""Largest random rotation, in degrees to either side. The paper names the rotation, not its size."""


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

    train: Split
    validation: Split
    test: Split
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    info: DataInfo


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
    decoded, complete = _load(config, progress)
    groups, seed = decoded.groups, config.split_seed
    everything, test = decoded[: len(groups)], decoded[len(groups) :]
    if not len(test):
        kept, held_out = _part(everything.labels, groups, TEST_SHARE, seed)
        everything, test, groups = everything[kept], everything[held_out], groups[kept]
    facts = {"source_train": len(everything), "source_test": len(test)}
    kept, held_out = _part(everything.labels, groups, config.validation_share, seed)
    if config.train_samples is not None:
        wanted = config.train_samples
        if not 3 <= wanted <= len(everything):
            raise DataError(f"train_samples = {wanted}: {config.dataset} allows 3 to {len(everything)}")
        share = max(1, round(wanted * config.validation_share))
        share = max(wanted - len(kept), min(share, len(held_out)))
        kept = kept[_subset(everything.labels[kept], wanted - share, seed)]
        held_out = held_out[_subset(everything.labels[held_out], share, seed)]
    if len(kept) < 2 or not len(held_out):
        left = f"{len(kept)} images to train on and {len(held_out)} to validate on"
        raise DataError(f"validation_share = {config.validation_share:g}: leaves {left}, of {config.dataset}")
    if config.test_samples is not None:
        if config.test_samples > len(test):
            raise DataError(f"test_samples = {config.test_samples}: {config.dataset} allows 1 to {len(test)}")
        test = test[_subset(test.labels, config.test_samples, seed)]
    splits = {"train": everything[kept], "validation": everything[held_out], "test": test}
    facts |= {name: len(split) for name, split in splits.items()}
    facts |= {"name": config.dataset, "complete": complete, "digest": decoded.digest}
    info = DataInfo(**facts, classes=decoded.classes, image_size=config.image_size)
    mean, std = SOURCES[config.dataset.partition(":")[0]].moments or _moments(splits["train"].images)
    return Data(**splits, classes=decoded.classes, mean=mean, std=std, info=info)


@dataclass(frozen=True)
class Decoded(Split):
    """All images of a source, those for training first; `groups` and `classes` are as in a `Listing`.

    The digest is a SHA-256 over what was decoded, before resizing (see data/README.md).
    """

    groups: Tensor
    classes: list[str]
    digest: str


def _load(config: RunConfig, progress: bool) -> tuple[Decoded, bool]:
    """The images of `config.dataset`, downloaded if need be, and whether they are complete."""
    name, _, path = config.dataset.partition(":")
    source = SOURCES[name]
    root = Path(config.data_dir or os.environ.get("EATLIB_DATA") or ROOT / "data").expanduser()
    paths = [Path(path or root) / part for part in source.paths]
    cache = root / ".cache" / f"{quote(config.dataset, safe='')}-{config.image_size}.pt"
    advice = f". What must lie where: data/README.md, whose data/ is {root} here (data_dir, or EATLIB_DATA)"
    advice += ". To fetch what is absent: download: true (--download)" if source.archives else ""
    with about(config.dataset, advice):
        if config.download and not all(part.exists() for part in paths):
            from torchvision.datasets.utils import download_and_extract_archive  # a slow import

            for archive, server, md5 in source.archives:
                target = root / archive
                download_and_extract_archive(server + target.name, str(target.parent), md5=md5)
        decoded = _cached(source, paths, cache, config.image_size, progress)
        train, test = len(decoded.groups), len(decoded) - len(decoded.groups)
        whole = source.train_images or train, source.test_images or test
        complete = (train, test) == whole and source.digest in (None, decoded.digest)
        if not train or (whole[1] and not test) or not (complete or config.allow_partial):
            found = f"{train} training and {test} test images found (digest {decoded.digest})"
            wanted = f"the complete set has {whole[0]} and {whole[1]} (digest {source.digest or 'any'})"
            raise DataError(f"{found}, {wanted}. Set allow_partial: true to use them as they are, labelled partial")
        return decoded, complete


def _cached(source: Source, paths: list[Path], cache: Path, size: int, progress: bool) -> Decoded:
    """The images from the cache, if it was made from these files, else decoded now and written to it."""
    made_from = ["version 3", _state(paths)]  # a later version, once decoding changes
    with suppress(Exception):  # none is there, or a damaged one, which can raise anything
        found = torch.load(cache, mmap=True)  # tensors and plain values alone: no code is run
        if found["made_from"] == made_from:
            return Decoded(**found["decoded"])
    decoded = _decode(source.read(*paths), size, progress)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:  # other processes may write the same now
            torch.save({"made_from": made_from, "decoded": vars(decoded)}, f"{folder}/whole")
            Path(folder, "whole").replace(cache)
    except (OSError, RuntimeError) as error:  # a full disk, say: the images are in memory all the same
        warnings.warn(f"{cache}: not written ({error}); images are decoded anew in each run", stacklevel=2)
    return decoded


def _state(paths: list[Path]) -> str:
    """Changes whenever a file in there is added, removed or written: a hash of names, sizes and times."""
    lines = []
    for number, top in enumerate(paths):
        for name in chain([""], _files(top)):
            if "/." not in name:  # what is hidden is no data
                found = os.stat(f"{top}{name}")  # noqa: PTH116  pathlib is slow for CelebA's 200,000 files
                if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                    raise DataError(f"{top}{name}: not a regular file")  # reading a pipe could wait for ever
                lines.append(f"{number}{name}\t{found.st_size}\t{found.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def _files(top: Path) -> Iterator[str]:
    """The files in a folder and all below that is not hidden, links followed, without `top` itself in their names."""
    reached: dict[str, str] = {}
    for folder, below, names in os.walk(top, followlinks=True):
        below[:] = [name for name in below if name[0] != "."]
        first = reached.setdefault(os.path.realpath(folder), folder)
        if first != folder:  # links that lead in circles could be followed for ever
            raise DataError(f"{folder}: the same folder as {first}")
        yield from (f"{folder}/{name}".removeprefix(str(top)) for name in names)


def _decode(listing: Listing, size: int, progress: bool) -> Decoded:
    """Decode all images, take their digest, and resize them to squares of `size` pixels."""
    parts = [part for part in (listing.train, listing.test) if part]
    items = [(image, int(label)) for part in parts for image, label in zip(*part, strict=True)]
    labels = [label for _, label in items]
    if labels and not 0 <= min(labels) <= max(labels) < len(listing.classes):
        raise DataError(f"classes {min(labels)} to {max(labels)} found; allowed are 0 to {len(listing.classes) - 1}")
    label_bytes = 1 if len(listing.classes) <= 256 else 4
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)

    def place(index: int) -> bytes:
        """Put one image where it belongs, resized; what the digest takes of it."""
        image, label = items[index]
        if not isinstance(image, np.ndarray):
            with about(image), Image.open(image, formats=FORMATS) as found:
                if found.mode[0] in "IF":  # Pillow would clip them
                    raise DataError(f"pixels of type {found.mode}; convert it to 8 bits a channel")
                image = np.asarray(found.convert("RGB"))
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise DataError(f"an image is {image.dtype} {image.shape}; it must be uint8 (height, width, 3)")
        original = label.to_bytes(label_bytes, "little") + image.transpose(2, 0, 1).tobytes()
        if image.shape[:2] != (size, size):
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        images[index].numpy()[:] = image.transpose(2, 0, 1)
        return original

    digest = hashlib.sha256()
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # by far too large to be decoded
        for start in tqdm(range(0, len(items), 1000), desc="decoding", disable=not progress):
            for original in pool.map(place, range(start, min(start + 1000, len(items)))):  # lest decoded ones pile up
                digest.update(original)
    groups = torch.tensor(range(len(listing.train[1])) if listing.groups is None else listing.groups)
    return Decoded(images, torch.tensor(labels), groups, [*map(str, listing.classes)], digest.hexdigest())


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


# --- batches, augmented on the device that trains -----------------------------------------------------------------


def count_batches(count: int, batch_size: int) -> int:
    """How many batches `training_batches` makes of so many images."""
    return max(1, -(-(count - 1) // batch_size))  # a last image of its own joins the batch before


def training_batches(
    split: Split, batch_size: int, augmentation: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, as (images, labels) on the split's device: every image once, shuffled and augmented.

    No image is dropped: the last batch is as short as it comes out, as with the authors' loaders. But a last
    batch of a single image, on which batch norm can fail, joins the batch before.

    Args:
        augmentation: as for `augment`.
        generator: draws order and augmentation; one on the CPU draws the same for every device.
    """
    device, count = split.images.device, len(split)
    order = torch.randperm(count, generator=generator, device=generator.device).to(device)
    # Drawn and moved once an epoch: moving small tensors in each step makes an accelerator wait.
    draws = {name: drawn.to(device) for name, drawn in draw(count, augmentation, generator).items()}
    starts = [batch_size * number for number in range(count_batches(count, batch_size))]
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        chosen = order[start:end]
        yield augment(split.images[chosen], {name: d[start:end] for name, d in draws.items()}), split.labels[chosen]


def draw(count: int, augmentation: str, generator: torch.Generator) -> dict[str, Tensor]:
    """What `augment` is to do to each of `count` images, on the generator's device.

    Args:
        augmentation: "none"; "crop", each offset of the image within `PADDING` black pixels being as likely;
            "crop_flip", then mirrored left to right or not (the authors' code); "crop_rotate", then turned by
            up to `ROTATION` degrees (the paper's text).
    """
    where = {"generator": generator, "device": generator.device}
    draws = {}
    if augmentation != "none":
        draws = {side: torch.randint(2 * PADDING + 1, (count,), **where) for side in ("top", "left")}
    if augmentation == "crop_flip":
        draws["flip"] = torch.randint(2, (count,), **where).bool()
    elif augmentation == "crop_rotate":
        draws["angle"] = (2 * torch.rand(count, **where) - 1) * math.radians(ROTATION)
    return draws


def augment(images: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Crop, mirror and turn (N, C, H, W) uint8 images as drawn; rotation is bilinear, black beyond the edge."""
    if "top" in draws:
        windows = F.pad(images, (PADDING,) * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
        images = windows[torch.arange(len(images), device=images.device), :, draws["top"], draws["left"]]
    if "flip" in draws:
        images = torch.where(draws["flip"][:, None, None, None], images.flip(3), images)
    if "angle" in draws:
        cos, sin, zero = draws["angle"].cos(), draws["angle"].sin(), torch.zeros_like(draws["angle"])
        matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        images = F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)
    return images
