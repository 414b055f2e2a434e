import torch

from eatlib.config import RunConfig
from eatlib.data import batches, load_data, training_batches


def test_digits_come_in_disjoint_stratified_splits():
    data = load_data(RunConfig())
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.shape[1:] == (3, 16, 16)
    for split in (data.train, data.validation, data.test):
        counts = split.labels.bincount(minlength=10) / len(split)
        assert (counts - 0.1).abs().max() < 0.01


def test_an_epoch_has_every_image_once():
    data = load_data(RunConfig(train_samples=101, test_samples=50))
    assert len(data.train) + len(data.validation) == 101
    assert len(data.test) == 50
    generator = torch.Generator().manual_seed(0)
    epoch = list(training_batches(data.train, 30, "none", generator))
    assert [len(labels) for _, labels in epoch] == [30, 30, 31]
    images = torch.cat([images for images, _ in epoch])
    assert images.long().sum() == data.train.images.long().sum()
    assert torch.cat([labels for _, labels in batches(data.test, 30)]).equal(data.test.labels)
