# A study -> its runs -> its table and figures. `./run_all.sh STUDY` checks the study and its data and calls this; so does
# `snakemake --config study=quick`, without the checks. profiles/default/config.yaml says how it is executed.
import os
import sys
from pathlib import Path

from eatlib import steps
from eatlib.results import StudyResults
from eatlib.study import open_study

study = open_study(config.get("study", "quick"))
folder = config.get("folder", f"results/{study.name}")
runs = StudyResults.load(folder, study).configs

if steps.PARENT in os.environ and workflow.is_main_process:  # not in a job, which may be on another machine
    steps.end_with_parent()
os.environ[steps.PARENT] = str(os.getpid())

localrules: all, figures, study_file


rule all:
    input:
        [f"{folder}/{name}.json" for name in runs],  # Snakemake does not make again what only a finished step needed
        f"{folder}/tradeoff.html",


rule figures:
    """The trade-off notebook, executed on all results of the study, and what it writes beside them."""
    input:
        notebook="notebooks/2_tradeoff.ipynb",
        study=f"{folder}/study.yaml",
        results=[f"{folder}/{name}.json" for name in runs],
    output:
        notebook=f"{folder}/tradeoff.ipynb",
        page=f"{folder}/tradeoff.html",
        table=f"{folder}/table.csv",
    log:
        f"{folder}/log/figures.log",
    shell:
        "exec {sys.executable:q} -m eatlib.steps draw {folder:q} > {log:q} 2>&1"


rule train:
    """One run: papermill executes 1_train.ipynb, whose JSON comes last and whole. Its checkpoint survives a failure."""
    input:
        notebook=ancient("notebooks/1_train.ipynb"),  # a changed comment trains nothing again; `-R train` does
        study=ancient(f"{folder}/study.yaml"),
        before=lambda wildcards: [  # the run whose weights it starts from, if it does
            ancient(f"{folder}/{name}.json") for name in [steps.predecessor(runs, runs[wildcards.run])] if name
        ],
    output:
        f"{folder}/{{run}}.json",
    log:
        f"{folder}/log/{{run}}.log",
    threads: lambda wildcards: runs[wildcards.run].threads
    resources:
        mem_mb=2000,
        gpu=lambda wildcards: int(runs[wildcards.run].device != "cpu" and bool(steps.local_gpus())),
    shell:
        "exec {sys.executable:q} -m eatlib.steps train {folder:q} {wildcards.run:q} > {log:q} 2>&1"


rule study_file:
    output:
        f"{folder}/study.yaml",
    run:
        Path(output[0]).write_text(study.to_yaml())
