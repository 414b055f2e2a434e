"""The files of a source -> its images, decoded and resized once, and kept beside the data in a memory-mapped file."""

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eatlib.config import RunConfig
from eatlib.data.sources import SOURCES, DataError, Listing, Source, reading

CACHE_VERSION = 2
"""Raised when decoding changes, so that older caches are made anew."""


@dataclass(frozen=True)
class Decoded:
    """A source's images in memory: the training images, one for each of `groups`, then its own test images, if any.

    Attributes:
        digest: SHA-256 over, for each image, the label (one byte; four from 257 classes up, little-endian) and the
            decoded pixels before resizing, channel by channel.
        images: (N, 3, H, W), uint8.
        labels: (N,), int64.
        groups: (training images,): those of one number stay on one side of a split.
    """

    classes: list[str]
    digest: str
    images: Tensor
    labels: Tensor
    groups: Tensor


def load_images(config: RunConfig, root: Path, progress: bool) -> tuple[Source, Decoded, bool]:
    """The source of `config.dataset`, its images, downloaded or decoded if need be, and whether they are complete.

    Args:
        root: the data folder.

    Raises:
        DataError: the images are missing, damaged, or incomplete without `allow_partial`.
    """
    name, _, path = config.dataset.partition(":")
    source, home, cache = SOURCES[name], root, root / ".cache" / name
    if path:
        home = Path(path).resolve()
        cache = cache.with_name(f"{name}-{home.name}-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}")

    def attempt() -> tuple[Source, Decoded, bool]:
        missing = [str(home / path) for path in source.paths if not (home / path).exists()]
        if missing:
            raise DataError(f"{name}: no {', '.join(missing)}. {source.advice(home)}")
        decoded = _cached(source, home, cache, config.image_size, progress)
        train, test = len(decoded.groups), len(decoded.labels) - len(decoded.groups)
        whole = source.facts.train_images or train, source.facts.test_images or test
        complete = (train, test) == whole and source.digest in (None, decoded.digest)
        if not train or (whole[1] and not test) or not (complete or config.allow_partial):
            found = f"{train} training and {test} test images found (digest {decoded.digest})"
            wanted = f"the complete set has {whole[0]} and {whole[1]} (digest {source.digest or 'any'})"
            leave = "Set allow_partial: true to use them as they are, labelled partial"
            raise DataError(f"{name}: {found}, {wanted}. {leave}. {source.advice(home)}")
        return source, decoded, complete

    try:
        return attempt()
    except DataError:
        if not (config.download and source.files):
            raise
    with _lock(cache):
        source.download(home)
    return attempt()


def _cached(source: Source, home: Path, cache: Path, size: int, progress: bool) -> Decoded:
    """The images from the cache, if it was made from these files, else decoded now."""
    path = cache.with_name(f"{cache.name}-{size}.pt")
    made_from = [CACHE_VERSION, _state(source, home)]
    decoded = _read(path, made_from)
    if decoded is None:
        with _lock(cache) as lock:
            decoded = _read(path, made_from)  # another process may have made it while this one waited
            if decoded is None:
                with reading(home):
                    decoded = _decode(source.read(home), size, f"{source.name}: decoding" if progress else None)
                if lock:
                    _write(path, made_from, decoded)
    return decoded


def _state(source: Source, home: Path) -> str:
    """Changes whenever a file is added, removed or written: a hash of their names, sizes and times."""
    if source.package:
        return metadata.version(source.package)
    lines = []
    with reading(home):
        for top in source.paths:
            for folder, _, names in [(str(home), [], [top]), *os.walk(home / top, followlinks=True)]:
                for name in (f"{folder}/{name}".removeprefix(str(home)) for name in names):
                    if "/." not in name:  # what is hidden is no data
                        stat = os.stat(f"{home}{name}")  # noqa: PTH116  pathlib is slow for CelebA's 200,000 files
                        lines.append(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def _decode(listing: Listing, size: int, progress: str | None) -> Decoded:
    """Decode and resize all images, and take the digest."""
    parts = [part for part in (listing.train, listing.test) if part]
    items = [image for images, _ in parts for image in images]
    labels = [int(label) for _, labels in parts for label in labels]
    if labels and not 0 <= min(labels) <= max(labels) < len(listing.classes):
        raise DataError(f"classes {min(labels)} to {max(labels)} found; allowed are 0 to {len(listing.classes) - 1}")

    def pixels(item: Path | np.ndarray) -> tuple[bytes, np.ndarray]:
        array = _open(item) if isinstance(item, Path) else item
        if array.dtype != np.uint8 or array.shape[2:] != (3,):
            raise DataError(f"an image is {array.dtype} {array.shape}; it must be uint8 (height, width, 3)")
        original = array.transpose(2, 0, 1).tobytes()
        if array.shape[:2] != (size, size):
            array = np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BILINEAR))
        return original, array.transpose(2, 0, 1)

    digest = hashlib.sha256()
    label_bytes = 1 if len(listing.classes) <= 256 else 4
    images = torch.empty(len(labels), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        stretches = (items[start : start + 1000] for start in range(0, len(items), 1000))  # lest decoded images pile up
        decoded = chain.from_iterable(pool.map(pixels, stretch) for stretch in stretches)
        bar = tqdm(decoded, desc=progress, total=len(labels), disable=progress is None)
        for label, target, (original, resized) in zip(labels, images.numpy(), bar, strict=True):
            digest.update(label.to_bytes(label_bytes, "little") + original)
            target[:] = resized
    groups = range(len(listing.train[1])) if listing.groups is None else listing.groups
    integers = (torch.tensor([*values], dtype=torch.int64) for values in (labels, groups))
    return Decoded([*map(str, listing.classes)], digest.hexdigest(), images, *integers)


def _open(path: Path) -> np.ndarray:
    """The (H, W, 3) uint8 pixels of an image file."""
    with reading(path):
        if not path.is_file():
            raise OSError("not a file")
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip them
                raise ValueError(f"pixels of type {image.mode}; convert it to 8 bits a channel")
            return np.asarray(image.convert("RGB"))


def _read(path: Path, made_from: list) -> Decoded | None:
    """The cached images, memory-mapped; None if there are none, or others, or half of them."""
    try:
        found = torch.load(path, mmap=True)
        return Decoded(**found["decoded"]) if found["made_from"] == made_from else None
    except Exception:  # a damaged file can raise anything
        return None


def _write(path: Path, made_from: list, decoded: Decoded) -> None:
    """Write to a file beside `path`, then move it into place; the caller holds the lock."""
    unfinished = path.with_suffix(".tmp")
    try:
        torch.save({"made_from": made_from, "decoded": vars(decoded)}, unfinished)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk, say: the images are in memory all the same
        unfinished.unlink(missing_ok=True)
        warnings.warn(f"{path}: not written ({error}); images are decoded anew in each run", stacklevel=2)


def _lock(cache: Path) -> AbstractContextManager:
    """Held by one process at a time, which downloads or decodes; gives None where there can be no cache."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(cache.with_name(f"{cache.name}.lock")).acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        warnings.warn(f"{cache.parent}: no cache there ({error}); images are decoded anew in each run", stacklevel=2)
        return nullcontext()
