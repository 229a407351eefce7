"""Layers with running statistics, and hooks that collect the moments of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# Private: the public BatchNorm classes have no public base class, and some layers (apex) subclass this one directly.
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from dist_swa.batch_norm.moments import Moments
from dist_swa.sharding.fqn import named_modules

BatchNormLayer = _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

_UNBATCHED_NDIM = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}


def batch_norm_layers(module: nn.Module) -> dict[str, BatchNormLayer]:
    """Return the layers of `module` that keep running statistics, by FQN."""
    parts = named_modules(module).items()
    return {name: part for name, part in parts if isinstance(part, BatchNormLayer) and part.running_mean is not None}


def statistics_of(layer: BatchNormLayer) -> tuple[Tensor, Tensor]:
    return cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)


class StatisticsCollector:
    """Collects the moments of all inputs of one layer with forward hooks.

    The layer runs in training mode with momentum 1. Its buffers then hold the moments of the last batch after each
    forward, so collecting them does not read the input again.
    """

    def __init__(self, layer: BatchNormLayer, exact: bool) -> None:
        self.layer = layer
        self.is_counted = True
        self._exact = exact
        self._is_masked = self._is_evaluating = False
        self._momentum = layer.momentum
        self._statistics = statistics_of(layer)
        self._initial_statistics = [statistic.clone() for statistic in self._statistics]
        self._hooks: list[RemovableHandle] = []

    def start(self, is_masked: bool) -> None:
        """Start a pass. A masked layer outputs NaN, so that the layers that depend on it collect NaN."""
        self.stop()
        mean, _ = self._statistics
        self.moments = Moments.zeros(mean.numel(), mean.device, not isinstance(self.layer, _BatchNorm))
        self._is_masked = is_masked
        self.layer.training, self.layer.momentum = True, 1.0
        self._clear()
        self._hooks = [
            self.layer.register_forward_pre_hook(self._pre_forward, with_kwargs=True),
            self.layer.register_forward_hook(self._post_forward, with_kwargs=True),
        ]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.layer.momentum = self._momentum

    def finalize(self) -> None:
        """Stop collecting. The layer normalises with the collected statistics from now on."""
        self.stop()
        self.layer.training = False
        self._restore()
        self.write_statistics()

    def write_statistics(self) -> None:
        """Write the collected statistics into the layer's buffers, unless no batch reached the layer."""
        if self.moments.count:
            mean, variance = self._statistics
            mean.copy_(self.moments.mean)
            variance.copy_(self.moments.variance)
            if self.layer.num_batches_tracked is not None:
                self.layer.num_batches_tracked.fill_(self.moments.num_forwards)

    def _pre_forward(self, layer: BatchNormLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, values_per_mean = _sizes(layer, _input(args, kwargs))
        self._is_evaluating = values_per_mean == 1  # no variance: torch raises in training mode
        if self._is_evaluating:
            layer.training = False
            self._restore()

    def _post_forward(self, layer: BatchNormLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        count, _ = _sizes(layer, _input(args, kwargs))
        if self._is_evaluating:
            layer.training = True
            self._clear()
            self.moments.num_skipped += self.is_counted
        elif count and self.is_counted:
            batch_moments = _exact_moments(layer, _input(args, kwargs)) if self._exact else self._statistics
            self.moments.add(count, *batch_moments)
        return torch.full_like(output, torch.nan) if self._is_masked else None

    def _clear(self) -> None:
        for statistic in self._statistics:
            statistic.zero_()  # momentum 1 multiplies the old value by 0, and 0 * NaN is NaN

    def _restore(self) -> None:
        for statistic, values in zip(self._statistics, self._initial_statistics, strict=True):
            statistic.copy_(values)


@contextmanager
def local_sync_batch_norm(layers: Set[nn.Module]) -> Iterator[None]:
    """Make the SyncBatchNorm among `layers` normalise like BatchNorm, without communication."""
    # The method of the class is replaced, because subclasses call super().forward(). No argument turns it off.
    synchronized = nn.SyncBatchNorm.forward

    def forward(self: nn.SyncBatchNorm, input: Tensor) -> Tensor:
        return _BatchNorm.forward(self, input) if self in layers else synchronized(self, input)

    nn.SyncBatchNorm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = synchronized  # type: ignore[method-assign]


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


def _sizes(layer: BatchNormLayer, input: Tensor) -> tuple[int, int]:
    """Return the weight of `input` in the moments, and the number of values behind each mean that torch computes.

    BatchNorm: both are the number of values per channel. InstanceNorm: instances, and values per instance and channel.
    """
    if input.numel() == 0 or input.ndim < 2:  # the layer itself raises for ndim < 2
        return 0, 0
    if isinstance(layer, _BatchNorm):
        count = input.numel() // input.shape[1]
        return count, count
    instances = _batched(layer, input)
    return instances.shape[0], instances[0, 0].numel()


def _batched(layer: BatchNormLayer, input: Tensor) -> Tensor:
    """Return an input of InstanceNorm with a batch dim, which it may lack."""
    ndim = next(ndim for layer_type, ndim in _UNBATCHED_NDIM.items() if isinstance(layer, layer_type))
    return input.unsqueeze(0) if input.ndim == ndim else input


def _exact_moments(layer: BatchNormLayer, input: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased variance per channel in float64."""
    if isinstance(layer, _BatchNorm):
        variance, mean = torch.var_mean(input.double(), [dim for dim in range(input.ndim) if dim != 1])
        return mean, variance
    variance, mean = torch.var_mean(_batched(layer, input).double().flatten(2), 2)
    return mean.mean(0), variance.mean(0)
