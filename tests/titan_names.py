"""What the torchtitan program in dist_swa/integrations/README.md needs: stand-ins for torchtitan's classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard


class ModelWrapper(Stateful):
    """As torchtitan's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict)


class Optimizers(Stateful):
    """A list of optimizers, as torchtitan's container."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.options = model, StateDictOptions(flatten_optimizer_state_dict=True)
        first, *others = model.parameters()
        self.optimizers = [torch.optim.AdamW([first], lr=0.1), torch.optim.AdamW(others, lr=0.1)]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for optimizer in self.optimizers:
            states |= get_optimizer_state_dict(self.model, optimizer, options=self.options)
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            set_optimizer_state_dict(self.model, optimizer, state_dict, options=self.options)


class TitanTrainer(Stateful):
    step = 0

    def __init__(self, model: nn.Module, optimizers: Optimizers) -> None:
        self.model, self.optimizers = model, optimizers

    def train_step(self) -> None:
        whole = torch.randn(12, 4, generator=torch.Generator().manual_seed(self.step))
        batch = whole.chunk(dist.get_world_size())[dist.get_rank()]
        self.model(batch).square().mean().backward()
        self.optimizers.step()

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    batch = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return float(model(batch).square().mean())


def titan_names(resume: str | None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for part in (*model, model):
        fully_shard(part)
    optimizers = Optimizers(model)
    trainer = TitanTrainer(model, optimizers)
    names: dict[str, Any] = {"ModelWrapper": ModelWrapper, "model": model, "optimizers": optimizers, "trainer": trainer}
    return names | {"steps": 10, "resume": resume, "evaluate": evaluate}
