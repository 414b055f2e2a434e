"""Training images per second: eatlib's batches against a torchvision DataLoader with the same transforms.

    python benchmarks/data.py [--data-dir DIR] [--rounds 3] [--batch-size 512] [--threads 2]

CIFAR-10 if it is in the data folder, else made-up images of the same number and size. Both sides give
shuffled uint8 batches, cropped with padding 4 and flipped, or cropped and turned; the DataLoader goes through
Pillow, as the authors' code does. "First epoch" is from nothing in memory (eatlib: its cache; torchvision: its
pickles) to the end of the first epoch, "warm" a later epoch. The contenders' epochs alternate, medians are
printed; then what augmenting is of a training step of a quarter-wide ResNet-18.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from eatlib.config import RunConfig
from eatlib.data import DataError, Split, augment, data_root, load_data, training_batches
from eatlib.models import build_model

TRANSFORMS = {
    "crop_flip": [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()],
    "crop_rotate": [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomRotation(15, transforms.InterpolationMode.BILINEAR),
    ],
}


class PillowImages(Dataset):
    """What torchvision's CIFAR10 does for each image, on images in memory."""

    def __init__(self, split: Split, augmentation: str) -> None:
        self.pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose([*TRANSFORMS[augmentation], transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drain(epoch: Iterable[object]) -> None:
    for _ in epoch:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.batch_size
    config = RunConfig(dataset="cifar10", data_dir=options.data_dir)
    generator = torch.Generator().manual_seed(0)

    try:
        load_data(config)  # so that the cache is there
    except DataError as error:
        print(f"made-up images ({str(error).split('.')[0]})")
        images = torch.randint(256, (45_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
        train = Split(images, torch.randint(10, (len(images),), generator=generator))
    else:
        start = time.perf_counter()
        train = load_data(config).train
        loaded = time.perf_counter()
        drain(training_batches(train, size, "crop_flip", generator))
        cold = time.perf_counter() - start
        print(f"first epoch, eatlib: {cold:.2f} s, of which load_data {loaded - start:.2f} s")
        CIFAR10._check_integrity = lambda self: True  # no checksums: only reading is compared
        start = time.perf_counter()
        torchvision_set = CIFAR10(data_root(config), transform=PillowImages(train, "crop_flip").transform)
        loaded = time.perf_counter()
        drain(DataLoader(torchvision_set, size, shuffle=True, num_workers=options.threads))
        cold_torchvision = (time.perf_counter() - start) * len(train) / len(torchvision_set)
        print(
            f"first epoch, torchvision, {options.threads} workers: {cold_torchvision:.2f} s for as many images, "
            f"of which CIFAR10() {loaded - start:.2f} s: {cold_torchvision / cold:.1f} times as long"
        )

    epochs: dict[tuple[str, str], Callable[[], None]] = {}
    for name in TRANSFORMS:
        epochs[name, "eatlib"] = lambda name=name: drain(training_batches(train, size, name, generator))
        pillow = PillowImages(train, name)
        for workers in sorted({0, options.threads}):
            loader = DataLoader(pillow, size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
            epochs[name, f"DataLoader, {workers} workers"] = lambda loader=loader: drain(loader)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in epochs}
    for turn in range(options.rounds + 1):
        for key, epoch in epochs.items():
            taken = seconds(epoch)
            if turn:  # the first turn starts workers and warms up
                times[key].append(taken)
    print(f"\nwarm, {len(train)} images, batches of {size}, {options.threads} threads:")
    rates = {key: len(train) / statistics.median(found) for key, found in times.items()}
    for (name, contender), rate in rates.items():
        print(f"  {name:12} {contender:22} {rate:10,.0f} images/s   {rates[name, 'eatlib'] / rate:6.2f}")

    model = build_model("resnet18", classes=10, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = train.images[:size], train.labels[:size]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    print()
    for name in TRANSFORMS:
        pairs = [(seconds(lambda name=name: augment(images, name, generator)), seconds(step)) for _ in range(5)]
        augmenting, stepping = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{name} of a batch: {augmenting * 1e3:.1f} ms, {augmenting / stepping:.2%} of a training step "
            f"of ResNet-18 at width 1/4 ({stepping * 1e3:.0f} ms)"
        )


if __name__ == "__main__":
    main()
