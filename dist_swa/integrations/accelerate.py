"""Accelerate: an `SWA` that counts real optimizer steps, and travels in the checkpoints of an `Accelerator`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType, broadcast_object_list
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dist_swa.integrations.accelerate needs accelerate, got no {error.name}; pip install 'dist_swa[accelerate]'",
        name=error.name,
    ) from error

from dist_swa import SWA, checkpoint

_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
# By their names in its checkpoints. Weak, for an average refers to its accelerator, whose hooks keep it alive.
_attached: WeakKeyDictionary[Accelerator, WeakValueDictionary[str, AcceleratedSWA]] = WeakKeyDictionary()


class AcceleratedSWA(SWA):
    """An `SWA` whose `step` counts real optimizer steps only, however often it is called. `prepare_swa` builds it."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer, name: str, **options: Any
    ) -> None:
        super().__init__(model, optimizer.optimizer, **options)
        attached = _attached.setdefault(accelerator, WeakValueDictionary())
        attached[name] = self
        self._accelerator, self._prepared = accelerator, optimizer
        self._steps: set[bool] = set()  # since the last `step`: was there one at a rate above 0 (True), at 0 (False)?
        self._samples = self._tokens = 0
        self._undo: list[Callable[[], Any]] = [
            optimizer.optimizer.register_step_post_hook(self._note_step).remove,
            accelerator.register_save_state_pre_hook(
                lambda models, weights, folder: self.save(Path(folder, name))
            ).remove,
            accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder, name))).remove,
            lambda: attached.pop(name),
        ]

    def step(self, *, samples: int | None = None, tokens: int | None = None) -> bool:
        """Count the optimizer's step, if it made one since the last call. True if that updated the average.

        Call it on every rank after ``optimizer.step()`` and ``scheduler.step()``, also where accumulation or a
        gradient scaler may have skipped them. `samples` and `tokens` are those of `SWA.step`; what calls without a
        step are given goes to the next one.
        """
        samples = None if samples is None else self._samples + samples
        tokens = None if tokens is None else self._tokens + tokens
        updated = bool(self._steps) and super().step(samples=samples, tokens=tokens)
        if not self._steps and self.started and not self.completed:
            self._write_lrs()  # a scheduler may step without the optimizer
        self._samples, self._tokens = (0, 0) if self._steps else (samples or 0, tokens or 0)
        self._steps.clear()
        return updated

    def forget_idle_steps(self) -> None:
        """Do not count steps at a rate of 0: DCP so steps an optimizer without a state, as SGD, when it saves it."""
        self._steps.discard(False)

    def state_dict(self) -> dict[str, Any]:
        self.forget_idle_steps()
        return super().state_dict()

    @contextmanager
    def swapped_in(self, name: str | None = None) -> Iterator[None]:
        """`SWA.swapped_in`; a loader that is left early inside, as by ``max_batches``, does not displace the run's."""
        state = self._accelerator.gradient_state
        loaders = list(state.dataloader_references)
        try:
            with super().swapped_in(name):
                yield
        finally:
            state.dataloader_references = loaders

    def save(self, folder: Path) -> None:
        """Save the average into `folder`, in place of what is there. A collective. Raises what checkpoint.save does."""
        self.average.require_trained_weights("save")
        if self._accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # what could not be removed makes all ranks raise
        self._accelerator.wait_for_everyone()
        checkpoint.save({"swa": self}, folder)

    def load(self, folder: Path) -> bool:
        """Load what `save` saved. A collective. Without `folder`: one warning, `reset`, and False."""
        (is_there,) = broadcast_object_list([folder.exists()])
        if is_there:
            checkpoint.load({"swa": self}, folder)
        else:
            warnings.warn(f"{folder} is not there: averaging starts anew", stacklevel=2)
            self.reset()
        self._steps.clear()
        return bool(is_there)

    def detach(self) -> None:
        """Let go of optimizer and accelerator: no more steps are counted, nothing goes into their checkpoints."""
        while self._undo:
            self._undo.pop()()

    def _note_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # with it a fused optimizer is called, and does nothing
        if found_inf is None or not found_inf.item():
            self._steps.add(any(group.get("lr", 1) for group in optimizer.param_groups))


def prepare_swa(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    num_processes: int | None = None,
    name: str = "dist_swa",
    swa_end: str | None = None,
    update_interval: str = "1ba",
    **options: Any,
) -> AcceleratedSWA:
    """Return an `SWA` of `model` that the accelerator's ``save_state`` and ``load_state`` save and load, too.

    Call it on every rank, with what ``accelerator.prepare`` returned: under DDP, FSDP1, FSDP2, or in one process.

    Args:
        num_processes: how many the launch is meant to run; some launches silently run one.
        name: of the average's folder in a checkpoint, where an accelerator has several. A checkpoint without that
            folder gives one warning, and averaging starts anew, as at the run's first step.
        swa_end, update_interval, options: those of `SWA`; by default every step from `swa_start` to the end counts.

    Memory, and when it is a collective: as `SWA`. Raises ValueError for a model or optimizer that was not prepared,
    for DeepSpeed, Megatron-LM and XLA, and for another number of processes than `num_processes`; RuntimeError where
    the accelerator has an average of that name already.
    """
    kind = accelerator.distributed_type
    if kind in _UNSUPPORTED or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        kind = kind if kind in _UNSUPPORTED else DistributedType.DEEPSPEED
        raise ValueError(
            f"prepare_swa needs a model in DDP, FSDP1, FSDP2 or one process, got distributed_type={kind.value}; FSDP2"
            " (fsdp_version: 2) shards as DeepSpeed's ZeRO-3 does"
        )
    if num_processes not in (None, accelerator.num_processes):
        raise ValueError(
            f"prepare_swa needs num_processes={num_processes}, got {accelerator.num_processes} of them, with"
            f" distributed_type={kind.value}; see launch/accelerate for launches that run them all"
        )
    if not getattr(model, "_is_accelerate_prepared", False) or not isinstance(optimizer, AcceleratedOptimizer):
        raise ValueError(
            f"prepare_swa needs what accelerator.prepare returned, got a {type(model).__name__} and a"
            f" {type(optimizer).__name__} that were not prepared; call it after prepare"
        )
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        raise ValueError(f"prepare_swa needs a name for a folder in each checkpoint, got {name=}; write 'ema'")
    for swa in list(_attached.get(accelerator, {}).values()):
        if not any(swa._prepared is one for one in accelerator._optimizers):
            swa.detach()  # accelerator.free_memory has let go of what it averages
    if name in _attached.get(accelerator, ()):
        raise RuntimeError(f"prepare_swa needs a name for each average, got {name=} twice; pass another name=")
    return AcceleratedSWA(
        accelerator, model, optimizer, name, swa_end=swa_end, update_interval=update_interval, **options
    )
