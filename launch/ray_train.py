"""Train on the workers of Ray Train, average the weights, and go on after a worker has failed.

    python launch/ray_train.py FOLDER --workers 2            # --gpu: one GPU for each worker

Ray makes the process group, and starts the workers again when one of them fails. Each start resumes from the latest
checkpoint in FOLDER, which all nodes must see. A run that is started again goes on as well, also with other workers.
Comments with "dist_swa:" mark what averaging adds.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from dist_swa import SWA, checkpoint  # dist_swa:
from dist_swa.checkpoint import CheckpointFolder

STEPS, SAVE_EVERY, GLOBAL_BATCH = 60, 10, 32


def train(folder: Path, device: torch.device, report: Callable[[dict[str, Any]], Any]) -> None:
    """Train in the process group that exists."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).to(device)
    model = DistributedDataParallel(network)  # or fully_shard(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    swa = SWA(model, max_duration=f"{STEPS}ba", swa_start="0.5dur")  # dist_swa: after the model was wrapped

    def state() -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "swa": swa}  # dist_swa: one entry

    checkpoints, loaded = CheckpointFolder(folder), state()
    done = checkpoints.load_latest(loaded)  # None where there is none yet
    if done is not None:
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for step in range(1 + (done or 0), STEPS + 1):
        inputs = load_batch(step).to(device)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        swa.step()  # dist_swa: after each optimizer step, on every worker
        if step % SAVE_EVERY == 0:
            checkpoints.save(step, state())
            report({"step": step, "loss": loss.item(), **swa.metrics()})


def load_batch(step: int) -> torch.Tensor:
    """Return this worker's part of a global batch."""
    batch = torch.randn(GLOBAL_BATCH, 4, generator=torch.Generator().manual_seed(step))
    return batch.tensor_split(dist.get_world_size())[dist.get_rank()]


def train_on_worker(config: dict[str, Any]) -> None:
    train(Path(config["folder"], "checkpoints"), get_device(), ray.train.report)


def main(folder: Path, workers: int, gpu: bool = False) -> None:
    folder = folder.absolute()  # workers have a working directory of their own
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()
    # dist_swa: needs no workers; load_state_dict(safetensors.torch.load_file("FOLDER/averaged.safetensors"))
    if not (folder / "averaged.safetensors").exists():
        checkpoint.export(folder / f"checkpoints/step-{STEPS:09}", folder / "averaged.safetensors", key="swa")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoints and the averaged model; all nodes must see it")
    parser.add_argument("--workers", type=int, default=2, help="number of workers")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    return parser.parse_args()


if __name__ == "__main__":
    main(**vars(parse_args()))
