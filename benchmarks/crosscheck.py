"""What others count for the same networks: MACs, effective MACs, activation sparsity; the tables of docs/energy.md.

    pip install fvcore && pip install --no-deps neurobench snntorch tonic
    python benchmarks/crosscheck.py [--images 2]

`torch.utils.flop_counter` comes with PyTorch; what is not installed leaves its columns empty. Weights are freshly drawn
and images random: what is compared is how things are counted.
"""

import argparse
import logging
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eatlib.energy import EnergyMeter
from eatlib.models import build_model

Counts = dict[str, float | None]
NETWORKS = ("resnet18", "vgg16", "mobilenet_v2", "googlenet")
"""The paper's two; one with depthwise convolutions and ReLU6; one whose ReLUs are functional calls."""
MULTIPLYING = ("conv", "linear", "addmm", "matmul", "bmm")
"""What fvcore calls the operators that multiply."""


def eatlib(model: nn.Module, images: Tensor) -> Counts:
    """MACs of `fused`, the effective ones from shares of zeros and exact; the share of zeros that ReLU modules make."""
    counts: Counts = {}
    for how, exact in ((" by shares", False), ("", True)):
        with EnergyMeter(model, exact_macs=exact) as meter:
            model(images)
        report = meter.report("fused")
        (totals,) = report.batches
        counts |= {"MACs": totals.operations, f"effective{how}": totals.effective_operations}
        counts[f"ratio{how}"] = report.ratio
    layers = meter.report("published").layers
    relus = layers[layers["kind"].isin(["ReLU", "ReLU6"])]
    zeros = (relus["outputs"] - relus["nonzero_outputs"]).sum()
    return counts | {"sparsity": float(zeros / relus["outputs"].sum()) if len(relus) else None}


def inside(model: nn.Module, images: Tensor) -> Counts:
    """MACs that do not fall on padding, by the sizes of convolutions and linear layers."""
    counts: Counts = {"MACs": 0}

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs = len(output) * module.weight.shape[0] * module.weight.shape[1]
            if isinstance(module, nn.Conv2d):
                sizes = zip(inputs[0].shape[2:], output.shape[2:], module.kernel_size, strict=True)
                moves = zip(module.stride, module.padding, module.dilation, strict=True)
                for (size, out, kernel), (stride, padding, dilation) in zip(sizes, moves, strict=True):
                    reads = [place * stride + k * dilation - padding for place in range(out) for k in range(kernel)]
                    macs *= sum(0 <= read < size for read in reads)
            counts["MACs"] += macs

    hooks = [module.register_forward_hook(add) for module in model.modules()]
    model(images)
    for hook in hooks:
        hook.remove()
    return counts


def flop_counter(model: nn.Module, images: Tensor) -> Counts:
    """A multiplication and the addition after it are two operations there."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return {"MACs": counter.get_total_flops() / 2}


def fvcore(model: nn.Module, images: Tensor) -> Counts:
    """A multiplication and the addition after it are one operation there; `all` has those of other operators, too."""
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    counted = FlopCountAnalysis(model, images).by_operator()
    return {"MACs": sum(counted[name] for name in MULTIPLYING), "all": sum(counted.values())}


def neurobench(model: nn.Module, images: Tensor) -> Counts:
    """`MACs` are its "Dense"; `sparsity` is that of the activation functions it knows, `with ReLU6` with one more."""
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    from neurobench.models import TorchModel

    counts: Counts = {}
    wrapped = TorchModel(model)
    for name in ("sparsity", "with ReLU6"):
        wrapped.register_hooks()
        wrapped(images)
        counts[name] = ActivationSparsity()(wrapped, None, None)
        operations = SynapticOperations()(wrapped, None, (images,))  # for each image
        wrapped.cleanup_hooks()
        wrapped.add_activation_module(nn.ReLU6)
    return counts | {"MACs": operations["Dense"] * len(images), "effective": operations["Effective_MACs"] * len(images)}


TOOLS: dict[str, Callable[[nn.Module, Tensor], Counts]] = {
    "eatlib": eatlib,
    "inside": inside,
    "flop_counter": flop_counter,
    "fvcore": fvcore,
    "neurobench": neurobench,
}


def count_all(name: str, images: int) -> dict[str, Counts]:
    """What each tool that is installed counts for a network and so many images of 32x32 pixels."""
    torch.manual_seed(0)
    model, batch = build_model(name, classes=10).eval(), torch.rand(images, 3, 32, 32)
    tools = {tool: count for tool, count in TOOLS.items() if tool not in ("fvcore", "neurobench") or find_spec(tool)}
    with torch.no_grad():
        return {tool: count(model, batch) for tool, count in tools.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    images = parser.parse_args().images
    found = {name: count_all(name, images) for name in NETWORKS}

    def table(columns: dict[str, tuple[str, str]], form: str, divisor: int) -> None:
        print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, counts in found.items():
            values = [counts.get(tool, {}).get(what) for tool, what in columns.values()]
            cells = ["" if value is None else format(value / divisor, form) for value in values]
            print(f"| {name} | {' | '.join(cells)} |")

    print(f"torch {torch.__version__}, {images} images of 32x32 pixels; counts are those of one image")
    dense = {"eatlib": ("eatlib", "MACs"), "flop_counter / 2": ("flop_counter", "MACs"), "fvcore": ("fvcore", "MACs")}
    table(dense | {"without padding": ("inside", "MACs"), "neurobench": ("neurobench", "MACs")}, ",.0f", images)
    effective = {"eatlib, `exact_macs`": ("eatlib", "effective"), "neurobench": ("neurobench", "effective")}
    table(effective | {"eatlib, by shares": ("eatlib", "effective by shares")}, ",.1f", images)
    sparsity = {"eatlib": ("eatlib", "sparsity"), "neurobench": ("neurobench", "sparsity")}
    table(sparsity | {"neurobench, told of ReLU6": ("neurobench", "with ReLU6")}, ".6f", 1)
    table({"fvcore, all operators": ("fvcore", "all")}, ",.0f", images)
    table({"ratio, `exact_macs`": ("eatlib", "ratio"), "ratio, by shares": ("eatlib", "ratio by shares")}, ".4f", 1)


if __name__ == "__main__":
    main()
