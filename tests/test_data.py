"""Splits and the cache; each source in a made-up copy, and the real images where there are any."""

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eatlib.config import DATASETS, DatasetFacts, RunConfig
from eatlib.data import Data, DataError, Listing, cache, load_data, source
from eatlib.data.sources import SOURCES


def load(dataset: str, root: Path, allow_partial: bool = True, **fields) -> Data:
    return load_data(RunConfig(dataset=dataset, data_dir=root, allow_partial=allow_partial, **fields))


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


# ------------------------------------------------------------------------- made-up sets in each layout


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
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in enumerate((7, 1, 7, 1)):
        rows.append(f"{number:05d}.ppm;32;32;0;0;31;31;{label}")
        if number != 2:
            write_image(root / f"GTSRB/Final_Test/Images/{number:05d}.ppm", (label, 9, 9))
    (root / "GT-final_test.csv").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture
def celeba_dir(tmp_path: Path) -> Path:
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


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """train/ and test/ with 10 images each of cat and dog, in the colour (100 for a dog, its number, 7)."""
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for number in range(10):
                write_image(tmp_path / f"own/{split}/{name}/{number}.png", (100 * label, number, 7))
    return tmp_path / "own"


def load_own(folder: Path) -> Data:
    return load(f"folder:{folder}", folder.parent / "data", allow_partial=False, image_size=8)


def test_cifar10_is_known_by_its_content(cifar10_dir):
    data = load("cifar10", cifar10_dir, validation_share=0.2)
    assert not data.info.complete
    assert data.classes == ["plane", "car"]
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert data.test.labels.tolist() == [0, 1] * 5
    assert data.class_counts() == {"train": [20, 20], "validation": [5, 5], "test": [5, 5]}
    records = b"".join(bytes([i % 2]) + bytes([i]) * 3072 for i in range(60))
    assert data.info.digest == sha256(records).hexdigest()
    assert data.mean == (0.4914, 0.4823, 0.4468)


def test_a_partial_set_needs_leave(cifar10_dir):
    (cifar10_dir / "cifar-10-batches-py/data_batch_3").unlink()
    message = r"40 training and 10 test images found .*, the complete set has 50000 and 10000 .*allow_partial: true"
    with pytest.raises(DataError, match=message):
        load("cifar10", cifar10_dir, allow_partial=False)
    data = load("cifar10", cifar10_dir)
    assert (data.info.complete, data.info.source_train) == (False, 40)
    with pytest.raises(DataError, match=message):
        load("cifar10", cifar10_dir, allow_partial=False)
    (cifar10_dir / "cifar-10-batches-py/test_batch").unlink()
    with pytest.raises(DataError, match="40 training and 0 test images found"):
        load("cifar10", cifar10_dir)


def test_a_set_of_the_right_size_with_other_content_is_not_complete(cifar10_dir, monkeypatch):
    small = replace(SOURCES["cifar10"], facts=DatasetFacts(32, "none", 50, 10))
    monkeypatch.setitem(SOURCES, "cifar10", small)
    digest = load("cifar10", cifar10_dir).info.digest
    with pytest.raises(DataError, match=f"50 training and 10 test images found .digest {digest}"):
        load("cifar10", cifar10_dir, allow_partial=False)
    monkeypatch.setitem(SOURCES, "cifar10", replace(small, digest=digest))
    assert load("cifar10", cifar10_dir, allow_partial=False).info.complete


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_1", "test_batch"])
def test_a_pickle_runs_no_code_and_is_named_if_damaged(cifar10_dir, name):
    path = cifar10_dir / "cifar-10-batches-py" / name
    for content in (pickle.dumps({"labels": [], "data": Malicious(cifar10_dir / "ran")}), b"\x80\x04]q", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"cifar-10-batches-py/{name}: cannot be read"):
            load("cifar10", cifar10_dir)
    assert not (cifar10_dir / "ran").exists()


def test_gtsrb_keeps_tracks_together(gtsrb_dir, monkeypatch):
    for seed in range(3):
        data = load("gtsrb", gtsrb_dir, validation_share=0.4, split_seed=seed)
        tracks = [
            {tuple(color) for color in split.images[:, :2, 0, 0].tolist()} for split in (data.train, data.validation)
        ]
        assert not tracks[0] & tracks[1]
        assert (len(tracks[0]), len(tracks[1])) == (6, 4)
        assert (len(data.train), len(data.validation)) == (18, 12)
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.train.images[:, 0, 0, 0].long().equal(data.train.labels)
    assert data.test.labels.tolist() == [7, 1, 1]  # the absent one is not counted
    assert (len(data.classes), data.classes[14]) == (43, "stop")
    assert not data.info.complete
    counts = DatasetFacts(32, "none", 30, 3)
    monkeypatch.setitem(SOURCES, "gtsrb", replace(SOURCES["gtsrb"], facts=counts))
    assert load("gtsrb", gtsrb_dir, allow_partial=False).info.complete


def test_gtsrb_with_a_foreign_class_or_table_is_refused(gtsrb_dir):
    write_image(gtsrb_dir / "gtsrb/GTSRB/Final_Training/Images/00043/00000_00000.ppm", (0, 0, 0))
    with pytest.raises(DataError, match="classes 1 to 43 found; allowed are 0 to 42"):
        load("gtsrb", gtsrb_dir)
    (gtsrb_dir / "gtsrb/GT-final_test.csv").write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match=r"GT-final_test\.csv: cannot be read"):
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
    assert not data.info.complete
    (celeba_dir / "celeba/list_attr_celeba.txt").write_text("1\nSmiling\n000001.png 1\n")
    with pytest.raises(DataError, match=r"list_attr_celeba\.txt: cannot be read"):
        load("celeba", celeba_dir)


def test_a_folder_of_ones_own_with_and_without_a_test_split(own):
    Image.new("LA", (9, 50), (3, 100)).save(own / "train/cat/grey.png")
    for hidden in (".ipynb_checkpoints/0.png", "train/.trash/0.png", "test/cat/.ipynb_checkpoints/0.png"):
        write_image(own / hidden, (1, 2, 3))
    (own / "test/cat/.#0.png").symlink_to("nowhere")
    data = load_own(own)
    assert (len(data.train), len(data.validation), len(data.test)) == (19, 2, 20)
    assert data.classes == ["cat", "dog"]
    assert data.test.images[:, 0, 0, 0].long().equal(data.test.labels * 100)
    assert data.info.complete
    assert data.mean[0] == pytest.approx(float(data.train.images[:, 0].double().mean()) / 255, abs=1e-4)
    flat = load_own(own / "test")
    assert (len(flat.train), len(flat.validation), len(flat.test)) == (14, 2, 4)
    assert flat.class_counts()["test"] == [2, 2]
    assert flat.info.source_test == 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own: shutil.rmtree(own), r"no .*own\. By hand: images of two classes or more go to CLASS/"),
        (lambda own: shutil.rmtree(own / "test"), r"own: images of .*; found \['cat', 'dog'\]"),
        (lambda own: (own / "test/dog").rename(own / "test/wolf"), r"; found \['dog', 'wolf'\]"),
        (lambda own: [shutil.rmtree(own / split / "dog") for split in ("train", "test")], r"; found \['cat'\]"),
        (lambda own: [(own / split / "new").mkdir() for split in ("train", "test")], "no valid file .* new"),
        (lambda own: [(own / split / "a\udcff").mkdir() for split in ("train", "test")], r"; found \['a\\udcff'"),
    ],
)
def test_a_folder_in_another_layout_is_refused(own, spoil, message):
    spoil(own)
    with pytest.raises(DataError, match=message) as caught:
        load_own(own)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "truncated"),
        (lambda path: path.write_text("hello"), "cannot identify"),
        (lambda path: Image.fromarray(np.full((8, 8), 300, np.uint16)).save(path), "pixels of type I;16"),
        (lambda path: Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path, format="TIFF"), "pixels of type F"),
        (lambda path: path.write_bytes(b"P6 20000 20000 255\n"), "decompression bomb"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a file"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(own, spoil, message):
    spoil(own / "train/dog/3.png")
    with pytest.raises(DataError, match=message) as caught:
        load_own(own)
    assert "own/train/dog/3.png" in str(caught.value)


def test_a_data_set_of_ones_own_is_one_function(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "shades", None)
    monkeypatch.setitem(SOURCES, "shades", None)
    (tmp_path / "shades.npy").touch()

    @source("shades", DatasetFacts(8, "crop", train_images=6), paths=("shades.npy",))
    def shades(root: Path) -> Listing:
        images = [np.full((4, 6, 3), 40 * number, np.uint8) for number in range(6)]
        return Listing(["dark", "light"], (images, [0, 0, 0, 1, 1, 1]))

    data = load("shades", tmp_path, allow_partial=False)
    assert data.class_counts() == {"train": [1, 1], "validation": [1, 1], "test": [1, 1]}
    assert data.test.images.shape == (2, 3, 8, 8)
    assert (data.info.complete, RunConfig(dataset="shades").augmentation) == (True, "crop")

    (tmp_path / "shades.npy").write_text("changed")
    source("shades", paths=("shades.npy",))(lambda root: Listing(["a", "b"], (np.zeros((9, 4, 6, 3)), [0] * 9)))
    with pytest.raises(DataError, match=r"an image is float64 \(4, 6, 3\); it must be uint8"):
        load("shades", tmp_path)


# --------------------------------------------------------------------------------- fetching and caching


def test_what_to_fetch_and_where_to_put_it_is_said(tmp_path, monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no\nnetwork")

    for name in ("download_file_from_google_drive", "_urlretrieve", "_get_redirect_url"):
        monkeypatch.setattr(f"torchvision.datasets.utils.{name}", no_network)
    monkeypatch.setenv("EATLIB_DATA", str(tmp_path))
    for name, words in {
        "cifar10": ["cifar-10-python.tar.gz", "cifar-10-batches-py"],
        "gtsrb": ["GTSRB_Final_Training_Images.zip", "Final_Training/Images", "GT-final_test.csv"],
        "celeba": ["img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt", "quota"],
    }.items():
        for download in (False, True):
            with pytest.raises(DataError) as caught:
                load_data(RunConfig(dataset=name, download=download))
            for word in [*words, "--download", str(tmp_path), "EATLIB_DATA"]:
                assert word in str(caught.value)
            assert ("download failed (OSError: no network)" in str(caught.value)) == download


def test_a_half_unpacked_set_is_downloaded_again_on_request(gtsrb_dir, tmp_path, monkeypatch):
    """Stands in for the server: torchvision's own unpacking does the rest."""
    served = tmp_path / "served"
    shutil.copytree(gtsrb_dir / "gtsrb", served)
    for name, inside in {
        "GTSRB_Final_Training_Images": "GTSRB/Final_Training",
        "GTSRB_Final_Test_Images": "GTSRB/Final_Test",
        "GTSRB_Final_Test_GT": "GT-final_test.csv",
    }.items():
        shutil.make_archive(str(served / name), "zip", served, inside)

    def serve(url: str, root: str, filename: str, md5: str) -> None:
        assert len(md5) == 32
        Path(root).mkdir(parents=True, exist_ok=True)
        shutil.copy(served / Path(url).name, Path(root) / filename)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", serve)
    small = replace(SOURCES["gtsrb"], facts=DatasetFacts(32, "none", 30, 3))
    monkeypatch.setitem(SOURCES, "gtsrb", small)
    image = gtsrb_dir / "gtsrb/GTSRB/Final_Training/Images/00007/00002_00001.ppm"
    for damage in (image.unlink, lambda: image.write_bytes(b"P6 40")):
        damage()
        with pytest.raises(DataError, match=r"--download|cannot be read"):
            load("gtsrb", gtsrb_dir, allow_partial=False)
        assert load("gtsrb", gtsrb_dir, allow_partial=False, download=True).info.complete
    assert load("gtsrb", tmp_path / "elsewhere", allow_partial=False, download=True).info.source_train == 30


def test_images_are_decoded_once_for_a_size_a_state_of_the_files_and_a_version(gtsrb_dir, monkeypatch):
    decoded = []
    decode = cache._decode
    monkeypatch.setattr(cache, "_decode", lambda *arguments: decoded.append(1) or decode(*arguments))
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
    assert changed.info.digest != first.info.digest
    monkeypatch.setattr(cache, "CACHE_VERSION", 0)
    load("gtsrb", gtsrb_dir)
    monkeypatch.setattr(cache, "FileLock", None)  # a folder that can only be read: what is cached needs no lock
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("gtsrb", gtsrb_dir)
    assert len(decoded) == 4


@pytest.mark.parametrize("damage", [0, 7, 5000, None])
def test_a_half_written_cache_is_never_used(cifar10_dir, damage, monkeypatch):
    first = load("cifar10", cifar10_dir)
    (path,) = cifar10_dir.glob(".cache/*.pt")
    content = path.read_bytes()
    path.write_bytes(b"something else" * 100 if damage is None else content[:damage])
    assert load("cifar10", cifar10_dir).test.images.equal(first.test.images)
    assert path.stat().st_size == len(content)
    monkeypatch.setattr(cache, "_decode", None)
    assert load("cifar10", cifar10_dir).info == first.info


def test_a_cache_that_cannot_be_written_costs_a_warning(cifar10_dir, monkeypatch):
    (cifar10_dir / ".cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="no cache there"):
        assert len(load("cifar10", cifar10_dir).test) == 10
    (cifar10_dir / ".cache").unlink()

    def full(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="not written .no space left"):
        assert len(load("cifar10", cifar10_dir).test) == 10
    assert [path.suffix for path in (cifar10_dir / ".cache").iterdir()] == [".lock"]


def test_two_processes_at_once_do_not_harm_each_other(gtsrb_dir):
    code = (
        "import sys; from eatlib.config import RunConfig; from eatlib.data import load_data;"
        "c = RunConfig(dataset='gtsrb', data_dir=sys.argv[1], allow_partial=True);"
        "print(load_data(c).info.digest)"
    )
    command = [sys.executable, "-c", code, str(gtsrb_dir)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in (gtsrb_dir / ".cache").iterdir()) == ["gtsrb-32.pt", "gtsrb.lock"]
