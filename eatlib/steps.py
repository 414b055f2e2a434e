"""The steps of a study, each a process of its own that the Snakefile or the runner starts.

    python -m eatlib.steps train FOLDER RUN     also: draw FOLDER, check FOLDER

In the folder, `<run>.json` is the one sign that a run is done. `notebooks/` holds the executed notebooks, `log/` what
was printed, and `work/` what a run needs while it is not done: its lock, checkpoint and progress. Every lock is the
operating system's, and ends with its process.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from eatlib.config import RunConfig
from eatlib.results import ROOT, RunResult, StudyResults, write_atomically

TRAIN_NOTEBOOK = ROOT / "notebooks" / "1_train.ipynb"
TRADEOFF_NOTEBOOK = ROOT / "notebooks" / "2_tradeoff.ipynb"
KERNEL = {"kernel_name": "python3", "cwd": str(ROOT)}
PARENT = "EATLIB_PARENT"
"""Environment variable in which a process tells those that it starts with whom they have to end."""


def predecessor(configs: dict[str, RunConfig], config: RunConfig) -> str | None:
    """The name of the run whose weights this one starts from."""
    return next((name for name, run in configs.items() if config.starts_from_run and run.hash == config.start), None)


def train(folder: Path, name: str, *, for_weights: bool = False) -> None:
    """Execute the training notebook for one run of the study in `folder`, unless another process has done so.

    The notebook writes its result into the work folder; only one that validates is moved to where it counts. Weights
    stay for as long as a run without a result starts from them, or with `save_weights`.

    Args:
        for_weights: train also if there is a result, to have the same weights once more.
    """
    import papermill

    configs = StudyResults.load(folder).configs
    config, before = configs[name], predecessor(configs, configs[name])
    result, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    work, notebook = folder / "work" / name, folder / "notebooks" / f"{name}.ipynb"
    start, gpus = folder / f"{before}.safetensors" if before else None, local_gpus()
    for path in (work.parent, notebook.parent):
        path.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "work" / f"{name}.lock"):
        if (weights if for_weights else result).exists():
            return
        work.mkdir(exist_ok=True)  # by which others see that the weights it starts from are needed
        if start and not start.exists():
            train(folder, before, for_weights=True)
        notebook.unlink(missing_ok=True)
        os.environ |= {"OMP_NUM_THREADS": str(config.threads), "JUPYTER_PREFER_ENV_PATH": "1"}
        with gpu_of_its_own(config, gpus) as gpu:
            if gpu is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            papermill.execute_notebook(
                TRAIN_NOTEBOOK,
                notebook,
                config.model_dump(mode="json") | {"work_dir": str(work), "start_weights": str(start or "")},
                progress_bar=False,
                **KERNEL,
                shutdown_kernel="immediate",  # all is written by then, and PyTorch takes a second to end by itself
            )
        finished = work / "result.json"
        if RunResult.load(finished).config_hash != config.hash:
            raise RuntimeError("the notebook wrote a result of another configuration")
        if result.exists() and RunResult.load(result).test != RunResult.load(finished).test:
            raise RuntimeError(f"{name}, trained once more for its weights, differs from its JSON: remove that first")
        if finished.with_suffix(".safetensors").exists():  # not if this process was killed between here and the end
            finished.with_suffix(".safetensors").replace(weights)
        if not result.exists():
            finished.replace(result)
        shutil.rmtree(work)
        for run in filter(None, (None if for_weights else name, before)):
            after = (other for other in configs if configs[other].start == configs[run].hash)
            over = ((folder / f"{other}.json").exists() and not (folder / "work" / other).exists() for other in after)
            if not configs[run].save_weights and all(over):
                (folder / f"{run}.safetensors").unlink(missing_ok=True)


def draw(folder: Path) -> None:
    """Execute the trade-off notebook on the study in `folder`, and make a self-contained page of it."""
    import papermill
    from nbconvert import HTMLExporter

    notebook = folder / "tradeoff.ipynb"
    values = {"study": folder.name, "results": str(folder.parent)}
    executed = papermill.execute_notebook(TRADEOFF_NOTEBOOK, notebook, values, progress_bar=False, **KERNEL)
    executed.metadata.title = f"{folder.name}: accuracy against energy"
    options = {"exclude_input": True, "exclude_output_prompt": True, "exclude_anchor_links": True}
    exporter = HTMLExporter(**options, template_name="page", extra_template_basedirs=[str(TRADEOFF_NOTEBOOK.parent)])
    write_atomically(notebook.with_suffix(".html"), exporter.from_notebook_node(executed)[0])


def check_runs(folder: Path, download: str = "") -> int:
    """Load the data of each run once, so that none has to fail, fetch or decode by itself; say what is wrong."""
    from eatlib.checkpoint import CheckpointError, load_start
    from eatlib.data import load_data
    from eatlib.models import build_model
    from eatlib.penalties import choose_layers

    fields = {"dataset", "image_size", "train_samples", "test_samples", "validation_share", "split_seed", "data_dir"}
    fields |= {"allow_partial", "download", "model", "width", "penalty_layers", "start", "new_head"}
    found = StudyResults.load(folder)
    runs = [found.configs[name] for name in found.missing]
    runs = [run.model_copy(update={"start": None}) if run.starts_from_run else run for run in runs]
    problems: dict[str, None] = {}
    for run in {run.model_dump_json(include=fields): run for run in runs}.values():
        try:
            run = run.model_copy(update={"download": run.download or bool(download)})
            data = load_data(run, progress=sys.stderr.isatty())
            model = build_model(run.model, classes=len(data.classes), image_size=run.image_size, width=run.width)
            choose_layers(model, run.penalty_layers)
            if run.start:
                load_start(model, run, None)
        except (ValueError, CheckpointError, OSError) as error:
            problems[str(error)] = None
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


# --- where a process runs, and when it ends -----------------------------------------------------------------------


def local_gpus() -> list[str]:
    """Identifiers of the GPUs that processes started here may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]  # words without numbers where it fails
        listed = ",".join(subprocess.run(command, capture_output=True, text=True).stdout.split())
    return [gpu for gpu in map(str.strip, (listed or "").split(",")) if re.fullmatch(r"\d+|(GPU|MIG)-.+", gpu)]


@contextmanager
def gpu_of_its_own(config: RunConfig, gpus: list[str]) -> Iterator[str | None]:
    """Hold one of `gpus` that no run of this machine or Slurm job holds; None if the run may use none or has none."""
    for gpu in itertools.cycle(gpus if config.device in ("auto", "cuda") else []):
        lock = Path(tempfile.gettempdir()) / f"eatlib-{os.getuid()}-gpu-{os.environ.get('SLURM_JOB_ID', '')}-{gpu}.lock"
        with suppress(Timeout), FileLock(lock, timeout=0.5):
            yield gpu
            return
    yield None


def end_descendants() -> None:
    """End all processes that this one has started, and those that they have."""
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


def main() -> int:
    """Do the step that the command line says."""
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's optional check compiles a grammar for over a second
    end_with_parent()
    name, folder, *arguments = sys.argv[1:]
    return {"train": train, "draw": draw, "check": check_runs}[name](Path(folder), *arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
