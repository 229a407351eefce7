"""The weights of a LightningModule: averaged ones in validations and checkpoints, trained ones where training resumes.

A checkpoint of averaged weights has them in ``state_dict``, where Lightning and everybody else look for the model. The
trained values of what was averaged are beside the average.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from dist_swa import SWA, checkpoint
from dist_swa.checkpoint.entries import TRAINED
from dist_swa.collectives import rank_and_world_size
from dist_swa.sharding.fqn import clean_name

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import FSDPStrategy, Strategy
except ImportError as error:
    raise ImportError(
        f"dist_swa.integrations.lightning needs lightning, got {error}; pip install 'dist_swa[lightning]'"
    ) from error

KEY = "dist_swa"  # of the average in a checkpoint; below `TRAINED` are the trained values of what it replaces


class ModuleWeights:
    """Swaps averaged weights into the module for a validation, and puts them into the ``state_dict`` of checkpoints.

    `swa` is the one whose average is used, while it is unfinished. It takes the place of
    ``strategy.lightning_module_state_dict`` until `detach`, because Lightning calls no callback for a checkpoint with
    ``save_weights_only``.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.swa: SWA | None = None
        self._strategy = strategy
        self._lightning_state_dict = strategy.lightning_module_state_dict
        self._swap, self._is_swapped_in = ExitStack(), False
        strategy.lightning_module_state_dict = self.state_dict  # type: ignore[method-assign]

    def detach(self) -> None:
        vars(self._strategy).pop("lightning_module_state_dict", None)
        self.swa = None

    @property
    def are_averaged(self) -> bool:
        """Whether validations and checkpoints have averaged weights now."""
        return self.swa is not None and self.swa.started and not self.swa.completed

    def put_in_model(self, *, averaged: bool) -> None:
        """Have the averaged weights in the module, if there are any, or the trained ones. As `SWA.swapped_in`."""
        if not averaged:
            self._is_swapped_in = False
            self._swap.close()
        elif self.swa is not None and self.are_averaged and not self._is_swapped_in:
            self.swa.average.broadcast_buffers()  # Lightning validates without DDP's forward, which would do it
            self._swap.enter_context(self.swa.swapped_in())
            self._is_swapped_in = True

    @contextmanager
    def in_model(self, *, averaged: bool) -> Iterator[None]:
        """`put_in_model` inside, and what was there before on exit."""
        before = self._is_swapped_in
        self.put_in_model(averaged=averaged)
        try:
            yield
        finally:
            self.put_in_model(averaged=before)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights for a checkpoint, as Lightning would for a module that has them."""
        return self._state_dict(self.are_averaged)

    def trained(self) -> dict[str, Any]:
        """Return the trained values of what the averaged `state_dict` replaces; {} where that has trained weights."""
        if not self.are_averaged:
            return {}
        is_first = rank_and_world_size(None)[0] == 0
        return {
            name: value
            for name, value in self._state_dict(averaged=False).items()
            # DCP would save a buffer from any rank. The ranks may have different statistics.
            if self._replaces(name) and (is_first or type(value) is not Tensor)
        }

    def _state_dict(self, averaged: bool) -> dict[str, Any]:
        """Return Lightning's state dict with averaged or trained weights. Copies, if the module has the other ones."""
        if averaged == self._is_swapped_in:
            return self._lightning_state_dict()
        with self.in_model(averaged=averaged):
            state = self._lightning_state_dict()
            written = {name: value for name, value in state.items() if self._replaces(name)}
            return state | copy.deepcopy(written)

    def _replaces(self, name: str) -> bool:
        return self.swa is not None and clean_name(name) in self.swa.average.swapped_names


def load_trained(trainer: Trainer, pl_module: LightningModule, saved: Mapping[str, Any] | Path) -> None:
    """Put the trained weights of a checkpoint into the module, if it has averaged ones in its ``state_dict``.

    `saved`: what one file has under `KEY`, or the path of a folder. Every rank calls it.
    """
    options = StateDictOptions(full_state_dict=not isinstance(saved, Path), strict=False)
    if isinstance(saved, Path):
        trained = _read_trained(trainer, saved) if saved.is_dir() else {}
    else:
        trained = saved.get(TRAINED, {})
    if trained and trainer.strategy.restore_checkpoint_after_setup:
        set_model_state_dict(cast(nn.Module, trainer.model), trained, options=options)
    elif trained:
        pl_module.load_state_dict(trained, strict=False)


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
