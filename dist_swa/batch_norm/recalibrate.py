"""BatchNorm statistics over all ranks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from dist_swa.batch_norm.layers import (
    Norm,
    StatisticsCollector,
    batch_norm_layers,
    local_sync_batch_norm,
    statistics_of,
)
from dist_swa.batch_norm.lockstep import ForwardFn, Ranks, call, prepared, run_in_lockstep
from dist_swa.batch_norm.moments import merge_ranks
from dist_swa.collectives import fingerprint
from dist_swa.sharding.fqn import NamePattern, select
from dist_swa.sharding.shard import copy_unless_expanded
from dist_swa.sharding.wrappers import (
    collective_groups,
    find_fsdp_modules,
    preserve_broadcast_flags,
    reshard,
    unwrap,
)


def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: ForwardFn | None = None,
    max_batches: int | None = None,
    layerwise: bool = False,
    exact: bool = False,
    skip: NamePattern | None = None,
    process_group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> None:
    """Replace the BatchNorm statistics of `model` by those of all `batches` of all ranks.

    A collective: every rank calls it, each with its own `batches`; they may be of different sizes and numbers, also
    none. Afterwards `running_mean` and `running_var` (the unbiased variance, as torch keeps it) are those of all
    samples, `num_batches_tracked` the number of counted forwards on all ranks, in the same buffers. BatchNorm and its
    subclasses, SyncBatchNorm (local during the pass), and InstanceNorm with `track_running_stats` (the mean of
    per-instance moments) take part, all else runs in evaluation mode, so dropout is off and draws nothing. Frozen
    layers (in evaluation mode inside a model in training mode) stay as they are. Weights, gradients, momentum, modes,
    hooks and torch's random state are given back on any exit, and on an error the statistics too. A model without
    such layers returns at once.

    Args:
        batches: tensors (N, C, ...), tuples or lists (their first element is used), or dicts (keyword arguments).
            Tensors go to the model's device, also those inside of tuples, lists, dicts, dataclasses and what has a
            `to` method.
        forward: called as ``forward(module, batch)`` for any other batch; `module` is the model inside DDP. Where
            ranks run a sharded model's forwards together, it is also called for batches that are not counted.
        max_batches: per rank.
        layerwise: in one pass every layer is normalised by the batch, so what deeper layers see depends on how the
            samples are batched. With True there is one pass per BatchNorm depth, each layer normalises with the final
            statistics of those before it, and all become exact. Needs `batches` that can be iterated again. Until a
            layer's turn comes it gives NaN; depth is not seen where NaN does not pass through (`sign`, comparisons).
        exact: read every input again in float64 (memory: one such copy of the largest). Without it, the float32
            moments of torch's own forward are merged: variances were within 2e-6 of the true ones where |mean|/std is
            at most 10, within 3e-4 at 1e5, and there within 4e-3 for inputs in channels_last or without spatial dims,
            which torch sums one after the other.
        skip: layers to leave alone: a pattern of FQNs ("backbone.*"), a function of the FQN, or several of them.
        process_group: the ranks to merge; default: DDP's own group, or all ranks. Under tensor parallelism, where a
            group of ranks has the same batches, pass the data-parallel group, or each sample counts on each.
        progress: whether the first rank shows a progress bar.

    A batch that leaves a layer one value per channel is not counted there, with one warning: the layer normalises it
    with the statistics it had. Layers that no batch reached keep them, with one warning.

    Costs the forwards, float64 copies of the statistics, a copy of all buffers, one small all-reduce of integers, and
    in each pass one more and two of the statistics, whatever the number of ranks; a sharded model adds one all-reduce
    of five integers a forward, and sends a batch to ranks that never had one. Raises on every rank, with nothing
    changed: TypeError or ValueError for arguments that do not fit, ValueError where no rank has a batch, and what a
    loader or a forward raises on one rank; but from inside a forward that is a collective it raises there alone, since
    the others wait in it. Why an averaged model needs it: arXiv:1803.05407, section 3.2.
    """
    module, ddp = unwrap(model)
    norms = batch_norm_layers(module)
    if not norms:
        return
    if process_group is None and ddp is not None:
        process_group = ddp.process_group
    ranks = Ranks(process_group, statistics_of(next(iter(norms.values())))[0].device, *collective_groups(module))
    layers: dict[str, StatisticsCollector] = {}
    error: Exception | None = None
    try:
        _check_arguments(batches, forward, max_batches, layerwise)
        layers = {name: StatisticsCollector(layer, exact) for name, layer in _chosen(module, norms, skip).items()}
        total = _known_length(batches, max_batches) if progress and not layerwise else None
    except Exception as raised:
        error = raised
    _agree_on_layers(layers, layerwise, error, ranks)
    if not layers:
        return
    bar = tqdm(desc="recalibrating BatchNorm", unit="batch", total=total, disable=not (progress and ranks.is_first()))
    with bar, torch.no_grad(), _unchanged(module, layers.values()):
        run = partial(_run, module, forward or call, layers.values(), bar)
        unordered = _run_passes(
            layers, lambda: islice(prepared(batches, forward, ranks.device), max_batches), run, layerwise, ranks
        )
    for layer in layers.values():
        layer.write()
    for reason, names in {
        "layers that no batch reached keep their statistics": [n for n in layers if not layers[n].moments.count],
        "layers do not count batches with one value per channel": [n for n in layers if layers[n].moments.num_skipped],
        "layers whose input depends on their own output, or is NaN, were normalised by the batch": unordered,
    }.items():
        if names:
            warnings.warn(f"BatchNorm {reason}: {', '.join(names)}", stacklevel=2)


def _run_passes(
    layers: Mapping[str, StatisticsCollector],
    new_batches: Callable[[], Iterator[Any]],
    run: Callable[[Any, bool], None],
    layerwise: bool,
    ranks: Ranks,
) -> list[str]:
    """Take the moments of all layers over all ranks, in one pass or layer by layer.

    Return the layers that could not be ordered: none settles in a masked pass, so they are done together at last.
    """
    remaining, is_masked, unordered = dict(layers), layerwise, list[str]()
    num_batches = None
    devices = [] if ranks.device.type == "cpu" else [ranks.device]
    while remaining:
        for layer in remaining.values():
            layer.start(is_masked)
        with torch.random.fork_rng(devices, device_type=ranks.device.type):
            num_batches = run_in_lockstep(new_batches(), run, ranks, num_batches)
        merge_ranks([layer.moments for layer in remaining.values()], ranks.group, ranks.device)
        settled = [n for n, layer in remaining.items() if not (is_masked and bool(layer.moments.mean.isnan().any()))]
        for name in settled:
            remaining.pop(name).settle()
        if not settled:
            is_masked, unordered = False, list(remaining)
    return unordered


def _run(
    module: nn.Module, forward: ForwardFn, layers: Iterable[StatisticsCollector], bar: Any, batch: Any, is_counted: bool
) -> None:
    for layer in layers:
        layer.is_counted = is_counted
    forward(module, batch)
    bar.update(is_counted)


@contextmanager
def _unchanged(module: nn.Module, layers: Iterable[StatisticsCollector]) -> Iterator[None]:
    """Let all but `layers` evaluate, uncompiled and with SyncBatchNorm local; on any exit all is as it was."""
    reshard(find_fsdp_modules(module))
    modes = [(part, part.training) for part in module.modules()]
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    # A model that was compiled has loaded torch._dynamo, which takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        local = local_sync_batch_norm({layer.layer for layer in layers})
        with eager, local, preserve_broadcast_flags(module.modules()) as ddps:
            for ddp in ddps:  # that are not outermost
                ddp.require_forward_param_sync = False  # so that ranks may have other numbers of batches
            for part, _ in modes:
                part.training = False  # not eval(), which models override
            yield
    finally:
        for layer in layers:
            layer.stop()
        for part, training in modes:
            part.training = training
        for part, name, buffer, values in buffers:
            if getattr(part, name, None) is not buffer:
                setattr(part, name, buffer)
            copy_unless_expanded(buffer, values)
        reshard(find_fsdp_modules(module), discard_prefetched=True)


def _check_arguments(batches: Any, forward: Any, max_batches: Any, layerwise: bool) -> None:
    if max_batches is not None and (not isinstance(max_batches, int) or isinstance(max_batches, bool)):
        raise TypeError(f"max_batches needs a whole number, got max_batches={max_batches!r}; None takes them all")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches needs a whole number >= 1, got max_batches={max_batches}; None takes them all")
    if forward is not None and not callable(forward):
        raise TypeError(f"forward needs a function of module and batch, got forward={forward!r}; leave it out")
    if not isinstance(batches, Iterable):
        raise TypeError(f"recalibrate_batch_norm needs batches to iterate over, got {batches=}; pass a loader")
    if layerwise and isinstance(batches, Iterator):
        raise TypeError(
            f"layerwise=True needs batches that can be iterated again, got batches={type(batches).__name__}; pass a"
            " loader or a list"
        )


def _chosen(module: nn.Module, norms: Mapping[str, Norm], skip: NamePattern | None) -> dict[str, Norm]:
    """Return the layers that are neither frozen nor to be skipped."""
    skipped = set() if skip is None else select(norms, skip, "skip")
    chosen = {n: layer for n, layer in norms.items() if n not in skipped and (layer.training or not module.training)}
    for name, layer in chosen.items():
        if is_lazy(statistics_of(layer)[0]) or statistics_of(layer)[0].is_meta:
            raise ValueError(
                f"recalibrate_batch_norm needs statistics with values, got none in {name!r}; materialise the model"
            )
    return chosen


def _agree_on_layers(layers: Iterable[str], layerwise: bool, error: Exception | None, ranks: Ranks) -> None:
    """Raise on all ranks where one has an error, or where they would not do the same. A collective."""
    mark = fingerprint(torch.empty(0), f"{list(layers)} {bool(layerwise)}")
    highest, lowest = ranks.agree(error, [mark, -mark])
    if highest != -lowest:
        raise ValueError(
            f"recalibrate_batch_norm needs the same layers on every rank, got layers={list(layers)}, {layerwise=} here"
            " and others elsewhere; let modes, skip and layerwise agree"
        )


def _known_length(batches: Iterable[Any], max_batches: int | None) -> int | None:
    length = length_hint(batches) or max_batches
    return length if max_batches is None or length is None else min(length, max_batches)
