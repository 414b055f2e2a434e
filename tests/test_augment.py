"""Splits, batches and augmentation."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from eatlib.config import RunConfig
from eatlib.data import PADDING, ROTATION, Data, DataError, Split, augment, draw, load_data, training_batches

DIGITS_DIGEST = "ace363b25212d35b1292715e07d838e65838df5b48b6674671fc52f29f618dc6"


def load_digits(folder: Path, **fields) -> Data:
    return load_data(RunConfig(data_dir=folder, **fields))


def test_digits_come_in_disjoint_stratified_splits(tmp_path):
    digits = load_digits(tmp_path)
    splits = (digits.train, digits.validation, digits.test)
    assert [len(split) for split in splits] == [1295, 143, 359]
    assert (digits.train.images.dtype, digits.train.labels.dtype) == (torch.uint8, torch.int64)
    assert digits.train.images.shape[1:] == (3, 16, 16)
    assert len(torch.cat([split.images for split in splits]).flatten(1).unique(dim=0)) == 1797
    for split in splits:
        counts = split.labels.bincount()
        assert counts.max() - counts.min() <= 0.15 * len(split) / 10
    assert (digits.info.complete, digits.info.digest) == (True, DIGITS_DIGEST)
    assert (digits.info.source_train, digits.info.source_test) == (1438, 359)
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-4)
    assert digits.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-4)
    assert load_digits(tmp_path, seed=5).validation.images.equal(digits.validation.images)
    assert not load_digits(tmp_path, split_seed=1).validation.images.equal(digits.validation.images)


def test_subsets_are_stratified_nested_and_as_large_as_asked(tmp_path):
    def rows(split: Split) -> set[bytes]:
        return {image.numpy().tobytes() for image in split.images}

    digits = load_digits(tmp_path)
    larger = load_digits(tmp_path, train_samples=303, test_samples=50)
    smaller = load_digits(tmp_path, train_samples=101, test_samples=20)
    for part, whole in ((larger, digits), (smaller, larger)):
        for name in ("train", "validation", "test"):
            assert rows(getattr(part, name)) <= rows(getattr(whole, name))
    assert (len(smaller.train), len(smaller.validation), len(smaller.test)) == (91, 10, 20)
    assert smaller.test.labels.bincount().tolist() == [2] * 10
    assert set(larger.train.labels.bincount().tolist()) <= {26, 27, 28, 29}
    assert (smaller.info.train, smaller.info.source_train) == (91, 1438)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_samples": 1439}, "train_samples = 1439: digits allows 3 to 1438"),
        ({"test_samples": 360}, "test_samples = 360: digits allows 1 to 359"),
        ({"train_samples": 200, "validation_share": 0.999}, "validation_share = 0.999: leaves 0 images"),
    ],
)
def test_subsets_that_cannot_be_are_refused(tmp_path, fields, message):
    with pytest.raises(DataError, match=message):
        load_digits(tmp_path, **fields)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_an_epoch_is_every_image_once_shuffled_and_augmented_as_drawn():
    images = torch.randint(256, (50, 3, 12, 12), dtype=torch.uint8, generator=seeded())
    epoch = list(training_batches(Split(images, torch.arange(50)), 20, "crop_flip", seeded()))
    generator = seeded()
    order = torch.randperm(50, generator=generator)
    assert torch.cat([labels for _, labels in epoch]).equal(order)
    assert torch.cat([batch for batch, _ in epoch]).equal(augment(images[order], draw(50, "crop_flip", generator)))


@pytest.mark.parametrize(("count", "sizes"), [(90, [30, 30, 30]), (92, [30, 30, 30, 2]), (91, [30, 30, 31]), (1, [1])])
def test_a_last_batch_of_one_joins_the_one_before(count, sizes):
    split = Split(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.arange(count))
    assert [len(labels) for _, labels in training_batches(split, 30, "none", seeded())] == sizes


def test_each_image_is_cropped_and_mirrored_as_drawn():
    images = torch.randint(256, (200, 3, 12, 12), dtype=torch.uint8, generator=seeded())
    draws = draw(200, "crop_flip", seeded())
    padded = F.pad(images, (PADDING,) * 4)
    for image, found, top, left, flip in zip(padded, augment(images, draws), *draws.values(), strict=True):
        window = image[:, top : top + 12, left : left + 12]
        assert found.equal(window.flip(2) if flip else window)


def test_every_offset_and_side_is_as_likely():
    draws = draw(8100, "crop_flip", seeded())
    counts = (9 * draws["top"] + draws["left"]).bincount()
    assert (len(counts), draw(9, "none", seeded())) == (81, {})
    assert 60 < counts.min() <= counts.max() < 140  # 100 on average, standard deviation 10
    assert 3850 < draws["flip"].sum() < 4250  # standard deviation 45


def test_rotation_turns_each_image_by_an_angle_of_its_own():
    images = torch.zeros(400, 3, 65, 65, dtype=torch.uint8)
    images[:, :, 30:35, 50:55] = 255  # a spot 20 pixels to the right of the centre
    angles = draw(400, "crop_rotate", seeded())["angle"]
    assert angles.rad2deg().abs().max() <= ROTATION
    assert angles.std().rad2deg() == pytest.approx(ROTATION / 3**0.5, rel=0.1)  # of a uniform distribution
    turned = augment(images, {"angle": angles})[:, 0].double()
    coordinates = torch.arange(65) - 32
    mass = turned.sum(dim=(1, 2))
    x = (turned * coordinates).sum(dim=(1, 2)) / mass
    y = (turned * coordinates[:, None]).sum(dim=(1, 2)) / mass
    torch.testing.assert_close(torch.atan2(y, x), -angles.double(), atol=0.005, rtol=0)
    torch.testing.assert_close(torch.hypot(x, y), torch.full((400,), 20.0).double(), atol=0.1, rtol=0)
    assert augment(images, {"angle": torch.zeros(400)}).equal(images)
