"""Run launch/ray_train.py in a folder, where worker 1 dies once: a program for tests/launch/test_ray_train.py."""

import os
import sys
from pathlib import Path
from typing import Any

import ray
import ray_train
import torch
import torch.distributed as dist

DIES_AT = 47  # averaging has begun; the latest checkpoint is that of step 40


def dies_once(config: dict[str, Any]) -> None:
    died = Path(config["folder"], "died")
    if dist.get_rank() == 1 and not died.exists():
        load_batch = ray_train.load_batch

        def dies(step: int) -> torch.Tensor:
            if step == DIES_AT:
                died.touch()
                os._exit(1)
            part: torch.Tensor = load_batch(step)
            return part

        ray_train.load_batch = dies
    ray_train.train_on_worker(config)


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    ray_train.train_on_worker = dies_once
    ray_train.main(Path(sys.argv[1]), workers=2)
    ray.shutdown()
