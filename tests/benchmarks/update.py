"""Time and memory of an update, compared with one `lerp_` over a flat buffer (the minimum) and with torch.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/update.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile

from dist_swa import EMA, ShardedAverage

GPT2_LAYER: list[tuple[int, ...]] = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
GPT2_LAYER += [(768, 3072), (3072,), (3072, 768), (768,)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "GPT-2 (124 M in 148 tensors)": [(50257, 768), (1024, 768), *GPT2_LAYER * 12, (768,), (768,)],
    "2000 tensors of 64 x 64": [(64, 64)] * 2000,
}


def median_s(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def allocated_bytes(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU time of one thread, medians of 7\n")
    print("| model | update | time | x floor | allocated |\n| --- | --- | --- | --- | --- |")
    for name, shapes in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)
            numel = sum(parameter.numel() for parameter in model)
            flat, target = torch.randn(numel), torch.randn(numel)
            floor_s = median_s(lambda flat=flat, target=target: flat.lerp_(target, 0.01))  # type: ignore[misc]
            calls: dict[str, Callable[[], object]] = {"dist_swa": ShardedAverage(model, EMA(0.99)).update}
            turns = [ShardedAverage(model, EMA(0.99)).update for _ in range(3)]
            calls["dist_swa, 3 averages in turn"] = lambda turns=turns: [turn() for turn in turns]  # type: ignore[misc]
            calls["dist_swa, 3 averages at once"] = ShardedAverage(model, dict.fromkeys("abc", EMA(0.99))).update
            if dtype == torch.float32:  # of a bf16 model it keeps a bf16 average, which is not comparable
                averaged_model = AveragedModel(model)
                calls["torch AveragedModel"] = lambda m=model, a=averaged_model: a.update_parameters(m)  # type: ignore[misc]
            for label, call in calls.items():
                time_s, allocated = median_s(call), allocated_bytes(call)
                row = f"{name}, {str(dtype)[6:]} | {label} | {time_s * 1e3:.1f} ms | {time_s / floor_s:.2f}"
                print(f"| {row} | {allocated / 2**20:.1f} MiB |", flush=True)


if __name__ == "__main__":
    main()
