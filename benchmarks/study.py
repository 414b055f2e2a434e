"""What a run costs beyond its training, and how well runs share a machine.

    python benchmarks/study.py [--epochs N]

Overhead: wall time of a run's process (start of Python and of the kernel, imports, papermill) minus that of `fit`.
Parallel efficiency: the same four runs, one thread each, one after another and two at a time, engine and figures
included; 1 means that two at a time take half as long.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from eatlib.config import Study
from eatlib.results import ROOT, RunResult
from eatlib.study import open_study


def seconds(*arguments: str) -> float:
    """Wall time of `python -m ...`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    changes = {"epochs": options.epochs, "lambda": 1, "width": 0.25, "model": "resnet18"}
    block = {"fixed": open_study("smoke").fixed | changes, "grid": {"seed": [0, 1, 2, 3]}}
    study = Study(name="four", label="Four runs that take a while.", blocks=[block])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, study.name)
        folder.mkdir()
        (folder / "study.yaml").write_text(study.to_yaml())
        overheads = []
        for name in study.runs():
            process = seconds("eatlib.steps", "train", str(folder), name)
            overheads.append(process - RunResult.load(folder / f"{name}.json").provenance.wall_seconds)
        file = str(folder / "study.yaml")
        alone, together = (
            seconds("eatlib.study", file, "--results", f"{temporary}/{cores}", "-c", cores) for cores in ("1", "2")
        )
    print(f"overhead of a run: {statistics.median(overheads):.1f} s")
    print(f"four runs, two at a time instead of one: {alone:.1f} s -> {together:.1f} s, "
          f"parallel efficiency {alone / together / 2:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
