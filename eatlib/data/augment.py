"""Batches of a split, augmented on the device that trains."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from eatlib.data.images import Split

PADDING = 4
"""Black pixels around the image that a random crop may reach into, on each side (the authors' code)."""

ROTATION = 15.0
"""Largest random rotation, in degrees to either side. The paper names the rotation, not its size."""


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
