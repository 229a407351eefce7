"""Average given weights and save every four steps: a run to kill or to stop with SIGUSR1, on any number of ranks."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_swa import EMA, SWA, Polynomial, ShardedAverage
from dist_swa.checkpoint import CheckpointFolder
from models import build, trajectory, wrap, write
from stop_request import StopRequest

NUM_STEPS = 120


def average_trajectory(result: Path, checkpoints: Path | None = None) -> None:
    """Average given weights, from the newest checkpoint on if there is one, and write the averages to `result`."""
    model = wrap(build(), "fsdp2") if dist.is_initialized() else build()
    swa = SWA(model, swa_start="1ba", rule=Polynomial(2.0))
    ema = ShardedAverage(model, EMA(decay=0.9))
    state: dict[str, Any] = {"swa": swa, "ema": ema}
    folder = CheckpointFolder(checkpoints, keep=2) if checkpoints else None
    stop = StopRequest(torch.device("cpu")) if folder else None
    saved = folder.load_latest(state) or 0 if folder else 0
    for step, values in enumerate(trajectory(NUM_STEPS, build())[saved:], start=saved + 1):
        if folder and stop and stop.is_agreed():
            folder.wait()
            if step - 1 > max(folder.steps(), default=0):
                folder.save(step - 1, state)
            return
        write(model, values)
        swa.step()
        ema.update()
        if folder and step % 4 == 0:
            (folder.save_async if step % 8 else folder.save)(step, state)
            time.sleep(0.02)
    if folder:
        folder.wait()
    tensors: dict[str, Tensor] = {}
    for name, average in (("swa", swa.average), ("ema", ema)):
        tensors |= {f"{name} {key}": value for key, value in average.full_state_dict().items()}
        tensors[f"{name} num_averaged"] = torch.tensor(average.num_averaged)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(tensors, result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    average_trajectory(Path("result.pt"), Path("checkpoints"))
    dist.barrier()
    time.sleep(0.1)  # see tests/README.md, "The end of a script"
    dist.destroy_process_group()
