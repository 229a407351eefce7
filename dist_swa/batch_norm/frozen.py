"""FrozenLayers: BatchNorm layers in evaluation mode during training. `SWA.finalize` keeps their statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from dist_swa.batch_norm.layers import batch_norm_layers
from dist_swa.batch_norm.recalibrate import recalibrate_batch_norm
from dist_swa.sharding.fqn import NamePattern, select
from dist_swa.sharding.wrappers import unwrap


class FrozenLayers:
    """Knows which layers of `model` were in evaluation mode the last time that the model was seen in training mode."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = batch_norm_layers(unwrap(model)[0])
        self.names: set[str] = set()

    def refresh(self) -> None:
        """Read the modes of the layers, if the model is in training mode."""
        if unwrap(self._model)[0].training:
            self.names = {name for name, layer in self._layers.items() if not layer.training}

    def recalibrate(self, batches: Iterable[Any] | None, **options: Any) -> None:
        """Call `recalibrate_batch_norm` for the other layers. ValueError where it needs `batches`.

        A collective with `batches`, and under DDP. Local otherwise.
        """
        options = skipping(self.names.__contains__, options)
        if batches is None and unwrap(self._model)[1] is None:
            if self._layers.keys() - select(self._layers, options["skip"], "skip"):
                raise _error_without_batches()
            return
        batches = _NoBatches() if batches is None else batches
        recalibrate_batch_norm(self._model, batches, **options)

    def saved(self) -> list[bool]:
        """Return, for a checkpoint, whether each layer was frozen."""
        return [name in self.names for name in self._layers]

    def names_of(self, saved: list[bool]) -> set[str]:
        """Return the frozen layers of a checkpoint; ValueError for another number of layers."""
        if len(saved) != len(self._layers):
            raise ValueError(
                f"load_state_dict needs the {len(saved)} normalisation layers of the checkpoint, got"
                f" num_layers={len(self._layers)}; build the model as it was"
            )
        return {name for name, is_frozen in zip(self._layers, saved, strict=True) if is_frozen}


def skipping(layers: NamePattern, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` of `recalibrate_batch_norm` that also skip `layers`."""
    skip = options.get("skip")
    return {**options, "skip": [layers, *([] if skip is None else [skip])]}


class _NoBatches:
    """Raises when it is asked for a batch: `recalibrate_batch_norm` then raises on all ranks."""

    def __iter__(self) -> Iterator[Any]:
        raise _error_without_batches()


def _error_without_batches() -> ValueError:
    return ValueError(
        "finalize needs batches for a model with BatchNorm, got batches=None; pass the training loader, or call"
        " average.transfer() to keep the statistics of the last update"
    )
