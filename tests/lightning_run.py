"""A small run in Lightning's Trainer, on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from cases import read
from dist_swa import SWA
from dist_swa.integrations.lightning import SWACallback
from small_run import loader, loss_of, network, sgd

EPOCHS, STEPS = 3, 4  # epochs of a run, batches of an epoch
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1),
    "fsdp2, one file": lambda: ModelParallelStrategy(dist.get_world_size(), 1, save_distributed_checkpoint=False),
}
SCHEDULE: dict[str, Any] = {"swa_start": "0.25dur"}  # averages the steps from the third on
LIGHTNINGS_OWN_WARNINGS = (
    "`isinstance.treespec, LeafSpec.` is deprecated",
    ".* does not have many workers",
    "Be aware that when using `ckpt_path`",
    "You defined a `validation_step` but have no `val_dataloader`",
    "Starting from v1.9.0, `tensorboardX` has been removed",
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",
)


class Module(pl.LightningModule):
    """Records the weights after every optimizer step (`steps`) and in every validation step (`validated`)."""

    def __init__(self, with_norm: bool = False) -> None:
        super().__init__()
        self.net = network(with_norm)
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def configure_model(self) -> None:
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net[0], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.net(given)
        return out

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return loss_of(self, batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self(batch[0])
        self.validated.append(read(self.net))

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.net)
        optimizer.register_step_post_hook(lambda *_: self.steps.append(read(self.net)))
        return optimizer


class Stop(Callback):
    """Raises ZeroDivisionError after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            raise ZeroDivisionError


class Ranks(ClusterEnvironment):
    """The process group that exists already."""

    creates_processes_externally = True
    main_address = main_port = ""  # type: ignore[assignment]

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0


def trainer(callbacks: list[Callback], strategy: str = "", **options: Any) -> pl.Trainer:
    """Return a Trainer on all ranks with a strategy of `STRATEGIES`, or of one process."""
    if strategy:
        options |= {"strategy": STRATEGIES[strategy](), "devices": dist.get_world_size(), "plugins": [Ranks()]}
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "use_distributed_sampler": False,  # it would shuffle
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=callbacks, **(defaults | options))


@contextmanager
def lightnings_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in LIGHTNINGS_OWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def fit(
    module: Module,
    callbacks: list[Callback],
    strategy: str = "",
    *,
    data: Any = None,
    validate: bool = False,
    resume: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train `module` in a new Trainer with `options`, and return it."""
    data = loader(STEPS, bool(strategy)) if data is None else data
    with lightnings_own_warnings():
        it = trainer(callbacks, strategy, **options)
        it.fit(module, data, loader(STEPS, bool(strategy)) if validate else None, ckpt_path=resume)
    return it


def swa_of(callback: SWACallback) -> SWA:
    assert callback.swa is not None
    return callback.swa
