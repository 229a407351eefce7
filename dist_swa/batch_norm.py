"""BatchNorm statistics over all ranks.

The pass takes the moments that BatchNorm computes of every batch anyway, accumulates count, mean and summed squared
deviations per channel in float64, and merges the ranks by Chan's formula (Chan, Golub, LeVeque 1983): never a mean
of variances, and never ``E[x^2] - E[x]^2``, which cancels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from dist_swa.agreement import agreed_max
from dist_swa.shards import find_fsdp_modules, has_collective_forward, reshard, unwrap

Forward = Callable[[nn.Module, Any], Any]


def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> None:
    """Replace the BatchNorm statistics of `model` by those of all `batches` of all ranks.

    A collective: every rank calls it, each with its own `batches`; they may be of different sizes, and, but for a
    sharded model, of different numbers, also none. `running_var` is the unbiased variance, as torch keeps it;
    `num_batches_tracked` becomes the number of forwards on all ranks. BatchNorm runs in training mode and all else in
    evaluation mode, so dropout draws nothing. Frozen layers (in evaluation mode inside a model in training mode)
    stay as they are. Momentum, modes, hooks and torch's random state are given back on any exit, and on an error the
    statistics too. A model without BatchNorm returns at once.

    Args:
        batches: tensors (N, C, ...), tuples or lists (their first element is used), or dicts (keyword arguments).
        forward: called as ``forward(module, batch)`` for any other batch; `module` is the model inside DDP.
        max_batches: per rank.
        process_group: the ranks to merge; default: DDP's own group, or all ranks. Under tensor parallelism pass the
            data-parallel group.
        progress: whether the first rank shows a progress bar.

    Costs the forwards, float64 copies of the statistics, one small all-reduce of integers and two of the statistics,
    whatever the number of ranks; a sharded model adds one scalar all-reduce a forward. Raises ValueError where no rank
    has a batch, or the ranks of a sharded model have different numbers of them. A loader or forward that fails on one
    rank raises on all; but a forward of a sharded model there alone, since the others are inside of it. Why an
    averaged model needs it: arXiv:1803.05407, section 3.2.
    """
    module, ddp = unwrap(model)
    layers = _find_layers(module)
    if not layers:
        return
    if max_batches is not None and not isinstance(max_batches, int):
        raise TypeError(f"max_batches needs a whole number, got max_batches={max_batches!r}; None takes them all")
    if forward is not None and not callable(forward):
        raise TypeError(f"forward needs a function of module and batch, got forward={forward!r}; leave it out")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches needs a whole number >= 1, got max_batches={max_batches}; None takes them all")
    group = process_group if process_group is not None or ddp is None else ddp.process_group
    device = _statistics(next(iter(layers.values())))[0].device
    with torch.no_grad(), _counting(module, layers, device) as moments:
        calls = islice(_forward_calls(module, batches, forward, device), max_batches)
        _run_forwards(calls, has_collective_forward(module), group, device, progress)
        _merge(list(moments.values()), group, device)
        for name, layer in layers.items():
            _write(layer, moments[name])
    unused = [name for name, layer in layers.items() if moments[name].count == 0]
    if unused:
        warnings.warn(
            f"BatchNorm layers that no batch reached keep their statistics: {', '.join(unused)}", stacklevel=2
        )


@dataclass
class _Moments:
    """Count, mean and summed squared deviations per channel of what a layer was given."""

    mean: Tensor
    deviations: Tensor
    count: int = 0
    num_forwards: int = 0

    def add(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        """Merge a batch in, by Chan's formula."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * (count / total)
        self.deviations += deviations + delta.square() * (self.count / total * count)
        self.count = total
        self.num_forwards += 1


def _find_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and (layer.training or not module.training)
    }
    for name, layer in layers.items():
        if isinstance(layer, nn.SyncBatchNorm):
            raise NotImplementedError(
                f"recalibrate_batch_norm needs layers that normalise locally, got SyncBatchNorm at {name!r}; use"
                " BatchNorm, whose statistics this pass synchronises"
            )
    return layers


@contextmanager
def _counting(
    module: nn.Module, layers: Mapping[str, _BatchNorm], device: torch.device
) -> Iterator[dict[str, _Moments]]:
    """Let every layer report the moments of what it is given; on exit all but the statistics is as it was."""
    reshard(find_fsdp_modules(module))
    modes = [(part, part.training) for part in module.modules()]
    momenta = [(layer, layer.momentum) for layer in layers.values()]
    statistics = {name: [(buffer, buffer.clone()) for buffer in layer.buffers()] for name, layer in layers.items()}
    moments = {
        name: _Moments(*torch.zeros(2, layer.num_features, dtype=torch.float64, device=device))
        for name, layer in layers.items()
    }
    handles = [layer.register_forward_hook(_hook(moments[name]), with_kwargs=True) for name, layer in layers.items()]
    renewed: set[str] = set()
    try:
        for part, _ in modes:
            part.training = False  # not eval(), which models override
        for layer in layers.values():
            layer.training, layer.momentum = (
                True,
                1.0,
            )  # the running statistics become those of the last batch
            for statistic in _statistics(layer):
                statistic.zero_()  # 0 times a NaN would stay
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield moments
        renewed = {name for name, moment in moments.items() if moment.count}
    finally:
        for handle in handles:
            handle.remove()
        for part, training in modes:
            part.training = training
        for layer, momentum in momenta:
            layer.momentum = momentum
        for name in statistics.keys() - renewed:
            for buffer, values in statistics[name]:
                buffer.copy_(values)
        reshard(find_fsdp_modules(module))


def _hook(moments: _Moments) -> Callable[..., None]:
    def add_batch(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        count = given.numel() // given.shape[1]
        mean, variance, _ = _statistics(layer)
        moments.add(count, mean.double(), variance.double() * (count - 1))

    return add_batch


def _run_forwards(
    calls: Iterator[Callable[[], Any]],
    together: bool,
    group: dist.ProcessGroup | None,
    device: torch.device,
    progress: bool,
) -> None:
    """Make the calls. What ends them early is raised on all ranks, and no rank waits for another.

    Forwards that are collectives (`together`) are agreed on one by one. An error inside of one cannot be agreed on:
    the other ranks are inside, too; it is raised at once.
    """
    error: Exception | None = None
    num_batches = 0
    is_first = not dist.is_initialized() or dist.get_rank(group) == 0
    with tqdm(desc="recalibrating BatchNorm", unit="batch", disable=not (progress and is_first)) as bar:
        while True:
            call = None
            try:
                call = next(calls, None) if error is None else None
            except Exception as raised:
                error = raised
            if together or call is None:
                _agree_to_go_on(error, call is None, num_batches, group, device)
            if call is None:
                return
            try:
                call()
            except Exception as raised:
                if together:
                    raise
                error = raised
            num_batches += 1
            bar.update()


def _agree_to_go_on(
    error: Exception | None, has_ended: bool, num_batches: int, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Raise on every rank where one has failed, where some have ended and others not, and where none had a batch."""
    facts = [error is not None, has_ended, not has_ended, num_batches]
    any_failed, any_ended, any_running, most_batches = agreed_max(facts, group, device)
    if error is not None:
        raise error
    if any_failed:
        raise RuntimeError("a pass needs every rank, got an error on another one; see that rank's traceback")
    if any_ended and any_running:
        mine = num_batches if has_ended else f"{num_batches + 1} or more"
        raise ValueError(
            f"a sharded model needs as many batches on every rank, got num_batches={mine} here and another number"
            " elsewhere; pass max_batches"
        )
    if most_batches == 0 and has_ended:
        raise ValueError("a pass needs a batch on some rank, got num_batches=0 everywhere; check the loader")


def _forward_calls(
    module: nn.Module, batches: Iterable[Any], forward: Forward | None, device: torch.device
) -> Iterator[Callable[[], Any]]:
    """Yield the forward of every batch, ready to be called."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"recalibrate_batch_norm needs batches to iterate over, got {batches=}; pass a loader")
    for batch in batches:
        if forward is not None:
            yield partial(forward, module, batch)
        elif isinstance(batch, Mapping):
            yield partial(module, **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        else:
            given = batch[0] if isinstance(batch, tuple | list) and batch else batch
            if not isinstance(given, Tensor):
                raise TypeError(
                    "recalibrate_batch_norm needs batches of tensors, tuples, lists or dicts, got"
                    f" batch={type(batch).__name__}; pass forward="
                )
            yield partial(module, given.to(device))


def _merge(moments: Sequence[_Moments], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Make every rank's moments those of all ranks. Two all-reduces, whatever the number of layers and ranks."""
    if not dist.is_initialized():
        return
    sizes = [moment.mean.numel() for moment in moments]
    counts = [[moment.count, moment.num_forwards] for moment in moments]
    sums = torch.cat(
        [
            torch.tensor(counts, dtype=torch.float64, device=device).flatten(),
            *(moment.mean * moment.count for moment in moments),
        ]
    )
    dist.all_reduce(sums, group=group)
    totals = sums[: 2 * len(moments)].view(-1, 2).tolist()
    means = sums[2 * len(moments) :].split_with_sizes(sizes)
    for moment, (count, num_forwards), mean_sum in zip(moments, totals, means, strict=True):
        mean = mean_sum / max(count, 1)
        moment.deviations += (moment.mean - mean).square() * moment.count
        moment.mean, moment.count, moment.num_forwards = mean, int(count), int(num_forwards)
    deviations = torch.cat([moment.deviations for moment in moments])
    dist.all_reduce(deviations, group=group)
    for moment, merged in zip(moments, deviations.split_with_sizes(sizes), strict=True):
        moment.deviations = merged


def _write(layer: _BatchNorm, moments: _Moments) -> None:
    if moments.count:
        mean, variance, num_forwards = _statistics(layer)
        mean.copy_(moments.mean)
        variance.copy_(moments.deviations / (moments.count - 1))
        num_forwards.fill_(moments.num_forwards)


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor, Tensor]", (layer.running_mean, layer.running_var, layer.num_batches_tracked))
