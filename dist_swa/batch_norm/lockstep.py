"""Run the same number of forwards on every rank, so that collectives inside of them do not hang.

A forward without collectives needs no agreement: each rank runs its own batches, and the ranks meet at the end.
Before each forward with collectives (FSDP1, FSDP2, tensor parallelism) the ranks agree whether any has a batch left.
A rank without one repeats a batch, which is not counted. The ranks of a tensor-parallel group compute one forward
together: a rank without a batch receives the batch of a peer, and both count it.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_swa.collectives import all_reduce_max

ForwardFn = Callable[[nn.Module, Any], Any]

_NO_BATCH = object()


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks that run a recalibration."""

    group: dist.ProcessGroup | None  # the ranks whose statistics are merged; None: all
    device: torch.device
    collective_groups: Sequence[dist.ProcessGroup]  # the groups that run each forward together
    tp_groups: Sequence[dist.ProcessGroup]  # those of them that need the same batch

    def agree(self, error: Exception | None, values: Sequence[int] = ()) -> list[int]:
        """Return the maximum of each of `values` over all ranks. Raise on every rank if any has an error. A collective.

        The rank with the error raises it, all others raise RuntimeError.
        """
        maxima = [error is not None, *values]
        for group in [None] if self.group is None else dict.fromkeys([*self.collective_groups, self.group]):
            maxima = all_reduce_max(maxima, group, self.device)
        if error is not None:
            raise error
        if maxima[0]:
            raise RuntimeError("a pass needs every rank, got an error on another one; see that rank's traceback")
        return maxima[1:]

    def is_first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank(self.group) == 0


def run_in_lockstep(
    batches: Iterable[Any], run: Callable[[Any, bool], None], ranks: Ranks, expected: int | None = None
) -> int:
    """Call ``run(batch, is_counted)`` for each of `batches`, and again while other ranks have batches. A collective.

    Returns the number of batches of this rank. Errors of `batches` and `run`, and a number of batches other than
    `expected`, raise on every rank. An error inside a forward with collectives raises on its own rank at once: the
    other ranks are inside the forward, too, and cannot agree on it.
    """
    remaining: Iterator[Any] = _counted(batches, expected)
    error: Exception | None = None
    num_batches, spare = 0, _NO_BATCH
    while True:
        batch = _NO_BATCH
        try:
            batch = next(remaining, _NO_BATCH)
        except Exception as raised:
            error = raised
        exhausted = batch is _NO_BATCH
        num_batches += not exhausted
        if ranks.collective_groups or exhausted:
            values = [not exhausted, num_batches, exhausted, exhausted and spare is _NO_BATCH]
            any_left, max_batches, any_exhausted, any_without = ranks.agree(error, values)
            if max_batches == 0:
                raise ValueError("a pass needs a batch on some rank, got num_batches=0 everywhere; check the loader")
            if not any_left:
                return num_batches
            if any_exhausted:
                batch = _share(batch, ranks, ranks.tp_groups)
            if any_without:
                spare = _share(spare if batch is _NO_BATCH else batch, ranks, [*ranks.collective_groups, ranks.group])
        spare = spare if batch is _NO_BATCH else batch
        try:
            run(spare, batch is not _NO_BATCH)
        except Exception as raised:
            if ranks.collective_groups:
                raise
            error, remaining = raised, iter(())


def _counted(batches: Iterable[Any], expected: int | None) -> Iterator[Any]:
    """Yield `batches`. Raise ValueError at their end if their number is not `expected`."""
    num_batches = 0
    for batch in batches:
        yield batch
        num_batches += 1
    if expected not in (None, num_batches):
        raise ValueError(
            f"layerwise=True needs the same batches in every pass, got {num_batches=} after {expected}; pass a loader"
            " that starts again in every iteration"
        )


def _share(batch: Any, ranks: Ranks, groups: Sequence[dist.ProcessGroup | None]) -> Any:
    """Return `batch`; on a rank without one, the batch of a peer in one of `groups`. A collective; raises on all."""
    for group in groups:
        error: Exception | None = None
        try:
            batch = _share_within(batch, group, ranks.device)
        except Exception as raised:
            error = ValueError(
                "a sharded model needs a batch on every rank, got num_batches=0 on one and a peer's batch that cannot"
                f" be sent there ({type(raised).__name__}: {raised}); give every rank a batch"
            )
        ranks.agree(error)
    return batch


def _share_within(batch: Any, group: dist.ProcessGroup | None, device: torch.device) -> Any:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    has_batch = batch is not _NO_BATCH
    any_missing, rank_from_end = all_reduce_max([not has_batch, (world_size - rank) * has_batch], group, device)
    if not any_missing or rank_from_end == 0:  # 0: no rank has a batch
        return batch
    source = world_size - rank_from_end
    message: list[Any] = [None]
    error: Exception | None = None
    if rank == source:
        try:
            torch.save(batch, data := io.BytesIO())
            message = [data.getvalue()]
        except Exception as raised:
            error = raised
    dist.broadcast_object_list(message, source, group, device)
    if message[0] is None:
        raise error or RuntimeError(f"rank {source} cannot pickle it")
    if has_batch:
        return batch

    def place(storage: Any, location: str) -> Any:
        target = location if location == "cpu" else str(device)  # the sender's "cuda:0" may be "cuda:1" here
        return torch.serialization.default_restore_location(storage, target)

    # Not weights_only: a batch of any class is pickled by this program on another rank, as in object collectives.
    return torch.load(io.BytesIO(message[0]), place, weights_only=False)


def prepare(batches: Iterable[Any], forward: ForwardFn | None, device: torch.device) -> Iterator[Any]:
    """Yield the part of each batch that `forward` takes, or else `default_forward`, on `device`."""
    for batch in batches:
        inputs = batch
        if forward is None and isinstance(batch, tuple | list) and batch:
            inputs = batch[0]
        if forward is None and not isinstance(inputs, Tensor | Mapping):
            raise TypeError(
                "recalibrate_batch_norm needs batches of tensors, tuples, lists or dicts, got"
                f" batch={type(batch).__name__}; pass forward="
            )
        yield _to_device(inputs, device)


def default_forward(module: nn.Module, batch: Tensor | Mapping[str, Any]) -> None:
    """Run `module` on a tensor, or on a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        module(**batch)
    else:
        module(batch)


def _to_device(batch: Any, device: torch.device) -> Any:
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(value, device) for value in batch))
    if type(batch) in (tuple, list):
        return type(batch)(_to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for field in dataclasses.fields(batch):
            # Not setattr: the dataclass may be frozen.
            object.__setattr__(moved, field.name, _to_device(getattr(batch, field.name), device))
        return moved
    return batch
