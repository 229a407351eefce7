"""Checks of an average: of its arguments, and of what its ranks have averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_swa.collectives import all_gather


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
    if device is not None and torch.device(device).type == "meta":
        raise ValueError("ShardedAverage needs a device with memory, got device='meta'; leave it out")
