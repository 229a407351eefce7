"""A short training run with a learning-rate phase."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from dist_swa import SWA

Rates = list[float]
LRS = [0.4, 0.01]
SWA_LR = 0.05
# Updates after 5, 7, ..., 21; complete at 21.
TIMES: dict[str, Any] = {"swa_start": "5ba", "swa_end": "21ba", "update_interval": "2ba"}
START, END, INTERVAL, ANNEAL_STEPS = 5, 21, 2, 4
STEPS = 30


class Run:
    """A model, an optimizer with two param groups, a scheduler or none, and their SWA."""

    def __init__(self, scheduler: str | None = None, *, lrs: Sequence[float | torch.Tensor] = LRS, **options: Any):
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        groups = [{"params": [parameter], "lr": lr} for parameter, lr in zip(self.model.parameters(), lrs, strict=True)]
        self.optimizer = torch.optim.SGD(groups, momentum=0.5)
        self.scheduler = _make_scheduler(scheduler, self.optimizer)
        arguments: dict[str, Any] = {**TIMES, "schedule_swa_lr": True, "swa_lr": SWA_LR, "anneal_steps": ANNEAL_STEPS}
        self.swa = SWA(self.model, self.optimizer, **arguments | options)
        self.num_steps = 0

    @property
    def lrs(self) -> Rates:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def train(self, num_steps: int) -> list[Rates]:
        """Return the rates after each step."""
        seen = []
        for _ in range(num_steps):
            self.num_steps += 1
            for parameter in self.model.parameters():
                parameter.grad = torch.sin(parameter.detach() + self.num_steps)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.swa.step()
            seen.append(self.lrs)
        return seen

    def save(self, path: Path) -> None:
        save(self._state(), checkpoint_id=path)

    def resume(self, path: Path, stopped: "Run") -> None:
        state = self._state()
        load(state, checkpoint_id=path)
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=state["optimizer"])
        self.num_steps = stopped.num_steps
        if self.scheduler is not None and stopped.scheduler is not None:
            self.scheduler.load_state_dict(stopped.scheduler.state_dict())

    def _state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": self.model, "optimizer": optimizer, "swa": self.swa}


def _make_scheduler(name: str | None, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    match name:
        case "step":
            return StepLR(optimizer, step_size=3, gamma=0.7)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=STEPS)
    return None


def without_phase(scheduler: str | None) -> list[Rates]:
    """Return the rates of a run without the phase."""
    return Run(scheduler, schedule_swa_lr=False, swa_lr=None).train(STEPS)


def annealed(start: float, swa_lr: float, strategy: str, step: int) -> float:
    """Return the rate of a group after `step` of the phase; the rate before the phase is `start`."""
    fraction = min(((step - START) // INTERVAL + 1) / ANNEAL_STEPS, 1.0)
    remaining = 1 - fraction if strategy.startswith("lin") else math.cos(fraction * math.pi / 2) ** 2
    return swa_lr + (start - swa_lr) * remaining
