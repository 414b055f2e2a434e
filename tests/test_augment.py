"""Splits, batches and augmentation."""

from pathlib import Path

import pytest
import torch

from eatlib.config import RunConfig
from eatlib.data import Data, DataError, Split, augment, batches, image_grid, load_data, training_batches
from eatlib.data.augment import PADDING, ROTATION, draw

DIGITS_DIGEST = "ace363b25212d35b1292715e07d838e65838df5b48b6674671fc52f29f618dc6"


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


def load_digits(folder: Path, **fields) -> Data:
    return load_data(RunConfig(data_dir=folder, **fields))


@pytest.fixture
def digits(digits_dir: Path) -> Data:
    return load_digits(digits_dir)


def test_digits_come_in_disjoint_stratified_splits(digits):
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1295, 143, 359)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.shape[1:] == (3, 16, 16)
    assert digits.train.labels.dtype == torch.int64
    images = torch.cat([digits.train.images, digits.validation.images, digits.test.images])
    assert len(images.flatten(1).unique(dim=0)) == 1797
    for counts in digits.class_counts().values():
        assert max(counts) - min(counts) <= 0.15 * sum(counts) / 10
    assert digits.info.complete
    assert digits.info.digest == DIGITS_DIGEST
    assert (digits.info.source_train, digits.info.source_test) == (1438, 359)
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-4)
    assert digits.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-4)


def test_splits_follow_the_split_seed_alone(digits, digits_dir):
    assert load_digits(digits_dir, seed=5).validation.images.equal(digits.validation.images)
    assert not load_digits(digits_dir, split_seed=1).validation.images.equal(digits.validation.images)


def test_subsets_are_stratified_nested_and_as_large_as_asked(digits, digits_dir):
    def rows(split: Split) -> set[bytes]:
        return {image.numpy().tobytes() for image in split.images}

    larger = load_digits(digits_dir, train_samples=303, test_samples=50)
    smaller = load_digits(digits_dir, train_samples=101, test_samples=20)
    for part, whole in ((larger, digits), (smaller, larger)):
        for name in ("train", "validation", "test"):
            assert rows(getattr(part, name)) <= rows(getattr(whole, name))
    assert (len(smaller.train), len(smaller.validation), len(smaller.test)) == (91, 10, 20)
    assert smaller.class_counts()["test"] == [2] * 10
    assert set(larger.class_counts()["train"]) <= {26, 27, 28, 29}
    assert (smaller.info.train, smaller.info.source_train) == (91, 1438)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_samples": 1439}, "train_samples = 1439: digits allows 3 to 1438"),
        ({"test_samples": 360}, "test_samples = 360: digits allows 1 to 359"),
        ({"train_samples": 200, "validation_share": 0.999}, "validation_share = 0.999: leaves 0 images"),
    ],
)
def test_subsets_that_cannot_be_are_refused(digits_dir, fields, message):
    with pytest.raises(DataError, match=message):
        load_digits(digits_dir, **fields)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int) -> Split:
    """Images that are 4x4 squares of their own number."""
    numbers = torch.arange(count)
    return Split(numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous(), numbers)


def ramp(count: int, side: int = 12) -> torch.Tensor:
    """The same image `count` times; no two of its pixels are alike, none is black."""
    image = torch.arange(1, side * side + 1, dtype=torch.uint8).view(1, 1, side, side)
    return image.repeat(count, 3, 1, 1)


def augmented(images: torch.Tensor, augmentation: str, seed: int = 0) -> torch.Tensor:
    return augment(images, draw(len(images), augmentation, seeded(seed)))


def crops_of(image: torch.Tensor) -> dict[bytes, tuple[int, int]]:
    side = image.shape[-1]
    padded = torch.nn.functional.pad(image, (PADDING,) * 4)
    return {
        padded[:, top : top + side, left : left + side].contiguous().numpy().tobytes(): (top, left)
        for top in range(2 * PADDING + 1)
        for left in range(2 * PADDING + 1)
    }


def test_an_epoch_has_every_image_once_in_a_seeded_order():
    split = numbered(100)
    epoch = list(training_batches(split, 30, "none", seeded()))
    labels = torch.cat([labels for _, labels in epoch])
    assert labels.sort().values.equal(split.labels)
    assert not labels.equal(split.labels)
    for images, batch_labels in epoch:
        assert images[:, 0, 0, 0].long().equal(batch_labels)
    again = torch.cat([labels for _, labels in training_batches(split, 30, "none", seeded())])
    assert again.equal(labels)


@pytest.mark.parametrize(("count", "sizes"), [(90, [30, 30, 30]), (92, [30, 30, 30, 2]), (91, [30, 30, 31]), (1, [1])])
def test_a_last_batch_of_one_joins_the_one_before(count, sizes):
    epoch = training_batches(numbered(count), 30, "none", seeded())
    assert [len(labels) for _, labels in epoch] == sizes


def test_training_batches_are_augmented_as_drawn_for_each_image():
    images = ramp(50)
    epoch = list(training_batches(Split(images, torch.arange(50)), 20, "crop_flip", seeded()))
    generator = seeded()
    order = torch.randperm(50, generator=generator)
    assert torch.cat([labels for _, labels in epoch]).equal(order)
    assert torch.cat([batch for batch, _ in epoch]).equal(augment(images, draw(50, "crop_flip", generator)))


def test_batches_are_in_order_and_the_last_is_short():
    found = list(batches(numbered(70), 30))
    assert [len(labels) for _, labels in found] == [30, 30, 10]
    assert torch.cat([labels for _, labels in found]).equal(torch.arange(70))


def test_crops_are_windows_of_the_image_at_every_offset_alike():
    images = ramp(8100)
    found = augmented(images, "crop")
    assert images.equal(ramp(8100))
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    known = crops_of(images[0])
    offsets = torch.tensor([known[image.numpy().tobytes()] for image in found])
    counts = (offsets[:, 0] * 9 + offsets[:, 1]).bincount(minlength=81)
    assert counts.min() > 60  # of 100 on average, standard deviation 10
    assert counts.max() < 140


def test_flips_mirror_about_half_of_the_images():
    images = ramp(4000)
    known = crops_of(images[0])
    flips = [image for image in augmented(images, "crop_flip") if image.numpy().tobytes() not in known]
    assert all(image.flip(2).numpy().tobytes() in known for image in flips)
    assert 1850 < len(flips) < 2150  # standard deviation 32


def test_rotation_turns_each_image_by_an_angle_of_its_own():
    side = 65
    images = torch.zeros(400, 3, side, side, dtype=torch.uint8)
    images[:, :, 32 - 2 : 32 + 3, 52 - 2 : 52 + 3] = 255  # a spot 20 pixels to the right of the centre
    angles = draw(400, "crop_rotate", seeded())["angle"]
    assert angles.rad2deg().abs().max() <= ROTATION
    assert angles.std().rad2deg() == pytest.approx(ROTATION / 3**0.5, rel=0.1)  # of a uniform distribution
    turned = augment(images, {"angle": angles})[:, 0].double()
    coordinates = torch.arange(side) - 32
    mass = turned.sum(dim=(1, 2))
    x = (turned * coordinates).sum(dim=(1, 2)) / mass
    y = (turned * coordinates[:, None]).sum(dim=(1, 2)) / mass
    torch.testing.assert_close(torch.atan2(y, x), -angles.double(), atol=0.005, rtol=0)
    torch.testing.assert_close(torch.hypot(x, y), torch.full((400,), 20.0).double(), atol=0.1, rtol=0)
    assert augment(images, {"angle": torch.zeros(400)}).equal(images)


def test_the_grid_has_a_column_for_each_class():
    grid = image_grid(numbered(3), classes=4, rows=2)
    assert grid.shape == (2 * 6, 4 * 6, 3)
    assert [int(grid[3, column * 6 + 3, 0]) for column in range(4)] == [0, 1, 2, 0]
