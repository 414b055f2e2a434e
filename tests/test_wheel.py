"""What `pip install` brings is enough for a network of one's own: the study's packages are not needed."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from eatlib.results import ROOT

PROGRAM = '''
import re
import sys
from importlib import metadata

here = sys.argv[1]
sys.path.insert(0, here)
(own,) = metadata.distributions(path=[here])
todo, needed = ["eatlib"], set()  # what the wheel asks for, and what that asks for
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name in needed:
        continue
    needed.add(name)
    try:
        asked = own.requires if name == "eatlib" else metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # of another platform
        continue
    todo += [re.match("[A-Za-z0-9._-]+", line)[0] for line in asked if "extra ==" not in line]
homes, finders = metadata.packages_distributions(), list(sys.meta_path)


class Needed:
    """Finds what is of the standard library, or of a package that is needed."""

    def find_spec(self, name, path=None, target=None):
        of = {re.sub("[-_.]+", "-", home).lower() for home in homes.get(name.split(".")[0], [])}
        found = (finder.find_spec(name, path, target) for finder in finders) if not of or of & needed else ()
        return next(filter(None, found), None)


sys.meta_path[:] = [Needed()]
for absent in ("sklearn", "matplotlib", "papermill", "snakemake"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} can be imported")

import torch
from torch import nn

import eatlib

assert eatlib.__file__.startswith(here), eatlib.__file__
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
batches = [(torch.rand(8, 3, 8, 8), torch.arange(8) % 4)]
with eatlib.ActivationPenalty(model, sigma=1e-2) as penalty:
    model(batches[0][0])
    penalty().backward()
print(eatlib.energy_report(model, batches, accounting="fused"))
points = list(eatlib.tradeoff(model, batches, batches, lambdas=[1, 2], folder="steps"))
print(len(points), "points")
'''


def test_the_wheel_works_without_the_studys_packages(tmp_path):
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("pip and setuptools make a wheel")
    source, wheels, place = (tmp_path / name for name in ("source", "wheels", "place"))
    source.mkdir()
    for name in ("eatlib", "pyproject.toml", "README.md", "LICENSE"):  # a build leaves folders where it is done
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    call([*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(wheels)], tmp_path)
    (wheel,) = wheels.glob("eatlib-*.whl")
    call([*pip, "install", str(wheel), "--no-deps", "--target", str(place)], tmp_path)
    said = call([sys.executable, "-c", PROGRAM, str(place)], tmp_path)
    assert said.startswith("energy ratio ")
    assert said.endswith("not counted: nothing\n3 points\n")
    assert len(list((tmp_path / "steps").glob("*.safetensors"))) == 2


def call(command, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
