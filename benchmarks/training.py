"""What the penalty costs: standard training, this penalty, the same on a quarter of each batch, and the usual one.

    python benchmarks/training.py --threads 1                         # both networks, full and quarter width, float32
    python benchmarks/training.py --precisions bfloat16 --compile     # the same under autocast, compiled
    python benchmarks/training.py --penalty hoyer                     # another penalty than the paper's

Each step of the variants alternates with the others' in one process. Times are medians, and so are the ratios of each
step to the standard one beside it. Memory is the peak of what PyTorch allocates in a step, weights and momentum
included, over that of standard training.
"""

import argparse
import operator
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from eatlib.models import build_model
from eatlib.penalties import PENALTIES, ActivationPenalty
from eatlib.training import find_device, memory_format

LAMBDA, SIGMA = 1.0, 1e-4
KINDS = ("standard", "penalty", "quarter", "usual")


class UsualPenalty:
    """As in the authors' published code: a hook on every leaf clones its output; norms, read back each step."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: list[Tensor] = []
        for module in model.modules():
            if next(module.children(), None) is None and not isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda _, inputs, output: self._outputs.append(output.clone()))

    def __call__(self) -> Tensor:
        terms = [(output.float() ** 2 / (output.float() ** 2 + SIGMA)).mean() for output in self._outputs]
        self._outputs.clear()
        total = torch.stack(terms).mean()
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
        if kind in ("penalty", "quarter"):
            share = 1.0 if kind == "penalty" else 0.25
            self.penalty = ActivationPenalty(model, arguments.penalty, sigma=SIGMA, share=share)
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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(self.images).float()
        loss = F.cross_entropy(logits, self.labels)
        if self.penalty is not None:
            loss = loss + LAMBDA * self.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        # With one thread on the CPU, its own time: what else runs on the machine has less of a part in it.
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        self._wait()
        start = clock()
        self.step()
        self._wait()
        return clock() - start

    def peak(self) -> float:
        """Bytes."""
        held = sum(t.nbytes for t in self.model.state_dict().values())
        held += sum(s["momentum_buffer"].nbytes for s in self.optimizer.state.values())
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # the other variants' too
            self.step()
            return held + torch.cuda.max_memory_allocated() - before
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


def compare(arguments: argparse.Namespace, name: str, width: float, precision: str) -> str:
    """A line of the table."""
    variants = {kind: Variant(kind, arguments, name, width, precision) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(arguments.steps + 2):
        for kind, variant in variants.items():
            seconds = variant.seconds()
            if turn > 1:
                times[kind].append(seconds)
    standard = variants["standard"].peak()
    line = f"{name + f' x{width:g}':16}{precision:>10}{1e3 * statistics.median(times['standard']):12.1f} ms"
    for kind in KINDS[1:]:
        ratio = statistics.median(map(operator.truediv, times[kind], times["standard"]))
        line += f"{ratio:12.2f}{variants[kind].peak() / standard:12.3f}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vgg16"])
    parser.add_argument("--widths", nargs="+", type=float, default=[0.25, 1.0])
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--penalty", default="l0", choices=PENALTIES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, help="default: 256 at a quarter of the width, 64 at full width")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.specialize_float = True  # or a second value of `share` in one process ends in an error
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {find_device(arguments.device)}")
    columns = "".join(f"{column:>12}" for column in ("penalty", "memory", "quarter", "memory", "usual", "memory"))
    print(f"{'network':16}{'precision':>10}{'standard':>15}{columns}")
    for name in arguments.networks:
        for width in arguments.widths:
            for precision in arguments.precisions:
                print(compare(arguments, name, width, precision), flush=True)


if __name__ == "__main__":
    main()
