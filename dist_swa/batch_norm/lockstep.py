"""Run the forwards of a loader on every rank, so that none waits for one that will not come.

Where a forward is local, each rank runs its own batches, and all meet at the end. Where it is a collective (FSDP1,
FSDP2, tensor parallelism), the ranks agree before each: those that have run out of batches go on with forwards that
are not counted until all have. The ranks of a tensor-parallel group compute one forward; there a rank that has run
out is sent its peer's batch, which counts on both.
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

_NONE = object()  # no batch
_NOBODY = -(1 << 40)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a pass."""

    group: dist.ProcessGroup | None  # whose statistics are merged; None: all
    device: torch.device
    collective_groups: Sequence[dist.ProcessGroup]  # who run each forward together
    tp_groups: Sequence[dist.ProcessGroup]  # who run it on the same batch

    def agree(self, error: Exception | None, facts: Sequence[int] = ()) -> list[int]:
        """Return the largest of each of `facts` over the ranks; where one has an error, raise on all. A collective."""
        largest = [error is not None, *facts]
        for group in [None] if self.group is None else dict.fromkeys([*self.collective_groups, self.group]):
            largest = all_reduce_max(largest, group, self.device)
        if error is not None:
            raise error
        if largest[0]:
            raise RuntimeError("a pass needs every rank, got an error on another one; see that rank's traceback")
        return largest[1:]

    def is_first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank(self.group) == 0


def run_in_lockstep(
    batches: Iterator[Any], run: Callable[[Any, bool], None], ranks: Ranks, expected: int | None = None
) -> int:
    """Call ``run(batch, is_counted)`` for each of `batches`, and more where peers have more. Return their number.

    What ends them early is raised on every rank, and so is another number than `expected`. An error inside of a
    forward that is a collective cannot be agreed on, since the others are inside, too: it is raised at once.
    """
    error: Exception | None = None
    num_batches, has_ended, spare = 0, False, _NONE
    while True:
        batch = _NONE
        if not has_ended:
            try:
                batch = next(batches, _NONE)
            except Exception as raised:
                error = raised
            has_ended = batch is _NONE
            if has_ended and error is None and expected not in (None, num_batches):
                error = ValueError(
                    f"layerwise=True needs the same batches in every pass, got {num_batches=} after {expected}; pass"
                    " a loader, not what reads on from where it stopped"
                )
        if ranks.collective_groups or has_ended:
            facts = [not has_ended, num_batches, has_ended, has_ended and spare is _NONE]
            any_running, most_batches, any_ended, any_empty = ranks.agree(error, facts)
            if not any_running:
                if most_batches == 0:
                    raise ValueError(
                        "a pass needs a batch on some rank, got num_batches=0 everywhere; check the loader"
                    )
                return num_batches
            if any_ended:
                batch = _lent(batch, ranks, ranks.tp_groups)
            if any_empty:
                spare = _lent(spare if batch is _NONE else batch, ranks, [*ranks.collective_groups, ranks.group])
        try:
            run(spare if batch is _NONE else batch, batch is not _NONE)
        except Exception as raised:
            if ranks.collective_groups:
                raise
            error, has_ended = raised, True
        if batch is not _NONE:
            spare = batch
            num_batches += not has_ended


def _lent(batch: Any, ranks: Ranks, groups: Sequence[dist.ProcessGroup | None]) -> Any:
    """Return `batch`, and on ranks without one that of a peer in one of `groups`. A collective; raises on all ranks."""
    for group in groups:
        error: Exception | None = None
        try:
            batch = _lent_within(batch, group, ranks.device)
        except Exception as raised:
            error = ValueError(
                "a sharded model needs a batch on every rank, got num_batches=0 on one and a peer's batch that cannot"
                f" be sent there ({type(raised).__name__}: {raised}); give every rank a batch"
            )
        ranks.agree(error)
    return batch


def _lent_within(batch: Any, group: dist.ProcessGroup | None, device: torch.device) -> Any:
    rank = dist.get_rank()
    any_empty, lender = all_reduce_max([batch is _NONE, _NOBODY if batch is _NONE else -rank], group, device)
    if not any_empty or lender == _NOBODY:
        return batch
    data, error = io.BytesIO(), None
    if rank == -lender:
        try:
            torch.save(batch, data)
        except Exception as raised:
            error = raised
    has_failed, num_bytes = all_reduce_max([error is not None, data.tell()], group, device)
    if has_failed:
        raise error or RuntimeError(f"rank {-lender} cannot pickle it")
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    if rank == -lender:
        sent.copy_(torch.frombuffer(data.getbuffer(), dtype=torch.uint8))
    dist.all_reduce(sent, dist.ReduceOp.MAX, group)
    if batch is not _NONE:
        return batch

    def place(storage: Any, location: str) -> Any:
        mine = location if location == "cpu" else str(device)  # the lender's "cuda:0" may be cuda:1 here
        return torch.serialization.default_restore_location(storage, mine)

    received = bytearray(num_bytes)
    torch.frombuffer(received, dtype=torch.uint8).copy_(sent)
    # Pickled by this very program on another rank, as torch.distributed's own object collectives do.
    return torch.load(io.BytesIO(received), place, weights_only=False)


def prepared(batches: Iterable[Any], forward: ForwardFn | None, device: torch.device) -> Iterator[Any]:
    """Yield what `forward`, or by default `call`, takes of each batch, on `device`."""
    for batch in batches:
        given = batch
        if forward is None and isinstance(batch, tuple | list) and batch:
            given = batch[0]
        if forward is None and not isinstance(given, Tensor | Mapping):
            raise TypeError(
                "recalibrate_batch_norm needs batches of tensors, tuples, lists or dicts, got"
                f" batch={type(batch).__name__}; pass forward="
            )
        yield _moved(given, device)


def call(module: nn.Module, batch: Tensor | Mapping[str, Any]) -> None:
    """Run `module` on a tensor, or on keyword arguments."""
    if isinstance(batch, Mapping):
        module(**batch)
    else:
        module(batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if callable(getattr(batch, "to", None)):  # a tensor, or what knows its own tensors
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if type(batch) in (tuple, list):
        return type(batch)(_moved(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(moved, field.name, _moved(getattr(batch, field.name), device))  # also where frozen
        return moved
    return batch
