"""Studies as a user runs them: real processes, real notebooks, and every way that they may end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from eatlib.config import RunConfig, Study
from eatlib.results import ROOT, RunResult, StudyResults
from eatlib.study import (
    BUSY,
    TRAIN_NOTEBOOK,
    TRAINING_CODE,
    Job,
    Outcome,
    code_changed,
    execute,
    jobs,
    load_study,
    local_gpus,
    run_study,
)

SMALL = {
    "dataset": "digits",
    "model": "vgg16",
    "width": 0.0625,
    "train_samples": 200,
    "test_samples": 60,
    "epochs": 2,
    "batch_size": 50,
    "learning_rate": 0.05,
}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eatlib.study", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def small_study(lambdas: list[float], **fixed: object) -> Study:
    return Study(name="small", label="test", fixed=SMALL | fixed, blocks=[{"grid": {"lambda": lambdas}}])


def wait_for(condition, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_a_study_from_the_command_line_to_the_figures(tmp_path):
    templates = {path: path.read_bytes() for path in (ROOT / "notebooks").glob("*.ipynb")}
    first = command("run", "smoke", "--results", str(tmp_path / "with space"))
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "with space" / "smoke"
    found = StudyResults.load(folder)
    assert len(found.results) == 2
    assert not found.missing
    assert not found.problems
    for name in ("tradeoff.png", "tradeoff.pdf", "tradeoff.ipynb", "tradeoff.html"):
        assert (folder / name).stat().st_size > 1000
    assert load_study("smoke").label in (folder / "tradeoff.html").read_text()
    assert "energy ratio EAT" in first.stdout
    assert str(folder / "tradeoff.html") in first.stdout
    assert not list((folder / "work").glob("*.log")), "a finished run leaves no work behind"
    assert {path: path.read_bytes() for path in templates} == templates

    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    second = command("run", "smoke", "--results", str(tmp_path / "with space"))
    assert second.returncode == 0, second.stderr
    assert "done" not in second.stdout
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before


def test_a_failing_run_is_reported_and_harms_no_other(tmp_path):
    study = Study(
        name="mixed",
        label="test",
        fixed=SMALL,
        blocks=[
            {"fixed": {"penalty_layers": "nowhere*"}, "grid": {"lambda": [1]}},
            {"grid": {"lambda": [0]}},
        ],
    )
    outcomes = run_study(study, tmp_path, workers=2)
    good, bad = sorted(outcomes, key=lambda outcome: outcome.name)
    assert good.status == "done"
    assert bad.status == "failed"
    assert "nowhere" in bad.error
    assert [result.config.lambda_ for result in StudyResults.load(tmp_path / "mixed").results] == [0]
    job = Job(study.runs()[0], tmp_path / "mixed")
    assert not job.result.exists()
    assert "nowhere" in job.notebook.read_text(), "the executed notebook is kept for a look"


def test_missing_data_are_said_once_before_anything_starts(tmp_path):
    missing = [f"folder:{tmp_path}/{name}" for name in ("one", "two")]
    datasets = f"dataset=[{','.join(missing)}]"
    done = command("run", "smoke", "--set", datasets, "--results", str(tmp_path / "results"))
    assert done.returncode == 2
    assert [done.stderr.count(f"{name}': there is no such folder") for name in missing] == [1, 1]
    assert "Traceback" not in done.stderr
    assert "FAILED" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_data_are_downloaded_once_before_anything_starts(tmp_path):
    """There is no network: a proxy that nobody listens at."""
    no_network = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    arguments = ["run", "smoke", "--set", "dataset=cifar10", "train_samples=[300,400]", "--results", str(tmp_path)]
    data = {"EATLIB_DATA": str(tmp_path / "data")} | no_network
    without, download = command(*arguments, **data), command(*arguments, "--download", **data)
    assert (without.returncode, download.returncode) == (2, 2)
    assert "--download" in without.stderr
    assert download.stderr.count("cifar10: download failed") == 1
    assert "FAILED" not in download.stdout
    assert not list(tmp_path.glob("smoke*")), "nothing was written"


def test_a_relative_data_folder_is_from_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EATLIB_DATA", "environment")
    for fixed in ({}, {"data_dir": "field"}):
        (outcome,) = run_study(small_study([0], epochs=1, seed=len(fixed), **fixed), tmp_path / "results")
        assert outcome.status == "done", outcome.error
    caches = {path.parent for path in tmp_path.rglob(".cache")}
    assert caches == {tmp_path / "environment", tmp_path / "field"}


def test_data_of_finished_runs_are_not_needed(tmp_path, make_result):
    study = small_study([0], dataset=f"folder:{tmp_path}/nowhere")
    job = Job(study.runs()[0], tmp_path / study.name)
    make_result(**job.config.to_dict()).save(job.result)
    assert run_study(study, tmp_path) == []


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_result(tmp_path):
    whole = small_study([1.0], epochs=60, threads=1)  # bits depend on the number of threads
    run_study(whole, tmp_path / "whole")
    job = Job(whole.runs()[0], tmp_path / "killed" / whole.name)
    request = {"config": job.config.to_dict(), "folder": str(job.folder), "wait": False, "parent": os.getpid()}
    process = subprocess.Popen([sys.executable, "-m", "eatlib.study", "_execute", json.dumps(request)])
    progress = job.work / "progress.json"
    wait_for(progress.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not job.result.exists()
    assert json.loads(progress.read_text())["epoch"] < 60
    (outcome,) = run_study(whole, tmp_path / "killed")
    assert outcome.status == "done"
    assert re.search(r"resumed after epoch \d", job.notebook.read_text())
    first, second = (
        RunResult.load(path / whole.name / job.result.name) for path in (tmp_path / "whole", tmp_path / "killed")
    )
    assert first.test == second.test
    timeless = [[epoch.model_copy(update={"seconds": 0}) for epoch in r.history] for r in (first, second)]
    assert timeless[0] == timeless[1]


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path, make_result):
    job = Job(RunConfig.parse({"epochs": 1}), tmp_path)
    job.work.mkdir(parents=True)
    with FileLock(job.lock):
        assert execute(job, wait=False) == BUSY
    make_result().save(job.result)
    before = job.result.read_bytes()
    assert execute(job, wait=True) == 0
    assert job.result.read_bytes() == before
    assert not job.notebook.exists(), "nothing was executed"


COUNT_EXECUTIONS = """
import re
from pathlib import Path

def note(cell, runs=Path(__file__).with_name("executions")):
    if run := re.search("(?m)^result_path = .*/(.+)/result.json", cell.raw_cell):
        with runs.open("a") as file:
            file.write(run[1] + "\\n")

get_ipython().events.register("pre_run_cell", note)
"""
"""Run by each kernel as it starts: notes down the runs whose parameters it is given."""


def test_two_runners_execute_each_run_once(tmp_path):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "count.py").write_text(COUNT_EXECUTIONS)
    results = tmp_path / "results"
    arguments = [sys.executable, "-m", "eatlib.study", "run", "smoke", "--workers", "1", "--results", str(results)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(startup.parents[1])}
    runners = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    outputs = [runner.communicate()[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outputs
    found = StudyResults.load(results / "smoke")
    assert not found.problems
    executed = (startup / "executions").read_text().split()
    assert sorted(executed) == sorted(result.config.name for result in found.results)
    assert len(executed) == 2


def test_interrupting_a_study_keeps_what_is_finished_and_leaves_no_process(tmp_path):
    arguments = ["run", "smoke", "--set", "epochs=500", "--workers", "1", "--results", str(tmp_path)]
    runner = subprocess.Popen(
        [sys.executable, "-m", "eatlib.study", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, these tests perhaps, with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: list(tmp_path.glob("*/work/*/progress.json")))
        runner.send_signal(signal.SIGINT)
        _, errors = runner.communicate(timeout=60)
    finally:
        runner.terminate()
    assert runner.returncode == 130
    assert "the next call resumes" in errors
    assert "Traceback" not in errors
    for lock in tmp_path.glob("*/work/*.lock"):
        FileLock(lock, timeout=5).acquire().lock.release()
    assert list(tmp_path.glob("*/work/*/checkpoint/*")), "the next call has something to resume from"
    wait_for(lambda: not [process for process in psutil.process_iter(["cmdline"]) if marked(process, tmp_path)])


def marked(process, path):
    return any(str(path) in argument for argument in process.info["cmdline"] or ())


@pytest.fixture
def cluster(tmp_path):
    """The address of a Dask scheduler with one worker, both processes on this machine, and the worker's pid file."""
    file = tmp_path / "scheduler.json"
    dask = str(Path(sys.executable).with_name("dask"))
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([dask, "scheduler", "--port", "0", *common], env=environment),
        subprocess.Popen([dask, "worker", "--nthreads", "2", *common], env=environment, cwd=tmp_path),
    ]
    wait_for(file.exists)
    yield json.loads(file.read_text())["address"]
    for process in processes:
        process.terminate()
        process.wait()


def two_kinds(**second: object) -> Study:
    """A run as it comes, and one that differs from it in `second`."""
    blocks = [{"grid": {"seed": [0]}}, {"grid": {"seed": [1]}, "fixed": second}]
    return Study(name="kinds", label="test", fixed=SMALL, blocks=blocks)


@pytest.mark.parametrize(("own", "cores", "expected"), [(2, 8, [4, 2]), (8, 8, [8, 8]), (None, 1, [1, 1])])
def test_each_run_has_its_own_threads_or_an_equal_share_of_the_cores(tmp_path, monkeypatch, own, cores, expected):
    def tell(job, *, wait, threads, stop):
        return Outcome(job.name, "done", seconds=threads)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("eatlib.study._cores", lambda: cores)
    monkeypatch.setattr("eatlib.study.MEMORY_PER_RUN", 1)
    monkeypatch.setattr("eatlib.study.run_process", tell)
    monkeypatch.setattr("eatlib.study._check_data", lambda todo: None)
    study = two_kinds(threads=own)
    threads = {outcome.name: outcome.seconds for outcome in run_study(study, tmp_path)}
    assert [threads[run.name] for run in study.runs()] == expected


@pytest.mark.parametrize("installed", [True, False])
def test_the_dashboard_is_shown_where_there_is_one(tmp_path, monkeypatch, capsys, installed):
    monkeypatch.setattr("eatlib.study.find_spec", lambda name: installed or None)
    monkeypatch.setattr("eatlib.study.run_process", lambda job, **_: Outcome(job.name, "done"))
    monkeypatch.setattr("eatlib.study._check_data", lambda todo: None)
    run_study(small_study([0]), tmp_path)
    assert ("Dask dashboard: http://127.0.0.1:" in capsys.readouterr().out) is installed


def test_only_the_runs_that_use_a_gpu_ask_for_one(tmp_path, monkeypatch):
    from dask.distributed import LocalCluster

    def meet(job, *, wait, threads, stop):
        """With a GPU: be alone with it, and wait for the run that needs none, which must not be waiting for it."""
        if job.config.device == "cpu":
            (job.folder / "cpu").touch()
        else:
            with (job.folder / "gpu").open("x"):
                wait_for((job.folder / "cpu").exists)
            (job.folder / "gpu").unlink()
        return Outcome(job.name, "done")

    monkeypatch.setattr("eatlib.study.run_process", meet)
    blocks = [{"fixed": {"device": "cuda"}, "grid": {"seed": [0, 1]}}, {"fixed": {"device": "cpu", "seed": 2}}]
    study = Study(name="kinds", label="test", fixed=SMALL, blocks=blocks)
    options = {"n_workers": 1, "processes": False, "dashboard_address": None, "resources": {"GPU": 1}}
    with LocalCluster(threads_per_worker=3, **options) as cluster:
        outcomes = run_study(study, tmp_path, scheduler=cluster.scheduler_address)
    assert [outcome.status for outcome in outcomes] == ["done"] * 3


def test_a_study_runs_on_a_cluster(tmp_path, cluster):
    done = command("run", "smoke", "--results", str(tmp_path), DASK_SCHEDULER_ADDRESS=cluster)
    assert done.returncode == 0, done.stderr
    assert len(StudyResults.load(tmp_path / "smoke").results) == 2
    # The data that count are those of the workers, which may see others than this machine.
    nowhere = ["--set", f"dataset=folder:{tmp_path}/nowhere", "lambda=[0]"]
    done = command("run", "smoke", *nowhere, "--results", str(tmp_path), "--scheduler", cluster)
    assert done.returncode == 1
    assert "there is no such folder" in done.stdout


def test_a_worker_that_dies_is_replaced(tmp_path, cluster):
    from dask.distributed import Client

    arguments = ["run", "smoke", "--set", "epochs=40", "--results", str(tmp_path), "--scheduler", cluster]
    runner = subprocess.Popen([sys.executable, "-m", "eatlib.study", *arguments], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("*/work/*/progress.json")))
    with Client(cluster) as client:
        (process,) = client.run(os.getpid).values()
    os.kill(process, signal.SIGKILL)
    output, _ = runner.communicate(timeout=300)
    assert runner.returncode == 0, output
    assert len(StudyResults.load(tmp_path / "smoke@epochs=40").results) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nope"], "unknown study 'nope'; there are: "),
        (["run", "smoke", "--set", "epochs=0"], "epochs = 0"),
        (["run", "smoke", "--set", "epoch=1"], "did you mean 'epochs'"),
        (["run", "smoke", "--set", "epochs"], "must be FIELD=VALUE"),
        (["run", "smoke", "--workers", "0"], "--workers 0"),
        (["run", "smoke", "--measure"], "--measure is for --dry-run"),
        (["run", "smoke", "--dry-run", "--measure", "--set", "device=cuda:99"], "not on this machine"),
        (["run", "smoke", "--set", "seed=0", "--set", "seed=1"], "set twice"),
        (["run", "smoke", "--set", "dataset=folder:here"], "from the root"),
        (["run", "smoke", "--set", "train_samples=5000"], "train_samples = 5000: digits allows 3 to "),
        (["run", "smoke", "--frob"], "--frob"),
        (["run", "smoke", "--scheduler", "tcp://127.0.0.1:9"], "no Dask scheduler answers"),
        (["clean", "nope"], "has no results"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_exits_2(tmp_path, arguments, message):
    done = command(*arguments, "--results", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_results_folder_is_said(tmp_path):
    tmp_path.chmod(0o500)
    done = command("run", "smoke", "--results", str(tmp_path))
    assert done.returncode == 2
    assert "cannot write to the results folder" in done.stderr


def test_a_file_where_results_should_go_is_said(tmp_path):
    (tmp_path / "results").write_text("")
    done = command("run", "smoke", "--results", str(tmp_path / "results"))
    assert done.returncode == 2
    assert "cannot write to the results folder" in done.stderr


def test_a_dry_run_shows_the_runs_and_changes_nothing(tmp_path):
    done = command("run", "smoke", "--dry-run", "--results", str(tmp_path / "results"))
    assert done.returncode == 0
    assert done.stdout.count("missing\n") == 2
    assert "left: no estimate for 2 of 2 runs, as no like has run here" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_learns_from_like_runs_of_any_size(tmp_path, make_result):
    def past(name: str, seconds: float, device: str = "cpu", **config: object) -> None:
        """One epoch of 70 images."""
        result = make_result(model="vgg16", width=0.0625, **config)
        history = [result.history[0].model_copy(update={"seconds": seconds})]
        provenance = result.provenance.model_copy(update={"device": device})
        result.model_copy(update={"history": history, "provenance": provenance}).save(tmp_path / "past" / name)

    def dry_run(*options: str) -> str:
        done = command("run", "smoke", "--dry-run", *options, "--results", str(tmp_path), CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stderr
        return done.stdout

    past("on another device.json", 1, device="cuda:0")
    past("with other images.json", 1, image_size=32)
    assert "left: no estimate for 2 of 2 runs" in dry_run()
    past("like.json", 7)
    *_, standard, penalised, left = dry_run().splitlines()
    assert standard.endswith("missing, about 48 s"), "2 epochs of 80% of 300 images, 0.1 s each"
    assert penalised.endswith("missing")
    assert re.search("left: about 48 s .*; no estimate for 1 of 2 runs", left)
    past("like.json", 7, dataset="folder:/of/sixteen/by/sixteen", image_size=16)
    past("with penalty.json", 14, **{"lambda": 3})
    for line in ("without penalty, on cpu: 10 images/s", "with penalty, on cpu: 5 images/s", "missing, about 96 s"):
        assert line in dry_run()
    for job in jobs(load_study("smoke"), tmp_path):
        make_result(**job.config.to_dict()).save(job.result)
    assert dry_run().endswith("left: nothing\n")
    assert dry_run("--force").count("again about") == 2


def test_a_dry_run_measures_what_has_not_run_here(tmp_path):
    arguments = ["run", "smoke", "--dry-run", "--measure", "--results", str(tmp_path / "results")]
    done = command(*arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"on cpu: [\d,]+ images/s, measured now", done.stdout)) == 2
    assert len(re.findall(r"missing, about \d+ s\n", done.stdout)) == 2
    assert re.search(r"left: about \d+ s of training on this machine", done.stdout)
    assert "no estimate" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_code_are_stale(tmp_path, monkeypatch, make_result):
    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    code = tmp_path / TRAINING_CODE[0]
    code.parent.mkdir()
    code.write_text("old")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr("eatlib.study.ROOT", tmp_path)
    here = {"git_commit": git("rev-parse", "HEAD"), "git_clean": True}
    made = make_result()

    def changed(**provenance):
        return code_changed(made.model_copy(update={"provenance": made.provenance.model_copy(update=provenance)}))

    assert changed(**here) is False
    (tmp_path / "README.md").write_text("new")
    assert changed(**here) is False
    code.write_text("new")
    assert changed(**here) is True
    assert changed(git_commit=here["git_commit"], git_clean=False) is None
    assert changed(git_commit="0" * 40, git_clean=True) is None
    assert changed(git_commit=None, git_clean=None) is None


def test_force_executes_what_has_a_result(tmp_path):
    study = small_study([0], epochs=1)
    assert len(run_study(study, tmp_path)) == 1
    assert run_study(study, tmp_path) == []
    (path,) = (tmp_path / "small").glob("*.json")
    before = path.stat().st_ino, RunResult.load(path).test
    (outcome,) = run_study(study, tmp_path, force=True)
    assert outcome.status == "done"
    assert path.stat().st_ino != before[0]
    assert RunResult.load(path).test == before[1]


def test_clean_keeps_results_and_what_is_not_a_study(tmp_path, make_result):
    folder = tmp_path / "results" / "some"
    make_result().save(folder / "run.json")
    (tmp_path / "notebooks").mkdir()
    (folder / "work" / "run").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    for name in ("some", "..", "../results/some"):  # the first has no study.yaml yet
        assert command("clean", name, "--results", str(folder.parent)).returncode == 2
    (folder / "study.yaml").write_text(small_study([0]).to_yaml())
    with FileLock(folder / "work" / "run.lock"):
        assert command("clean", "some", "--results", str(folder.parent)).returncode == 2
    assert (folder / "work" / "run").is_dir()
    assert command("clean", "some", "--results", str(folder.parent)).returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "study.yaml", "work"]
    assert not (folder / "work" / "run").exists()
    assert (tmp_path / "notebooks").is_dir()


def test_list_shows_changed_studies_and_clean_cleans_them(tmp_path, make_result):
    study = load_study("smoke", {"epochs": 3})
    first, _ = jobs(study, tmp_path)
    make_result(**first.config.to_dict()).save(first.result)
    (first.folder / "study.yaml").write_text(study.to_yaml())
    first.notebook.parent.mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.yaml").write_text("blocks: 1")
    done = command("list", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^smoke +0 of +2 runs done", done.stdout)
    assert re.search(r"(?m)^smoke@epochs=3 +1 of +2 runs done", done.stdout)
    assert str(tmp_path / "broken") in done.stderr
    assert command("clean", "smoke@epochs=3", "--results", str(tmp_path)).returncode == 0
    assert {path.name for path in first.folder.iterdir()} == {first.result.name, "study.yaml"}


def test_a_file_that_is_no_result_is_named_and_kept(tmp_path, capsys):
    study = small_study([0], epochs=1)
    job = Job(study.runs()[0], tmp_path / study.name)
    job.folder.mkdir()
    job.result.write_text('{"precious": 1}')
    (outcome,) = run_study(study, tmp_path)
    assert outcome.status == "done"
    assert "precious" in capsys.readouterr().err
    (aside,) = (job.folder / "work").glob("*.json.*")
    assert aside.read_text() == '{"precious": 1}'


def test_gpus_are_only_those_that_can_be_used(tmp_path, monkeypatch):
    driver = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for script, expected in (
        ("echo 0; echo 1", ["0", "1"]),
        ("echo NVIDIA-SMI has failed; exit 9", []),
        ("echo No devices were found", []),
    ):
        driver.write_text(f"#!/bin/sh\n{script}\n")
        driver.chmod(0o755)
        assert local_gpus() == expected
    for visible, expected in (("", []), ("-1", []), ("2,GPU-1f", ["2", "GPU-1f"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert local_gpus() == expected


def test_a_killed_run_is_called_killed(tmp_path):
    study = small_study([0], epochs=500)
    job = Job(study.runs()[0], tmp_path / study.name)

    def kill():
        wait_for((job.work / "progress.json").exists)
        (process,) = [p for p in psutil.Process().children() if "_execute" in p.cmdline()]
        process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    (outcome,) = run_study(study, tmp_path)
    killer.join()
    assert outcome.status == "failed"
    assert "killed by SIGKILL" in outcome.error


def test_failed_runs_and_missing_standard_training_end_in_1_and_a_sentence(tmp_path):
    done = command("run", "smoke", "--set", "lambda=[1]", "learning_rate=1e30", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "the loss became nan in epoch 1" in done.stdout
    assert "no standard training" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("instead", ["sigmoid: float = 1", "other = dict(\n    sigma = 1,\n)", "# sigma = 1"])
def test_a_notebook_without_a_parameter_is_refused_before_anything_starts(tmp_path, monkeypatch, instead):
    import nbformat

    from eatlib.study import StudyError

    notebook = nbformat.read(TRAIN_NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub("(?m)^sigma: .*", instead, cell.source)
    changed = tmp_path / "changed.ipynb"
    nbformat.write(notebook, changed)
    monkeypatch.setattr("eatlib.study.TRAIN_NOTEBOOK", changed)
    with pytest.raises(StudyError, match="has no parameter sigma"):
        run_study(small_study([0]), tmp_path / "results")


@pytest.mark.parametrize("study", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_valid(study):
    assert Study.load(study).runs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nope"], "unknown study 'nope'"), (["--frob"], "unknown option --frob"), (["smoke"], "Python 3.11 or newer")],
)
def test_run_all_refuses_before_it_installs_anything(tmp_path, arguments, message):
    """In a copy without .venv, with a PATH that has no Python."""
    for name in ("run_all.sh", "requirements.txt", "studies"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "basename", "dirname", "tr", "cmp", "mktemp", "cat", "env", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [str(tools / "bash"), str(tmp_path / "run_all.sh"), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": str(tools), "HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()
