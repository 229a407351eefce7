"""The weights of a LightningModule: averaged ones in validations and checkpoints, trained ones where training resumes.

A checkpoint of averaged weights has them in ``state_dict``, which Lightning and other tools load. The trained values of
what was averaged are beside the average.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from dist_swa import SWA, checkpoint
from dist_swa.checkpoint.entries import TRAINED
from dist_swa.collectives import rank_and_world_size
from dist_swa.sharding.fqn import clean_name

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import FSDPStrategy
except ImportError as error:
    raise ImportError(
        f"dist_swa.integrations.lightning needs lightning, got {error}; pip install 'dist_swa[lightning]'"
    ) from error

KEY = "dist_swa"  # of the average in a checkpoint; below `TRAINED` are the trained values of what it replaces


class ModuleWeights:
    """Swaps averaged weights into the module of `trainer` for a validation, and while a checkpoint is saved.

    `swa` is the one whose average is used, while it is unfinished. Until `detach`, ``trainer.save_checkpoint`` has the
    averaged weights in the module: Lightning calls no callback for ``save_weights_only``, and a module's own
    ``state_dict`` and ``on_save_checkpoint`` see the weights that they are to save.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.swa: SWA | None = None
        self._trainer = trainer
        self._swap, self.is_swapped_in = ExitStack(), False
        save = trainer.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            with self.in_model(averaged=True):
                save(*args, **kwargs)

        trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    def detach(self) -> None:
        vars(self._trainer).pop("save_checkpoint", None)
        self.swa = None

    @property
    def are_averaged(self) -> bool:
        """Whether validations and checkpoints have averaged weights now."""
        return self.swa is not None and self.swa.started and not self.swa.completed

    def put_in_model(self, *, averaged: bool) -> None:
        """Have the averaged weights in the module, if there are any, or the trained ones. As `SWA.swapped_in`."""
        if not averaged:
            self.is_swapped_in = False
            self._swap.close()
        elif self.swa is not None and self.are_averaged and not self.is_swapped_in:
            self.swa.average.broadcast_buffers()  # so that all ranks validate the model of the checkpoint
            self._swap.enter_context(self.swa.swapped_in())
            self.is_swapped_in = True

    @contextmanager
    def in_model(self, *, averaged: bool) -> Iterator[None]:
        """`put_in_model` inside, and what was there before on exit."""
        before = self.is_swapped_in
        self.put_in_model(averaged=averaged)
        try:
            yield
        finally:
            self.put_in_model(averaged=before)

    def trained(self) -> dict[str, Any]:
        """Return Lightning's state dict, with copies of what the average replaces. While the trained weights are in."""
        state, swapped = self._trainer.strategy.lightning_module_state_dict(), self._swapped_storages()
        return state | copy.deepcopy({name: value for name, value in state.items() if _storage(value) in swapped})

    def difference(self, trained: Mapping[str, Any], averaged: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values in `trained` that are other ones in `averaged`, the ``state_dict`` of a checkpoint."""
        if self.swa is None:
            return {}
        names, is_first = self.swa.average.swapped_names, rank_and_world_size(None)[0] == 0

        def differs(name: str, value: Any) -> bool:
            if type(value) is not Tensor:
                return clean_name(name) in names
            # DCP would save a plain tensor from any rank. The ranks may have different statistics.
            return is_first and not _is_same(value, averaged.get(name))

        return {name: value for name, value in trained.items() if differs(name, value)}

    def _swapped_storages(self) -> set[int]:
        """Return the addresses of what the average replaces."""
        module, names = self._trainer.lightning_module, cast(SWA, self.swa).average.swapped_names
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return {_storage(tensor) for name, tensor in tensors if clean_name(name) in names} - {0}


def _storage(value: Any) -> int:
    """Return the address of the memory of a tensor, or of this rank's part of it; 0 where it has none."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.untyped_storage().data_ptr() if type(local) in (Tensor, nn.Parameter) else 0


def _is_same(value: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and value.dtype == other.dtype and torch.equal(value, other)


def load_trained(trainer: Trainer, pl_module: LightningModule, loaded: dict[str, Any], saved: Any) -> None:
    """Put the trained weights of a checkpoint into the module, if it has averaged ones in its ``state_dict``.

    `loaded`: the checkpoint as Lightning has loaded it. `saved`: what it has under `KEY`, or the path of a folder.
    Every rank calls it.
    """
    if isinstance(saved, Path):
        trained = _read_trained(trainer, saved) if saved.is_dir() else {}
    else:
        trained = saved.get(TRAINED, {})
    if trained and trainer.strategy.restore_checkpoint_after_setup:
        options = StateDictOptions(full_state_dict=not isinstance(saved, Path), strict=False)
        set_model_state_dict(cast(nn.Module, trainer.model), trained, options=options)
    elif trained:  # as Lightning does it
        loaded = {**loaded, "state_dict": {**loaded["state_dict"], **trained}}
        trainer.strategy.load_model_state_dict(loaded, strict=pl_module.strict_loading)
        state = trainer.strategy.lightning_module_state_dict()
        if wrong := [name for name, value in trained.items() if not torch.equal(value, state[name].to(value.device))]:
            raise RuntimeError(
                "resuming from averaged weights needs a module whose load_state_dict takes what its state_dict returns,"
                f" got another value of {wrong[0]}; write load_state_dict, or save with SWACallback(evaluate='trained')"
            )


def _read_trained(trainer: Trainer, folder: Path) -> dict[str, Any]:
    entry = f"{entry_in_folder(trainer)}.{TRAINED}"
    names = [
        key.removeprefix(f"{entry}.") for key in checkpoint.open_checkpoint(folder).keys if key.startswith(f"{entry}.")
    ]
    if not names:
        return {}
    model = get_model_state_dict(cast(nn.Module, trainer.model))
    state = {entry: {name: model[name] for name in names}}
    load_from_folder(state, folder)
    return state[entry]


def entry_in_folder(trainer: Trainer) -> str:
    """Return the key of the average in a checkpoint folder, which has the ``state_dict`` of the checkpoint."""
    return f"{'model' if isinstance(trainer.strategy, FSDPStrategy) else 'state_dict'}.{KEY}"


def load_from_folder(state: dict[str, Any], folder: Path, **options: Any) -> None:
    """`checkpoint.load` of a folder that Lightning wrote."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was not written by dist_swa.checkpoint")
        checkpoint.load(state, folder, **options)
