"""Collectives that make ranks agree before one of them acts or raises, so that none waits forever."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE_NUMEL = 1 << 20  # elements per partial sum, which bounds the memory of a fingerprint


def rank_and_world_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the rank of this process in `group`, and the size of `group`; 0 and 1 without torch.distributed. Local."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def all_reduce_max(values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Return the maximum of each of `values` over the ranks of `group`. A collective."""
    if not dist.is_initialized():
        return [int(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group)
    return [int(value) for value in tensor.tolist()]


def all_gather(value: T, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> list[T]:
    """Return the `value` of each rank of `group`, which travels pickled. A collective; without any, ``[value]``.

    Under NCCL it travels on `device`, or by default on the current device, which has to be this rank's own.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    with nullcontext() if device is None or device.index is None else torch.accelerator.device_index(device.index):
        dist.all_gather_object(values, value, group)
    return values


@contextmanager
def raise_on_all(group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Raise an error of the body on every rank of `group`. A collective; `device` as for `all_gather`.

    A rank with an error raises its own. All others raise that of the first rank that has one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors = all_gather(None if error is None else _portable(error), group, device)
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            other.add_note(f"(raised on rank {rank})")
            raise other


def _portable(error: Exception) -> Exception:
    """Return `error`, or a RuntimeError with its text if it does not pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def fingerprint(values: Tensor, text: str) -> int:
    """Return a 56-bit hash of `text`, the dtype, and the bits of `values` with their positions."""
    bits = torch.view_as_real(values) if values.is_complex() else values
    bits = bits.reshape(-1).view(_INT_OF_SIZE[bits.element_size()])
    digest = hashlib.sha256(f"{text} {values.dtype}".encode())
    for piece in bits.tensor_split(1 + bits.numel() // _PIECE_NUMEL):
        weights = torch.arange(1, len(piece) + 1, device=piece.device)
        digest.update(str(int((piece * weights).sum())).encode() + b" ")
    return int.from_bytes(digest.digest()[:7])


def check_replicas(
    names: Sequence[str], fingerprints: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Raise ValueError on every rank of `group` unless all ranks pass the same fingerprints. A collective."""
    (count,) = _ranges([len(names)], group, device)
    if count[0] != count[1]:
        raise ValueError(
            f"replicas need the same parameters on every rank, got num_parameters={count[0]} to {count[1]}; build the"
            " same model on every rank"
        )
    for name, (lowest, highest) in zip(names, _ranges(fingerprints, group, device), strict=True):
        if lowest != highest:
            raise ValueError(
                f"replicas need the same names, shapes and values on every rank, got other ones of parameter={name!r}"
                "; broadcast the model from one rank first, or wrap it in DDP, which does"
            )


def _ranges(values: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[tuple[int, int]]:
    """Return the minimum and the maximum of each of `values` over the ranks of `group`. A collective."""
    largest = all_reduce_max([*values, *(-value for value in values)], group, device)
    count = len(values)
    return [(-low, high) for high, low in zip(largest[:count], largest[count:], strict=True)]
