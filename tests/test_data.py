"""Splits, batches, augmentation; each source in a made-up copy, and the real images where there are any."""

import os
import pickle
import shutil
import subprocess
import sys
from hashlib import md5, sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eatlib import data as module
from eatlib.config import RunConfig
from eatlib.data import (
    PADDING,
    ROTATION,
    Data,
    DataError,
    Split,
    augment,
    batches,
    image_grid,
    load_data,
    training_batches,
)

DIGITS_DIGEST = "ace363b25212d35b1292715e07d838e65838df5b48b6674671fc52f29f618dc6"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture
def digits(digits_dir: Path) -> Data:
    return load_data(RunConfig(data_dir=digits_dir))


# ------------------------------------------------------------------------------------------- splits


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
    again = load_data(RunConfig(data_dir=digits_dir, seed=5))
    assert again.validation.images.equal(digits.validation.images)
    other = load_data(RunConfig(data_dir=digits_dir, split_seed=1))
    assert not other.validation.images.equal(digits.validation.images)


def test_a_validation_share_that_leaves_nothing_to_train_on_is_refused(digits_dir):
    with pytest.raises(DataError, match=r"validation_share = 0.999: leaves 0 images"):
        load_data(RunConfig(data_dir=digits_dir, train_samples=200, validation_share=0.999))


def test_subsets_are_stratified_nested_and_as_large_as_asked(digits, digits_dir):
    def rows(split: Split) -> set[bytes]:
        return {image.numpy().tobytes() for image in split.images}

    larger = load_data(RunConfig(data_dir=digits_dir, train_samples=303, test_samples=50))
    smaller = load_data(RunConfig(data_dir=digits_dir, train_samples=101, test_samples=20))
    for part, whole in ((larger, digits), (smaller, larger)):
        for name in ("train", "validation", "test"):
            assert rows(getattr(part, name)) <= rows(getattr(whole, name))
    assert (len(smaller.train), len(smaller.validation), len(smaller.test)) == (91, 10, 20)
    assert smaller.class_counts()["test"] == [2] * 10
    assert set(larger.class_counts()["train"]) <= {26, 27, 28, 29}
    assert (smaller.info.train, smaller.info.source_train) == (91, 1438)


@pytest.mark.parametrize(
    ("field", "value", "allowed"), [("train_samples", 1439, "3 to 1438"), ("test_samples", 360, "1 to 359")]
)
def test_a_subset_larger_than_the_set_is_refused(digits_dir, field, value, allowed):
    with pytest.raises(DataError, match=f"{field} = {value}: digits allows {allowed}"):
        load_data(RunConfig(data_dir=digits_dir, **{field: value}))


# ------------------------------------------------------------------------------------------ batches


def numbered(count: int) -> Split:
    """Images that are 4x4 squares of their own number."""
    numbers = torch.arange(count)
    return Split(numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous(), numbers)


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


def test_batches_are_in_order_and_the_last_is_short():
    found = list(batches(numbered(70), 30))
    assert [len(labels) for _, labels in found] == [30, 30, 10]
    assert torch.cat([labels for _, labels in found]).equal(torch.arange(70))


# --------------------------------------------------------------------------------------- augmentation


def ramp(count: int, side: int = 12) -> torch.Tensor:
    """The same image `count` times; no two of its pixels are alike, none is black."""
    image = torch.arange(1, side * side + 1, dtype=torch.uint8).view(1, 1, side, side)
    return image.repeat(count, 3, 1, 1)


def crops_of(image: torch.Tensor) -> dict[bytes, tuple[int, int]]:
    side = image.shape[-1]
    padded = torch.nn.functional.pad(image, (PADDING,) * 4)
    return {
        padded[:, top : top + side, left : left + side].contiguous().numpy().tobytes(): (top, left)
        for top in range(2 * PADDING + 1)
        for left in range(2 * PADDING + 1)
    }


def test_crops_are_windows_of_the_image_at_every_offset_alike():
    images = ramp(8100)
    before = images.clone()
    found = augment(images, "crop", seeded())
    assert images.equal(before)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    known = crops_of(images[0])
    offsets = torch.tensor([known[image.numpy().tobytes()] for image in found])
    counts = (offsets[:, 0] * 9 + offsets[:, 1]).bincount(minlength=81)
    assert counts.min() > 60  # of 100 on average, standard deviation 10
    assert counts.max() < 140


def test_flips_mirror_about_half_of_the_images():
    images = ramp(4000)
    found = augment(images, "crop_flip", seeded())
    straight, mirrored = crops_of(images[0]), crops_of(images[0])
    flips = 0
    for image in found:
        if image.numpy().tobytes() not in straight:
            assert image.flip(2).numpy().tobytes() in mirrored
            flips += 1
    assert 1850 < flips < 2150  # standard deviation 32


def test_rotation_turns_each_image_by_an_angle_of_its_own():
    side = 65
    images = torch.zeros(400, 3, side, side, dtype=torch.uint8)
    images[:, :, 32 - 2 : 32 + 3, 52 - 2 : 52 + 3] = 255  # a spot 20 pixels to the right of the centre
    angles = torch.rand(400, generator=seeded()) * 2 - 1
    turned = module._rotate(images, torch.deg2rad(ROTATION * angles))[:, 0].double()
    coordinates = torch.arange(side) - 32
    mass = turned.sum(dim=(1, 2))
    x = (turned * coordinates).sum(dim=(1, 2)) / mass
    y = (turned * coordinates[:, None]).sum(dim=(1, 2)) / mass
    torch.testing.assert_close(torch.atan2(y, x).rad2deg(), -ROTATION * angles.double(), atol=0.3, rtol=0)
    torch.testing.assert_close(torch.hypot(x, y), torch.full((400,), 20.0).double(), atol=0.1, rtol=0)
    assert module._rotate(images, torch.zeros(400)).equal(images)
    both = augment(images, "crop_rotate", seeded())
    assert (both.shape, both.dtype) == (images.shape, torch.uint8)
    assert len(both.flatten(1).unique(dim=0)) > 390


@pytest.mark.parametrize("name", ["crop", "crop_flip", "crop_rotate"])
def test_augmentation_is_seeded(name):
    images = ramp(20)
    assert augment(images, name, seeded(1)).equal(augment(images, name, seeded(1)))
    assert not augment(images, name, seeded(1)).equal(augment(images, name, seeded(2)))


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="augmentation = 'flip': must be none, crop, crop_flip or crop_rotate"):
        augment(ramp(1), "flip", seeded())


def test_the_grid_has_a_column_for_each_class():
    split = numbered(3)
    grid = image_grid(split, classes=4, rows=2)
    assert grid.shape == (2 * 6, 4 * 6, 3)
    assert [int(grid[3, column * 6 + 3, 0]) for column in range(4)] == [0, 1, 2, 0]


# ------------------------------------------------------------------------- made-up sets in each layout


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 images; image i is a square of the value i."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for part, name in enumerate(names):
        pixels = np.repeat(np.arange(part * 10, part * 10 + 10, dtype=np.uint8)[:, None], 3072, axis=1)
        (folder / name).write_bytes(pickle.dumps({"labels": [0, 1] * 5, "data": pixels}))
    meta = pickle.dumps({"label_names": ["plane", "car"]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(meta).hexdigest()})
    return tmp_path


@pytest.fixture
def gtsrb(tmp_path: Path) -> Path:
    """Classes 1 and 7, 5 tracks of 3 images, in the colour (class, track, 0); 4 test images, one absent."""
    root = tmp_path / "gtsrb"
    for label in (1, 7):
        for track in range(5):
            for frame in range(3):
                name = f"GTSRB/Final_Training/Images/{label:05d}/{track:05d}_{frame:05d}.ppm"
                write_image(root / name, (label, track, 0))
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate((7, 1, 7, 1)):
        rows.append(f"{number:05d}.ppm;32;32;0;0;31;31;{label}")
        if number != 2:
            write_image(root / f"GTSRB/Final_Test/Images/{number:05d}.ppm", (label, 9, 9))
    (root / "GT-final_test.csv").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Images 1 to 24, of value 10 i; partitions 0, 0, 1, 2 in turn; image 24 is absent."""
    folder = tmp_path / "celeba"
    attributes = ["24", "Smiling Bald Heavy_Makeup Mouth_Slightly_Open"]
    partitions = []
    for number in range(1, 25):
        smiling, makeup, mouth = (1 if number >> bit & 1 else -1 for bit in (1, 2, 0))
        attributes.append(f"{number:06d}.png {smiling:2d} -1 {makeup:2d} {mouth:2d}")
        partitions.append(f"{number:06d}.png {(2, 0, 0, 1)[number % 4]}")
        if number != 24:
            write_image(folder / f"img_align_celeba/{number:06d}.png", (10 * number,) * 3, (178, 218))
    (folder / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(partitions) + "\n")
    return tmp_path


def test_cifar10_is_known_by_its_content(cifar10):
    config = RunConfig(dataset="cifar10", data_dir=cifar10, allow_partial=True, validation_share=0.2)
    data = load_data(config)
    assert not data.info.complete
    assert data.classes == ["plane", "car"]
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert data.test.labels.tolist() == [0, 1] * 5
    assert data.class_counts() == {"train": [20, 20], "validation": [5, 5], "test": [5, 5]}
    records = b"".join(bytes([i % 2]) + bytes([i]) * 3072 for i in range(60))
    assert data.info.digest == sha256(records).hexdigest()
    assert data.mean == (0.4914, 0.4823, 0.4468)


def test_a_partial_set_needs_leave(cifar10):
    (cifar10 / "cifar-10-batches-py/data_batch_3").unlink()
    config = RunConfig(dataset="cifar10", data_dir=cifar10)
    message = r"40 training and 10 test images found, the complete set has 50,000 .*allow_partial: true"
    with pytest.raises(DataError, match=message):
        load_data(config)
    assert not list(cifar10.glob(".cache/*.safetensors"))
    data = load_data(config.model_copy(update={"allow_partial": True}))
    assert (data.info.complete, data.info.source_train) == (False, 40)
    with pytest.raises(DataError, match="allow_partial: true"):
        load_data(config)


def test_a_set_of_the_right_size_with_other_content_is_not_complete(cifar10, monkeypatch):
    monkeypatch.setattr(module._Cifar10, "published", (50, 10))
    config = RunConfig(dataset="cifar10", data_dir=cifar10)
    with pytest.raises(DataError, match="50 training and 10 test images found, but other pixels or labels"):
        load_data(config)
    digest = load_data(config.model_copy(update={"allow_partial": True})).info.digest
    monkeypatch.setattr(module._Cifar10, "digest", digest)
    assert load_data(config).info.complete


def test_damaged_pickles_are_reported(cifar10):
    (cifar10 / "cifar-10-batches-py/test_batch").write_bytes(b"\x80\x04]q")
    with pytest.raises(DataError, match="cifar-10-batches-py: torchvision cannot read it"):
        load_data(RunConfig(dataset="cifar10", data_dir=cifar10, allow_partial=True))


def test_gtsrb_keeps_tracks_together(gtsrb):
    for seed in range(3):
        config = RunConfig(dataset="gtsrb", data_dir=gtsrb, allow_partial=True, validation_share=0.4, split_seed=seed)
        data = load_data(config)
        tracks = [
            {tuple(color) for color in split.images[:, :2, 0, 0].tolist()} for split in (data.train, data.validation)
        ]
        assert not tracks[0] & tracks[1]
        assert (len(tracks[0]), len(tracks[1])) == (6, 4)
        assert (len(data.train), len(data.validation)) == (18, 12)
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.train.images[:, 0, 0, 0].long().equal(data.train.labels)
    assert data.test.labels.tolist() == [7, 1, 1]  # the absent one is not counted
    assert len(data.classes) == 43
    assert data.classes[14] == "stop"
    assert not data.info.complete


def test_a_set_of_the_published_counts_is_complete(gtsrb, monkeypatch):
    monkeypatch.setattr(module._Gtsrb, "published", (30, 3))
    assert load_data(RunConfig(dataset="gtsrb", data_dir=gtsrb)).info.complete


def test_gtsrb_with_a_foreign_class_or_table_is_refused(gtsrb):
    config = RunConfig(dataset="gtsrb", data_dir=gtsrb, allow_partial=True)
    (gtsrb / "gtsrb/GT-final_test.csv").write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match=r"GT-final_test.csv: not GTSRB's table"):
        load_data(config)
    write_image(gtsrb / "gtsrb/GTSRB/Final_Training/Images/00043/00000_00000.ppm", (0, 0, 0))
    with pytest.raises(DataError, match="class 43; allowed are 0 to 42"):
        load_data(config)


def test_celeba_has_eight_classes_of_three_attributes(celeba):
    data = load_data(RunConfig(dataset="celeba", data_dir=celeba, allow_partial=True))
    assert data.test.images.shape[1:] == (3, 64, 64)
    assert data.test.images[:, 0, 0, 0].tolist() == [40, 80, 120, 160, 200]  # 24 is absent
    assert data.test.labels.tolist() == [4, 0, 4, 0, 4]  # the bits of the number, by construction
    train = torch.cat([data.train.images, data.validation.images])[:, 0, 0, 0].long() // 10
    assert sorted(train.tolist()) == [number for number in range(1, 24) if number % 4 in (1, 2)]
    assert torch.cat([data.train.labels, data.validation.labels]).equal(train % 8)
    assert data.classes[0] == "none"
    assert data.classes[5] == "Heavy_Makeup + Mouth_Slightly_Open"
    assert not data.info.complete


def test_an_image_that_cannot_be_decoded_is_named(celeba):
    damaged = celeba / "celeba/img_align_celeba/000009.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(DataError, match=r"000009\.png: cannot be decoded"):
        load_data(RunConfig(dataset="celeba", data_dir=celeba, allow_partial=True))


def test_lists_that_are_not_celebas_are_refused(celeba):
    (celeba / "celeba/list_attr_celeba.txt").write_text("1\nSmiling\n000001.png 1\n")
    with pytest.raises(DataError, match="not CelebA's lists"):
        load_data(RunConfig(dataset="celeba", data_dir=celeba, allow_partial=True))


def test_a_folder_of_ones_own_with_and_without_a_test_split(tmp_path):
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for number in range(10):
                write_image(tmp_path / f"own/{split}/{name}/{number}.png", (100 * label, number, 7))
    Image.new("LA", (9, 50), (3, 100)).save(tmp_path / "own/train/cat/grey.png")
    config = RunConfig(dataset=f"folder:{tmp_path}/own", data_dir=tmp_path / "data", image_size=8)
    data = load_data(config)
    assert (len(data.train), len(data.validation), len(data.test)) == (19, 2, 20)
    assert data.classes == ["cat", "dog"]
    assert data.test.images[:, 0, 0, 0].long().equal(data.test.labels * 100)
    assert data.info.complete
    assert data.mean[0] == pytest.approx(float(data.train.images[:, 0].double().mean()) / 255, abs=1e-4)
    assert data.std[2] > 0

    flat = load_data(config.model_copy(update={"dataset": f"folder:{tmp_path}/own/test"}))
    assert (len(flat.train), len(flat.validation), len(flat.test)) == (14, 2, 4)
    assert flat.class_counts()["test"] == [2, 2]
    assert flat.info.source_test == 4


def test_folders_that_are_not_in_the_layout_are_refused(tmp_path):
    def load(name: str) -> Data:
        return load_data(RunConfig(dataset=f"folder:{tmp_path}/{name}", data_dir=tmp_path / "data"))

    with pytest.raises(DataError, match=r"nowhere.: there is no such folder"):
        load("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: .*images go to CLASS/"):
        load("empty")
    write_image(tmp_path / "half/train/cat/0.png", (1, 2, 3))
    with pytest.raises(DataError, match="only one of the folders train and test"):
        load("half")
    write_image(tmp_path / "half/test/dog/0.png", (1, 2, 3))
    with pytest.raises(DataError, match="only in one of train and test: cat, dog"):
        load("half")
    write_image(tmp_path / "one/cat/0.png", (1, 2, 3))
    with pytest.raises(DataError, match="too few images for a validation split"):
        load("one")


# --------------------------------------------------------------------------------- fetching and caching


def test_what_to_fetch_and_where_to_put_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("EATLIB_DATA", str(tmp_path))
    for name, words in {
        "cifar10": ["cifar-10-python.tar.gz", "cifar-10-batches-py"],
        "gtsrb": ["GTSRB_Final_Training_Images.zip", "Final_Training/Images", "GT-final_test.csv"],
        "celeba": ["img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt", "quota"],
    }.items():
        with pytest.raises(DataError) as caught:
            load_data(RunConfig(dataset=name))
        for word in [*words, "--download", str(tmp_path), "EATLIB_DATA"]:
            assert word in str(caught.value)


def test_a_failed_download_says_what_to_do_by_hand(tmp_path, monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", no_network)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", no_network)
    for name in ("cifar10", "gtsrb", "celeba"):
        with pytest.raises(DataError, match=r"download failed \(OSError: no network\)\. By hand: "):
            load_data(RunConfig(dataset=name, data_dir=tmp_path, download=True))


def test_a_half_unpacked_set_is_downloaded_again_on_request(cifar10, monkeypatch):
    folder = cifar10 / "cifar-10-batches-py"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "data_batch_3").write_bytes(whole["data_batch_3"][:100])
    asked = []

    def fetch(source):
        asked.append(source.name)
        for name, content in whole.items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr("eatlib.data._Cifar10.download", fetch)
    monkeypatch.setattr(
        "eatlib.data._Cifar10.is_complete", lambda source, train, test, digest: (train, test) == (50, 10)
    )
    with pytest.raises(DataError, match="cannot read it"):
        load_data(RunConfig(dataset="cifar10", data_dir=cifar10))
    assert asked == []
    data = load_data(RunConfig(dataset="cifar10", data_dir=cifar10, download=True))
    assert asked == ["cifar10"]
    assert data.info.source_train == 50


def test_a_download_is_unpacked_where_it_is_looked_for(gtsrb, tmp_path, monkeypatch):
    """Stands in for the server: torchvision's own unpacking does the rest."""
    served = tmp_path / "served"
    shutil.move(gtsrb / "gtsrb", served)
    for name, inside in {
        "GTSRB_Final_Training_Images": "GTSRB/Final_Training",
        "GTSRB_Final_Test_Images": "GTSRB/Final_Test",
        "GTSRB_Final_Test_GT": "GT-final_test.csv",
    }.items():
        shutil.make_archive(str(served / name), "zip", served, inside)

    def serve(url: str, root: str, filename: str, md5: str | None = None) -> None:
        assert md5
        Path(root).mkdir(parents=True, exist_ok=True)
        shutil.copy(served / Path(url).name, Path(root) / filename)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", serve)
    config = RunConfig(dataset="gtsrb", data_dir=tmp_path / "new", download=True, allow_partial=True)
    assert load_data(config).info.source_train == 30


def test_decoding_happens_once(cifar10, monkeypatch):
    config = RunConfig(dataset="cifar10", data_dir=cifar10, allow_partial=True)
    first = load_data(config)
    monkeypatch.setattr(module, "_decode", None)
    second = load_data(config)
    assert second.info == first.info
    assert second.train.images.equal(first.train.images)
    assert second.train.labels.equal(first.train.labels)
    assert [path.suffix for path in sorted((cifar10 / ".cache").iterdir())] == [".safetensors", ".lock"]


def test_another_size_source_or_version_is_decoded_anew(gtsrb, monkeypatch):
    config = RunConfig(dataset="gtsrb", data_dir=gtsrb, allow_partial=True)
    first = load_data(config)
    smaller = load_data(config.model_copy(update={"image_size": 16}))
    assert smaller.test.images.shape[1:] == (3, 16, 16)
    assert smaller.info.digest == first.info.digest  # taken before resizing
    write_image(gtsrb / "gtsrb/GTSRB/Final_Test/Images/00000.ppm", (200, 200, 200))
    changed = load_data(config)
    assert changed.test.images[0, 0, 0, 0] == 200
    assert changed.info.digest != first.info.digest
    decoded = []
    monkeypatch.setattr(module, "CACHE_VERSION", 2)
    decode = module._decode
    monkeypatch.setattr(module, "_decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    load_data(config)
    load_data(config)
    assert decoded == [1]


@pytest.mark.parametrize("damage", [0, 7, 5000, None])
def test_a_half_written_cache_is_never_used(cifar10, damage, monkeypatch):
    config = RunConfig(dataset="cifar10", data_dir=cifar10, allow_partial=True)
    first = load_data(config)
    cache = cifar10 / ".cache/cifar10-32.safetensors"
    content = cache.read_bytes()
    cache.write_bytes(b"something else" * 100 if damage is None else content[:damage])
    assert load_data(config).test.images.equal(first.test.images)
    assert cache.stat().st_size == len(content)
    monkeypatch.setattr(module, "_decode", None)
    assert load_data(config).info == first.info


def test_a_cache_that_cannot_be_written_costs_a_warning(cifar10, monkeypatch):
    config = RunConfig(dataset="cifar10", data_dir=cifar10, allow_partial=True)
    (cifar10 / ".cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="no cache there"):
        assert len(load_data(config).test) == 10
    (cifar10 / ".cache").unlink()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.warns(UserWarning, match="not written .no space left"):
        assert len(load_data(config).test) == 10


def test_two_processes_at_once_do_not_harm_each_other(gtsrb):
    code = (
        "import sys; from eatlib.config import RunConfig; from eatlib.data import load_data;"
        "c = RunConfig(dataset='gtsrb', data_dir=sys.argv[1], allow_partial=True);"
        "print(load_data(c).info.digest)"
    )
    command = [sys.executable, "-c", code, str(gtsrb)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in (gtsrb / ".cache").iterdir()) == [
        "gtsrb-32.safetensors",
        "gtsrb.lock",
    ]


# -------------------------------------------------------------------------------------- real images

GTSRB_TEST_COUNTS = [
    *(60, 720, 750, 450, 660, 630, 150, 450, 450, 480, 660, 420, 690, 720, 270, 210, 150, 360, 390, 60, 90),
    *(90, 120, 150, 90, 480, 180, 60, 150, 90, 150, 270, 60, 210, 120, 390, 120, 60, 690, 90, 90, 60, 90),
]


@pytest.fixture(scope="session")
def real_images(request: pytest.FixtureRequest) -> Path:
    """$EATLIB_DATA, else ../shared/data unpacked where pytest keeps what lasts from run to run."""
    if "EATLIB_DATA" in os.environ:
        return Path(os.environ["EATLIB_DATA"])
    packed = module.ROOT.parent / "shared/data/unpack.py"
    if not packed.exists():
        pytest.skip("no real images: EATLIB_DATA is not set and ../shared/data is not there")
    folder = request.config.cache.mkdir("images")
    subprocess.run([sys.executable, packed, folder], check=True)
    return folder


def load_real(folder: Path, name: str) -> Data:
    present = {"cifar10": "cifar-10-batches-py"}.get(name, name)
    if not (folder / present).exists():
        pytest.skip(f"no real images of {name}: {folder} does not hold {present}")
    return load_data(RunConfig(dataset=name, data_dir=folder, allow_partial=True))


def test_the_real_cifar10_is_complete(real_images):
    data = load_real(real_images, "cifar10")
    assert data.info.complete
    assert (data.info.source_train, data.info.source_test) == (50_000, 10_000)
    assert data.class_counts() == {"train": [4500] * 10, "validation": [500] * 10, "test": [1000] * 10}
    assert data.classes[:3] == ["airplane", "automobile", "bird"]
    images = torch.cat([data.train.images, data.validation.images])
    assert images.shape == (50_000, 3, 32, 32)
    # PAPER's constants are those of the training images.
    mean, std = module._moments(images)
    assert mean == pytest.approx(data.mean, abs=6e-4)
    assert std == pytest.approx(data.std, abs=6e-4)


def test_the_real_gtsrb_has_its_test_counts_and_whole_tracks(real_images):
    data = load_real(real_images, "gtsrb")
    assert data.class_counts()["test"] == GTSRB_TEST_COUNTS
    assert data.info.source_test == 12_630
    assert data.info.complete == (data.info.source_train == 39_209)
    assert min(data.class_counts()["train"]) > 0
    assert min(data.class_counts()["validation"]) > 0
    source = module._source("gtsrb", real_images)
    tracks = torch.tensor(source.read().groups)
    labels = tracks // 100_000
    kept, held_out = module._part(labels, 0.1, 0, tracks)
    assert not set(tracks[kept].tolist()) & set(tracks[held_out].tolist())
    assert (len(kept), len(held_out)) == (len(data.train), len(data.validation))
    assert labels[held_out].equal(data.validation.labels)


def test_the_real_celeba_has_the_labels_of_its_lists(real_images):
    data = load_real(real_images, "celeba")
    assert data.train.images.shape[1:] == (3, 64, 64)
    lines = (real_images / "celeba/list_attr_celeba.txt").read_text().splitlines()[1:]
    columns = [lines[0].split().index(name) + 1 for name in module._CelebA.attributes]
    partition = dict(line.split() for line in (real_images / "celeba/list_eval_partition.txt").read_text().splitlines())
    present = {path.name for path in (real_images / "celeba/img_align_celeba").iterdir()}
    expected = {"0": [], "1": [], "2": []}
    for line in lines[1:]:
        row = line.split()
        if row[0] in present:
            expected[partition[row[0]]].append(int("".join("01"[row[c] == "1"] for c in columns), 2))
    assert data.test.labels.tolist() == expected["2"]
    train = torch.cat([data.train.labels, data.validation.labels])
    assert train.bincount(minlength=8).tolist() == np.bincount(expected["0"], minlength=8).tolist()
    assert data.info.complete == (len(train) == 162_770)
