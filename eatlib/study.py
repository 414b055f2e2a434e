"""A study -> the runs that are missing -> papermill, here or on a cluster.

    python -m eatlib.study run quick
    python -m eatlib.study list

Each run is a process of its own that executes `notebooks/1_train.ipynb` with papermill; Dask says where and when.
In `results/<study>/`, `<run>.json` is the one sign that a run is done; `notebooks/` holds the executed notebooks
and `work/` what a run needs while it is not done: its lock, log, checkpoint and progress.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from eatlib import estimate
from eatlib.config import ConfigError, RunConfig, Study
from eatlib.results import ROOT, ResultError, RunResult, write_atomically

STUDIES = ROOT / "studies"
RESULTS = ROOT / "results"
TRAIN_NOTEBOOK = ROOT / "notebooks" / "1_train.ipynb"
TRADEOFF_NOTEBOOK = ROOT / "notebooks" / "2_tradeoff.ipynb"

TRAINING_CODE = [
    f"eatlib/{module}.py" for module in ("config", "data", "models", "activations", "penalties", "energy", "training")
]
"""What decides the numbers in a result; when it changes, older results are stale."""

DATA_FIELDS = {
    "dataset",
    "image_size",
    "train_samples",
    "test_samples",
    "validation_share",
    "split_seed",
    "allow_partial",
    "data_dir",
    "download",
}
"""Fields of a configuration that say which images its run sees, and where they are."""

MEMORY_PER_RUN = 2 << 30
"""Bytes of memory that the default number of workers allows each run."""
BUSY = 3
"""Exit status of a run's process when another process is at work on the same run."""
STOPPED = 128 + signal.SIGTERM


class StudyError(Exception):
    """Something the user asked for that cannot be done; the message is one line."""


@dataclass(frozen=True)
class Job:
    """One run of a study and the files it uses."""

    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def result(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def notebook(self) -> Path:
        return self.folder / "notebooks" / f"{self.name}.ipynb"

    @property
    def work(self) -> Path:
        return self.folder / "work" / self.name

    @property
    def lock(self) -> Path:
        return self.work.parent / f"{self.name}.lock"

    @property
    def log(self) -> Path:
        return self.work.parent / f"{self.name}.log"

    def load(self) -> RunResult | None:
        """The result if the run is done: it is there, validates, and is of this very configuration."""
        try:
            result = RunResult.load(self.result)
        except (ResultError, OSError):
            return None
        return result if result.config_hash == self.config.hash else None

    def parameters(self) -> dict[str, Any]:
        """What papermill sets in the notebook."""
        values = self.config.model_dump(mode="json")
        return values | {"result_path": str(self.work / "result.json"), "work_dir": str(self.work)}


@dataclass(frozen=True)
class Outcome:
    """How one attempt at a run ended."""

    name: str
    status: Literal["done", "failed", "busy", "stopped"]
    seconds: float = 0.0
    error: str = ""


# --- one run, in a process of its own ---------------------------------------------------------------------------


def execute(job: Job, *, wait: bool) -> int:
    """Execute the run's notebook in this process, unless it is done or another process is at it.

    The lock belongs to the process and ends with it, however it ends. The notebook writes its result into the
    work folder; only one that validates is moved to where it counts.
    """
    # At import, jsonschema's optional check of international addresses compiles a grammar, for over a second.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from filelock import FileLock, Timeout

    job.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.lock, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        return BUSY
    with lock:
        if job.load() is not None:
            return 0
        job.notebook.parent.mkdir(parents=True, exist_ok=True)
        job.notebook.unlink(missing_ok=True)
        papermill.execute_notebook(
            TRAIN_NOTEBOOK,
            job.notebook,
            job.parameters(),
            kernel_name="python3",
            progress_bar=False,
            cwd=str(job.folder),
            shutdown_kernel="immediate",  # all is written by then, and PyTorch takes a second to end by itself
        )
        finished = job.work / "result.json"
        if not finished.exists():
            raise RuntimeError("the notebook ended without writing a result")
        if RunResult.load(finished).config_hash != job.config.hash:
            raise RuntimeError("the notebook wrote a result of another configuration")
        weights = finished.with_suffix(".safetensors")
        if weights.exists():
            weights.replace(job.result.with_suffix(".safetensors"))
        finished.replace(job.result)
        shutil.rmtree(job.work, ignore_errors=True)
    return 0


def _die_with(parent: int) -> None:
    """End this process and its kernel on SIGTERM, or when the process that started it is gone."""
    import psutil

    def end(*_: object) -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(STOPPED)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=watch, daemon=True).start()


def run_process(job: Job, *, wait: bool, threads: int, stop: Path) -> Outcome:
    """Start the process that executes one run and see it to its end. This is the task that Dask sends to a worker.

    Args:
        wait: if another process is at the run, wait for it; else come back as "busy".
        stop: when this file appears, the run is ended.
    """
    start = time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = _environment() | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    gpu = _take_gpu() if job.config.device in ("auto", "cuda") else None
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    request = {
        "config": job.config.to_dict(),
        "folder": str(job.folder),
        "wait": wait,
        "parent": os.getpid(),
    }
    try:
        with job.log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "eatlib.study", "_execute", json.dumps(request)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends its runs in order
            )
            while process.poll() is None:
                if stop.exists():
                    process.terminate()
                    process.wait()
                    break
                time.sleep(0.1)
    finally:
        if gpu is not None:
            with _GPU_LOCK:
                _GPU_RUNS[gpu] -= 1
    seconds = time.monotonic() - start
    if process.returncode == BUSY:
        return Outcome(job.name, "busy")
    if stop.exists():
        return Outcome(job.name, "stopped", seconds)
    if process.returncode == 0 and job.load() is not None:
        job.log.unlink(missing_ok=True)
        return Outcome(job.name, "done", seconds)
    return Outcome(job.name, "failed", seconds, _last_error(job, process.returncode))


def _environment() -> dict[str, str]:
    """For processes that execute notebooks: this Python and this eatlib, whatever else the user has installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": path}
    if data := os.environ.get("EATLIB_DATA"):
        environment["EATLIB_DATA"] = str(Path(data).expanduser().absolute())
    return environment


_GPU_RUNS: Counter[str] = Counter()
_GPU_LOCK = threading.Lock()


def _take_gpu() -> str | None:
    """The GPU of this machine that has the fewest runs of this process; None if it has no GPU."""
    gpus = local_gpus()
    with _GPU_LOCK:
        chosen = min(gpus, key=_GPU_RUNS.__getitem__, default=None)
        if chosen is not None:
            _GPU_RUNS[chosen] += 1
    return chosen


def local_gpus() -> list[str]:
    """Identifiers of the GPUs that processes started here may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        if shutil.which("nvidia-smi") is None:
            return []
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        listed = "" if done.returncode else ",".join(done.stdout.split())
    return [gpu for gpu in map(str.strip, listed.split(",")) if re.fullmatch(r"\d+|(GPU|MIG)-.+", gpu)]


def _last_error(job: Job, status: int) -> str:
    """What went wrong, in a few lines: a signal, the notebook's error if it holds one, else the end of the log."""
    if status < 0:
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        return f"the run's process was killed by {signal.Signals(-status).name}{hint}"
    try:
        cells = json.loads(job.notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError):
        cells = []
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                return f"{output['ename']}: {output['evalue']}"
    if shutil.disk_usage(job.folder).free < 1 << 20:
        return f"no space left on the disk of {job.folder}"
    lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-3:]) or f"the run's process ended with status {status} and no message"


# --- a study ----------------------------------------------------------------------------------------------------


def load_study(name: str, changes: dict[str, Any] | None = None) -> Study:
    """A study of `studies/` by name, with `changes` applied to all its runs.

    Raises:
        StudyError: no such study, or a field that cannot be used.
    """
    path = STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
        raise StudyError(f"unknown study {name!r}; there are: {known}")
    try:
        return Study.load(path).override(changes or {})
    except ConfigError as error:
        raise StudyError(str(error)) from None


def jobs(study: Study, results: Path) -> list[Job]:
    """The runs of a study with their files under `results`; a relative `data_dir` is from the current folder."""
    configs = study.runs()
    for index, config in enumerate(configs):
        if config.data_dir is not None:  # a run is executed in another folder
            place = config.data_dir.expanduser().absolute()
            configs[index] = config.model_copy(update={"data_dir": place})
    return [Job(config, results / study.name) for config in configs]


def code_changed(result: RunResult) -> bool | None:
    """Whether `TRAINING_CODE` differs from what made this result; None if git cannot tell."""
    commit = result.provenance.git_commit
    if commit is None or not result.provenance.git_clean:
        return None
    command = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *TRAINING_CODE]
    status = subprocess.run(command, capture_output=True).returncode
    return {0: False, 1: True}.get(status)


def run_study(
    study: Study,
    results: Path = RESULTS,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> list[Outcome]:
    """Execute the runs that have no result yet, in parallel; each goes its own way whatever becomes of the others.

    Args:
        results: the folder that holds one folder a study.
        workers: runs at a time on this machine; None: what its cores and memory allow.
        scheduler: address of a Dask scheduler whose workers see `results` under the same path.
        force: also execute the runs that have a result.

    Returns:
        One outcome for each run that was attempted.

    Raises:
        StudyError: nothing was started: data are missing, the results folder cannot be written to, ...
    """
    results = results.resolve()
    folder = results / study.name
    todo = [job for job in jobs(study, results) if force or job.load() is None]
    if todo:
        _check_parameters(todo[0])
        if scheduler is None:  # the workers of a cluster may have other data
            _check_data(todo)
    try:
        (folder / "work").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "study.yaml", study.to_yaml())
        for old in (folder / "work").glob(".stop-*"):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise StudyError(f"cannot write to the results folder {folder}: {error.strerror}") from None
    if not todo:
        return []

    from dask.distributed import Client, LocalCluster, as_completed

    if scheduler is None:
        count = _at_a_time(todo, workers)
        share = max(1, _cores() // count)
        cluster = LocalCluster(
            n_workers=1,
            threads_per_worker=count,
            processes=False,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            silence_logs=50,
        )
        client = Client(cluster)
    else:
        cluster = None
        try:
            client = Client(scheduler, timeout=5)
        except (OSError, TimeoutError, ValueError) as error:
            raise StudyError(f"no Dask scheduler answers at {scheduler}: {error}") from None
        share = 1
    if find_spec("bokeh") is not None and not quiet:  # without it, schedulers announce a page that is not there
        link = client.dashboard_link
        # Dask names this machine by its address in the network, where the dashboard above does not listen.
        print("Dask dashboard:", link if cluster is None else re.sub("//.*:", "//127.0.0.1:", link))
    stop = folder / "work" / f".stop-{uuid.uuid4().hex}"
    # An unmet resource waits for ever: a GPU is only asked for where workers declare them.
    declared = client.scheduler_info()["workers"].values()
    gpus_declared = any(worker.get("resources", {}).get("GPU") for worker in declared)

    for job in todo:
        _set_aside(job, force=force)
    progress = _Progress(todo, total=len(jobs(study, results)), quiet=quiet)
    outcomes: dict[str, Outcome] = {}
    submitted: dict[Any, Job] = {}

    def start(job: Job, *, wait: bool) -> Any:
        threads = job.config.threads or share
        resources = {"GPU": 1} if gpus_declared and job.config.device != "cpu" else None
        future = client.submit(run_process, job, wait=wait, threads=threads, stop=stop, resources=resources, pure=False)
        submitted[future] = job
        return future

    try:
        running = as_completed([start(job, wait=False) for job in todo])
        ticker = threading.Thread(target=progress.tick, daemon=True)
        ticker.start()
        for future in running:
            job = submitted[future]
            try:
                outcome = future.result()
            except Exception as error:  # the worker died, more often than Dask retries
                outcome = Outcome(job.name, "failed", error=f"{type(error).__name__}: {error}")
            if outcome.status == "busy":
                running.add(start(job, wait=True))
                continue
            outcomes[job.name] = outcome
            progress.finished(job, outcome)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop.touch()
        client.cancel(list(submitted))
        _wait_for_end(todo)
        raise
    finally:
        progress.close()
        client.close()
        if cluster is not None:
            cluster.close()
    return list(outcomes.values())


def _set_aside(job: Job, *, force: bool) -> None:
    """Move a file that is no result, or with `force` any, out of the run's place; nothing is lost."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(job.lock, timeout=0):
            if not job.result.exists() or (job.load() is not None and not force):
                return
            aside = job.work.parent / f"{job.result.name}.{uuid.uuid4().hex[:8]}"
            job.result.replace(aside)
            shutil.rmtree(job.work, ignore_errors=True)
            try:
                RunResult.load(aside)
            except ResultError as error:
                print(f"not a result, set aside: {error}", file=sys.stderr)
    except Timeout:
        pass  # a process that is at it


def _check_parameters(job: Job) -> None:
    """papermill only warns about a parameter that the notebook lacks, so look before anything starts."""
    notebook = json.loads(TRAIN_NOTEBOOK.read_text(encoding="utf-8"))  # to import nbformat takes a second
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise StudyError(f"{TRAIN_NOTEBOOK} must have exactly one cell tagged 'parameters', not {len(cells)}")
    names = [node for node in ast.walk(ast.parse("".join(cells[0]["source"]))) if isinstance(node, ast.Name)]
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    missing = sorted(job.parameters().keys() - known)
    if missing:
        raise StudyError(f"{TRAIN_NOTEBOOK} has no parameter {', '.join(missing)}")


def _check_data(todo: list[Job]) -> None:
    """Have the data sets of these runs loaded once, so that no run has to fail, fetch or decode by itself.

    In a process of its own, as that takes PyTorch; its messages come by its output, progress and warnings directly.
    """
    needed = {job.config.model_dump_json(include=DATA_FIELDS) for job in todo}
    done = subprocess.run(
        [sys.executable, "-m", "eatlib.study", "_load", str(os.getpid()), *sorted(needed)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends this process
    )
    if done.returncode != 0:
        raise StudyError(done.stdout.strip() or f"the process that loads the data ended with status {done.returncode}")


def _load(configurations: list[str]) -> int:
    """Load the data of each configuration, given as JSON; print once each what is wrong with them."""
    from eatlib.data import DataError, load_data

    problems: dict[str, None] = {}
    for text in configurations:
        try:
            with redirect_stdout(sys.stderr):  # for what torchvision has to say
                load_data(RunConfig.parse(json.loads(text)), progress=sys.stderr.isatty())
        except (DataError, OSError) as error:
            problems[str(error)] = None
    print(*problems, sep="\n")
    return 1 if problems else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_a_time(todo: list[Job], workers: int | None) -> int:
    """Runs at a time on this machine; by default as many as there are GPUs, or cores and memory for their threads."""
    import psutil

    if workers is None:
        gpus = local_gpus()
        if gpus and any(job.config.device != "cpu" for job in todo):
            workers = len(gpus)
        else:
            by_cores = _cores() // max(job.config.threads or 1 for job in todo)
            by_memory = psutil.virtual_memory().available // MEMORY_PER_RUN
            workers = max(1, min(by_cores, by_memory))
    return min(workers, len(todo))


def _wait_for_end(todo: list[Job], timeout: float = 10) -> None:
    """Wait until no process holds the lock of any of these runs."""
    from filelock import FileLock, Timeout

    deadline = time.monotonic() + timeout
    for job in todo:
        if job.lock.exists():
            try:
                FileLock(job.lock, timeout=max(0, deadline - time.monotonic())).acquire().lock.release()
            except Timeout:
                return


class _Progress:
    """What is running, how far it is, and how long it will take: a bar on a terminal, else a line a finished run."""

    def __init__(self, todo: list[Job], *, total: int, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._open = {job.name: job for job in todo}
        self._done = total - len(todo)
        self._total = total
        self._bar: tqdm[Any] | None = None
        self._closed = threading.Event()
        self._start = time.time()
        if self._done and not quiet:
            print(f"{self._done} of {total} runs have a result already")
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(
                total=len(todo),
                bar_format="{n:.1f}/{total} runs |{bar:20}| {elapsed}, {remaining} left {postfix}",
                dynamic_ncols=True,
            )

    def tick(self) -> None:
        """Keep the bar up to date from what the runs write after each epoch."""
        shares: dict[str, float] = {}
        while self._bar is not None and not self._closed.wait(0.5):
            texts = []
            running = list(self._open.values())
            for job in running:
                path = job.work / "progress.json"
                try:
                    if path.stat().st_mtime < self._start:
                        continue  # of an earlier attempt
                    state = json.loads(path.read_text())
                except (OSError, ValueError):
                    continue
                config = job.config
                shares[job.name] = state["epoch"] / state["epochs"]
                texts.append(
                    f"{config.model} {config.dataset} lambda {config.lambda_:g} seed {config.seed}: "
                    f"epoch {state['epoch']}/{state['epochs']}, {state['images_per_second']:.0f} images/s"
                )
            more = f" and {len(texts) - 2} more" if len(texts) > 2 else ""
            self._bar.n = self._bar.total - len(running) + sum(shares.get(job.name, 0) for job in running)
            self._bar.set_postfix_str("; ".join(texts[:2]) + more if texts else "starting")

    def finished(self, job: Job, outcome: Outcome) -> None:
        """Say how a run ended."""
        self._open.pop(job.name, None)
        self._done += outcome.status == "done"
        if outcome.status == "failed":
            text = f"FAILED {job.name}: {outcome.error}\n       see {job.notebook}"
        else:
            text = f"{outcome.status} {job.name} in {outcome.seconds:.0f} s ({self._done} of {self._total})"
        if self._bar is not None:
            if outcome.status == "failed":
                self._bar.write(text)
        elif outcome.status == "failed" or not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        self._closed.set()
        if self._bar is not None:
            self._bar.n = self._bar.total - len(self._open)
            self._bar.set_postfix_str("")
            self._bar.close()


def render(study_name: str, results: Path) -> None:
    """Execute `2_tradeoff.ipynb` on the study's results, beside them, and make a self-contained page of it."""
    import papermill
    from nbconvert import HTMLExporter

    notebook = results / study_name / "tradeoff.ipynb"
    papermill.execute_notebook(
        TRADEOFF_NOTEBOOK,
        notebook,
        {"study": study_name, "results": str(results)},
        kernel_name="python3",
        progress_bar=False,
    )
    exporter = HTMLExporter(
        exclude_input=True, exclude_output_prompt=True, embed_images=True, mathjax_url="", require_js_url=""
    )
    write_atomically(notebook.with_suffix(".html"), exporter.from_filename(str(notebook))[0])


# --- the command line -------------------------------------------------------------------------------------------


def _changes(items: Iterable[str]) -> dict[str, Any]:
    changes = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise StudyError(f"--set {item!r}: must be FIELD=VALUE, for example epochs=10 or seed=[0,1]")
        if key in changes:
            raise StudyError(f"--set {item!r}: {key} is set twice; a list is an axis, as in seed=[0,1]")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise StudyError(f"--set {item!r}: {value!r} is not a YAML value") from None
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eatlib.study", description="Run the studies of energy-aware training."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the runs of a study that have no result yet, then draw it")
    run.add_argument("study", nargs="?", default="quick", help="a file of studies/ (default: quick)")
    run.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="set fields for all runs; a list is an axis",
    )
    run.add_argument("--dry-run", action="store_true", help="show the runs and what there is of them; do nothing")
    run.add_argument(
        "--measure", action="store_true", help="with --dry-run: time a few steps of what has not run here yet"
    )
    run.add_argument("--stale", action="store_true", help="show the results made by other code; do nothing")
    run.add_argument("--force", action="store_true", help="execute also the runs that have a result")
    run.add_argument("--workers", type=int, metavar="N", help="runs at a time (default: what the machine allows)")
    run.add_argument("--scheduler", metavar="ADDRESS", help="use this Dask scheduler ($DASK_SCHEDULER_ADDRESS)")
    run.add_argument("--download", action="store_true", help="fetch a data set that is not there")
    run.add_argument("--quiet", action="store_true", help="say only what failed, and the results")
    run.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where results go (results/)")
    listing = commands.add_parser("list", help="show the studies, changed ones too, and how much of each is done")
    listing.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    clean = commands.add_parser("clean", help="delete a study's logs, checkpoints and executed notebooks")
    clean.add_argument("study", help="a study, or the name of its folder in results/")
    clean.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    changes = _changes(arguments.set)
    if arguments.workers is not None and arguments.workers < 1:
        raise StudyError(f"--workers {arguments.workers}: must be 1 or more")
    if arguments.download:
        changes["download"] = True
    study = load_study(arguments.study, changes)
    results = arguments.results.resolve()
    if arguments.measure and not arguments.dry_run:
        raise StudyError("--measure is for --dry-run: it estimates, and trains nothing")
    if arguments.stale:
        _show_stale(study, results)
        return 0
    if arguments.dry_run:
        _show_runs(study, results, workers=arguments.workers, force=arguments.force, measure=arguments.measure)
        return 0
    scheduler = arguments.scheduler or os.environ.get("DASK_SCHEDULER_ADDRESS")
    if not arguments.quiet:
        print(f"{study.name}: {study.label}", flush=True)
    outcomes = run_study(
        study,
        results,
        workers=arguments.workers,
        scheduler=scheduler,
        force=arguments.force,
        quiet=arguments.quiet,
    )
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    if not outcomes:
        print("every run has a result already; --force trains them again")
    status = _show_results(study, results)
    if failed:
        print(
            f"{len(failed)} of {len(outcomes)} runs failed; the next call runs only these again",
            file=sys.stderr,
        )
    return 1 if failed else status


def _show_results(study: Study, results: Path) -> int:
    """Draw the figures, print the table and where everything is; 1 if the figures could not be drawn."""
    from filelock import FileLock

    from eatlib import tables
    from eatlib.results import StudyResults

    folder = results / study.name
    found = StudyResults.load(folder)
    print(f"\n{study.label}", *found.scale(), sep="\n", end="\n\n")
    for problem in found.problems:
        print("not used:", problem, file=sys.stderr)
    if not any(result.config.lambda_ == 0 for result in found.results):
        print("no standard training (lambda 0) has a result: nothing to compare with")
        return 0
    summary = tables.tradeoff_table(found.table(), margin=study.margin)
    print(f"{tables.readable(summary).to_string(index=False)}\n")
    if len(beside := tables.paper_table(summary)):
        print(f"The paper's table 1 beside ours:\n{beside.to_string(index=False)}\n")
    print(found.code())
    if found.missing:
        print(f"{len(found.missing)} runs are missing")
    if stale := sum(code_changed(result) is True for result in found.results):
        print(f"{stale} results were made by other code than this: --stale lists them, --force trains again")
    log = folder / "work" / "render.log"
    with FileLock(log.with_suffix(".lock")), log.open("w") as output:
        status = subprocess.run(
            [sys.executable, "-m", "eatlib.study", "_render", study.name, str(results)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
        ).returncode
    if status != 0:
        print(f"the figures could not be drawn, see {log}", file=sys.stderr)
        return 1
    log.unlink(missing_ok=True)
    print()
    for path in (*sorted(folder.glob("*.png")), folder / "tradeoff.ipynb", folder / "tradeoff.html"):
        print(path)
    return 0


def _state(result: RunResult) -> str:
    changed = code_changed(result)
    return {True: "stale: the code has changed", False: "done", None: "done, code unknown"}[changed]


def _show_stale(study: Study, results: Path) -> None:
    """Print a line for each result that other code has made, or may have."""
    for job in jobs(study, results):
        result = job.load()
        if result is not None and (state := _state(result)) != "done":
            print(f"{job.name}  {state}, {result.provenance.wall_seconds:.0f} s")


def _show_runs(study: Study, results: Path, *, workers: int | None, force: bool, measure: bool) -> None:
    """Print a line a run, whether it is done and how long it took or may take, and how long all that is left may."""
    found = [(job, job.load()) for job in jobs(study, results)]
    todo = [job for job, result in found if force or result is None]
    at_a_time = _at_a_time(todo, workers) if todo else 1
    seconds = estimate.seconds_of(
        [job.config for job in todo],
        results,
        device="cuda" if local_gpus() else "cpu",
        threads=max(1, _cores() // at_a_time),
        measure=measure,
    )
    for job, result in found:
        text = "missing" if result is None else f"{_state(result)}, {estimate.duration(result.provenance.wall_seconds)}"
        if job.name in seconds:
            text += f", {'again ' if result else ''}about {estimate.duration(seconds[job.name])}"
        print(f"{job.name}  {text}")
    if not todo:
        print("left: nothing")
        return
    texts = []
    if seconds:
        total = max(sum(seconds.values()) / at_a_time, *seconds.values())
        pace = f"{at_a_time} runs at a time" if at_a_time > 1 else "one run after another"
        texts.append(f"about {estimate.duration(total)} of training on this machine, {pace}")
    if unknown := len(todo) - len(seconds):
        reason = "no number of images is known" if measure else "no like has run here (--measure times a few steps)"
        texts.append(f"no estimate for {unknown} of {len(todo)} runs, as {reason}")
    print(f"left: {'; '.join(texts)}")


def _list(arguments: argparse.Namespace) -> int:
    studies = [load_study(path.stem) for path in STUDIES.glob("*.yaml")]
    known = {study.name for study in studies}
    for path in arguments.results.glob("*/study.yaml"):  # with changed fields, or no longer in studies/
        if path.parent.name not in known:
            try:
                studies.append(Study.load(path).model_copy(update={"name": path.parent.name}))
            except ConfigError as error:
                print("not used:", error, file=sys.stderr)
    width = max((len(study.name) for study in studies), default=0)
    for study in sorted(studies, key=lambda study: study.name):
        all_jobs = jobs(study, arguments.results)
        done = sum(job.load() is not None for job in all_jobs)
        print(f"{study.name:{width}} {done:4} of {len(all_jobs):4} runs done   {study.label}")
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from filelock import FileLock, Timeout

    folder = arguments.results / arguments.study
    if Path(arguments.study).name != arguments.study or not (folder / "study.yaml").is_file():
        raise StudyError(f"{arguments.study!r} has no results in {arguments.results}")
    with ExitStack() as stack:
        locks = sorted((folder / "work").glob("*.lock"))
        try:
            for lock in locks:
                stack.enter_context(FileLock(lock, timeout=0))
        except Timeout:
            raise StudyError(f"{lock.stem} is being worked on: nothing is deleted") from None
        shutil.rmtree(folder / "notebooks", ignore_errors=True)
        for path in (folder / "work").glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in locks:  # a lock that is deleted locks nobody out
                path.unlink()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; 0: all well, 1: runs failed, 2: cannot be done, 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["_execute"]:
        request = json.loads(arguments[1])
        _die_with(request["parent"])
        job = Job(RunConfig.parse(request["config"]), Path(request["folder"]))
        return execute(job, wait=request["wait"])
    if arguments[:1] == ["_load"]:
        _die_with(int(arguments[1]))
        return _load(arguments[2:])
    if arguments[:1] == ["_render"]:
        render(arguments[1], Path(arguments[2]))
        return 0
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        return {"run": _run, "list": _list, "clean": _clean}[options.command](options)
    except (StudyError, estimate.EstimateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the next call resumes the rest", file=sys.stderr)
        return 130


if __name__ == "__main__":
    from eatlib import study  # under its own name: Dask could not send what is defined in __main__

    sys.exit(study.main())
