"""Accelerate: an `SWA` that counts real optimizer steps and is part of an `Accelerator`'s checkpoints."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dist_swa.integrations.accelerate needs accelerate, got no {error.name}; pip install 'dist_swa[accelerate]'",
        name=error.name,
    ) from error

from dist_swa import SWA, checkpoint
from dist_swa.integrations.trainer_options import check_accelerator, existing

# Weak: an average refers to its accelerator, and the hooks of the accelerator refer to the average.
_attached: WeakSet[AcceleratedSWA] = WeakSet()


class AcceleratedSWA(SWA):
    """An `SWA` whose `step` counts real optimizer steps only, however often it is called. `prepare_swa` builds it.

    `accelerator`, `model`, `optimizer`, `name` and the options are those of `prepare_swa`. Attributes that matter to a
    training loop are those of `SWA`.

    Example: four batches make two optimizer steps.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from dist_swa.integrations.accelerate import prepare_swa
    >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model, optimizer = accelerator.prepare(model, optimizer)
    >>> swa = prepare_swa(accelerator, model, optimizer, swa_start="1ba")
    >>> for _ in range(4):
    ...     with accelerator.accumulate(model):
    ...         accelerator.backward(model(torch.randn(8, 4)).square().mean())
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         updated = swa.step()
    >>> swa.num_averaged
    2
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer, name: str, **options: Any
    ) -> None:
        super().__init__(model, optimizer.optimizer, **options)
        self.accelerator, self.prepared_optimizer, self.name = accelerator, optimizer, name
        # Optimizer steps since the last call of `step`: True if one had a rate above 0, False if one had a rate of 0.
        self._steps: set[bool] = set()
        self._samples = self._tokens = 0
        self._attachments = ExitStack()
        for hook in (
            optimizer.optimizer.register_step_post_hook(self._note_step),
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: self.save(Path(folder, name))),
            accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder, name))),
        ):
            self._attachments.callback(hook.remove)
        _attached.add(self)

    def step(self, *, samples: int | None = None, tokens: int | None = None) -> bool:
        """Count the optimizer's step, if it made one since the last call. True if that updated the average.

        Call it on every rank after ``optimizer.step()`` and ``scheduler.step()``, also if gradient accumulation or a
        gradient scaler may have skipped them. `samples` and `tokens` are those of `SWA.step`. If no optimizer step
        was made, they are added to those of the next one.
        """
        samples = None if samples is None else self._samples + samples
        tokens = None if tokens is None else self._tokens + tokens
        updated = bool(self._steps) and super().step(samples=samples, tokens=tokens)
        self._samples, self._tokens = (0, 0) if self._steps else (samples or 0, tokens or 0)
        self._steps.clear()
        return updated

    def discard_zero_lr_steps(self) -> None:
        """Ignore the lr=0 step that DCP makes to initialise optimizer state, as it does for SGD in each save."""
        self._steps.discard(False)

    def state_dict(self) -> dict[str, Any]:
        self.discard_zero_lr_steps()
        return super().state_dict()

    @contextmanager
    def swapped_in(self, name: str | None = None) -> Iterator[None]:
        """`SWA.swapped_in` with its `name`.

        A loader may be left early inside, as `max_batches` does, without effect on the run.
        """
        state = self.accelerator.gradient_state
        loaders = list(state.dataloader_references)  # only a loader that was read to its end removes itself
        try:
            with super().swapped_in(name):
                yield
        finally:
            state.dataloader_references = loaders

    def recalibrate(self, batches: Iterable[Any], **options: Any) -> None:
        """Recalibrate from `batches`, inside `swapped_in`, the BatchNorm layers that `finalize` would recalibrate.

        A collective. `options` are those of `recalibrate_batch_norm`.
        """
        self._frozen.recalibrate(batches, **options)

    def save(self, folder: Path) -> None:
        """Save the average into `folder`, and replace what is there. A collective. Raises what checkpoint.save does."""
        self.average.require_trained_weights("save")
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # if a file remains, checkpoint.save raises on all ranks
        self.accelerator.wait_for_everyone()
        checkpoint.save({"swa": self}, folder)

    def load(self, folder: Path, position: Mapping[str, int] | None = None) -> None:
        """Load what `save` saved. A collective. Without `folder`: one warning, and `reset` to `position`."""
        if not self.load_existing(folder):
            start = self.reset_to(position or {})
            warnings.warn(f"{folder} does not exist: averaging starts anew; {start}", stacklevel=2)
        self._steps.clear()

    def load_existing(self, folder: Path | None) -> bool:
        """Load what `save` saved into the `folder` of the first rank. False if it does not exist. A collective."""
        found = existing(folder)
        if found is not None:
            checkpoint.load({"swa": self}, found)
        return found is not None

    def detach(self) -> None:
        """Remove all hooks: no more steps are counted, and checkpoints of the accelerator do not have the average."""
        self._attachments.close()
        _attached.discard(self)

    def _note_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer is called on overflow, and does nothing
        if found_inf is None or not found_inf.item():
            self._steps.add(any(group.get("lr", 1) for group in optimizer.param_groups))


def prepare_swa(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    num_processes: int | None = None,
    name: str = "dist_swa",
    **options: Any,
) -> AcceleratedSWA:
    """Return an `SWA` of `model` that the accelerator's ``save_state`` and ``load_state`` save and load, too.

    Call it on every rank with the `model` and `optimizer` that ``accelerator.prepare`` returned, under DDP, FSDP1,
    FSDP2 or in one process.

    Args:
        num_processes: how many processes the launch is meant to run. Some launches silently run one.
        name: the folder of the average in each checkpoint. Several averages of an accelerator need different names.
            If a checkpoint does not have the folder, one warning says so, and averaging starts anew from step 0;
            call ``swa.reset(batches=...)`` with the steps made so far.
        options: arguments of `SWA`.

    Memory, and when it is a collective: as `SWA`. Raises ValueError for a model or optimizer that was not prepared,
    for DeepSpeed, Megatron-LM and XLA, and for another number of processes than `num_processes`; RuntimeError if the
    accelerator already has an average of that name.

    Example:

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from dist_swa.integrations.accelerate import prepare_swa
    >>> accelerator = Accelerator(cpu=True)
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model, optimizer = accelerator.prepare(model, optimizer)
    >>> swa = prepare_swa(accelerator, model, optimizer, max_duration="4ba", swa_start="0.5dur")
    >>> for _ in range(4):
    ...     accelerator.backward(model(torch.randn(8, 4)).square().mean())
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     updated = swa.step()
    >>> folder = accelerator.save_state("checkpoint")  # with the average
    >>> swa.finalize()
    """
    check_accelerator(accelerator, model, num_processes, name)
    # Private, because accelerate has no public call that tells whether a model was prepared.
    if not getattr(model, "_is_accelerate_prepared", False) or not isinstance(optimizer, AcceleratedOptimizer):
        raise ValueError(
            f"prepare_swa needs what accelerator.prepare returned, got a {type(model).__name__} and a"
            f" {type(optimizer).__name__} that were not prepared; call it after prepare"
        )
    for swa in [one for one in _attached if one.accelerator is accelerator]:
        # Private, because free_memory() calls no hook: it only clears this list.
        if not any(swa.prepared_optimizer is one for one in accelerator._optimizers):
            swa.detach()
        elif swa.name == name:
            raise RuntimeError(f"prepare_swa needs a name for each average, got {name=} twice; pass another name=")
    return AcceleratedSWA(accelerator, model, optimizer, name, **options)
