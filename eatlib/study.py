"""Run a study: what the Snakefile asks, what is checked before it starts, and one run's process.

    python -m eatlib.study quick --set epochs=2 -c 2     check, call Snakemake, show the table

In `results/<study>/`, `<run>.json` is the one sign that a run is done. `notebooks/` holds the executed notebooks,
`log/` what was printed, and `work/` what a run needs while it is not done: its lock, checkpoint and progress. Every
lock is the operating system's, and ends with its process.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from eatlib.config import DATASETS, ConfigError, RunConfig, Study
from eatlib.results import ROOT, ResultError, RunResult, StudyResults, write_atomically

TRAIN_NOTEBOOK = ROOT / "notebooks" / "1_train.ipynb"
TRADEOFF_NOTEBOOK = ROOT / "notebooks" / "2_tradeoff.ipynb"
KERNEL = {"kernel_name": "python3", "cwd": str(ROOT)}
PARENT = "EATLIB_PARENT"
"""Environment variable in which a process tells those that it starts with whom they have to end."""


class StudyError(Exception):
    """Something the user asked for that cannot be done; the message is one line."""


# --- what the Snakefile asks --------------------------------------------------------------------------------------


def open_study(name: str) -> Study:
    """A study of `studies/` by name, or any study file by path.

    Raises:
        StudyError: there is none, or it is not valid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "studies" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / "studies").glob("*.yaml")))
        raise StudyError(f"study = {name!r}: must be one of {known}, or the path of a YAML file")
    try:
        return Study.load(path)
    except ConfigError as error:
        raise StudyError(str(error)) from None


def result_files(study: Study, folder: Path) -> dict[str, RunConfig]:
    """The file in which each run has its result, or will have it; a result is known by its hash, not by its name."""
    found = StudyResults.load(folder, study)
    names = {result.config_hash: name for name, result in found.runs.items()}
    return {names.get(run.hash, name): run for name, run in study.runs().items()}


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


def end_descendants() -> None:
    """End all processes that this one has started, and those that they have."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def end_with_parent() -> None:
    """End this process and those that it started when its parent is gone, also if it is already, or on SIGTERM."""
    parent = int(os.environ.get(PARENT, os.getppid()))
    os.environ[PARENT] = str(os.getpid())

    def end(*_: object) -> None:
        try:
            end_descendants()
        finally:
            os._exit(128 + signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=watch, daemon=True).start()


# --- one run, in a process of its own -----------------------------------------------------------------------------


def train(folder: Path, name: str) -> None:
    """Execute the training notebook for one run of the study in `folder`, unless another process has done so.

    The notebook writes its result into the work folder; only one that validates is moved to where it counts.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's optional check compiles a grammar for over a second
    import papermill

    config = result_files(Study.load(folder / "study.yaml"), folder)[name]
    work, notebook = folder / "work" / name, folder / "notebooks" / f"{name}.ipynb"
    for path in (work, notebook.parent):
        path.mkdir(parents=True, exist_ok=True)
    with FileLock(work.with_suffix(work.suffix + ".lock")), gpu_of_its_own(config, local_gpus()) as gpu:
        if (folder / f"{name}.json").exists():
            return
        finished = work / "result.json"
        notebook.unlink(missing_ok=True)
        os.environ |= {"OMP_NUM_THREADS": str(config.threads), "JUPYTER_PREFER_ENV_PATH": "1"}
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        papermill.execute_notebook(
            TRAIN_NOTEBOOK,
            notebook,
            config.model_dump(mode="json") | {"result_path": str(finished), "work_dir": str(work)},
            progress_bar=False,
            **KERNEL,
            shutdown_kernel="immediate",  # all is written by then, and PyTorch takes a second to end by itself
        )
        if RunResult.load(finished).config_hash != config.hash:
            raise RuntimeError("the notebook wrote a result of another configuration")
        weights = finished.with_suffix(".safetensors")
        if weights.exists():
            weights.replace(folder / f"{name}.safetensors")
        finished.replace(folder / f"{name}.json")
        shutil.rmtree(work)


@contextmanager
def gpu_of_its_own(config: RunConfig, gpus: list[str]) -> Iterator[str | None]:
    """Hold one of `gpus` that no other run on this machine holds; None if the run may use none, or there are none."""
    gpus = gpus if config.device in ("auto", "cuda") else []
    for gpu in itertools.cycle(gpus):
        try:
            with FileLock(Path(tempfile.gettempdir()) / f"eatlib-{os.getuid()}-gpu-{gpu}.lock", timeout=0.5):
                yield gpu
                return
        except Timeout:
            continue
    yield None


def draw(folder: Path) -> None:
    """Execute the trade-off notebook on the study in `folder`, and make a self-contained page of it."""
    import papermill
    from nbconvert import HTMLExporter

    notebook = folder / "tradeoff.ipynb"
    values = {"study": folder.name, "results": str(folder.parent)}
    papermill.execute_notebook(TRADEOFF_NOTEBOOK, notebook, values, progress_bar=False, **KERNEL)
    options = {"exclude_input": True, "exclude_output_prompt": True, "embed_images": True}
    exporter = HTMLExporter(**options, mathjax_url="", require_js_url="")
    write_atomically(notebook.with_suffix(".html"), exporter.from_filename(str(notebook))[0])


def check_data(folder: Path) -> int:
    """Load the data of each run once, so that no run has to fail, fetch or decode by itself; say what is wrong."""
    from eatlib.data import DataError, load_data

    fields = {"dataset", "image_size", "train_samples", "test_samples", "validation_share", "split_seed"}
    fields |= {"allow_partial", "data_dir", "download"}
    study = Study.load(folder / "study.yaml")
    missing = StudyResults.load(folder, study).missing
    todo = {run.model_dump_json(include=fields): run for name, run in study.runs().items() if name in missing}
    problems: dict[str, None] = {}
    for config in todo.values():
        try:
            load_data(config, progress=sys.stderr.isatty())
        except (DataError, OSError) as error:
            problems[str(error)] = None
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


# --- before anything starts ---------------------------------------------------------------------------------------


def prepare(study: Study, folder: Path) -> None:
    """Write the study beside its results and clear the places of its runs; the caller has the lock."""
    text, path = study.to_yaml(), folder / "study.yaml"
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # a newer file has the figures drawn again
        write_atomically(path, text)
    found = StudyResults.load(folder, study)
    for problem in found.problems:
        print("not a result:", problem, file=sys.stderr)
    for name in found.missing:
        if (folder / f"{name}.json").exists():
            aside = folder / "superseded" / f"{name}.{time.strftime('%Y%m%d-%H%M%S')}.json"
            aside.parent.mkdir(exist_ok=True)
            (folder / f"{name}.json").replace(aside)
            shutil.rmtree(folder / "work" / name, ignore_errors=True)
            print(f"{name}.json is no result of this configuration: moved to {aside}", file=sys.stderr)


def show_plan(study: Study, folder: Path) -> None:
    """Print a line a run: done, or why it is not and how long it may take, judged by like runs with a result."""
    costs: dict[tuple[Any, ...], list[float]] = {}
    for path in {*folder.parent.glob("*/*.json"), *(ROOT / "results").glob("**/*.json")}:
        with suppress(ResultError, OSError):
            result = RunResult.load(path)
            images = result.data.train * len(result.history)
            costs.setdefault(_kind(result.config), []).append(sum(e.seconds for e in result.history) / images)
    done = StudyResults.load(folder, study).runs
    total, unknown = 0.0, 0
    for name, run in result_files(study, folder).items():
        images = run.train_samples or DATASETS[run.dataset.split(":")[0]].train_images
        if name in done:
            print(f"{name}  done in {_duration(done[name].provenance.wall_seconds)}")
            continue
        reason = "its JSON is another configuration's" if (folder / f"{name}.json").exists() else "no result"
        if like := costs.get(_kind(run) if images else ()):
            seconds = statistics.median(like) * images * (1 - run.validation_share) * run.epochs
            total += seconds
            print(f"{name}  to train ({reason}), about {_duration(seconds)}")
        else:
            unknown += 1
            print(f"{name}  to train ({reason}), no like has run")
    print(f"{len(done)} runs are done. To train, one after another: about {_duration(total)}", end="")
    print(f", and {unknown} runs of which no like has a result" if unknown else "")


def _kind(config: RunConfig) -> tuple[Any, ...]:
    """What decides how long a run takes for each image that it trains on."""
    fields = ("model", "width", "image_size", "precision", "compile", "threads", "device")
    return *(getattr(config, field) for field in fields), config.lambda_ > 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


# --- the command line ---------------------------------------------------------------------------------------------


def _changes(items: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        try:
            if key in changes or not value:
                raise yaml.YAMLError
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            allowed = "FIELD=VALUE, a YAML value, each field once, as in epochs=10 or seed=[0,1]"
            raise StudyError(f"--set {item!r}: must be {allowed}") from None
    return changes


def run_engine(folder: Path, names: list[str], options: list[str]) -> int:
    """Call Snakemake in a session of its own and show how far its runs are; its exit status."""
    import psutil
    from tqdm import tqdm

    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
    if "--profile" not in options:
        memory = psutil.virtual_memory().available >> 20
        command += ["--resources", f"mem_mb={memory}", f"gpu={len(local_gpus())}"]
    command += [*options, "--config", f"folder={folder}"]
    todo = [name for name in names if not (folder / f"{name}.json").exists()]
    with (
        (folder / "log" / "snakemake.log").open("w") as log,
        tqdm(total=len(names), initial=len(names) - len(todo), unit="run", disable=None, dynamic_ncols=True) as bar,
    ):
        engine = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while engine.poll() is None:
                time.sleep(0.2)
                _show(folder, todo, bar)
        finally:
            if engine.poll() is None and "--profile" in options:  # it has jobs elsewhere to cancel
                engine.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    engine.wait(timeout=30)
            end_descendants()
            _show(folder, todo, bar)
    return engine.returncode


def _show(folder: Path, todo: list[str], bar: Any) -> None:
    """Say which runs are done since the last call and, on a terminal, in which epoch the running ones are."""
    for name in [name for name in todo if (folder / f"{name}.json").exists()]:
        todo.remove(name)
        bar.update()
        if bar.disable:
            print(f"done {name}", flush=True)
    if not bar.disable:
        states = [(name, folder / "work" / name / "progress") for name in todo]
        bar.set_postfix_str("; ".join(f"{name} {state.read_text()}" for name, state in states if state.exists()))


def failures(folder: Path, names: list[str]) -> list[str]:
    """What went wrong in each run that was tried and has no result: the notebook's error or the end of its log."""
    texts = []
    for name in names:
        log, notebook = folder / "log" / f"{name}.log", folder / "notebooks" / f"{name}.ipynb"
        if (folder / f"{name}.json").exists() or not log.exists():
            continue
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        if notebook.exists():
            cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
            errors = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
            lines = [f"{error['ename']}: {error['evalue']}" for error in errors] or lines
        text = " | ".join(lines) or f"ended without a word: out of memory, or see {log.with_name('snakemake.log')}"
        texts.append(f"FAILED {name}: {text}\n       see {notebook if notebook.exists() else log}")
    return texts


def run(name: str, arguments: argparse.Namespace, options: list[str]) -> int:
    """Check everything, have the engine do what is missing, and show the table."""
    changes = _changes(arguments.set) | ({"download": True} if arguments.download else {})
    try:
        study = open_study(name).override(changes)
    except ConfigError as error:
        raise StudyError(str(error)) from None
    folder = arguments.results.resolve() / study.name
    if arguments.dry_run:
        show_plan(study, folder)
        return 0
    try:
        (folder / "log").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:  # an OSError too
        raise StudyError(f"another runner is at work on {folder}") from None
    except OSError as error:
        raise StudyError(f"cannot write to the results folder {folder}: {error.strerror}") from None
    with lock:
        print(f"{study.name}: {study.label}", flush=True)
        prepare(study, folder)
        names = list(result_files(study, folder))
        missing = [name for name in names if not (folder / f"{name}.json").exists()]
        if missing and subprocess.run([sys.executable, "-m", "eatlib.study", "data", str(folder)]).returncode:
            return 2
        for name in missing:
            (folder / "log" / f"{name}.log").unlink(missing_ok=True)
        status = run_engine(folder, names, options)
        if problems := failures(folder, names):
            problems.append(f"{len(problems)} runs failed; the next call runs only these again")
            print(*problems, sep="\n", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "eatlib.study", "draw", str(folder)], capture_output=True)
        elif status:
            end = (folder / "log" / "snakemake.log").read_text(errors="replace").strip().splitlines()[-1:]
            print(f"error: the engine stopped: {''.join(end)}\nsee {folder}/log/", file=sys.stderr)
        if (folder / "table.md").exists():
            print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}")
            print(f"figures, tables and {folder}/tradeoff.html are in {folder}")
    return min(status, 2) if status >= 0 else 1


def main() -> int:
    """Do what the command line says; 0: all well, 1: runs failed, 2: cannot be done, 130: interrupted."""
    steps = {"train": train, "draw": draw, "data": check_data}
    if sys.argv[1:2] and sys.argv[1] in steps:
        end_with_parent()
        return steps[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    os.environ[PARENT] = str(os.getpid())
    named = sys.argv[1:2] and not sys.argv[1].startswith("-")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # ./run_all.sh --help has the texts
    parser.add_argument("--set", nargs="+", action="extend", default=[])
    parser.add_argument("-n", "--dry-run", action="store_true")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        return run(sys.argv[1] if named else "quick", *parser.parse_known_args(sys.argv[1 + bool(named) :]))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the next call resumes the rest", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
