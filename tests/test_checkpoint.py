"""What survives an interruption, to the last bit; and what no run goes on from."""

import random

import pytest
import torch
from safetensors.torch import save_file
from test_training import assert_same_weights, configuration, one_thread, without_timings  # noqa: F401

from eatlib import results
from eatlib.checkpoint import CheckpointError, load
from eatlib.data import load_data
from eatlib.training import evaluate, fit


class StopHereError(Exception):
    pass


def interrupt_after(epoch: int):
    def on_epoch(record: results.Epoch) -> None:
        if record.epoch == epoch:
            raise StopHereError

    return on_epoch


def test_interrupted_and_resumed_is_uninterrupted(tmp_path):
    epochs = 4
    stop = random.randint(1, epochs)
    config = configuration(epochs=epochs, save_weights=True, warmup_epochs=1)
    whole = fit(config, weights_path=tmp_path / "whole.safetensors")
    checkpoint = tmp_path / "c" / "checkpoint.pt"
    with pytest.raises(StopHereError):
        fit(config, checkpoint=checkpoint, weights_path=tmp_path / "no.safetensors", on_epoch=interrupt_after(stop))
    assert not (tmp_path / "no.safetensors").exists()
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    torch.rand(3)
    seen = []
    resumed = fit(config, checkpoint=checkpoint, weights_path=tmp_path / "resumed.safetensors", on_epoch=seen.append)
    assert [epoch.epoch for epoch in seen] == list(range(stop + 1, epochs + 1))
    assert without_timings(resumed) == without_timings(whole), f"interrupted after epoch {stop}"
    assert_same_weights(tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors")
    assert resumed.provenance.wall_seconds >= sum(epoch.seconds for epoch in resumed.history)


def test_interrupted_with_dropout(tmp_path):
    """Dropout draws from PyTorch's own generator, whose state has to survive too."""
    changes = {"model": "squeezenet1_1", "width": 1.0, "image_size": 32, "train_samples": 64, "test_samples": 20}
    config = configuration(**changes, epochs=2, learning_rate=0.01)
    whole = fit(config)
    with pytest.raises(StopHereError):
        fit(config, checkpoint=tmp_path / "c", on_epoch=interrupt_after(1))
    assert without_timings(fit(config, checkpoint=tmp_path / "c")) == without_timings(whole)


def spoil(path, how: str) -> None:
    """Make a checkpoint one that no run can go on from."""
    content = path.read_bytes()
    state = torch.load(path)
    if how in state["made of"]:
        state["made of"][how] = "another"
        torch.save(state, path)
    else:
        half = len(content) // 2
        damaged = {"truncated": content[:half], "empty": b"", "text": b"{}", "garbled": content[:half] * 2}
        path.write_bytes(damaged[how])


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "text", "garbled", "configuration", "data digest", "code", "PyTorch"]
)
def test_a_checkpoint_that_is_not_this_runs_and_this_codes_is_set_aside(tmp_path, how):
    config, checkpoint = configuration(epochs=2), tmp_path / "checkpoint.pt"
    whole = fit(config)
    with pytest.raises(StopHereError):
        fit(config, checkpoint=checkpoint, on_epoch=interrupt_after(1))
    spoil(checkpoint, how)
    with pytest.warns(UserWarning, match=r"moved to .*checkpoint\.set-aside, training anew: "):
        again = fit(config, checkpoint=checkpoint)
    assert (tmp_path / "checkpoint.set-aside").exists()
    assert without_timings(again) == without_timings(whole)


def test_a_checkpoint_of_another_number_of_threads_is_another_runs(tmp_path):
    fit(configuration(epochs=1), checkpoint=tmp_path / "c")
    with pytest.warns(UserWarning, match="its configuration is"):
        fit(configuration(epochs=1, threads=2), checkpoint=tmp_path / "c")


def test_weights_are_kept_and_loaded(tmp_path):
    config = configuration(epochs=1, save_weights=True)
    data = load_data(config)
    result = fit(config, data=data, weights_path=tmp_path / "run_0.5.safetensors")
    result.save(tmp_path / "run_0.5.json")
    for name in ("run_0.5.json", "run_0.5.safetensors"):
        model, loaded = load(tmp_path / name)
        assert loaded == config
        assert not model.training
        again = evaluate(model, data.test, batch_size=64)
        assert again.accuracy == result.test.accuracy
        assert again.loss == pytest.approx(result.test.loss, rel=1e-4)
    with pytest.raises(FileNotFoundError, match="save_weights"):
        load(tmp_path / "other.json")
    for metadata in (None, {}, {"config": "?"}, {"config": "{}"}):
        save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors", metadata)
        with pytest.raises(CheckpointError, match="no trained weights of eatlib"):
            load(tmp_path / "foreign.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no trained weights of eatlib"):
        load(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="weights_path=PATH"):
        fit(config)
