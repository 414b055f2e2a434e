"""A study from the command line to the figures: what is refused, what fails, what is killed, and what is never lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from eatlib import study as studies
from eatlib.config import RunConfig, Study
from eatlib.results import ROOT, StudyResults

TOY_TRAINING = """
import time
from pathlib import Path
from conftest import made_up_result
from eatlib.config import RunConfig
config = RunConfig.parse({name: globals()[name] for name in RunConfig.model_fields})
if config.seed == 13:
    raise ValueError("thirteen is unlucky")
with Path(work_dir).parent.with_name("executions").open("a") as file:
    file.write(Path(work_dir).name + chr(10))
time.sleep(0.2)
assert Path(start_weights).is_file() == config.starts_from_run
Path(work_dir, "result.safetensors").touch()
made_up_result(**config.to_dict()).save(Path(work_dir, 'result.json'))
"""


def notebook(path: Path, *cells: str) -> None:
    """A notebook whose first cell is the parameters'."""
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    code = [nbformat.v4.new_code_cell(source) for source in cells]
    written = nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel})
    written.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(written, path)


@pytest.fixture
def project(tmp_path):
    """This project with notebooks that make results up, in a folder with a space."""
    root = tmp_path / "a project"
    for name in ("eatlib", "profiles", "studies"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", root)
    shutil.copytree(ROOT / "notebooks" / "page", root / "notebooks" / "page")
    notebook(root / "notebooks" / "1_train.ipynb", "start_weights = work_dir = ''", TOY_TRAINING)
    draw = "import pathlib\nfor name in ('csv', 'md'): pathlib.Path(results, study, f'table.{name}').write_text('|a|')"
    notebook(root / "notebooks" / "2_tradeoff.ipynb", "study = results = ''", draw)
    write_study(root, seed=[0, 1])
    return root


def write_study(root: Path, **grid: list) -> None:
    study = {"label": "Made up.", "fixed": {"epochs": 1}, "blocks": [{"grid": {"lambda": [0, 1]} | grid}]}
    (root / "studies" / "toy.yaml").write_text(yaml.safe_dump(study))


def environment(root: Path, **more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(root), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def run(root: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eatlib.study", *arguments]
    return subprocess.run(command, cwd=root, env=environment(root, **more), capture_output=True, text=True, timeout=300)


def executions(root: Path, study: str = "toy") -> list[str]:
    path = root / "results" / study / "executions"
    return sorted(path.read_text().split()) if path.exists() else []


# --- from the command line to the figures -------------------------------------------------------------------------


def test_the_readmes_command_from_a_study_to_its_figures(tmp_path):
    """The real thing, twice: the number of runs at a time changes no bit, and what is done is not done again."""
    tables = []
    for cores in ("1", "2"):
        results = tmp_path / cores
        command = [str(ROOT / "run_all.sh"), "smoke", "--results", str(results), "-c", cores]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "7"})
        assert done.returncode == 0, done.stdout + done.stderr
        folder = results / "smoke"
        assert sorted(path.name for path in folder.glob("*.json")) == [
            "digits_vgg16_lambda0_seed0.json",
            "digits_vgg16_lambda1_seed0.json",
        ]
        assert {"table.csv", "tradeoff.png", "tradeoff.pdf", "tradeoff.html"} <= {p.name for p in folder.iterdir()}
        assert not list((folder / "work").glob("*/*"))
        assert "accuracy" in done.stdout
        tables.append(StudyResults.load(folder).table().drop(columns="total_seconds"))
    assert tables[0].equals(tables[1])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_a_failing_run_is_reported_and_stops_no_other(project):
    write_study(project, seed=[0, 13])
    done = run(project, "toy")
    assert done.returncode == 1
    folder = project / "results" / "toy"
    assert "FAILED digits_resnet18_lambda0_seed13: ValueError: thirteen is unlucky" in done.stderr
    name = "digits_resnet18_lambda0_seed13"
    assert f"see {folder}/log/{name}.log and {folder}/notebooks/{name}.ipynb" in done.stderr
    assert "2 runs failed" in done.stderr
    assert "|a|" in done.stdout, "figures of what there is"
    assert len(list(folder.glob("*.json"))) == 2
    write_study(project, seed=[0, 1])
    done = run(project, "toy")
    assert done.returncode == 0, done.stderr
    names = [f"digits_resnet18_lambda{weight}_seed{seed}" for weight in (0, 1) for seed in (0, 1)]
    assert executions(project) == names, "each run once"


def test_a_path_is_done_in_order_and_a_failed_step_stops_no_other_path(project):
    path = [{"lambda": 0}, {"lambda": 1}, {"lambda": 2}]
    study = {"label": "Made up.", "fixed": {"epochs": 1}, "blocks": [{"grid": {"seed": [0, 13]}, "path": path}]}
    (project / "studies" / "toy.yaml").write_text(yaml.safe_dump(study))
    done = run(project, "toy")
    assert done.returncode == 1
    assert "1 runs failed" in done.stderr
    assert "2 runs were not tried, as they start from these" in done.stderr
    names = [f"digits_resnet18_{step}_seed0" for step in ("lambda0", "path_lambda1", "path_lambda2")]
    folder = project / "results" / "toy"
    assert (folder / "executions").read_text().split() == names
    assert not list(folder.rglob("*.safetensors")), "nothing needs them any more"
    (folder / f"{names[2]}.json").unlink()
    plan = run(project, "toy", "-n").stdout
    assert f"{names[2]}  to train (no result, starts from {names[1]})" in plan
    before = (folder / f"{names[1]}.json").stat().st_mtime_ns
    done = run(project, "toy")
    assert done.returncode == 1, done.stderr
    assert (folder / "executions").read_text().split() == [*names, *names], "for its weights, what comes before it"
    assert (folder / f"{names[2]}.json").exists()
    assert (folder / f"{names[1]}.json").stat().st_mtime_ns == before


def test_figures_that_fail_are_reported_and_drawn_by_the_next_call(project):
    trade = project / "notebooks" / "2_tradeoff.ipynb"
    whole = trade.read_text()
    trade.write_text(whole.replace("import pathlib", "1 / 0"))
    done = run(project, "toy")
    assert done.returncode == 1
    assert "figures or the engine failed: ZeroDivisionError: division by zero | " in done.stderr
    trade.write_text(whole)
    assert run(project, "toy").returncode == 0
    assert len(executions(project)) == 4


def test_the_engine_can_be_called_by_itself(project):
    command = [sys.executable, "-m", "snakemake", "--config", "study=toy"]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(executions(project)) == 4


def test_a_study_of_ones_own_by_its_path_whatever_its_name(project, tmp_path):
    path = tmp_path / "train.yaml"
    shutil.copy(project / "studies" / "toy.yaml", path)
    done = run(project, str(path), "--download")
    assert done.returncode == 0, done.stderr
    assert len(executions(project, "train")) == 4


def test_a_study_is_done_whatever_its_output_goes_to(project):
    write_study(project, seed=[0])
    with (project / "studies" / "toy.yaml").open("a") as file:
        file.write("label: größe → $x\n")
    text = (project / "studies" / "toy.yaml").read_text().replace("label: Made up.\n", "")
    (project / "studies" / "toy.yaml").write_text(text)
    command = [sys.executable, "-u", "-m", "eatlib.study", "toy"]
    process = subprocess.Popen(
        command, cwd=project, env=environment(project, PYTHONIOENCODING="ascii"), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"toy: gr??e ? $x\n"
    process.stdout.close()
    assert process.wait() == 0
    assert {*executions(project)} == {f"digits_resnet18_lambda{weight}_seed0" for weight in (0, 1)}
    assert (project / "results" / "toy" / "tradeoff.html").exists()


# --- killed -------------------------------------------------------------------------------------------------------


def test_random_kills_lose_nothing_and_leave_nothing():
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "3", "--seed", str(os.getpid())]
    done = subprocess.run(command, env=environment(ROOT), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    counts = {what: int(count) for count, what in (line.split(None, 1) for line in done.stdout.splitlines())}
    assert counts["kills"] == 3
    for bad in ("lost", "made again", "left", "failed unharmed", "other numbers"):
        assert [count for what, count in counts.items() if bad in what] == [0], done.stdout


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_while_a_runner_is_at_work_another_says_so_and_after_its_end_goes_on(project, sign):
    training = project / "notebooks" / "1_train.ipynb"
    training.write_text(training.read_text().replace("sleep(0.2)", "sleep(1000)"))
    command = [sys.executable, "-m", "eatlib.study", "toy"]
    runner = psutil.Popen(command, cwd=project, env=environment(project), stderr=subprocess.PIPE, text=True)
    while not executions(project):
        time.sleep(0.1)
    second = run(project, "toy")
    assert (second.returncode, second.stderr) == (2, f"error: another runner is at work on {project}/results/toy\n")
    family = runner.children(recursive=True)
    runner.send_signal(sign)
    _, alive = psutil.wait_procs(family, timeout=8)
    assert not alive
    if sign == signal.SIGINT:
        assert runner.wait() == 130
        assert "the next call resumes the rest" in runner.stderr.read()
    training.write_text(training.read_text().replace("sleep(1000)", "sleep(0.2)"))
    assert run(project, "toy").returncode == 0


def test_an_engine_whose_runner_was_killed_while_it_started_ends(project):
    runner = psutil.Popen([sys.executable, "-m", "eatlib.study", "toy"], cwd=project, env=environment(project))
    while not ((project / "results/toy/log/snakemake.log").exists() and (engine := runner.children())):
        time.sleep(0.01)
    runner.kill()
    _, alive = psutil.wait_procs(engine, timeout=30)
    assert executions(project) == alive == []


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_result(tmp_path):
    smoke = studies.open_study("smoke")
    path = [{"lambda": 0, "schedule": "triangular"}, {"lambda": 1, "epochs": 40, "batch_size": 10}]
    study = Study(name="long", label="", blocks=[{"fixed": smoke.fixed, "path": path}])
    whole, killed = (tmp_path / name / study.name for name in ("whole", "killed"))
    for folder in (whole, killed):
        folder.mkdir(parents=True)
        (folder / "study.yaml").write_text(study.to_yaml())
    _, name = study.runs()
    commands = {f: [sys.executable, "-m", "eatlib.steps", "train", str(f), name] for f in (whole, killed)}
    process = psutil.Popen(commands[killed], cwd=ROOT, env=environment(ROOT), stderr=subprocess.DEVNULL)
    progress = killed / "work" / name / "progress"
    while not (progress.exists() and int(progress.read_text().split()[1].split("/")[0]) > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    results = []
    for folder, command in commands.items():
        subprocess.run(command, cwd=ROOT, env=environment(ROOT), check=True, capture_output=True)
        values = json.loads((folder / f"{name}.json").read_text())
        for epoch in values["history"]:
            epoch.update(seconds=None, joules=None)
        results.append(values | {"provenance": None})
        assert not (folder / "work" / name).exists()
    assert results[0] == results[1]
    assert "resumed from its checkpoint" in (killed / "notebooks" / f"{name}.ipynb").read_text()


# --- refused, or set aside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], f"study = 'nope': must be the path of a YAML file, or one of {ROOT}/studies: ablation, "),
        (["nope.yaml"], "study = 'nope.yaml': must be the path of a YAML file, or one of"),
        (["-n", "-c", "1"], "--dry-run goes without -c 1"),
        (["smoke", "quick"], "'quick': one study at a time; after it, options"),
        (["smoke", "-c", "0"], "-c 0: must be all, or a number"),
        (["quick", "--results", "/proc/nowhere"], "cannot write to the results folder /proc/nowhere/quick"),
        (["smoke", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_exits_2(tmp_path, monkeypatch, capfd, arguments, message):
    results = [] if "--results" in arguments else ["--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["study", *arguments, *results])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert studies.main() == 2
    assert re.match(f"error: .*{re.escape(message)}", capfd.readouterr().err)
    assert not list(tmp_path.rglob("*.json"))


def test_a_results_folder_that_cannot_be_used_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "smoke" / "study.yaml").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["study", "smoke", "--results", str(tmp_path)])
    assert studies.main() == 2
    assert re.fullmatch(f"error: .*{tmp_path}/smoke.*\n", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nope"], "unknown study 'nope'"), (["my.yaml"], "no such study file: /"), (["--results"], "needs a folder")],
)
def test_run_all_refuses_before_it_installs_anything(tmp_path, arguments, message):
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    done = subprocess.run([str(tmp_path / "run_all.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_what_is_no_result_of_the_run_is_set_aside_and_the_run_done(project, make_result):
    folder = project / "results" / "toy"
    folder.mkdir(parents=True)
    names = [f"digits_resnet18_lambda0_seed{seed}" for seed in (0, 1)]
    (folder / f"{names[0]}.json").write_text("{")
    make_result(**{"lambda": 0, "seed": 1, "epochs": 2}).save(folder / f"{names[1]}.json")
    make_result(**{"lambda": 1, "seed": 1}).save(folder / "under_another_name.json")
    done = run(project, "toy")
    assert done.returncode == 0, done.stderr
    assert f"not a result: {folder}/{names[0]}.json: Invalid JSON: EOF while parsing" in done.stderr
    for name in names:
        assert f"{name}.json is no result of this configuration: moved to {folder}/superseded/{name}." in done.stderr
    assert len(list((folder / "superseded").iterdir())) == 2
    assert executions(project) == [names[0], names[1], "digits_resnet18_lambda1_seed0"]


def test_a_table_of_before_is_not_shown_for_figures_that_failed(project):
    write_study(project, seed=[0])
    notebook(project / "notebooks" / "2_tradeoff.ipynb", "study = results = ''", "raise ValueError('no figure')")
    (project / "results" / "toy").mkdir(parents=True)
    (project / "results" / "toy" / "table.md").write_text("|old|")
    done = run(project, "toy")
    assert done.returncode == 1
    assert "figures or the engine failed: ValueError: no figure" in done.stderr
    assert "|old|" not in done.stdout


def test_a_dry_run_says_what_why_and_how_long_and_changes_nothing(project, make_result, capsys):
    folder = project / "results" / "toy"
    study = Study.load(project / "studies" / "toy.yaml")
    studies.show_plan(study, folder)
    assert "digits_resnet18_lambda1_seed0  to train (no result), no like has run" in capsys.readouterr().out
    assert not folder.exists()
    make_result(**{"lambda": 1}).save(folder / "digits_resnet18_lambda1_seed0.json")
    (folder / "digits_resnet18_lambda0_seed0.json").write_text("")
    studies.show_plan(study, folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits_resnet18_lambda0_seed0  to train (its JSON is another configuration's)")
    assert "digits_resnet18_lambda1_seed0  done in 0:00:01" in lines
    assert "digits_resnet18_lambda1_seed1  to train (no result), about 0:00:01" in lines
    assert studies._kind(RunConfig(), "cuda:0") != studies._kind(RunConfig(), "cpu"), (
        "a GPU's pace is not this machine's"
    )
    assert lines[-1] == "1 runs are done, 3 are to train: about 0:00:01 for 1 of them, one after another"


# --- where runs go ------------------------------------------------------------------------------------------------


STAND_INS = {
    "sbatch": """#!/bin/bash
n=$$; printf '%s\\n' "$@" > "$STANDIN/$n"
cd "${@:$(($(printf '%s\\n' "$@" | grep -nx -- -D | cut -d: -f1) + 1)):1}"
last="${@: -1}"; SLURM_JOB_ID=$n bash -c "${last#--wrap=}" > /dev/null 2>&1; echo $n""",
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"',
    "sacct": """#!/bin/bash
case "$*" in *Account*) echo someone ;; *) for n in $(ls "$STANDIN"); do echo "$n|COMPLETED"; done ;; esac""",
    "sshare": "#!/bin/bash\necho someone",
} | dict.fromkeys(("sinfo", "scontrol", "sacctmgr", "squeue", "scancel"), "#!/bin/bash")


def test_on_slurm_each_run_is_a_job_with_what_the_profile_says(project, tmp_path):
    programs, jobs = tmp_path / "some programs", tmp_path / "jobs"
    jobs.mkdir()
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    options = ["--profile", "profiles/slurm", "--slurm-init-seconds-before-status-checks", "1"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = run(project, "toy", *options, PATH=path, STANDIN=str(jobs))
    assert done.returncode == 0, done.stderr + (project / "results/toy/log/snakemake.log").read_text()
    calls = [path.read_text().splitlines() for path in jobs.iterdir()]
    assert len(executions(project)) == len(calls) == 4
    for call in calls:
        for option, value in (("-p", "gpu"), ("-t", "720"), ("--mem", "16000"), ("-D", str(project))):
            assert call[call.index(option) + 1] == value
        assert {"--cpus-per-task=1", "--gpus=1"} <= set(call)
        assert call[call.index("--output") + 1].startswith(f"{project}/results/slurm/")
