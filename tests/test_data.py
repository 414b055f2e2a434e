"""Each source in a made-up copy: what is read, what is refused, what is downloaded, and the cache."""

import os
import pickle
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import eatlib.data
from eatlib.config import RunConfig
from eatlib.data import SOURCES, Data, DataError, Listing, load_data
from eatlib.results import ROOT
from eatlib.sources import source


def load(dataset: str, root: Path, allow_partial: bool = True, **fields) -> Data:
    return load_data(RunConfig(dataset=dataset, data_dir=root, allow_partial=allow_partial, **fields))


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def cifar10_dir(tmp_path: Path) -> Path:
    """60 images; image i is a square of the value i. In protocol 2, as the published batches are."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for part, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        pixels = np.repeat(np.arange(part * 10, part * 10 + 10, dtype=np.uint8)[:, None], 3072, axis=1)
        (folder / name).write_bytes(pickle.dumps({"labels": [0, 1] * 5, "data": pixels}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car"]}))
    return tmp_path


@pytest.fixture
def gtsrb_dir(tmp_path: Path) -> Path:
    """Classes 1 and 7, 5 tracks of 3 images, in the colour (class, track, 0); 4 test images, one absent."""
    root = tmp_path / "gtsrb"
    for label, track, frame in np.ndindex(2, 5, 3):
        name = f"GTSRB/Final_Training/Images/{1 + 6 * label:05d}/{track:05d}_{frame:05d}.ppm"
        write_image(root / name, (1 + 6 * label, track, 0))
    for number, label in ((0, 7), (1, 1), (3, 1)):
        write_image(root / f"GTSRB/Final_Test/Images/{number:05d}.ppm", (label, 9, 9))
    rows = [f"{number:05d}.ppm;32;{label}" for number, label in enumerate((7, 1, 7, 1))]
    (root / "GT-final_test.csv").write_text("\n".join(["Filename;Width;ClassId", *rows]))
    return tmp_path


@pytest.fixture
def celeba_dir(tmp_path: Path) -> Path:
    """Images 1 to 24, of value 10 i; partitions 0, 0, 1, 2 in turn; image 24 is absent."""
    attributes, partitions = ["24", "Smiling Bald Heavy_Makeup Mouth_Slightly_Open"], []
    for number in range(1, 25):
        smiling, makeup, mouth = (1 if number >> bit & 1 else -1 for bit in (1, 2, 0))
        attributes.append(f"{number:06d}.png {smiling:2d} -1 {makeup:2d} {mouth:2d}")
        partitions.append(f"{number:06d}.png {(2, 0, 0, 1)[number % 4]}")
        if number != 24:
            write_image(tmp_path / f"celeba/img_align_celeba/{number:06d}.png", (10 * number,) * 3, (178, 218))
    (tmp_path / "celeba/list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    (tmp_path / "celeba/list_eval_partition.txt").write_text("\n".join(partitions) + "\n")
    return tmp_path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """train/ and test/ with 10 images each of cat and dog, in the colour (100 for a dog, its number, 7)."""
    for split, label, number in np.ndindex(2, 2, 10):
        name = f"{('train', 'test')[split]}/{('cat', 'dog')[label]}/{number}.png"
        write_image(tmp_path / "own" / name, (100 * label, number, 7))
    return tmp_path / "own"


def load_own(folder: Path) -> Data:
    return load(f"folder:{folder}", folder.parent / "data", allow_partial=False, image_size=8)


def test_cifar10_is_known_by_its_content(cifar10_dir, monkeypatch):
    data = load("cifar10", cifar10_dir, validation_share=0.2)
    assert (data.info.complete, data.classes) == (False, ["plane", "car"])
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert data.test.labels.tolist() == [0, 1] * 5
    assert (data.train.labels.bincount().tolist(), data.validation.labels.bincount().tolist()) == ([20, 20], [5, 5])
    digest = sha256(b"".join(bytes([i % 2]) + bytes([i]) * 3072 for i in range(60))).hexdigest()
    assert data.info.digest == digest
    assert data.mean == (0.4914, 0.4823, 0.4468)
    published = replace(SOURCES["cifar10"], train_images=50, test_images=10)
    monkeypatch.setitem(SOURCES, "cifar10", published)
    with pytest.raises(DataError, match=f"50 training and 10 test images found .digest {digest}"):
        load("cifar10", cifar10_dir, allow_partial=False)
    monkeypatch.setitem(SOURCES, "cifar10", replace(published, digest=digest))
    assert load("cifar10", cifar10_dir, allow_partial=False).info.complete


def test_a_partial_set_needs_leave(cifar10_dir):
    (cifar10_dir / "cifar-10-batches-py/data_batch_3").unlink()
    message = r"40 training and 10 test images found .*, the complete set has 50000 and 10000 .*allow_partial: true"
    for _ in range(2):  # decoded, and from the cache
        with pytest.raises(DataError, match=message):
            load("cifar10", cifar10_dir, allow_partial=False)
        data = load("cifar10", cifar10_dir)
        assert (data.info.complete, data.info.source_train) == (False, 40)
    (cifar10_dir / "cifar-10-batches-py/test_batch").unlink()
    with pytest.raises(DataError, match="40 training and 0 test images found"):
        load("cifar10", cifar10_dir)


@pytest.mark.parametrize("name", ["batches.meta", "test_batch"])
def test_a_file_that_is_no_batch_is_named_and_runs_no_code(cifar10_dir, name):
    path = cifar10_dir / "cifar-10-batches-py" / name
    for content in (pickle.dumps({"labels": [], "data": os.getcwd}), b"\x80\x04]q", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"cifar-10-batches-py/{name}: (Unpickling|EOF)Error"):
            load("cifar10", cifar10_dir)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{name}: not a regular file"):
        load("cifar10", cifar10_dir)


def test_gtsrb_keeps_tracks_together(gtsrb_dir, monkeypatch):
    monkeypatch.setitem(SOURCES, "gtsrb", replace(SOURCES["gtsrb"], train_images=30, test_images=3))
    for seed in range(3):
        data = load("gtsrb", gtsrb_dir, allow_partial=False, validation_share=0.4, split_seed=seed)
        train, validation = (
            {tuple(color) for color in split.images[:, :2, 0, 0].tolist()} for split in (data.train, data.validation)
        )
        assert not train & validation
        assert (len(train), len(validation), len(data.train), len(data.validation)) == (6, 4, 18, 12)
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.train.images[:, 0, 0, 0].long().equal(data.train.labels)
    assert data.test.labels.tolist() == [7, 1, 1]  # the absent one is not counted
    assert (len(data.classes), data.classes[14]) == (43, "stop")
    assert data.info.complete


def test_gtsrb_with_a_foreign_class_or_table_is_refused(gtsrb_dir):
    write_image(gtsrb_dir / "gtsrb/GTSRB/Final_Training/Images/00043/00000_00000.ppm", (0, 0, 0))
    with pytest.raises(DataError, match="classes 1 to 43 found; allowed are 0 to 42"):
        load("gtsrb", gtsrb_dir)
    (gtsrb_dir / "gtsrb/GT-final_test.csv").write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match=r"GT-final_test\.csv: ValueError"):
        load("gtsrb", gtsrb_dir)


def test_celeba_has_eight_classes_of_three_attributes(celeba_dir):
    data = load("celeba", celeba_dir)
    assert data.test.images.shape[1:] == (3, 64, 64)
    assert data.test.images[:, 0, 0, 0].tolist() == [40, 80, 120, 160, 200]  # 24 is absent
    assert data.test.labels.tolist() == [4, 0, 4, 0, 4]  # the bits of the number, by construction
    train = torch.cat([data.train.images, data.validation.images])[:, 0, 0, 0].long() // 10
    assert sorted(train.tolist()) == [number for number in range(1, 24) if number % 4 in (1, 2)]
    assert torch.cat([data.train.labels, data.validation.labels]).equal(train % 8)
    assert (data.classes[0], data.classes[5]) == ("none", "Heavy_Makeup + Mouth_Slightly_Open")


def test_a_folder_of_ones_own_with_and_without_a_test_split(own):
    Image.new("LA", (9, 50), (3, 100)).save(own / "train/cat/grey.png")
    for hidden in (".ipynb_checkpoints/0.png", "train/.trash/0.png", "test/cat/.ipynb_checkpoints/0.png"):
        write_image(own / hidden, (1, 2, 3))
    (own / "test/cat/.#0.png").symlink_to("nowhere")
    data = load_own(own)
    assert (len(data.train), len(data.validation), len(data.test)) == (19, 2, 20)
    assert (data.info.complete, data.classes) == (True, ["cat", "dog"])
    assert data.test.images[:, 0, 0, 0].long().equal(data.test.labels * 100)
    assert data.mean[0] == pytest.approx(float(data.train.images[:, 0].double().mean()) / 255, abs=1e-4)
    flat = load_own(own / "test")
    assert (len(flat.train), len(flat.validation), flat.info.source_test) == (14, 2, 4)
    assert flat.test.labels.bincount().tolist() == [2, 2]


IMAGE = "own/train/dog/3.png"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("own", shutil.rmtree, "No such file .*own'"),
        ("own/test", shutil.rmtree, "No such file .*own/test'"),
        ("own/test/dog", lambda path: path.rename(path.with_name("wolf")), r"classes \['dog', 'wolf'\]; allowed are"),
        ("own", lambda path: [path.joinpath(split, "a\udcff").mkdir() for split in ("train", "test")], r"'a\\udcff'"),
        ("own/test/dog", lambda path: [image.unlink() for image in path.iterdir()], "no valid file .* dog"),
        (IMAGE, lambda path: path.write_bytes(path.read_bytes()[:60]), f"{IMAGE}: .*truncated"),
        (IMAGE, lambda path: path.write_text("hello"), f"{IMAGE}: .*cannot identify"),
        (IMAGE, lambda path: Image.new("I;16", (8, 8)).save(path), f"{IMAGE}: pixels of type I;16"),
        (IMAGE, lambda path: Image.new("F", (8, 8)).save(path, format="TIFF"), f"{IMAGE}: pixels of type F"),
        (IMAGE, lambda path: path.write_bytes(b"P6 20000 20000 255\n"), f"{IMAGE}: .*decompression bomb"),
        (IMAGE, lambda path: path.write_bytes(b"P6 10000 10000 255\n"), f"{IMAGE}: .*decompression bomb"),
        (IMAGE, lambda path: Image.new("RGB", (8, 8)).save(path, format="EPS"), f"{IMAGE}: .*cannot identify"),
        (IMAGE, lambda path: (path.unlink(), os.mkfifo(path)), f"{IMAGE}: not a regular file"),
        (IMAGE, lambda path: (path.unlink(), path.symlink_to("nowhere")), f"No such file .*{IMAGE}"),
        ("own", lambda path: [(path / f"train/dog/{i}").symlink_to("..") for i in "ab"], "dog/.: the same folder as"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(own, name, spoil, message):
    spoil(own.parent / name)
    with pytest.raises(DataError, match=message):
        load_own(own)


def test_a_data_set_of_ones_own_is_one_function(tmp_path, monkeypatch):
    pixels = [np.full((4, 6, 3), 40 * number, np.uint8) for number in range(6)]
    monkeypatch.setitem(SOURCES, "shades", None)  # so that the test leaves no other

    @source(image_size=8, augmentation="crop", train_images=6)
    def shades() -> Listing:
        return Listing(["dark", "light"], (pixels, [0, 0, 0, 1, 1, 1]))

    data = load("shades", tmp_path / "six", allow_partial=False)
    assert [split.labels.sort().values.tolist() for split in (data.train, data.validation, data.test)] == [[0, 1]] * 3
    assert data.test.images.shape == (2, 3, 8, 8)
    assert (data.info.complete, RunConfig(dataset="shades").augmentation) == (True, "crop")
    pixels[0] = np.zeros((4, 6, 3))
    with pytest.raises(DataError, match=r"an image is float64 \(4, 6, 3\); it must be uint8"):
        load("shades", tmp_path / "floats")


@pytest.mark.parametrize("name", ["cifar10", "gtsrb", "celeba"])
def test_what_is_absent_is_named_and_the_readme_says_what_makes_it(tmp_path, monkeypatch, name):
    archives = [archive for archive, _, _ in SOURCES[name].archives]
    assert all(Path(path).name in (ROOT / "data/README.md").read_text() for path in [*SOURCES[name].paths, *archives])
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", Mock(side_effect=OSError("no\nnetwork")))
    absent = f"{name}: FileNotFoundError: .*{tmp_path}/{SOURCES[name].paths[0]}.*data/README.md"
    for download, message in ((False, absent), (True, "no network.*data/README.md" if archives else absent)):
        with pytest.raises(DataError, match=message) as caught:
            load(name, tmp_path, download=download)
        assert ("--download" in str(caught.value)) == (name != "celeba")


def test_what_is_absent_is_downloaded_on_request(gtsrb_dir, monkeypatch):
    """Stands in for the server: torchvision's own unpacking does the rest."""
    served = gtsrb_dir / "served"
    shutil.move(gtsrb_dir / "gtsrb", served)
    for name, inside in (("Training_Images", "GTSRB/Final_Training"), ("Test_Images", "GTSRB/Final_Test")):
        shutil.make_archive(str(served / f"GTSRB_Final_{name}"), "zip", served, inside)
    shutil.make_archive(str(served / "GTSRB_Final_Test_GT"), "zip", served, "GT-final_test.csv")

    def serve(url: str, root: str, filename: str, md5: str) -> None:
        assert len(md5) == 32
        Path(root).mkdir(exist_ok=True)
        shutil.copy(served / Path(url).name, Path(root) / filename)

    monkeypatch.setitem(SOURCES, "gtsrb", replace(SOURCES["gtsrb"], train_images=30, test_images=3))
    for download in (serve, None):  # the second time it is there
        monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
        assert load("gtsrb", gtsrb_dir, allow_partial=False, download=True).info.complete


def test_images_are_decoded_once_for_a_size_and_a_state_of_the_files(gtsrb_dir, monkeypatch):
    decoded, decode = [], eatlib.data._decode
    monkeypatch.setattr(eatlib.data, "_decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    first, again = load("gtsrb", gtsrb_dir), load("gtsrb", gtsrb_dir)
    assert (again.info, len(decoded)) == (first.info, 1)
    assert again.train.images.equal(first.train.images)
    assert again.train.labels.equal(first.train.labels)
    smaller = load("gtsrb", gtsrb_dir, image_size=16)
    assert (smaller.test.images.shape[1:], len(decoded)) == ((3, 16, 16), 2)
    assert smaller.info.digest == first.info.digest  # taken before resizing
    write_image(gtsrb_dir / "gtsrb/GTSRB/Final_Test/Images/00000.ppm", (200, 200, 200))
    changed = load("gtsrb", gtsrb_dir)
    assert (changed.test.images[0, 0, 0, 0], len(decoded)) == (200, 3)
    training = gtsrb_dir / "gtsrb/GTSRB/Final_Training/Images"
    (training / "00001/00004_00002.ppm").rename(training / "00007/00005_00000.ppm")
    assert load("gtsrb", gtsrb_dir).info.digest not in (first.info.digest, changed.info.digest)
    load("gtsrb", gtsrb_dir.rename(gtsrb_dir.with_name("moved")))
    assert len(decoded) == 4


@pytest.mark.parametrize("damage", [0, 7, 5000, None])
def test_a_damaged_cache_is_made_anew(cifar10_dir, damage, monkeypatch):
    written, save = set(), torch.save
    monkeypatch.setattr(torch, "save", lambda content, path: written.add(path) or save(content, path))
    first = load("cifar10", cifar10_dir)
    (path,) = cifar10_dir.glob(".cache/*")
    path.write_bytes(b"something else" * 100 if damage is None else path.read_bytes()[:damage])
    assert load("cifar10", cifar10_dir).test.images.equal(first.test.images)
    monkeypatch.setattr(eatlib.data, "_decode", None)
    assert load("cifar10", cifar10_dir).info == first.info
    assert len(written) == 2  # each writer has a file of its own: there may be several at once


def test_a_cache_that_cannot_be_written_costs_a_warning(cifar10_dir, monkeypatch):
    (cifar10_dir / ".cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not written .*File exists"):
        assert len(load("cifar10", cifar10_dir).test) == 10
    (cifar10_dir / ".cache").unlink()

    def full(_: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="not written .no space left"):
        assert len(load("cifar10", cifar10_dir).test) == 10
    assert not list((cifar10_dir / ".cache").iterdir())
