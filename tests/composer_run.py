"""A small run in Composer's Trainer, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import composer.algorithms
import pytest
import torch.distributed as dist
from composer import Callback, ComposerModel, Event, Trainer
from torch import Tensor

import dist_swa
from cases import read
from dist_swa.integrations.composer import SWA
from small_run import loader, network, sgd

EPOCHS, STEPS = 4, 8  # epochs of a run, batches of an epoch


class Model(ComposerModel):  # type: ignore[misc]
    """Records the weights in every evaluation batch (`evaluated`)."""

    def __init__(self, with_norm: bool = False) -> None:
        super().__init__()
        self.net = network(with_norm)
        self.evaluated: list[dict[str, Tensor]] = []

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.net(batch[0])
        return out

    def loss(self, outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
        return (outputs - batch[1]).square().mean()

    def eval_forward(self, batch: Sequence[Tensor], outputs: Any = None) -> Tensor:
        self.evaluated.append(read(self.net))
        return self.forward(batch)


class Record(Callback):  # type: ignore[misc]
    """Records the number of the batch and what `value` returns at every event of `events`."""

    def __init__(self, value: Callable[[], Any], *events: Event) -> None:
        self.value, self.events = value, events or (Event.BATCH_END,)
        self.entries: list[tuple[int, Any]] = []

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        if event in self.events:
            self.entries.append((int(state.timestamp.batch), self.value()))


class AfterBatch(Callback):  # type: ignore[misc]
    """Calls `action` with Composer's state after a batch."""

    def __init__(self, batch: int, action: Callable[[Any], None]) -> None:
        self.batch, self.action = batch, action

    def batch_end(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == self.batch:
            self.action(state)


class Status(NamedTuple):
    """The state of an algorithm, ours or Composer's."""

    num_averaged: int
    completed: bool
    average: Mapping[str, Tensor]


def trainer(model: Model, algorithms: Sequence[Any], *callbacks: Any, **options: Any) -> Trainer:
    """Return a Trainer on all ranks, or of one process."""
    as_by_launcher()
    defaults: dict[str, Any] = {
        "device": "cpu",
        "max_duration": f"{EPOCHS}ep",
        "optimizers": sgd(model),
        "train_dataloader": loader(STEPS, dist.is_initialized()),
        "progress_bar": False,
        "auto_log_hparams": False,
    }
    return Trainer(model=model, algorithms=algorithms, callbacks=callbacks, **(defaults | options))


def as_by_launcher() -> None:
    """On a rank, set the variables that Composer's launcher sets."""
    if dist.is_initialized():
        os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
        os.environ |= {f"LOCAL_{name}": os.environ[name] for name in ("RANK", "WORLD_SIZE")}
        os.environ["NODE_RANK"] = "0"


def composers_own(*args: Any, **options: Any) -> Any:
    """Return a ``composer.algorithms.SWA``."""
    with pytest.warns(UserWarning, match="known issues when resuming"):
        return composer.algorithms.SWA(*args, **options)


def swa_of(algorithm: SWA) -> dist_swa.SWA:
    assert algorithm.swa is not None
    return algorithm.swa


def status_of(algorithm: Any) -> Status:
    if not isinstance(algorithm, SWA):
        average = algorithm.swa_model
        return Status(int(average.n_averaged), algorithm.swa_completed, read(average.module.net))
    swa = swa_of(algorithm)
    if not swa.started:
        return Status(0, False, {})
    average = {key.removeprefix("net."): value for key, value in swa.average.full_state_dict().items()}
    return Status(swa.num_averaged, swa.completed, average)
