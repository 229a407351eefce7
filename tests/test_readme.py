"""The README's code runs as it stands there, but for what it leaves out."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import fully_shard

from cases import CASES
from ranks import on_ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LEFT_OUT = {
    '"90ep"': '"4ep"',
    "range(90)": "range(4)",
    "        ...  ": "        optimizer.zero_grad(); model(images).square().mean().backward()  ",
    '"model": ...': '"model": model.state_dict()',
    '"optimizer": ...': '"optimizer": optimizer.state_dict()',
    'f"checkpoints/': 'f"{folder}/',
}


@on_ranks(2)
def test_the_lines_of_use_run(tmp_path: Path) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # the others: in the tests of each trainer
    for short, whole in LEFT_OUT.items():
        assert short in code, short
        code = code.replace(short, whole)
    looks = []

    def evaluate(model: nn.Module) -> None:
        looks.append(model.eval()(torch.ones(2, 4)))
        model.train()

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    loader = [(torch.randn(8, 4), torch.zeros(8)) for _ in range(5)]
    names: dict[str, Any] = {"torch": torch, "dcp": checkpoint, "fully_shard": fully_shard, "folder": tmp_path}
    names |= {"model": model, "loader": loader, "evaluate": evaluate}
    exec(compile(code, "README.md", "exec"), names)
    assert names["swa"].num_averaged == 7  # from batch 14 of 20 on
    assert names["swa"].completed
    assert len(looks) == 2
    assert len(list(tmp_path.iterdir())) == 4


def test_its_commands_and_files_are_there() -> None:
    for path in ["launch/train", "launch/test", "tests/benchmarks/update.py", *re.findall(r"\]\(([\w/.]+)\)", README)]:
        assert (ROOT / path).exists(), path
    assert os.access(ROOT / "launch/train", os.X_OK)
    assert os.access(ROOT / "launch/test", os.X_OK)


def test_its_table_names_every_case_of_the_matrix() -> None:
    table = README.partition("| model | variants |")[2].partition("\n\n")[0]
    named = []
    for family, variants in re.findall(r"^\| ([\w+. ]+?) \| (.*?) \|", table, re.MULTILINE):
        named += [
            family if variant == "alone" else f"{family}, {variant.strip('`')}" for variant in variants.split("; ")
        ]
    assert sorted(named) == sorted(CASES)
