"""What survives an interruption, to the last bit; and what no run goes on from."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import assert_same_weights, configuration, one_thread, without_timings  # noqa: F401

from eatlib import results
from eatlib.checkpoint import CheckpointError, load, load_start
from eatlib.data import load_data
from eatlib.models import build_model
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
    whole = fit(config, save_weights_to=tmp_path / "whole.safetensors")
    checkpoint = tmp_path / "c" / "checkpoint.pt"
    with pytest.raises(StopHereError):
        fit(config, checkpoint=checkpoint, save_weights_to=tmp_path / "no.safetensors", on_epoch=interrupt_after(stop))
    assert not (tmp_path / "no.safetensors").exists()
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    torch.rand(3)
    seen = []
    resumed = fit(config, checkpoint=checkpoint, save_weights_to=tmp_path / "resumed.safetensors", on_epoch=seen.append)
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
    "how", ["truncated", "empty", "text", "garbled", "configuration", "data digest", "device", "code", "PyTorch"]
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
    result = fit(config, data=data, save_weights_to=tmp_path / "run_0.5.safetensors")
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


# --- where a run starts ---------------------------------------------------------------------------------------------


def test_a_run_starts_from_weights(tmp_path):
    path = tmp_path / "first.safetensors"
    first = fit(configuration(epochs=2), save_weights_to=path)
    changes = {"epochs": 1, "learning_rate": 1e-9, "lambda": 0.0}
    for config, start in (
        (configuration(start=first.config_hash, **changes), path),
        (configuration(start=str(path), **changes), None),
    ):
        fit(config, start=start, save_weights_to=tmp_path / "second.safetensors")
        before, after = (load_file(file)["fc.weight"] for file in (path, tmp_path / "second.safetensors"))
        torch.testing.assert_close(before, after)
        assert config.hash not in (first.config_hash, configuration(**changes).hash)
    with pytest.raises(CheckpointError, match=f"start = '{first.config_hash}': no such file"):
        fit(configuration(start=first.config_hash, **changes))
    config = configuration(start=str(path), **changes)
    fit(configuration(epochs=2, seed=1), save_weights_to=path)
    with pytest.raises(CheckpointError, match="no such file, or another one by now"):
        fit(config)
    assert configuration(start=str(path), **changes).hash != config.hash


def test_weights_of_another_network_are_refused_by_layer(tmp_path):
    path = tmp_path / "w.safetensors"
    fit(configuration(epochs=1), save_weights_to=path)
    with pytest.raises(CheckpointError, match=r"differ: features\.conv1_1\.weight \[4, 3, 3, 3\], not \[8, 3, 3, 3\]"):
        fit(configuration(start=str(path), width=0.125))
    tensors = load_file(path)
    save_file(tensors | {"fc.weight": torch.zeros(7, 32), "fc.bias": torch.zeros(7)}, path)
    with pytest.raises(CheckpointError, match=r"2 tensors differ: fc\.weight \[7, 32\], not \[10, 32\]"):
        fit(configuration(start=str(path)))
    fit(configuration(start=str(path), new_head=True, epochs=1))


def test_torchvisions_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = configuration(
        model="squeezenet1_1", width=1, image_size=32, start="torchvision:IMAGENET1K_V1", new_head=True
    )
    with pytest.raises(CheckpointError, match=r"squeezenet1_1-b8a52dc0\.pth is not there; download: true may fetch it"):
        fit(config)
    with pytest.raises(CheckpointError, match="torchvision has no such weights of squeezenet1_1"):
        fit(config.model_copy(update={"start": "torchvision:NONE"}))
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", lambda self, **_: squeezenet1_1().state_dict())
    model = build_model("squeezenet1_1", classes=10, image_size=32)
    load_start(model, config.model_copy(update={"download": True}), None)
