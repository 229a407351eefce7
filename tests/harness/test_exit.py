"""The end of a script: no rank aborts while the interpreter shuts down."""

import os
import subprocess
import sys
from pathlib import Path

from markdown_blocks import code_for

# The long switch interval makes a rare abort frequent: gloo's thread gets the GIL only from a thread that waits.
TRAINING = """
import sys, time
import torch, torch.distributed as dist
from torch import nn

sys.setswitchinterval(100)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]), bucket_cap_mb=0.01)
for _ in range(5):
    model(torch.ones(4, 64)).sum().backward()
"""


def test_a_script_that_ends_as_in_the_readme_does_not_abort(tmp_path: Path) -> None:
    end = code_for("tests/harness/test_exit.py::test_a_script_that_ends_as_in_the_readme_does_not_abort")
    script = TRAINING + end
    for run in range(5):
        command = [sys.executable, "-c", script, f"file://{tmp_path}/store {run}"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], errors
