"""What measuring energy costs: a forward pass within the meter, with both reports, against a plain one.

    OMP_NUM_THREADS=1 python benchmarks/energy.py [--rounds 9] [--device cpu]

The two alternate in one process and change places from round to round. Printed are medians, and the median of the
rounds' ratios. On a CPU the time is that of the process, so that other work on the machine hardly matters; on a GPU it
is wall time.

What bounds the report: each distinct tensor is read once more, by one core; and each pass adds some 10 to 20 ms for
about 60 operators and 50 modules, which dominates small batches.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eatlib.energy import EnergyMeter
from eatlib.models import build_model


def plain(model: nn.Module, images: Tensor) -> None:
    model(images)


def metered(model: nn.Module, images: Tensor) -> None:
    with EnergyMeter(model) as meter:
        model(images)
    meter.report("published")
    meter.report("fused")


def milliseconds(function: Callable[[nn.Module, Tensor], None], model: nn.Module, images: Tensor) -> float:
    clock = time.perf_counter if images.is_cuda else time.process_time
    start = clock()
    function(model, images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"])
    parser.add_argument("--widths", nargs="+", type=float, default=[1.0, 0.25])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, 32x32 images")
    print("network   width  batch       plain     metered  metered/plain")
    for name in arguments.models:
        for width in arguments.widths:
            for batch_size in arguments.batch_sizes:
                torch.manual_seed(0)
                model = build_model(name, classes=10, width=width).eval().to(arguments.device)
                images = torch.rand(batch_size, 3, 32, 32, device=arguments.device)
                times: dict[str, list[float]] = {"plain": [], "metered": []}
                with torch.no_grad():
                    for round_ in range(arguments.rounds + 1):
                        for way in (plain, metered) if round_ % 2 else (metered, plain):
                            times[way.__name__].append(milliseconds(way, model, images))
                plains, metereds = times["plain"][1:], times["metered"][1:]  # the first round warms up
                ratio = statistics.median(b / a for a, b in zip(plains, metereds, strict=True))
                medians = f"{statistics.median(plains):8.1f} ms {statistics.median(metereds):8.1f} ms"
                print(f"{name:9} {width:5}  {batch_size:5} {medians}  {ratio:13.3f}", flush=True)


if __name__ == "__main__":
    main()
