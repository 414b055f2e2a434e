"""What a run costs beyond its training, and how well runs share a machine.

    python benchmarks/study.py [--epochs N]

Overhead: wall time of a run's process (start of Python and of the kernel, imports, papermill, figures) minus that of
`fit`. Parallel efficiency: the same four runs, one thread each, one after another and two at a time, in one session;
1 means that two at a time take half as long.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from eatlib.config import Study
from eatlib.results import StudyResults
from eatlib.study import run_study


def measure(epochs: int, workers: int) -> tuple[float, list[float], list[float]]:
    """Seconds for the study, and for each run: its process, and its training alone."""
    study = Study(
        name="benchmark",
        label="benchmark",
        fixed={
            "dataset": "digits",
            "model": "resnet18",
            "width": 0.25,
            "batch_size": 64,
            "epochs": epochs,
            "learning_rate": 0.05,
            "threads": 1,
        },
        blocks=[{"grid": {"lambda": [1], "seed": [0, 1, 2, 3]}}],
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        outcomes = run_study(study, Path(folder), workers=workers, quiet=True)
        total = time.perf_counter() - start
        assert all(outcome.status == "done" for outcome in outcomes), outcomes
        results = StudyResults.load(Path(folder) / study.name).results
        return total, [o.seconds for o in outcomes], [r.provenance.wall_seconds for r in results]


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    alone, processes, trainings = measure(epochs, workers=1)
    overhead = statistics.median(processes) - statistics.median(trainings)
    together, *_ = measure(epochs, workers=2)
    print(f"a run: {statistics.median(processes):.1f} s, of which training {statistics.median(trainings):.1f} s")
    print(f"overhead of a run: {overhead:.1f} s (goal: at most 4)")
    print(f"four runs: {alone:.1f} s one after another, {together:.1f} s two at a time")
    print(f"parallel efficiency of two workers: {alone / together / 2:.2f} (goal: at least 0.85)")


if __name__ == "__main__":
    main()
