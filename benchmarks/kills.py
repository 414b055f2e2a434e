"""Kill a study at random, again and again, until it is done; then compare it with one that was left alone.

    python benchmarks/kills.py --kills 50

Each time a random process of the runner's (itself, the engine, a run, a kernel) gets SIGKILL, SIGTERM or SIGINT.
Counted are results that were lost or changed, finished runs that were trained again, processes that outlive a killed
runner by more than 8 s, and runners that did not end the study although nothing was killed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

STUDY = """
label: Runs of some seconds, to be killed.
fixed: {dataset: digits, model: vgg16, width: 0.0625, train_samples: 300, test_samples: 100, sigma: 1.0e-2, epochs: 6,
        batch_size: 25, learning_rate: 0.02, energy_batch_size: 50}
blocks: [{grid: {seed: [0, 1], lambda: [0, 1]}}]
"""


def start(study: Path, results: Path) -> psutil.Popen:
    """A runner, as `./run_all.sh` starts it."""
    command = [sys.executable, "-m", "eatlib.study", str(study), "--results", str(results)]
    return psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def status(process: psutil.Process) -> str | None:
    """None if it is gone."""
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return None


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[-4:])
    except psutil.NoSuchProcess:
        return "ended meanwhile"


def results_of(folder: Path) -> dict[str, str]:
    """What every result says, timings aside."""
    found = {}
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        for epoch in values["history"]:
            epoch.update(seconds=None, joules=None)
        del values["provenance"]
        found[path.name] = json.dumps(values)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    bad = ("processes left after 8 s", "results lost", "results made again")
    bad += ("studies that failed unharmed", "studies with other numbers")
    counts: Counter[str] = Counter(dict.fromkeys(bad, 0))
    with tempfile.TemporaryDirectory() as temporary:
        study = Path(temporary, "killed.yaml")
        study.write_text(STUDY)
        start(study, Path(temporary, "alone")).wait()
        expected = results_of(Path(temporary, "alone", "killed"))
        while counts["kills"] < options.kills:
            counts["studies"] += 1
            results = Path(temporary, f"{counts['studies']}")
            times: dict[Path, int] = {}
            ended = False
            while not ended:
                runner = start(study, results)
                deadline = (
                    time.monotonic() + random.uniform(0.5, 12) if counts["kills"] < options.kills else float("inf")
                )
                while runner.is_running() and runner.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                if runner.poll() is None:
                    family = [runner, *runner.children(recursive=True)]
                    names = {process.pid: name_of(process) for process in family}
                    victim = random.choice(family)
                    sign = random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                    counts["kills"] += 1
                    counts[f"  {'runner' if victim is runner else 'its processes'} by {sign.name}"] += 1
                    if victim.is_running():
                        victim.send_signal(sign)
                    if victim is not runner:
                        runner.wait()
                    _, alive = psutil.wait_procs(family, timeout=8)
                    # What has ended stays listed until its new parent, the system's first process, has asked for it.
                    alive = [process for process in alive if status(process) not in (None, psutil.STATUS_ZOMBIE)]
                    counts["processes left after 8 s"] += len(alive)
                    for process in alive:
                        print(f"left after {sign.name} to {names[victim.pid]}: {names[process.pid]}", file=sys.stderr)
                else:
                    ended = runner.wait() == 0
                    counts["studies that failed unharmed"] += not ended
                for path, changed in times.items():
                    counts["results lost"] += not path.exists()
                    counts["results made again"] += path.exists() and path.stat().st_mtime_ns != changed
                times = {path: path.stat().st_mtime_ns for path in (results / "killed").glob("*.json")}
            counts["studies with other numbers"] += results_of(results / "killed") != expected
    for what, count in counts.items():
        print(f"{count:4} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
