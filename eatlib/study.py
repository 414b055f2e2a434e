"""`python -m eatlib.study STUDY`: check it before anything starts, have Snakemake do its steps, say how far it is."""

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from tqdm import tqdm

from eatlib.config import ConfigError, RunConfig, Study
from eatlib.results import ROOT, ResultError, RunResult, StudyResults, write_atomically
from eatlib.steps import PARENT, end_descendants, local_gpus, predecessor


class StudyError(Exception):
    """Something the user asked for that cannot be done; the message is one line."""


def open_study(name: str) -> Study:
    """A study of `studies/` by name, or any study file by path.

    Raises:
        StudyError: there is none.
        ConfigError: it is not valid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "studies" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in ROOT.glob("studies/*.yaml"))) or "none, as this is no checkout"
        raise StudyError(f"study = {name!r}: must be the path of a YAML file, or one of {ROOT}/studies: {known}")
    return Study.load(path)


# --- before anything starts ---------------------------------------------------------------------------------------


def prepare(study: Study, folder: Path) -> StudyResults:
    """Write the study beside its results, clear the places of its runs, and see what is there; the caller locks it."""
    text, path = study.to_yaml(), folder / "study.yaml"
    if not path.is_file() or path.read_bytes() != text.encode():  # a newer file has the figures drawn again
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
    return StudyResults.load(folder, study)


def show_plan(study: Study, folder: Path) -> None:
    """Print a line a run: done, or why it is not and how long it may take, judged by the epochs of like runs."""
    epochs: dict[tuple[Any, ...], list[float]] = {}
    for path in {*folder.parent.glob("*/*.json"), *(ROOT / "results").glob("**/*.json")}:
        with suppress(ResultError, OSError):
            past = RunResult.load(path)
            epochs.setdefault(_kind(past.config, past.provenance.device), []).extend(e.seconds for e in past.history)
    found, expected = StudyResults.load(folder, study), []
    for name, run in found.configs.items():
        if name in found.runs:
            print(f"{name}  done in {timedelta(seconds=round(found.runs[name].provenance.wall_seconds))}")
            continue
        reason = "its JSON is another configuration's" if (folder / f"{name}.json").exists() else "no result"
        if before := predecessor(found.configs, run):
            reason += f", starts from {before}"
        if like := epochs.get(_kind(run, "cuda" if local_gpus() else "cpu")):
            expected.append(timedelta(seconds=round(run.epochs * statistics.median(like))))
        print(f"{name}  to train ({reason}), {f'about {expected[-1]}' if like else 'no like has run'}")
    print(f"{len(found.runs)} runs are done, {len(found.missing)} are to train", end="")
    print(f": about {sum(expected, timedelta())} for {len(expected)} of them, one after another" if expected else "")


def _kind(config: RunConfig, device: str) -> tuple[Any, ...]:
    """What decides how long an epoch takes, on a GPU or not."""
    fields = ("dataset", "image_size", "train_samples", "model", "width", "precision", "compile", "threads", "device")
    return *(getattr(config, field) for field in fields), config.lambda_ > 0, device == "cpu"


# --- the command line ---------------------------------------------------------------------------------------------


def run_engine(folder: Path, found: StudyResults, options: list[str]) -> int:
    """Call Snakemake in a session of its own and show how far its runs are; its exit status."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT)]
    elsewhere = any(option.startswith(("--profile", "--executor")) for option in options)
    if not elsewhere:
        memory = psutil.virtual_memory().available >> 20
        command += ["--resources", f"mem_mb={memory}", f"gpu={len(local_gpus())}"]
    command += [*options, "--config", f"folder={folder}", f"study={folder}/study.yaml"]
    todo = [*found.missing]
    bar = tqdm(total=len(found.configs), initial=len(found.runs), unit="run", disable=None, dynamic_ncols=True)
    with bar, (folder / "log" / "snakemake.log").open("w") as log:
        engine = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while engine.poll() is None:
                time.sleep(0.2)
                _show(folder, todo, bar)
        finally:
            if engine.poll() is None and elsewhere:  # it has jobs elsewhere to cancel
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
    with suppress(FileNotFoundError):  # one may be done meanwhile
        states = [(name, folder / "work" / name / "progress") for name in todo]
        bar.set_postfix_str("; ".join(f"{name} {state.read_text()}" for name, state in states if state.exists()))


def last_words(log: Path) -> str:
    """The last error in a log, also that of a notebook which papermill executed, or else its last line."""
    text = log.read_text(errors="replace").rstrip()
    errors = re.findall(r"^[\w.]*Error: .*", text, re.MULTILINE)
    return (errors or text.splitlines() or ["ended without a word: out of memory, or see snakemake.log"])[-1]


def run(name: str, arguments: argparse.Namespace, options: list[str]) -> int:
    """Check everything, have the engine do what is missing, and show the table."""
    if not re.fullmatch(r"all|0*[1-9]\d*", arguments.cores or "all"):  # with 0, Snakemake would wait for ever
        raise StudyError(f"-c {arguments.cores}: must be all, or a number of runs at a time")
    if options and not options[0].startswith("-"):
        raise StudyError(f"{options[0]!r}: one study at a time; after it, options")
    study = open_study(name)
    folder = Path(os.path.realpath(arguments.results), study.name)  # also of links in a circle
    if arguments.dry_run:
        if options:
            raise StudyError(f"--dry-run goes without {' '.join(options)}")
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
        found = prepare(study, folder)
        check = [sys.executable, "-m", "eatlib.steps", "check", str(folder)] + ["--download"] * arguments.download
        if found.missing and subprocess.run(check).returncode:
            return 2
        logs = {name: folder / "log" / f"{name}.log" for name in (*found.configs, "figures", "snakemake")}
        for name in (*found.missing, "figures"):
            logs[name].unlink(missing_ok=True)
        drawn = not (status := run_engine(folder, found, options))
        undone = [name for name in found.configs if not (folder / f"{name}.json").exists()]
        if failed := [name for name in undone if logs[name].exists()]:
            for name in failed:
                print(f"FAILED {name}: {last_words(logs[name])}", file=sys.stderr)
                print(f"       see {logs[name]} and {folder}/notebooks/{name}.ipynb", file=sys.stderr)
            print(f"{len(failed)} runs failed; the next call runs only these again", file=sys.stderr)
            if waiting := len(undone) - len(failed):
                print(f"{waiting} runs were not tried, as they start from these", file=sys.stderr)
            draw = [sys.executable, "-m", "eatlib.steps", "draw", str(folder)]
            drawn = not subprocess.run(draw, capture_output=True).returncode
        elif status:
            words = " | ".join(last_words(logs[name]) for name in ("figures", "snakemake") if logs[name].exists())
            print(f"error: figures or the engine failed: {words}\nsee {folder}/log/", file=sys.stderr)
        if drawn and (folder / "table.md").exists():
            print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}")
            print(f"figures, tables and {folder}/tradeoff.html are in {folder}")
    return min(status, 2) if status >= 0 else 1


def main() -> int:
    """Do what the command line says; 0: all well, 1: runs failed, 2: cannot be done, 130: interrupted."""
    os.environ[PARENT] = str(os.getpid())
    named = sys.argv[1:2] and not sys.argv[1].startswith("-")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # ./run_all.sh --help has the texts
    parser.add_argument("-n", "--dry-run", action="store_true")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("-c", "--cores")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.stdout.reconfigure(errors="replace")
    study = sys.argv[1] if named else "quick"
    arguments, options = parser.parse_known_args(sys.argv[1 + bool(named) :])
    options += ["-c", arguments.cores] if arguments.cores else []
    try:
        try:
            return run(study, arguments, options)
        except BrokenPipeError:  # whoever read this has gone: go on without
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return run(study, arguments, options)
    except (StudyError, ConfigError, OSError) as error:  # the last: something in the results folder cannot be used
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the next call resumes the rest", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
