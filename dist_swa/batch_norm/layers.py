"""Layers that keep running statistics, and the moments of what they are given."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from dist_swa.batch_norm.moments import Moments
from dist_swa.sharding.fqn import named_modules

Norm = _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

_NDIM_OF_AN_INSTANCE = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}


def batch_norm_layers(module: nn.Module) -> dict[str, Norm]:
    """Return the layers of `module` that keep running statistics, by FQN."""
    parts = named_modules(module).items()
    return {name: part for name, part in parts if isinstance(part, Norm) and part.running_mean is not None}


class StatisticsCollector:
    """A layer that takes the moments of what it is given: with momentum 1 they are in its buffers after a forward."""

    def __init__(self, layer: Norm, is_exact: bool) -> None:
        self.layer = layer
        self.is_counted = True
        self._is_exact = is_exact
        self._is_masked = self._is_single = False
        self._momentum = layer.momentum
        self._statistics = statistics_of(layer)
        self._before = [statistic.clone() for statistic in self._statistics]
        self._count = 0
        self._hooks: list[RemovableHandle] = []

    def start(self, is_masked: bool) -> None:
        """Begin a pass. A masked layer gives NaN, which tells those that depend on it from those that do not."""
        self.stop()
        mean, _ = self._statistics
        self.moments = Moments.zeros(mean.numel(), mean.device, not isinstance(self.layer, _BatchNorm))
        self._is_masked = is_masked
        self.layer.training, self.layer.momentum = True, 1.0
        self._clear()
        self._hooks = [
            self.layer.register_forward_pre_hook(self._look, with_kwargs=True),
            self.layer.register_forward_hook(self._add, with_kwargs=True),
        ]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.layer.momentum = self._momentum

    def settle(self) -> None:
        """Normalise with the final statistics from now on."""
        self.stop()
        self.layer.training = False
        self._restore()
        self.write()

    def write(self) -> None:
        if self.moments.count:
            mean, variance = self._statistics
            mean.copy_(self.moments.mean)
            variance.copy_(self.moments.variance)
            if self.layer.num_batches_tracked is not None:
                self.layer.num_batches_tracked.fill_(self.moments.num_forwards)

    def _look(self, layer: Norm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._count, num_values = _sizes(layer, _given(args, kwargs))
        self._is_single = num_values == 1
        if self._is_single:
            layer.training = False
            self._restore()

    def _add(self, layer: Norm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._is_single:
            layer.training = True
            self._clear()
            self.moments.num_skipped += self.is_counted
        elif self._count and self.is_counted:
            found = _exact_moments(layer, _given(args, kwargs)) if self._is_exact else self._statistics
            self.moments.add(self._count, *found)
        return torch.full_like(output, torch.nan) if self._is_masked else None

    def _clear(self) -> None:
        for statistic in self._statistics:
            statistic.zero_()  # 0 times a NaN would stay

    def _restore(self) -> None:
        for statistic, values in zip(self._statistics, self._before, strict=True):
            statistic.copy_(values)


@contextmanager
def local_sync_batch_norm(layers: Set[nn.Module]) -> Iterator[None]:
    """Let SyncBatchNorm among `layers`, and what subclasses it, normalise as BatchNorm does: without communication."""
    synchronised = nn.SyncBatchNorm.forward

    def forward(self: nn.SyncBatchNorm, input: Tensor) -> Tensor:
        return _BatchNorm.forward(self, input) if self in layers else synchronised(self, input)

    nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = synchronised  # type: ignore[method-assign]


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


def _sizes(layer: Norm, given: Tensor) -> tuple[int, int]:
    """Return how much an input counts, and how many values share one mean: for BatchNorm the same."""
    if given.numel() == 0 or given.ndim < 2:  # torch refuses the latter
        return 0, 0
    if isinstance(layer, _BatchNorm):
        count = given.numel() // given.shape[1]
        return count, count
    instances = _batched(layer, given)
    return instances.shape[0], instances[0, 0].numel()


def _batched(layer: Norm, given: Tensor) -> Tensor:
    """Return what InstanceNorm was given with the batch dim that it may lack."""
    ndim = next(ndim for kind, ndim in _NDIM_OF_AN_INSTANCE.items() if isinstance(layer, kind))
    return given.unsqueeze(0) if given.ndim == ndim else given


def _exact_moments(layer: Norm, given: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance per channel, in float64."""
    if isinstance(layer, _BatchNorm):
        variance, mean = torch.var_mean(given.double(), [dim for dim in range(given.ndim) if dim != 1])
        return mean, variance
    variance, mean = torch.var_mean(_batched(layer, given).double().flatten(2), 2)
    return mean.mean(0), variance.mean(0)


def statistics_of(layer: Norm) -> tuple[Tensor, Tensor]:
    return cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
