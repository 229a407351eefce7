"""Run accelerate's own FSDP code on CPU ranks. Without this, accelerate silently runs DDP on a CPU.

`enter_fsdp` switches a process. As a script, this file runs another one: ``accelerate launch ... THIS SCRIPT``.
"""

import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

_ACCELERATES_OWN_WARNINGS = ("FSDP.state_dict_type.* are being deprecated", "Detected an existing checkpoint")


def enter_fsdp() -> None:
    """Make every new Accelerator of this process use FSDP if it was asked to."""
    os.environ |= {"ACCELERATE_USE_CPU": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    for message in _ACCELERATES_OWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    plain = Accelerator.__init__

    def init(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin or os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = plugin or FullyShardedDataParallelPlugin()  # from the environment

    Accelerator.__init__ = init


@contextmanager
def launched(**environment: str) -> Iterator[None]:
    """Set the variables that torchrun sets, and these, for this rank of a test. Reset accelerate's state on exit."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"ACCELERATE_USE_CPU": "1", "ACCELERATE_USE_FSDP": "false"} | environment
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


if __name__ == "__main__":
    enter_fsdp()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
