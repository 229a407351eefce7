"""``--tensorboard`` of the examples: the first rank writes `swa.metrics()` with the step."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import train
from dist_swa import SWA
from ranks import on_ranks


class Writer:
    """Stands for torch.utils.tensorboard.SummaryWriter, which needs the package tensorboard."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder)
        self.lines: list[str] = []

    def add_scalar(self, name: str, number: float, step: int) -> None:
        self.lines.append(f"{step} {name} {number}")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        self.path.write_text("\n".join(self.lines))


@on_ranks(2)
def test_the_first_rank_writes_metrics_with_their_steps(tmp_path: Path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    vars(module)["SummaryWriter"] = Writer
    swa = SWA(nn.Linear(2, 2), swa_start="1ba")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", module)
        with train.logger(tmp_path / f"log-{dist.get_rank()}") as log:
            for step in range(2):
                swa.step()
                log(step, swa.metrics())
    dist.barrier()
    assert [path.name for path in tmp_path.iterdir()] == ["log-0"]
    first = ["0 num_averaged 1", "0 weight 1.0", "0 num_skipped 0"]
    assert (tmp_path / "log-0").read_text().splitlines() == [
        *first,
        "1 num_averaged 2",
        "1 weight 0.5",
        "1 num_skipped 0",
    ]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with train.logger(None) as log:
        log(0, {"weight": 1.0})
    assert list(tmp_path.iterdir()) == []
