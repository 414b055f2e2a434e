"""One run's process: where it runs, and what it leaves to those that start from its weights."""

import threading

import pytest

from eatlib import steps
from eatlib.config import RunConfig


def test_runs_at_the_same_time_have_a_gpu_each(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 1,GPU-7,-1,x")
    monkeypatch.setattr(steps.tempfile, "gettempdir", lambda: str(tmp_path))
    assert steps.local_gpus() == ["0", "1", "GPU-7"]
    held, barrier = [], threading.Barrier(3)

    def hold() -> None:
        with steps.gpu_of_its_own(RunConfig(), ["0", "1", "GPU-7"]) as gpu:
            held.append(gpu)
            barrier.wait(timeout=10)

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(held) == ["0", "1", "GPU-7"]
    for config, gpus in ((RunConfig(device="cpu"), ["0"]), (RunConfig(), [])):
        with steps.gpu_of_its_own(config, gpus) as gpu:
            assert gpu is None


def test_a_slurm_job_waits_for_no_other_whose_gpu_has_the_same_number(monkeypatch, tmp_path):
    monkeypatch.setattr(steps.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    held = []

    def hold() -> None:
        with steps.gpu_of_its_own(RunConfig(), ["0"]) as gpu:
            held.append(gpu)

    with steps.gpu_of_its_own(RunConfig(), ["0"]):
        monkeypatch.setenv("SLURM_JOB_ID", "2")
        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert held == ["0"]


@pytest.fixture
def folder(tmp_path, monkeypatch, make_result, make_study):
    """A study of runs a, b from a, c from b, and d from a, of which a and b are done; training makes results up."""

    def execute(notebook, output, parameters, **_):
        config = RunConfig.parse({name: parameters[name] for name in RunConfig.model_fields})
        make_result(**config.to_dict()).save(f"{parameters['work_dir']}/result.json")

    monkeypatch.setattr("papermill.execute_notebook", execute)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    a = RunConfig(epochs=1)
    b, d = (RunConfig(epochs=1, lambda_=value, start=a.hash) for value in (1, 2))
    c = RunConfig(epochs=1, lambda_=3, start=b.hash)
    names = make_study(tmp_path / "made-up", [a, b, c, d])
    for run in (a, b):
        make_result(**run.to_dict()).save(tmp_path / "made-up" / f"{names[run.hash]}.json")
    (tmp_path / "made-up" / f"{names[a.hash]}.safetensors").touch()
    return tmp_path / "made-up", *(names[run.hash] for run in (a, b, c, d))


def test_weights_stay_while_a_run_that_starts_from_them_is_trained_once_more(folder):
    """b's weights are gone, so that it is trained once more for c, from those of a; meanwhile, d is over."""
    path, a, b, _, d = folder
    (path / "work" / b).mkdir(parents=True)
    steps.train(path, d)
    assert (path / f"{a}.safetensors").exists()
    (path / "work" / b).rmdir()
    (path / f"{d}.json").unlink()
    steps.train(path, d)
    assert not (path / f"{a}.safetensors").exists()


def test_what_is_done_leaves_no_trace_of_being_at_work(folder):
    path, _, b, _, _ = folder
    steps.train(path, b)
    assert not (path / "work" / b).exists()
