#!/usr/bin/env bash
# Set up if needed, then run a study and draw its results, or run the tests.
set -euo pipefail

usage() {
  cat <<TEXT
usage: ./run_all.sh [STUDY] [OPTIONS]    run a study (default: quick): train what has no result yet, draw the results
       ./run_all.sh --test [ARGUMENTS]   run the tests: pytest --nbval [ARGUMENTS]
       ./run_all.sh --setup              only set up

STUDY is one of: $(for file in studies/*.yaml; do basename "$file" .yaml; done | tr '\n' ' ')
or the path of a YAML file of your own.
  -n, --dry-run          show what would run, why, and how long it may take
  --download             fetch a data set that is not there
  --results DIR          where results go (default: results/)
  --help                 show this
Other options go to Snakemake: -c N (runs at a time), --profile profiles/slurm, ...

Without an active environment that has the packages, everything is installed into .venv/ (Python 3.11 or newer, about
6 GB). EATLIB_DATA names a folder with data sets, if they are not in data/.
TEXT
}

fail() { echo "error: $*" >&2; exit 2; }
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$caller/$1" ;; esac; }

caller=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
root=$PWD
[ -z "${EATLIB_DATA-}" ] || { EATLIB_DATA=$(absolute "$EATLIB_DATA"); export EATLIB_DATA; }

# What is asked for, checked before anything is installed; paths are from where the caller is.
action=run
arguments=()
case ${1-} in
  -h | --help) usage; exit 0 ;;
  --test | --setup) action=${1#--}; shift; arguments=("$@") ;;
  *.yaml | *.yml)
    arguments=("$(absolute "$1")"); shift
    [ -f "${arguments[0]}" ] || fail "no such study file: ${arguments[0]}" ;;
  [!-]*) [ -f "studies/$1.yaml" ] || fail "unknown study '$1'; see ./run_all.sh --help" ;;
esac
if [ "$action" = run ]; then
  while [ $# -gt 0 ]; do
    case $1 in --results=*) set -- --results "${1#*=}" "${@:2}" ;; esac
    if [ "$1" = --results ]; then [ $# -gt 1 ] || fail "--results needs a folder"; arguments+=("$1" "$(absolute "$2")"); shift
    else arguments+=("$1"); fi; shift
  done
fi

works() {
  "$1" -c 'import sys; from importlib.util import find_spec
needed = "torch torchvision papermill nbval pytest hypothesis seaborn pydantic snakemake nbconvert ipywidgets sklearn altair"
needed += " onnxruntime onnxscript torchao"
sys.exit(sys.version_info < (3, 11) or any(find_spec(name) is None for name in needed.split()))' 2>/dev/null
}

if ! { [ -n "${VIRTUAL_ENV-}${CONDA_PREFIX-}" ] && works python; }; then
  if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    base=
    for candidate in python3.13 python3.12 python3.11 python3 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$candidate; break; fi
    done
    [ -n "$base" ] || fail "Python 3.11 or newer is needed and none was found"
    echo "Setting up .venv with $("$base" --version): about 6 GB, some minutes, once."
    "$base" -m venv .venv || fail "'$base -m venv .venv' failed; on Debian and Ubuntu, install python3-venv"
    .venv/bin/python -m pip install -r requirements.txt
    .venv/bin/python -m pip install --quiet --no-deps --editable .
    cp requirements.txt .venv/installed-requirements.txt
  fi
  export PATH="$root/.venv/bin:$PATH"
fi

[ -w "${HOME:-/nowhere}" ] || { HOME=$(mktemp -d); export HOME; } # Jupyter and matplotlib write there
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
case $action in
  setup) echo "Ready: $(command -v python)" ;;
  test) exec python -m pytest --nbval ${arguments[@]+"${arguments[@]}"} ;;
  run) exec python -m eatlib.study ${arguments[@]+"${arguments[@]}"} ;;
esac
