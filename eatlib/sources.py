"""A data set's name -> its files, labels and classes: one function each, under what else is known of it."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, product
from pathlib import Path
from typing import Any

import numpy as np

Labelled = tuple[Sequence[str | Path | np.ndarray], Sequence[int]]
"""Images, each a file or (H, W, 3) uint8 pixels, and a label each."""


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what to do about it."""


@contextmanager
def about(subject: str | Path, advice: str = "") -> Iterator[None]:
    """Name `subject` in whatever goes wrong: a damaged file or torchvision can raise anything."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        message = str(error).replace("\n", " ")
        raise DataError(f"{subject}: {kind}{message}{advice}") from error


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


Reader = Callable[..., Listing]


@dataclass(frozen=True)
class Source:
    """A data set that configurations can name.

    Attributes:
        read: lists what is there; its arguments are `paths`.
        image_size, augmentation: what `null` stands for in a configuration. Flipping changes the class of a traffic
            sign or a digit.
        paths: files and folders in the data folder; all that is read lies in them.
        archives: what can be downloaded: where it goes and is unpacked, the URL of its folder, and its MD5.
        moments: mean and standard deviation of each channel, of pixels in [0, 1]; None: those of the training images.
        train_images, test_images: numbers of the complete set; None: whatever is there is complete.
        digest: of the complete set (see `eatlib.data`); None: its numbers of images tell.
    """

    read: Reader
    image_size: int
    augmentation: str
    paths: tuple[str, ...] = ()
    archives: tuple[tuple[str, str, str], ...] = ()
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    train_images: int | None = None
    test_images: int | None = None
    digest: str | None = None


SOURCES: dict[str, Source] = {}
"""By name; `folder` stands for every `folder:/path`."""


def source(**facts: Any) -> Callable[[Reader], Reader]:
    """Make the function below a data set of its name, with what else is known of it (see `Source`)."""

    def register(read: Reader) -> Reader:
        SOURCES[read.__name__] = Source(read, **facts)
        return read

    return register


@source(image_size=16, augmentation="none", train_images=1_797)
def digits() -> Listing:
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


@source(
    image_size=32,
    augmentation="crop_flip",
    paths=("cifar-10-batches-py",),
    archives=(("cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/", "c58f30108f718f92721af3b95e74349a"),),
    moments=((0.4914, 0.4823, 0.4468), (0.2470, 0.2435, 0.2616)),
    train_images=50_000,
    test_images=10_000,
    # `cat data_batch_*.bin test_batch.bin | sha256sum` in the binary version gives the same.
    digest="013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522",
)
def cifar10(folder: Path) -> Listing:
    """The batches of the Python version."""

    def unpickled(path: Path) -> dict[str, Any]:
        with about(path), path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()

    def split(pattern: str) -> Labelled:
        batches = [unpickled(path) for path in sorted(folder.glob(pattern))]
        images = [image for batch in batches for image in batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)]
        return images, [label for batch in batches for label in batch["labels"]]

    classes = unpickled(folder / "batches.meta")["label_names"]
    return Listing(classes, split("data_batch_[1-5]"), split("test_batch"))


GTSRB_URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
GTSRB_CLASSES = """speed limit 20, speed limit 30, speed limit 50, speed limit 60, speed limit 70, speed limit 80,
end of speed limit 80, speed limit 100, speed limit 120, no overtaking, no overtaking by trucks,
priority at next crossing, priority road, give way, stop, no vehicles, no trucks, no entry, danger, bend left,
bend right, double bend, uneven road, slippery road, road narrows, road works, traffic signals, pedestrians,
children, bicycles, snow, wild animals, end of all limits, right only, left only, straight only, straight or right,
straight or left, keep right, keep left, roundabout, end of no overtaking, end of no overtaking by trucks"""


@source(
    image_size=32,
    augmentation="crop",
    paths=("gtsrb/GTSRB/Final_Training/Images", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
    archives=(
        ("gtsrb/GTSRB_Final_Training_Images.zip", GTSRB_URL, "f33fd80ac59bff73c82d25ab499e03a3"),
        ("gtsrb/GTSRB_Final_Test_Images.zip", GTSRB_URL, "c7e4e6327067d32654124b0fe9e82185"),
        ("gtsrb/GTSRB_Final_Test_GT.zip", GTSRB_URL, "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
    ),
    moments=((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    train_images=39_209,
    test_images=12_630,
)
def gtsrb(training: Path, test: Path, table: Path) -> Listing:
    """The final training and test set."""
    import pandas as pd

    images = sorted(training.glob("[0-9]*/*.ppm"))
    labels = [int(path.parent.name) for path in images]
    # The 30 photographs of one sign are its track: 00012_00029.ppm is the last of its class's track 12.
    tracks = [label * 100_000 + int(path.name.split("_")[0]) for label, path in zip(labels, images, strict=True)]
    with about(table):
        tested = pd.read_csv(table, sep=";", index_col="Filename")["ClassId"]
    tested = tested[tested.index.isin({path.name for path in test.iterdir()})]
    classes = GTSRB_CLASSES.replace("\n", " ").split(", ")
    return Listing(classes, (images, labels), ([test / name for name in tested.index], tested), tracks)


CELEBA_ATTRIBUTES = ("Heavy_Makeup", "Smiling", "Mouth_Slightly_Open")


@source(
    image_size=64,
    augmentation="crop_flip",
    paths=("celeba/img_align_celeba", "celeba/list_attr_celeba.txt", "celeba/list_eval_partition.txt"),
    moments=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    train_images=162_770,
    test_images=19_962,
)
def celeba(folder: Path, attributes: Path, partitions: Path) -> Listing:
    """Partitions 0 and 2 of the aligned images; each attribute is a bit of the class, the first the highest."""
    import pandas as pd

    with about(attributes):
        labels = (pd.read_csv(attributes, sep=r"\s+", skiprows=1)[[*CELEBA_ATTRIBUTES]] > 0).astype(int) @ [4, 2, 1]
    with about(partitions):
        partition = pd.read_csv(partitions, sep=r"\s+", header=None, index_col=0)[1].reindex(labels.index)
    present = labels.index.isin({path.name for path in folder.iterdir()})
    parts = [labels[present & (partition == number)] for number in (0, 2)]
    classes = [" + ".join(compress(CELEBA_ATTRIBUTES, bits)) or "none" for bits in product((0, 1), repeat=3)]
    return Listing(classes, *(([folder / name for name in part.index], part) for part in parts))


@source(image_size=32, augmentation="crop_flip", paths=(".",))
def folder(root: Path) -> Listing:
    """As torchvision's ImageFolder lists it, but what is hidden, as .ipynb_checkpoints is, is left out."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # a slow import

    own_split = (root / "train").is_dir() or (root / "test").is_dir()
    parts = [root / "train", root / "test"] if own_split else [root]
    classes = [sorted(path.name for path in part.iterdir() if path.is_dir() and path.name[0] != ".") for part in parts]
    if classes[0] != classes[-1] or len(classes[0]) < 2 or not "".join(classes[0]).isprintable():
        allowed = "two or more, in CLASS/, or the same in train/CLASS/ and test/CLASS/"
        raise DataError(f"classes {sorted(set(classes[0]) ^ set(classes[-1])) or classes[0]}; allowed are {allowed}")

    def is_image(path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and "/." not in path.removeprefix(str(root))

    label_of = {name: label for label, name in enumerate(classes[0])}
    found = [make_dataset(part, label_of, is_valid_file=is_image) for part in parts]
    return Listing(classes[0], *(tuple(zip(*part, strict=True)) for part in found))
