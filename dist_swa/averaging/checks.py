"""Checks of an average: of its arguments, and of what its ranks have averaged."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_swa.collectives import all_gather

# They keep the state of the first rank only: fabric.save and load, and register_for_checkpointing.
_SAVE_FIRST_RANK = ("lightning.fabric.", "lightning_fabric.", "accelerate.")
# SWA calls ShardedAverage, and torch.no_grad stands in between.
_BETWEEN = ("dist_swa.swa", "dist_swa.averaging.", "torch.utils._contextlib")


def check_counts(
    num_averaged: int, names: Sequence[str], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Raise on every rank of `group` unless all averaged as many models and the same parameters. A collective.

    RuntimeError for other numbers of models, ValueError for other parameters.
    """
    facts = all_gather((num_averaged, hashlib.sha256(repr(names).encode()).hexdigest()), group, device)
    counts = [count for count, _ in facts]
    check_equal(min(counts), max(counts))
    if len({digest for _, digest in facts}) > 1:
        raise ValueError(
            f"averaging needs every rank to average the same parameters, got num_parameters={len(names)} here and other"
            " names elsewhere; freeze and unfreeze them on every rank alike"
        )


def check_equal(lowest: int, highest: int) -> None:
    """Raise RuntimeError unless these numbers of averaged models are equal."""
    if lowest != highest:
        raise RuntimeError(
            f"averaging needs every rank to have averaged the same number of models, got num_averaged={lowest} to"
            f" {highest}; call update on every rank, also where it has no batch, or reset the average"
        )


def check_ranks(
    num_averaged: int, fingerprints: Mapping[str, int], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Raise RuntimeError for other numbers of models, and ValueError for other `fingerprints` of plain parameters."""
    check_counts(num_averaged, (), group, device)
    of_ranks = all_gather(dict(fingerprints), group, device)
    for name in dict.fromkeys(name for of_rank in of_ranks for name in of_rank):
        if len({of_rank.get(name) for of_rank in of_ranks}) > 1:
            raise ValueError(
                "a checkpoint or export needs plain parameters to have the same values on every rank, got other ones"
                f" of parameter={name!r}; make it a DTensor, or save an entry for each rank that differs"
            )


def check_storage(dtype: Any, device: Any) -> None:
    """Raise TypeError or ValueError unless `dtype` and `device` are valid."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"ShardedAverage needs a torch.dtype, got dtype={dtype!r}; torch.float32 is the default")
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"ShardedAverage needs a floating dtype, got dtype={dtype}; torch.float32 is the default")
    try:
        where = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"ShardedAverage needs a device, got {device=}; leave it out, or pass 'cpu' or 'cuda'") from error
    if where is not None and where.type == "meta":
        raise ValueError("ShardedAverage needs a device with memory, got device='meta'; leave it out")


def check_keeps_all_ranks() -> None:
    """Raise RuntimeError where a saver calls `state_dict` or `load_state_dict` that keeps one rank's state. Local.

    Nothing in the calls themselves tells such savers from torch.distributed.checkpoint.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    caller = "" if frame is None else frame.f_globals.get("__name__", "")
    if caller.startswith(_SAVE_FIRST_RANK):
        raise RuntimeError(
            f"a sharded average needs a checkpoint of every rank, got {caller=}, which keeps the first rank's part"
            " only; leave the average out there, and call dist_swa.checkpoint.save({'swa': swa}, path) and"
            " checkpoint.load on every rank"
        )
