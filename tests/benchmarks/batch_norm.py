"""CPU time of a recalibration, compared with the same forwards alone (the minimum) and with torch's `update_bn`.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/batch_norm.py
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from dist_swa import recalibrate_batch_norm


def block(channels_in: int, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def conv_net() -> nn.Module:
    """Return the convolutions of a ResNet-18 for CIFAR: 17 BatchNorm layers."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [block(a, b, 1 + (a != b)) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(), *blocks)


def dense_net() -> nn.Module:
    """Return 50 narrow layers, whose cost per layer dominates."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()) for _ in range(50))
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "17 layers of a ResNet-18, 32 images of 32 x 32": (conv_net, (32, 3, 32, 32)),
    "50 layers of 256, 256 rows": (dense_net, (256, 256)),
}


@torch.no_grad()
def forwards_alone(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)


def cpu_s(call: Callable[[], object]) -> float:
    start = time.process_time()  # wall-clock time would include other processes
    call()
    return time.process_time() - start


def main(num_batches: int = 4, repeats: int = 5) -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {num_batches} batches, medians of {repeats}, CPU time\n")
    print("| model and batch | pass | time | x forwards |\n| --- | --- | --- | --- |")
    for name, (build, shape) in CASES.items():
        torch.manual_seed(0)
        model, batches = build(), [torch.randn(shape) for _ in range(num_batches)]
        calls: dict[str, Callable[[], object]] = {
            "forwards alone": lambda m=model, b=batches: forwards_alone(m, b),  # type: ignore[misc]
            "dist_swa": lambda m=model, b=batches: recalibrate_batch_norm(m, b),  # type: ignore[misc]
            "dist_swa, exact=True": lambda m=model, b=batches: recalibrate_batch_norm(m, b, exact=True),  # type: ignore[misc]
            "torch update_bn": lambda m=model, b=batches: update_bn(b, m),  # type: ignore[misc]
        }
        for call in calls.values():
            call()
        # Measured alternately, so that other load affects all of them; ratios are within one round.
        rounds = [{label: cpu_s(call) for label, call in calls.items()} for _ in range(repeats)]
        for label in calls:
            time_s = statistics.median(times[label] for times in rounds)
            ratio = statistics.median(times[label] / times["forwards alone"] for times in rounds)
            print(f"| {name} | {label} | {time_s * 1e3:.1f} ms | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
