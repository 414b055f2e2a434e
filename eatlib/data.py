"""A name -> images in memory, and augmented batches of them.

Images are decoded once and kept beside the data in one memory-mapped file. They stay uint8, on the device
that trains; networks normalise them themselves (see `eatlib.models`). Which files each data set needs, and
where: data/README.md.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from eatlib.config import RunConfig
from eatlib.results import ROOT, DataInfo

CACHE_VERSION = 1
"""Raised when decoding changes, so that older caches are made anew."""

TEST_SHARE = 0.2
"""Share of the images kept for testing where the source has no test split of its own."""

PADDING = 4
"""Black pixels around the image that a random crop may reach into, on each side (the authors' code)."""

ROTATION = 15.0
"""Largest random rotation, in degrees to either side. The paper names the rotation, not its size."""


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

    def __getitem__(self, indices: Tensor) -> "Split":
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


# ---------------------------------------------------------------------------------------------- batches


def batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images (N, 3, H, W), uint8, and labels (N,) of a split, in order; the last batch may be short."""
    yield from zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)


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
    order = torch.randperm(len(split), generator=generator, device=generator.device).to(split.images.device)
    starts = list(range(0, len(split), batch_size))
    if len(split) % batch_size == 1 and len(starts) > 1:
        starts.pop()
    # Drawn and moved once an epoch: moving small tensors in each step makes an accelerator wait.
    draws = _draw(len(split), augmentation, generator, split.images.device)
    for start, end in zip(starts, [*starts[1:], len(split)], strict=True):
        chosen = order[start:end]
        drawn = {name: values[start:end] for name, values in draws.items()}
        yield _augment(split.images[chosen], drawn), split.labels[chosen]


def augment(images: Tensor, augmentation: str, generator: torch.Generator) -> Tensor:
    """Augment a batch on its device, with a draw of its own for each image.

    Args:
        images: (N, C, H, W), uint8.
        augmentation: "none"; "crop", each offset of the image within `PADDING` black pixels being as likely;
            "crop_flip", then mirrored left to right or not (the authors' code); "crop_rotate", then turned by
            up to `ROTATION` degrees, bilinear, black beyond the edge (the paper's text).
        generator: may be on another device than the images.

    Returns:
        A batch of the same shape and type.
    """
    return _augment(images, _draw(len(images), augmentation, generator, images.device))


def _draw(count: int, augmentation: str, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """What `_augment` does to each of `count` images, on `device`."""

    def integers(choices: int) -> Tensor:
        return torch.randint(choices, (count,), generator=generator, device=generator.device).to(device)

    if augmentation == "none":
        return {}
    if augmentation not in ("crop", "crop_flip", "crop_rotate"):
        raise ValueError(f"augmentation = {augmentation!r}: must be none, crop, crop_flip or crop_rotate")
    draws = {"top": integers(2 * PADDING + 1), "left": integers(2 * PADDING + 1)}
    if augmentation == "crop_flip":
        draws["flip"] = integers(2).bool()
    elif augmentation == "crop_rotate":
        turn = torch.rand(count, generator=generator, device=generator.device).to(device)
        draws["angle"] = (2 * turn - 1) * math.radians(ROTATION)
    return draws


def _augment(images: Tensor, draws: dict[str, Tensor]) -> Tensor:
    if not draws:
        return images
    height, width = images.shape[2:]
    windows = F.pad(images, (PADDING,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    images = windows[torch.arange(len(images), device=images.device), :, draws["top"], draws["left"]]
    if "flip" in draws:
        images = torch.where(draws["flip"][:, None, None, None], images.flip(3), images)
    if "angle" in draws:
        images = _rotate(images, draws["angle"])
    return images


def _rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Turn each of the (N, C, H, W) square images by its angle, in radians."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def image_grid(split: Split, classes: int, rows: int = 4) -> np.ndarray:
    """The first images of each class, one column a class: (height, width, 3), uint8, for `imshow`."""
    side = split.images.shape[-1]
    cells = torch.zeros(rows, classes, 3, side, side, dtype=torch.uint8)
    for label in range(classes):
        members = (split.labels == label).nonzero().flatten()[:rows]
        cells[: len(members), label] = split.images[members].cpu()
    padded = F.pad(cells, (1, 1, 1, 1), value=255)
    return padded.permute(0, 3, 1, 4, 2).reshape(rows * (side + 2), classes * (side + 2), 3).numpy()


# ------------------------------------------------------------------------------------------- loading


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
    assert config.image_size is not None  # the configuration fills it in
    root = data_root(config)
    source = _source(config.dataset, root)
    _fetch(source, root, download=config.download)
    try:
        cached = _load_checked(source, config, root, progress)
    except DataError:
        if not config.download or not source.published:
            raise
        _download(source, root)  # the files are there but damaged, or fewer than there should be
        cached = _load_checked(source, config, root, progress)
    everything, test = cached.train, cached.test

    seed = config.split_seed
    if test is None:
        kept, held_out = _part(everything.labels, TEST_SHARE, seed)
        test = everything[held_out]
        everything = everything[kept]
    source_counts = {"source_train": len(everything), "source_test": len(test)}
    kept, held_out = _part(everything.labels, config.validation_share, seed, cached.groups)
    if not len(held_out):
        raise DataError(f"{config.dataset}: too few images for a validation split ({len(everything)})")
    if config.train_samples is not None:
        wanted = config.train_samples
        if not 3 <= wanted <= len(everything):
            allowed = f"{config.dataset} allows 3 to {len(everything)}"
            raise DataError(f"train_samples = {wanted}: {allowed}")
        share = max(1, round(wanted * config.validation_share))
        share = max(wanted - len(kept), min(share, len(held_out)))
        kept = kept[_subset(everything.labels[kept], wanted - share, seed)]
        held_out = held_out[_subset(everything.labels[held_out], share, seed)]
    if len(kept) < 2:
        raise DataError(f"validation_share = {config.validation_share:g}: leaves {len(kept)} images to train on")
    if config.test_samples is not None:
        if config.test_samples > len(test):
            allowed = f"{config.dataset} allows 1 to {len(test)}"
            raise DataError(f"test_samples = {config.test_samples}: {allowed}")
        test = test[_subset(test.labels, config.test_samples, seed)]
    train, validation = everything[kept], everything[held_out]
    mean, std = source.moments or _moments(train.images)
    info = DataInfo(
        name=config.dataset,
        complete=source.is_complete(len(cached.train), len(cached.test or ()), cached.digest),
        digest=cached.digest,
        **source_counts,
        train=len(train),
        validation=len(validation),
        test=len(test),
        classes=cached.classes,
        image_size=config.image_size,
    )
    return Data(config.dataset, train, validation, test, cached.classes, mean, std, info)


def data_root(config: RunConfig) -> Path:
    """`data_dir`, else `$EATLIB_DATA`, else the repository's data/ folder."""
    chosen = config.data_dir or os.environ.get("EATLIB_DATA") or ROOT / "data"
    return Path(chosen).expanduser()


def _part(labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices of two disjoint parts, the second with about `share` of each class, in random order.

    Images of one group stay together. A class with two groups or more is in both parts.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(labels)) if groups is None else groups
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
    mean, std = [], []
    for channel in images.unbind(1):
        share = channel.flatten().bincount(minlength=256).double() / channel.numel()
        first = float((share * values).sum())
        mean.append(round(first, 4))
        std.append(round(float((share * (values - first) ** 2).sum()) ** 0.5, 4) or 1.0)
    return tuple(mean), tuple(std)


# ------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Images:
    """One split as it lies on disk: files, or (H, W, 3) uint8 pixels, and a label each."""

    items: Sequence[Path | np.ndarray]
    labels: list[int]


@dataclass(frozen=True)
class _Listing:
    """What a source holds; `groups` numbers the training images that belong together."""

    classes: list[str]
    train: _Images
    test: _Images | None
    groups: list[int] | None = None


class _Source:
    """One data set on disk. torchvision, a slow import, is only needed to download and to decode."""

    moments: ClassVar[tuple[tuple[float, ...], tuple[float, ...]] | None] = None
    published: ClassVar[tuple[int, int] | None] = None
    """Numbers of training and test images of the complete set."""

    def __init__(self, name: str, paths: list[Path]) -> None:
        self.name = name
        self.paths = paths  # the files and folders that must be there; all that is read lies in them

    def state(self) -> str:
        """Changes whenever a file is added, removed or written: a hash of their names, sizes and times."""

        def line(name: str, stat: os.stat_result) -> str:
            return f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}"

        def below(folder: Path | str, prefix: str) -> Iterator[str]:
            with os.scandir(folder) as entries:  # CelebA has 200,000 files: pathlib would take seconds
                for entry in entries:
                    name = f"{prefix}/{entry.name}"
                    if entry.is_dir():
                        yield from below(entry.path, name)
                    else:
                        yield line(name, entry.stat())

        lines: list[str] = []
        for path in self.paths:
            lines += below(path, path.name) if path.is_dir() else [line(path.name, path.stat())]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()

    def is_complete(self, train: int, test: int, digest: str | None) -> bool:
        """By the published counts; digest None: not known yet."""
        return self.published in (None, (train, test))

    def by_hand(self) -> str:
        """What a person does to get the files."""
        raise NotImplementedError

    def download(self) -> None:
        raise NotImplementedError

    def read(self) -> _Listing:
        raise NotImplementedError


class _Digits(_Source):
    """scikit-learn's 1,797 digits, 8x8, in 17 shades of grey."""

    def __init__(self) -> None:
        super().__init__("digits", [])

    def state(self) -> str:
        return f"scikit-learn {metadata.version('scikit-learn')}"

    def read(self) -> _Listing:
        from sklearn.datasets import load_digits  # a slow import

        digits = load_digits()
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
        images = _Images(np.repeat(grey[..., None], 3, axis=3), digits.target.tolist())
        return _Listing([str(digit) for digit in range(10)], images, None)


class _Cifar10(_Source):
    published = (50_000, 10_000)
    moments = ((0.4914, 0.4823, 0.4468), (0.2470, 0.2435, 0.2616))
    # `cat data_batch_*.bin test_batch.bin | sha256sum` in the published binary version gives the same.
    digest = "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522"

    def __init__(self, root: Path) -> None:
        super().__init__("cifar10", [root / "cifar-10-batches-py"])
        self.root = root

    def is_complete(self, train: int, test: int, digest: str | None) -> bool:
        return super().is_complete(train, test, digest) and digest in (None, self.digest)

    def by_hand(self) -> str:
        return (
            f"unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {self.root}, "
            f"which makes {self.paths[0]}"
        )

    def download(self) -> None:
        from torchvision.datasets import CIFAR10

        CIFAR10(self.root, download=True)

    def read(self) -> _Listing:
        from torchvision.datasets import CIFAR10

        folder = self.paths[0]

        class Present(CIFAR10):
            """The batches that are there, judged by what is in them rather than by the files' checksums."""

            train_list: ClassVar = [item for item in CIFAR10.train_list if (folder / item[0]).exists()]

            def _check_integrity(self) -> bool:
                return True

        try:
            parts = [Present(self.root, train=train) for train in (True, False)]
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(
                f"{folder}: torchvision cannot read it ({type(error).__name__}: {error}); {self.by_hand()}"
            ) from error
        return _Listing(parts[0].classes, *(_Images(part.data, part.targets) for part in parts))


class _Gtsrb(_Source):
    """The *final* training set; torchvision's own train split is an earlier one of 26,640 images."""

    published = (39_209, 12_630)
    moments = ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669))
    url = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
    training_zip = ("GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3")
    classes: ClassVar = [
        *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
        "end of speed limit 80",
        "speed limit 100",
        "speed limit 120",
        "no overtaking",
        "no overtaking by trucks",
        "priority at next crossing",
        "priority road",
        "give way",
        "stop",
        "no vehicles",
        "no trucks",
        "no entry",
        "danger",
        "bend left",
        "bend right",
        "double bend",
        "uneven road",
        "slippery road",
        "road narrows",
        "road works",
        "traffic signals",
        "pedestrians",
        "children",
        "bicycles",
        "snow",
        "wild animals",
        "end of all limits",
        "right only",
        "left only",
        "straight only",
        "straight or right",
        "straight or left",
        "keep right",
        "keep left",
        "roundabout",
        "end of no overtaking",
        "end of no overtaking by trucks",
    ]

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train = root / "gtsrb/GTSRB/Final_Training/Images"
        self.test = root / "gtsrb/GTSRB/Final_Test/Images"
        self.table = root / "gtsrb/GT-final_test.csv"
        super().__init__("gtsrb", [self.train, self.test, self.table])

    def by_hand(self) -> str:
        return (
            f"unpack {self.training_zip[0]}, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip "
            f"from {self.url} in {self.root / 'gtsrb'}, which makes " + " and ".join(str(path) for path in self.paths)
        )

    def download(self) -> None:
        from torchvision.datasets import GTSRB
        from torchvision.datasets.utils import download_and_extract_archive

        GTSRB(self.root, split="test", download=True)
        name, md5 = self.training_zip
        download_and_extract_archive(self.url + name, str(self.root / "gtsrb"), md5=md5)

    def read(self) -> _Listing:
        import pandas as pd

        train = sorted(self.train.glob("[0-9]*/*.ppm"))
        labels = [int(path.parent.name) for path in train]
        if max(labels, default=0) >= len(self.classes):
            raise DataError(f"{self.train}: class {max(labels)}; allowed are 0 to {len(self.classes) - 1}")
        # The 30 photographs of one sign are its track: 00012_00029.ppm is the last of its class's track 12.
        tracks = [int(path.parent.name) * 100_000 + int(path.name.split("_")[0]) for path in train]
        try:
            table = pd.read_csv(self.table, sep=";").set_index("Filename")["ClassId"]
        except (KeyError, ValueError) as error:
            raise DataError(f"{self.table}: not GTSRB's table of test images ({error})") from error
        table = table[table.index.isin({path.name for path in self.test.iterdir()})]
        test = _Images([self.test / name for name in table.index], table.tolist())
        return _Listing(self.classes, _Images(train, labels), test, tracks)


class _CelebA(_Source):
    """Partitions 0 and 2 of the aligned images; three attributes make the class."""

    published = (162_770, 19_962)
    moments = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    attributes = ("Heavy_Makeup", "Smiling", "Mouth_Slightly_Open")  # from the highest bit of the class down

    def __init__(self, root: Path) -> None:
        self.folder = root / "celeba"
        names = ("img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt")
        super().__init__("celeba", [self.folder / name for name in names])

    def by_hand(self) -> str:
        return (
            "put img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt from "
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (its Google Drive has a daily quota: another "
            f"day may do) into {self.folder} and unpack the first there, which makes {self.paths[0]}"
        )

    def download(self) -> None:
        from torchvision.datasets import CelebA
        from torchvision.datasets.utils import download_file_from_google_drive, extract_archive

        archive = self.folder / "img_align_celeba.zip"
        wanted = {archive.name, *(path.name for path in self.paths[1:])}
        for identifier, md5, name in CelebA.file_list:
            if name in wanted:
                download_file_from_google_drive(identifier, str(self.folder), name, md5)
        extract_archive(str(archive))

    def read(self) -> _Listing:
        import pandas as pd

        images, attributes, partition = self.paths
        try:
            table = pd.read_csv(attributes, sep=r"\s+", skiprows=1)[list(self.attributes)] > 0
            table["partition"] = pd.read_csv(partition, sep=r"\s+", header=None, index_col=0)[1]
        except (KeyError, ValueError) as error:
            raise DataError(f"{attributes}, {partition}: not CelebA's lists ({error})") from error
        table = table[table.index.isin({path.name for path in images.iterdir()})]
        bits = table[list(self.attributes)].astype(int) @ [4, 2, 1]
        splits = []
        for number in (0, 2):
            labels = bits[table["partition"] == number]
            splits.append(_Images([images / name for name in labels.index], labels.tolist()))
        classes = [
            " + ".join(name for bit, name in enumerate(self.attributes) if label >> 2 - bit & 1) or "none"
            for label in range(8)
        ]
        return _Listing(classes, *splits)


class _Folder(_Source):
    """train/CLASS/image and test/CLASS/image, or CLASS/image, of which a part is kept for testing."""

    def __init__(self, path: Path) -> None:
        path = path.expanduser().resolve()
        if not path.is_dir():
            raise DataError(f"dataset = 'folder:{path}': there is no such folder")
        key = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        super().__init__(f"folder-{path.name}-{key}", [path])
        self.path = path

    def read(self) -> _Listing:
        from torchvision.datasets import ImageFolder

        own_split = [(self.path / name).is_dir() for name in ("train", "test")]
        if any(own_split) and not all(own_split):
            raise DataError(f"{self.path}: has only one of the folders train and test; it needs both, or none")
        try:
            parts = [ImageFolder(self.path / name) for name in (("train", "test") if all(own_split) else ("",))]
        except FileNotFoundError as error:
            layout = "images go to CLASS/ or, with a test split of their own, to train/CLASS/ and test/CLASS/"
            raise DataError(f"{self.path}: {error}. {layout}") from error
        if parts[0].classes != parts[-1].classes:
            different = sorted(set(parts[0].classes) ^ set(parts[-1].classes))
            raise DataError(f"{self.path}: only in one of train and test: {', '.join(different)}")
        splits = [_Images([Path(path) for path, _ in part.samples], part.targets) for part in parts]
        return _Listing(parts[0].classes, splits[0], splits[1] if all(own_split) else None)


def _source(dataset: str, root: Path) -> _Source:
    if dataset.startswith("folder:"):
        return _Folder(Path(dataset.removeprefix("folder:")))
    if dataset == "digits":
        return _Digits()
    return {"cifar10": _Cifar10, "gtsrb": _Gtsrb, "celeba": _CelebA}[dataset](root)


def _fetch(source: _Source, root: Path, *, download: bool) -> None:
    """See to it that the source's files are there."""

    def missing() -> list[str]:
        return [str(path) for path in source.paths if not path.exists()]

    if missing() and download:
        _download(source, root)
    if missing():
        raise DataError(
            f"{source.name}: no {', '.join(missing())}. Either set download: true (--download), or by hand: "
            f"{source.by_hand()}. Data elsewhere: set data_dir or EATLIB_DATA"
        )


def _download(source: _Source, root: Path) -> None:
    """Have torchvision fetch, verify and unpack the source; what is whole already is left alone."""
    with _exclusive(root, source.name):
        try:
            source.download()
        except Exception as error:  # torchvision and gdown raise what they please
            raise DataError(
                f"{source.name}: download failed ({type(error).__name__}: {error}). By hand: {source.by_hand()}"
            ) from error


def _require_complete(source: _Source, train: int, test: int, allow_partial: bool, digest: str | None = None) -> None:
    if not train or (not test and source.published):
        raise DataError(f"{source.name}: {train} training and {test} test images found; {source.by_hand()}")
    if allow_partial or source.is_complete(train, test, digest):
        return
    assert source.published is not None
    whole = "{:,} training and {:,} test images".format(*source.published)
    if (train, test) == source.published:
        found = f"{whole} found, but other pixels or labels than the published ones (digest {digest})"
    else:
        found = f"{train:,} training and {test:,} test images found, the complete set has {whole}"
    raise DataError(
        f"{source.name}: {found}. Set allow_partial: true to use them all the same, labelled partial; "
        f"for the complete set, {source.by_hand()}"
    )


# -------------------------------------------------------------------------------- decoding and the cache


@dataclass(frozen=True)
class _Decoded:
    """A source as images in memory."""

    classes: list[str]
    digest: str
    train: Split
    test: Split | None
    groups: Tensor | None


def _load_checked(source: _Source, config: RunConfig, root: Path, progress: bool) -> _Decoded:
    """The decoded images, complete unless the configuration allows otherwise."""
    decoded = _load_source(source, config, root, progress)
    _require_complete(source, len(decoded.train), len(decoded.test or ()), config.allow_partial, decoded.digest)
    return decoded


def _load_source(source: _Source, config: RunConfig, root: Path, progress: bool) -> _Decoded:
    """The decoded, resized images: from the cache if it was made from these files, else decoded now."""
    size = config.image_size
    path = root / ".cache" / f"{source.name}-{size}.safetensors"
    made_from = json.dumps({"version": CACHE_VERSION, "size": size, "files": source.state()})
    decoded = _read_cache(path, made_from)
    if decoded is not None:
        return decoded
    with _exclusive(root, source.name) as writable:
        decoded = _read_cache(path, made_from)  # another process may have made it while this one waited
        if decoded is None:
            listing = source.read()
            train, test = len(listing.train.labels), len(listing.test.labels) if listing.test else 0
            _require_complete(source, train, test, config.allow_partial)
            decoded = _decode(listing, size, f"{source.name}: decoding" if progress else None)
            if writable:
                _write_cache(path, made_from, decoded)
    return decoded


def _decode(listing: _Listing, size: int, progress: str | None) -> _Decoded:
    """Decode and resize all images, and take the digest.

    The digest is the SHA-256 over, for each training and then each test image, the label (one byte; four from
    257 classes up, little-endian) and the decoded pixels before resizing, channel by channel.
    """
    from PIL import Image
    from torchvision.datasets.folder import default_loader
    from tqdm.auto import tqdm

    def pixels(item: Path | np.ndarray) -> tuple[bytes, np.ndarray]:
        try:
            array = item if isinstance(item, np.ndarray) else np.asarray(default_loader(str(item)))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's, for damaged files
            raise DataError(f"{item}: cannot be decoded ({error})") from error
        channels = np.ascontiguousarray(array.transpose(2, 0, 1))
        if array.shape[:2] != (size, size):
            resized = Image.fromarray(array).resize((size, size), Image.Resampling.BILINEAR)
            return channels.tobytes(), np.asarray(resized).transpose(2, 0, 1)
        return channels.tobytes(), channels

    digest = hashlib.sha256()
    label_bytes = 1 if len(listing.classes) <= 256 else 4
    parts = [part for part in (listing.train, listing.test) if part is not None]
    splits = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=sum(len(part.labels) for part in parts), desc=progress, disable=progress is None) as bar,
    ):
        for part in parts:
            images = np.empty((len(part.labels), 3, size, size), np.uint8)
            for start in range(0, len(images), 1000):  # in stretches: decoded, large images do not pile up
                stretch = range(start, min(start + 1000, len(images)))
                found = pool.map(pixels, part.items[start : start + 1000])
                for index, (original, image) in zip(stretch, found, strict=True):
                    digest.update(part.labels[index].to_bytes(label_bytes, "little") + original)
                    images[index] = image
                bar.update(len(stretch))
            splits.append(Split(torch.from_numpy(images), torch.tensor(part.labels, dtype=torch.int64)))
    groups = None if listing.groups is None else torch.tensor(listing.groups)
    test = splits[1] if len(splits) == 2 else None
    return _Decoded(listing.classes, digest.hexdigest(), splits[0], test, groups)


def _read_cache(path: Path, made_from: str) -> _Decoded | None:
    """The cached images, memory-mapped; None if there are none, or others, or half of them."""
    try:
        with safe_open(path, framework="pt") as file:  # refuses a file that is shorter than its header says
            known = file.metadata() or {}
            if known.get("made_from") != made_from:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    train, test = (
        Split(tensors[f"{name}_images"], tensors[f"{name}_labels"]) if f"{name}_images" in tensors else None
        for name in ("train", "test")
    )
    return _Decoded(json.loads(known["classes"]), known["digest"], train, test, tensors.get("groups"))


def _write_cache(path: Path, made_from: str, decoded: _Decoded) -> None:
    """Write to a file beside `path`, then move it into place; the caller holds the lock."""
    tensors = {"train_images": decoded.train.images, "train_labels": decoded.train.labels}
    if decoded.test is not None:
        tensors |= {"test_images": decoded.test.images, "test_labels": decoded.test.labels}
    if decoded.groups is not None:
        tensors["groups"] = decoded.groups
    known = {"made_from": made_from, "digest": decoded.digest, "classes": json.dumps(decoded.classes)}
    unfinished = path.with_suffix(".tmp")
    try:
        save_file(tensors, unfinished, known)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk, say: the images are in memory all the same
        unfinished.unlink(missing_ok=True)
        warnings.warn(f"{path}: not written ({error}); images are decoded anew in each run", stacklevel=2)


@contextmanager
def _exclusive(root: Path, name: str) -> Iterator[bool]:
    """One process at a time downloads or decodes a data set; gives whether there can be a cache at all."""
    lock = FileLock(root / ".cache" / f"{name}.lock")
    try:
        (root / ".cache").mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        warnings.warn(f"{root}: no cache there ({error}); images are decoded anew in each run", stacklevel=4)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
