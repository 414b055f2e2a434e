"""Training images per second: eatlib's batches against a torchvision DataLoader with the same transforms.

    python benchmarks/data.py [--rounds 3] [--batch-size 512] [--threads 2]

Both sides give shuffled uint8 batches of 45,000 made-up images of 32x32, cropped with padding 4 and flipped, or
cropped and turned; the DataLoader goes through Pillow, as the authors' code does. The contenders' epochs alternate,
medians are printed; then what augmenting a batch is of a training step of a quarter-wide ResNet-18.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from eatlib.data import Split, training_batches
from eatlib.models import build_model

CROP = transforms.RandomCrop(32, padding=4)
FLIP, TURN = transforms.RandomHorizontalFlip(), transforms.RandomRotation(15, transforms.InterpolationMode.BILINEAR)


class PillowImages(Dataset):
    """What torchvision's CIFAR10 does for each image, on images in memory."""

    def __init__(self, split: Split, *steps: Callable) -> None:
        self.pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rounds", 3), ("batch-size", 512), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.batch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (45_000, 3, 32, 32), dtype=torch.uint8)
    train = Split(images, torch.randint(10, (len(images),)))
    model = build_model("resnet18", classes=10, width=0.25)

    def step() -> None:
        F.cross_entropy(model(images[:size]), train.labels[:size]).backward()

    work = {"training step": lambda: [step()]}
    for name, turn in (("crop_flip", FLIP), ("crop_rotate", TURN)):
        work[f"{name}, eatlib"] = lambda name=name: training_batches(train, size, name, generator)
        for workers in sorted({0, options.threads}):
            pillow = PillowImages(train, CROP, turn)
            loader = DataLoader(pillow, size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
            work[f"{name}, DataLoader, {workers} workers"] = lambda loader=loader: loader
    seconds = defaultdict(list)
    for _ in range(options.rounds + 1):  # the first round starts workers and warms up
        for name, batches in work.items():
            start = time.perf_counter()
            sum(1 for _ in batches())
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    step_rate = size / medians.pop("training step")
    for name, median in medians.items():
        rate = len(train) / median
        print(f"{name:34} {rate:10,.0f} images/s, {step_rate / rate:.2%} of a training step")


if __name__ == "__main__":
    main()
