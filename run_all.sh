#!/usr/bin/env bash
# Set up if needed, then run a study and draw its results, or run the tests.
set -euo pipefail
caller=$PWD
case ${EATLIB_DATA:-/} in /*) ;; *) export EATLIB_DATA=$caller/$EATLIB_DATA ;; esac
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

studies() { for file in studies/*.yaml; do basename "$file" .yaml; done | tr '\n' ' '; }

usage() {
  cat <<TEXT
usage: ./run_all.sh [STUDY] [OPTIONS]   run a study (default: quick): train what has no result yet, draw the results
       ./run_all.sh --test [ARGUMENTS]  run the tests: pytest --nbval [ARGUMENTS]
       ./run_all.sh --setup             only set up

studies: $(studies)
options:
  --dry-run            show the runs, which have a result, and how long the rest may take; do nothing
  --measure            with --dry-run: time a few steps of what has not run here yet
  --set FIELD=VALUE .. set fields for all runs, for example epochs=10 seed=[0,1]; results are kept apart
  --force              train also what has a result
  --stale              show results that were made by other code; do nothing
  --workers N          runs at a time (default: what cores, memory and GPUs allow)
  --scheduler ADDRESS  send the runs to this Dask scheduler (default: \$DASK_SCHEDULER_ADDRESS, if set)
  --download           fetch a data set that is not there
  --results DIR        where results go (default: results/)
  --quiet              say only what failed, and the results
  --help               show this

Without an active environment that has the packages, everything is installed into .venv/ (Python 3.11 or newer,
about 6 GB). EATLIB_DATA names a folder with data sets, if they are not in data/.
TEXT
}

fail() { echo "error: $*" >&2; exit 2; }

# What is asked for, checked before anything is installed.
action=run
study=
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --test) action="test"; shift; arguments=("$@"); break ;;
    --setup) action=setup ;;
    --dry-run | --measure | --force | --stale | --download | --quiet) arguments+=("$1") ;;
    --workers | --scheduler | --results)
      if [ "$1" = --workers ]; then [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "--workers needs a number, 1 or more"; fi
      [ $# -gt 1 ] || fail "$1 needs a value; see ./run_all.sh --help"
      if [ "$1" = --results ] && [[ $2 != /* ]]; then arguments+=("$1" "$caller/$2"); else arguments+=("$1" "$2"); fi
      shift ;;
    --set)
      [[ ${2-} == *=* ]] || fail "--set needs FIELD=VALUE; see ./run_all.sh --help"
      arguments+=("$1")
      while [[ ${2-} == [a-z]*=* ]]; do arguments+=("$2"); shift; done ;;
    -*) fail "unknown option $1; there are: $(usage | sed -n 's/^  \(--[a-z-]*\).*/\1/p' | tr '\n' ' ')--test --setup" ;;
    *)
      [ -z "$study" ] || fail "one study at a time: $study or $1?"
      [ -f "studies/$1.yaml" ] || fail "unknown study '$1'; there are: $(studies)"
      study=$1 ;;
  esac
  shift
done

# Jupyter, IPython and matplotlib write to the home folder.
if [ ! -w "${HOME:-/nowhere}" ]; then
  HOME=$(mktemp -d)
  export HOME
  trap 'rm -rf -- "$HOME"' EXIT
fi

works() {
  "$1" - 2>/dev/null <<'PYTHON'
import sys
from importlib.util import find_spec
needed = "torch torchvision papermill nbval pytest hypothesis seaborn pydantic distributed nbconvert ipywidgets sklearn"
sys.exit(sys.version_info < (3, 11) or any(find_spec(name) is None for name in needed.split()))
PYTHON
}

python=
if [ -n "${VIRTUAL_ENV-}${CONDA_PREFIX-}" ] && works python; then
  python=$(command -v python)
else
  python=$PWD/.venv/bin/python
  if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    base=
    for candidate in python3.13 python3.12 python3.11 python3 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$candidate; break; fi
    done
    [ -n "$base" ] || fail "Python 3.11 or newer is needed and none was found"
    echo "Setting up .venv with $("$base" --version): about 6 GB, some minutes, once."
    "$base" -m venv .venv || fail "'$base -m venv .venv' failed; on Debian and Ubuntu, install python3-venv"
    quiet=()
    [ -t 1 ] || quiet=(--quiet)
    "$python" -m pip install ${quiet[@]+"${quiet[@]}"} -r requirements.txt
    "$python" -m pip install --quiet --no-deps --editable .
    cp requirements.txt .venv/installed-requirements.txt
  fi
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
case $action in
  setup) echo "Ready: $python" ;;
  test) "$python" -m pytest --nbval ${arguments[@]+"${arguments[@]}"} ;;
  run) "$python" -m eatlib.study run "${study:-quick}" ${arguments[@]+"${arguments[@]}"} ;;
esac
