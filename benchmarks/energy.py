"""What measuring energy costs: the plain forward pass, the report, and hooks that count with `nonzero()`.

    python benchmarks/energy.py [--rounds 7] [--device cpu]

The three alternate in one process, in an order that rotates; printed are medians and the medians of each
round's ratio to the plain forward pass beside it.

What bounds the report: each distinct tensor is read once more (384 MB for ResNet-18, 157 MB for VGG-16, a quarter
wide, batch 256), by one core at some 7 GB/s; more threads do not help, as PyTorch's own wait spinning between its
operators. Each pass adds some 10 ms for about 60 operators and 50 modules, which dominates small batches.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eatlib.energy import EnergyMeter
from eatlib.models import build_model

LIMITS = {1.0: 1.15, 0.25: 1.3}  # what the report may cost, by width


def plain(model: nn.Module, images: Tensor) -> None:
    model(images)


def report(model: nn.Module, images: Tensor) -> None:
    with EnergyMeter(model) as meter:
        model(images)
    meter.report("published")
    meter.report("fused")


def usual(model: nn.Module, images: Tensor) -> None:
    """Hooks that list the non-zeros of every tensor that a leaf module reads or writes."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for x in (*inputs, output, *module.parameters(), *module.buffers()):
            len((x.abs() > 2.0**-126).nonzero())

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(hook) for module in leaves]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def seconds(function: Callable[[nn.Module, Tensor], None], model: nn.Module, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(model, images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"])
    parser.add_argument("--widths", nargs="+", type=float, default=[1.0, 0.25])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-usual", action="store_true", help="leave out the slow one")
    arguments = parser.parse_args()
    ways = [plain, report] if arguments.skip_usual else [plain, report, usual]
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, 32x32 images")
    print("network   width  batch    forward     report      usual   report/forward  limit  usual/forward")
    for name in arguments.models:
        for width in arguments.widths:
            for batch_size in arguments.batch_sizes:
                torch.manual_seed(0)
                model = build_model(name, classes=10, width=width).eval().to(arguments.device)
                images = torch.rand(batch_size, 3, 32, 32, device=arguments.device)
                times: dict[str, list[float]] = {way.__name__: [] for way in ways}
                with torch.no_grad():
                    for way in ways:
                        way(model, images)
                    for round_ in range(arguments.rounds):
                        for index in range(len(ways)):
                            way = ways[(round_ + index) % len(ways)]
                            times[way.__name__].append(seconds(way, model, images))
                ratios = {
                    way: statistics.median(a / b for a, b in zip(times[way], times["plain"], strict=True))
                    for way in times
                }
                cells = [f"{1e3 * statistics.median(times[way.__name__]):8.1f} ms" for way in ways]
                cells += ["       -   "] * (3 - len(cells))
                print(
                    f"{name:9} {width:5}  {batch_size:5}{''.join(cells)}  {ratios['report']:13.3f}"
                    f"  {LIMITS.get(width, float('nan')):5}  {ratios.get('usual', float('nan')):13.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
