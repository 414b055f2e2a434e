"""The published data sets, where they are: $EATLIB_DATA, else unpacked from ../shared/data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eatlib import load
from eatlib.config import RunConfig
from eatlib.data import SOURCES, Data, _moments, load_data
from eatlib.results import ROOT, RunResult
from eatlib.training import evaluate

GTSRB_TEST_COUNTS = [
    *(60, 720, 750, 450, 660, 630, 150, 450, 450, 480, 660, 420, 690, 720, 270, 210, 150, 360, 390, 60, 90),
    *(90, 120, 150, 90, 480, 180, 60, 150, 90, 150, 270, 60, 210, 120, 390, 120, 60, 690, 90, 90, 60, 90),
]


@pytest.fixture(scope="session")
def real_images(request: pytest.FixtureRequest) -> Path:
    """$EATLIB_DATA, else ../shared/data unpacked where pytest keeps what lasts from run to run."""
    if "EATLIB_DATA" in os.environ:
        return Path(os.environ["EATLIB_DATA"])
    packed = ROOT.parent / "shared/data/unpack.py"
    if not packed.exists():
        pytest.skip("no real images: EATLIB_DATA is not set and ../shared/data is not there")
    folder = request.config.cache.mkdir("images")
    subprocess.run([sys.executable, packed, folder], check=True)
    return folder


def load_real(folder: Path, name: str) -> tuple[Data, torch.Tensor]:
    """The data set, and the labels of its training and validation images."""
    if not all((folder / path).exists() for path in SOURCES[name].paths):
        pytest.skip(f"no real images of {name} in {folder}")
    data = load_data(RunConfig(dataset=name, data_dir=folder, allow_partial=True))
    return data, torch.cat([data.train.labels, data.validation.labels])


def test_the_real_cifar10_is_complete(real_images):
    data, labels = load_real(real_images, "cifar10")
    assert data.info.complete
    assert data.classes[:3] == ["airplane", "automobile", "bird"]
    counts = [split.bincount().tolist() for split in (labels, data.validation.labels, data.test.labels)]
    assert counts == [[5000] * 10, [500] * 10, [1000] * 10]
    # PAPER's constants are those of the training images.
    mean, std = _moments(torch.cat([data.train.images, data.validation.images]))
    assert (*mean, *std) == pytest.approx((*data.mean, *data.std), abs=6e-4)


def test_the_real_gtsrb_has_its_test_counts(real_images):
    data, labels = load_real(real_images, "gtsrb")
    assert data.test.labels.bincount().tolist() == GTSRB_TEST_COUNTS
    assert data.info.complete == (len(labels) == 39_209)
    assert len(labels.unique()) == 43


def test_the_real_celeba_has_the_published_shares_of_its_attributes(real_images):
    data, labels = load_real(real_images, "celeba")
    shares = [(labels >> bit & 1).double().mean().item() for bit in (2, 1, 0)]
    assert shares == pytest.approx([0.387, 0.482, 0.483], abs=0.02)
    assert data.info.complete == (len(labels) == 162_770)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results/reference").rglob("*.safetensors")), ids=lambda path: path.stem
)
def test_a_committed_network_does_what_its_result_says(real_images, path):
    model, config = load(path)
    test = load_real(real_images, config.dataset)[0].test[:2000]
    found, whole = evaluate(model, test), RunResult.load(path.with_suffix(".json")).test
    assert found.accuracy == pytest.approx(whole.accuracy, abs=0.03)
    for accounting, energy in found.energy.items():
        assert energy.ratio == pytest.approx(whole.energy[accounting].ratio, abs=0.01)
