"""States to save, models that a checkpoint does not fit, and new checksums."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from dist_swa import Equal, ShardedAverage
from dist_swa.averaging.rules import Rule
from models import Net, build, group_of, trajectory, wrap, write


class Training:
    """A model and its average after some models, on one process or in a wrapper on several ranks."""

    def __init__(
        self, wrapper: str = "", rule: Rule = Equal(), models: int = 3, build: Callable[[], Any] = build
    ) -> None:
        self.model = wrap(build(), wrapper) if wrapper else build()
        self.average = ShardedAverage(self.model, rule, process_group=group_of(wrapper))
        for values in trajectory(models, build()):
            write(self.model, values)
            self.average.update()

    def state(self) -> dict[str, Any]:
        return {"model": get_model_state_dict(self.model), "swa": self.average, "notes": {"lr": 0.1, "betas": (0.9, 1)}}

    def values(self) -> dict[str, Tensor]:
        """Return copies of all tensors that a load writes."""
        tensors = self.average.full_state_dict() if self.average.num_averaged else {}
        tensors = {f"swa {name}": value for name, value in tensors.items()}
        return tensors | {f"model {name}": value.clone() for name, value in self.model.state_dict().items()}


class ManyBuffers(nn.Module):
    """Has buffers of several sizes, which DCP's default planner would save from different ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        for i in range(24):
            self.register_buffer(f"b{i}", torch.zeros(i % 5 + 1, 7))
        self.register_buffer("count", torch.tensor(0))


def wide() -> Net:
    """Return a model with another shape of one parameter."""
    model = build()
    model.one_row = nn.Parameter(torch.zeros(2, 5))
    return model


def deep() -> Net:
    """Return a model with one more parameter."""
    model = build()
    model.more = nn.Parameter(torch.zeros(2, 5))
    return model


def reseal(folder: Path) -> None:
    """Write new checksums, as an attacker would."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))
