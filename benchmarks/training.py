"""What the penalty costs: standard training, this penalty and the usual implementation of it, side by side.

    python benchmarks/training.py                                     # both networks, full and quarter width, float32
    python benchmarks/training.py --precisions bfloat16 --compile     # the same under autocast, compiled
    python benchmarks/training.py --loader                            # images per second against a DataLoader loop

Each step of the variants alternates with the others' in one process. Times are medians, and so are the ratios of each
step to the standard one beside it. Memory is the peak of what PyTorch allocates in a step, weights and momentum
included, over that of standard training.
"""

import argparse
import operator
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.data import DataLoader, TensorDataset

from eatlib.data import Split, training_batches
from eatlib.models import build_model
from eatlib.penalties import ActivationPenalty
from eatlib.training import find_device, memory_format, train_one_epoch

SIGMA, LAMBDA = 1e-4, 1.0
GOALS = {0.25: 1.10, 1.0: 1.05}


class UsualPenalty:
    """As in the authors' published code: a hook on every leaf clones its output; norms, read back each step."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: list[Tensor] = []
        for module in model.modules():
            if next(module.children(), None) is None and not isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda _, inputs, output: self._outputs.append(output.clone()))

    def __call__(self) -> Tensor:
        total = torch.zeros((), device=self._outputs[0].device)
        for output in self._outputs:
            output = output.float()
            total = total + (output**2 / (output**2 + SIGMA)).mean()
        total = total / len(self._outputs)
        self._outputs.clear()
        total.item()
        return total


class Variant:
    """A network in training, one step at a time."""

    def __init__(self, kind: str, arguments: argparse.Namespace, name: str, width: float, precision: str) -> None:
        torch.manual_seed(0)
        self.device = find_device(arguments.device)
        model = build_model(name, classes=10, width=width).to(self.device)
        model = model.to(memory_format=memory_format(model)).train()
        self.penalty: Callable[[], Tensor] | None = None
        if kind == "penalty":
            self.penalty = ActivationPenalty(model, sigma=SIGMA)
        elif kind == "usual":
            self.penalty = UsualPenalty(model)
        # The usual way keeps what its hooks saw in a list, which does not survive compilation.
        self.model = torch.compile(model) if arguments.compile and kind != "usual" else model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
        size = arguments.batch or (256 if width < 1 else 64)
        self.images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8).to(self.device)
        self.labels = torch.randint(0, 10, (size,)).to(self.device)
        self.bfloat16 = precision == "bfloat16"

    def step(self) -> None:
        train_one_epoch(
            self.model,
            [(self.images, self.labels)],
            self.optimizer,
            self.penalty,
            LAMBDA,
            device=self.device,
            bfloat16=self.bfloat16,
        )

    def seconds(self) -> float:
        self._wait()
        start = time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - start

    def peak(self) -> float:
        """Bytes."""
        held = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        held += sum(s["momentum_buffer"].nbytes for s in self.optimizer.state.values())
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        with profile(profile_memory=True) as recorded:
            self.step()
        live = peak = 0
        memory = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(memory, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return held + peak

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(arguments: argparse.Namespace) -> None:
    print(f"{'network':22}{'precision':>10}{'standard':>11}{'penalty':>16}{'usual':>16}{'memory':>10}{'of usual':>10}")
    for name in arguments.networks:
        for width in arguments.widths:
            for precision in arguments.precisions:
                kinds = ("standard", "penalty", "usual")
                variants = [Variant(kind, arguments, name, width, precision) for kind in kinds]
                times: dict[str, list[float]] = {kind: [] for kind in kinds}
                for turn in range(arguments.steps + 2):
                    for kind, variant in zip(kinds, variants, strict=True):
                        seconds = variant.seconds()
                        if turn > 1:
                            times[kind].append(seconds)
                standard, penalty, usual = (1e3 * statistics.median(times[kind]) for kind in kinds)
                ratios = {
                    kind: statistics.median(map(operator.truediv, times[kind], times["standard"])) for kind in kinds
                }
                memory = [variant.peak() for variant in variants]
                label = f"{name} x{width:g}{' compiled' if arguments.compile else ''}"
                print(
                    f"{label:22}{precision:>10}{standard:8.0f} ms"
                    f"{penalty:8.0f} ms {ratios['penalty']:.2f}{usual:8.0f} ms {ratios['usual']:.2f}"
                    f"{memory[1] / memory[0]:10.3f}{memory[2] / memory[0]:10.2f}"
                    f"   goal {GOALS.get(width, 1.1):.2f}",
                    flush=True,
                )


def plain_loop(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What one writes first: floats, contiguous, one image at a time from a DataLoader with a padded random crop."""

    class Images(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            image = F.pad(image, (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2,)).tolist()
            image = image[:, top : top + 32, left : left + 32]
            return (image.flip(2) if torch.rand(()) < 0.5 else image).float() / 255, label

    return iter(DataLoader(Images(split.images, split.labels), batch_size, shuffle=True))


def compare_loaders(arguments: argparse.Namespace) -> None:
    for name in arguments.networks:
        for width in arguments.widths:
            size = arguments.batch or (256 if width < 1 else 64)
            split = Split(
                torch.randint(0, 256, (8 * size, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (8 * size,))
            )
            split = split.to(find_device(arguments.device))
            ours = Variant("standard", arguments, name, width, "float32")
            plain = Variant("standard", arguments, name, width, "float32")
            plain.model = plain.model.to(memory_format=torch.contiguous_format)
            generator = torch.Generator().manual_seed(0)
            rates: dict[str, list[float]] = {"eatlib": [], "plain": []}
            for turn in range(arguments.steps // 4 + 1):
                for kind, variant in (("eatlib", ours), ("plain", plain)):
                    if kind == "eatlib":
                        images = training_batches(split, size, "crop_flip", generator)
                    else:
                        images = plain_loop(split, size)
                    start = time.perf_counter()
                    train_one_epoch(variant.model, images, variant.optimizer, None, 0.0, device=variant.device)
                    variant._wait()
                    if turn:
                        rates[kind].append(len(split) / (time.perf_counter() - start))
            eatlib, usual = (statistics.median(rates[kind]) for kind in ("eatlib", "plain"))
            print(
                f"{name} x{width:g}: {eatlib:.0f} images/s; plain loop with a DataLoader {usual:.0f}; "
                f"{eatlib / usual:.2f} times",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vgg16"])
    parser.add_argument("--widths", nargs="+", type=float, default=[0.25, 1.0])
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--loader", action="store_true", help="compare images per second with a DataLoader loop")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, help="default: 256 at a quarter of the width, 64 at full width")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {find_device(arguments.device)}")
    compare_loaders(arguments) if arguments.loader else compare(arguments)


if __name__ == "__main__":
    main()
