"""A data set's name -> its files, labels and classes: one decorated function each."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, product
from pathlib import Path
from typing import Any

import numpy as np

from eatlib.config import DATASETS, DatasetFacts

Labelled = tuple[Sequence[Path | np.ndarray], Sequence[int]]
"""Images, each a file or (H, W, 3) uint8 pixels, and a label each."""


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what to do about it."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name what was read in whatever goes wrong: a damaged file can raise anything."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        name = os.fsencode(path).decode(errors="backslashreplace")
        raise DataError(f"{name}: cannot be read ({type(error).__name__}: {error}); see data/README.md") from error


@dataclass(frozen=True)
class Listing:
    """What a data set holds.

    Attributes:
        classes: their names; a label is a position in this list.
        test: None: a part of the training images is kept for testing.
        groups: a number for each training image; images of one number stay on one side of a split.
    """

    classes: list[str]
    train: Labelled
    test: Labelled | None = None
    groups: list[int] | None = None


@dataclass(frozen=True)
class Source:
    """A data set that configurations can name.

    Attributes:
        read: lists what the data folder, its argument, holds.
        paths: files and folders that must be in the data folder; all that is read lies in them.
        by_hand: what a person does to get them; `{root}` is the data folder.
        files: what torchvision can fetch: path in the data folder -> URL, or Google Drive's name for it, and MD5.
        moments: mean and standard deviation of each channel, of pixels in [0, 1]; None: those of the training images.
        digest: of the complete set (see `eatlib.data.cache`); None: its numbers of images tell.
        package: the installed package that the images come with, if they lie in no data folder.
    """

    name: str
    read: Callable[[Path], Listing]
    facts: DatasetFacts
    paths: tuple[str, ...] = ()
    by_hand: str = "put its files in {root}"
    files: dict[str, tuple[str, str]] | None = None
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    digest: str | None = None
    package: str | None = None

    def advice(self, root: Path) -> str:
        """How to get the files, and where they lie then."""
        way = "Either set download: true (--download), or by hand" if self.files else "By hand"
        places = " and ".join(str(root / path) for path in self.paths)
        made = f"{self.by_hand.format(root=root)}, which makes {places}"
        return f"{way}: {made}. Data elsewhere: set data_dir or EATLIB_DATA"

    def download(self, root: Path) -> None:
        """Have torchvision fetch, verify and unpack the files; what is whole already is not fetched again."""
        from torchvision.datasets import utils  # a slow import

        try:
            for path, (address, md5) in (self.files or {}).items():
                fetch = utils.download_url if "://" in address else utils.download_file_from_google_drive
                fetch(address, str((root / path).parent), Path(path).name, md5)
                if not path.endswith(".txt"):
                    utils.extract_archive(str(root / path))
        except Exception as error:  # torchvision and gdown raise what they please, on several lines
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"{self.name}: download failed ({why}). {self.advice(root)}") from error


SOURCES: dict[str, Source] = {}


def source(name: str, facts: DatasetFacts | None = None, **fields: Any) -> Callable:
    """Make the decorated function, data folder -> `Listing`, a data set that configurations can name.

    Args:
        facts: what is known of it before it is there; of the built-in ones, `eatlib.config` knows it.
        fields: the other fields of `Source`.
    """

    def register(read: Callable[[Path], Listing]) -> Callable[[Path], Listing]:
        DATASETS[name] = facts or DATASETS[name]
        SOURCES[name] = Source(name, read, DATASETS[name], **fields)
        return read

    return register


@source("digits", package="scikit-learn")
def digits(root: Path) -> Listing:
    """1,797 digits of 8x8 pixels, in 17 shades of grey."""
    from sklearn.datasets import load_digits  # a slow import

    found = load_digits()
    grey = np.round(found.images * (255 / 16)).astype(np.uint8)
    return Listing([str(digit) for digit in range(10)], (np.repeat(grey[..., None], 3, axis=3), found.target))


class _ArrayUnpickler(pickle.Unpickler):
    """For arrays, lists, dicts, strings, bytes and numbers. Any other pickle can run code when it is read."""

    array_parts = ("numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct", "_codecs.encode")

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # its name before NumPy 2
        if full_name not in self.array_parts:
            raise pickle.UnpicklingError(f"{full_name} is not part of an array")
        return super().find_class(module, name)


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


@source(
    "cifar10",
    paths=("cifar-10-batches-py",),
    by_hand=f"unpack {CIFAR10_URL} in {{root}}",
    files={"cifar-10-python.tar.gz": (CIFAR10_URL, "c58f30108f718f92721af3b95e74349a")},
    moments=((0.4914, 0.4823, 0.4468), (0.2470, 0.2435, 0.2616)),
    # `cat data_batch_*.bin test_batch.bin | sha256sum` in the binary version gives the same.
    digest="013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522",
)
def cifar10(root: Path) -> Listing:
    folder = root / "cifar-10-batches-py"

    def split(pattern: str) -> Labelled:
        images, labels = [], []
        for path in sorted(folder.glob(pattern)):
            with reading(path), path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()
                images += [*batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)]
                labels += map(int, batch["labels"])
        return images, labels

    meta = folder / "batches.meta"
    with reading(meta), meta.open("rb") as file:
        classes = _ArrayUnpickler(file, encoding="latin1").load()["label_names"]
    return Listing(classes, split("data_batch_[1-5]"), split("test_batch"))


GTSRB_URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
GTSRB_CLASSES = """speed limit 20, speed limit 30, speed limit 50, speed limit 60, speed limit 70, speed limit 80,
end of speed limit 80, speed limit 100, speed limit 120, no overtaking, no overtaking by trucks,
priority at next crossing, priority road, give way, stop, no vehicles, no trucks, no entry, danger, bend left,
bend right, double bend, uneven road, slippery road, road narrows, road works, traffic signals, pedestrians,
children, bicycles, snow, wild animals, end of all limits, right only, left only, straight only, straight or right,
straight or left, keep right, keep left, roundabout, end of no overtaking, end of no overtaking by trucks"""
GTSRB_MD5 = {
    "GTSRB_Final_Training_Images.zip": "f33fd80ac59bff73c82d25ab499e03a3",  # torchvision's train split is another one
    "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
    "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
}


@source(
    "gtsrb",
    paths=("gtsrb/GTSRB/Final_Training/Images", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
    by_hand=f"unpack {', '.join(GTSRB_MD5)} from {GTSRB_URL} in {{root}}/gtsrb",
    files={f"gtsrb/{name}": (GTSRB_URL + name, md5) for name, md5 in GTSRB_MD5.items()},
    moments=((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
)
def gtsrb(root: Path) -> Listing:
    import pandas as pd

    training, test, table = (root / path for path in SOURCES["gtsrb"].paths)
    images = sorted(training.glob("[0-9]*/*.ppm"))
    labels = [int(path.parent.name) for path in images]
    # The 30 photographs of one sign are its track: 00012_00029.ppm is the last of its class's track 12.
    tracks = [label * 100_000 + int(path.name.split("_")[0]) for label, path in zip(labels, images, strict=True)]
    with reading(table):
        tested = pd.read_csv(table, sep=";", index_col="Filename")["ClassId"]
    tested = tested[tested.index.isin({path.name for path in test.iterdir()})]
    classes = GTSRB_CLASSES.replace("\n", " ").split(", ")
    return Listing(classes, (images, labels), ([test / name for name in tested.index], tested), tracks)


CELEBA_ATTRIBUTES = ("Heavy_Makeup", "Smiling", "Mouth_Slightly_Open")
CELEBA_FILES = {
    "img_align_celeba.zip": ("0B7EVK8r0v71pZjFTYXZWM3FlRnM", "00d2c5bc6d35e252742224ab0c1e8fcb"),
    "list_attr_celeba.txt": ("0B7EVK8r0v71pblRyaVFSWGxPY0U", "75e246fa4810816ffd6ee81facbd244c"),
    "list_eval_partition.txt": ("0B7EVK8r0v71pY0NSMzRuSXJEVkk", "d32c9cbf5e040fd4025c592c306e6668"),
}


@source(
    "celeba",
    paths=("celeba/img_align_celeba", "celeba/list_attr_celeba.txt", "celeba/list_eval_partition.txt"),
    by_hand=f"put {', '.join(CELEBA_FILES)} from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (its Google Drive "
    "has a daily quota: another day may do) into {root}/celeba and unpack the first there",
    files={f"celeba/{name}": origin for name, origin in CELEBA_FILES.items()},
    moments=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
)
def celeba(root: Path) -> Listing:
    """Partitions 0 and 2 of the aligned images; each attribute is a bit of the class, the first the highest."""
    import pandas as pd

    folder, attributes, partitions = (root / path for path in SOURCES["celeba"].paths)
    with reading(attributes):
        labels = (pd.read_csv(attributes, sep=r"\s+", skiprows=1)[[*CELEBA_ATTRIBUTES]] > 0).astype(int) @ [4, 2, 1]
    with reading(partitions):
        partition = pd.read_csv(partitions, sep=r"\s+", header=None, index_col=0)[1].reindex(labels.index)
    present = labels.index.isin({path.name for path in folder.iterdir()})
    parts = [labels[present & (partition == number)] for number in (0, 2)]
    classes = [" + ".join(compress(CELEBA_ATTRIBUTES, bits)) or "none" for bits in product((0, 1), repeat=3)]
    return Listing(classes, *(([folder / name for name in part.index], part) for part in parts))


LAYOUT = "images of two classes or more go to CLASS/, or to train/CLASS/ and test/CLASS/ with the same classes"


@source("folder", paths=(".",), by_hand=LAYOUT + " in {root}")
def folder(root: Path) -> Listing:
    """As torchvision's ImageFolder lists it, but what is hidden, as .ipynb_checkpoints is, is left out."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # a slow import

    own_split = (root / "train").is_dir() or (root / "test").is_dir()
    parts = [root / "train", root / "test"] if own_split else [root]
    classes = [sorted(path.name for path in part.glob("[!.]*") if path.is_dir()) for part in parts]
    if classes[0] != classes[-1] or len(classes[0]) < 2 or not "".join(classes[0]).isprintable():
        different = set(classes[0]) ^ set(classes[-1])
        raise DataError(f"{root}: {LAYOUT}; found {sorted(different or classes[0])}")

    def is_image(path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and "/." not in path.removeprefix(str(root))

    label_of = {name: label for label, name in enumerate(classes[0])}
    found = [make_dataset(part, label_of, is_valid_file=is_image) for part in parts]
    return Listing(classes[0], *(([Path(path) for path, _ in part], [label for _, label in part]) for part in found))
