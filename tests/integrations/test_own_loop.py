"""A loop of one's own, as the guide has it: it resumes, and the best average is what was evaluated."""

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from dist_swa import checkpoint
from markdown_blocks import code_for, execute
from markdown_setups import as_by_torchrun
from ranks import run_on_ranks

README = "tests/integrations/test_own_loop.py::test_the_readme_resumes_and_loads_what_was_scored"
FULLY_SHARD = {
    "DistributedDataParallel(model)  #": "fully_shard(model)  #",
    "from torch.nn.parallel import DistributedDataParallel": "from torch.distributed.fsdp import fully_shard",
}


def run_readme(folder: Path, replaced: dict[str, str], epochs: int) -> None:
    """Run the program up to a number of epochs, and check that it loads what it scored."""
    os.chdir(folder)
    code, loop = code_for(README), "// STEPS, EPOCHS)"
    for old, new in {**replaced, loop: f"// STEPS, {epochs})", "dist.destroy_process_group()": ""}.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    with as_by_torchrun():
        execute(code, "dist_swa/integrations/README.md", names)
        assert names["epoch"] == epochs - 1
        assert names["checkpoints"].steps() == [20 * epoch for epoch in (1, 2, 3, 4)][:epochs][-3:]
        (step,) = names["best"].steps()
        assert names["swa"].num_averaged == step - 39  # from step 40 on
        lowest = names["lowest"].item()
        assert names["evaluate"]() == pytest.approx(lowest, rel=1e-6)
        names["dist"].destroy_process_group()
    checkpoint.export(f"best/step-{step:09}", f"averaged-{epochs}")
    plain = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1)).eval()
    plain.load_state_dict(load_file(f"averaged-{epochs}/model.safetensors"))
    held_out = names["held_out"]
    loss = (plain(held_out) - held_out.sum(1, keepdim=True)).square().mean().item()
    assert loss == pytest.approx(lowest, rel=1e-6)


@pytest.mark.parametrize("replaced", [{}, FULLY_SHARD], ids=["DDP", "fully_shard"])
def test_the_readme_resumes_and_loads_what_was_scored(tmp_path: Path, replaced: dict[str, str]) -> None:
    run_on_ranks(run_readme, 2, tmp_path, replaced, 3)
    run_on_ranks(run_readme, 3, tmp_path, replaced, 4)
