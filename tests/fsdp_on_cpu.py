"""Accelerate's own FSDP code on the CPU, where accelerate runs DDP instead, and says nothing.

`enter` does it in a process; as a script, this runs another one: ``accelerate launch ... tests/fsdp_on_cpu.py SCRIPT``.
"""

import os
import runpy
import sys
import warnings
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

_ACCELERATES_OWN_WARNINGS = ("FSDP.state_dict_type.* are being deprecated", "Detected an existing checkpoint")


def enter() -> None:
    """Let every new Accelerator of this process use FSDP where the environment says ACCELERATE_USE_FSDP."""
    os.environ |= {"ACCELERATE_USE_CPU": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    for message in _ACCELERATES_OWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    plain = Accelerator.__init__

    def init(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from the environment, too

    Accelerator.__init__ = init


if __name__ == "__main__":
    enter()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
