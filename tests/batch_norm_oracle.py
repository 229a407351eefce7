"""The expected BatchNorm statistics, in float64."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batch_norm_models import layers_of

ULP = 2**-23  # of float32, relative


def rows(batches: Iterable[Tensor]) -> Tensor:
    """Return one float64 row of channels per sample and position."""
    return torch.cat([batch.double().movedim(1, -1).flatten(0, -2) for batch in batches])


def two_pass(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased variance in float64."""
    samples = rows(batches)
    mean = samples.mean(0)
    return mean, (samples - mean).square().sum(0) / (len(samples) - 1)


def per_instance(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the averages over instances of their means and their unbiased variances, in float64."""
    instances = [instance.double().flatten(1) for batch in batches for instance in batch]
    means = torch.stack([instance.mean(1) for instance in instances])
    deviations = [instance - mean[:, None] for instance, mean in zip(instances, means, strict=True)]
    variances = [d.square().sum(1) / (d.shape[1] - 1) for d in deviations]
    return means.mean(0), torch.stack(variances).mean(0)


def is_exact(mean: Tensor, variance: Tensor, batches: Sequence[Tensor]) -> bool:
    """Whether statistics are correct up to the float32 rounding in torch's sums, in batch moments and in buffers."""
    true_mean, true_variance = two_pass(batches)
    largest = rows(batches).abs().amax(0)
    allowed = ULP * (true_variance + true_variance.sqrt() * largest) + (ULP * largest).square()
    return bool(
        ((mean - true_mean).abs() <= 1.5 * ULP * largest).all()
        and ((variance - true_variance).abs() <= allowed).all()
        and (variance >= 0).all()
    )


def has_statistics_of(layer: Any, batches: Sequence[Tensor]) -> bool:
    return is_exact(layer.running_mean, layer.running_var, batches)


def record_inputs(model: nn.Module) -> dict[str, list[Tensor]]:
    """Record copies of the inputs of every layer, per call."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers_of(model)}
    for name, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].clone()))
    return inputs


@torch.no_grad()
def inputs_of_layers(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Return the inputs of every layer of a float64 copy, per call."""
    like = copy.deepcopy(model).double()
    inputs = record_inputs(like)
    for batch in batches:
        like(batch.double())
    return inputs


def assert_all_statistics(model: nn.Module, like: nn.Module, batches: Iterable[Tensor]) -> None:
    """Compare with a float64 pass through `like`: BatchNorm in training mode, all else in evaluation mode."""
    like = copy.deepcopy(like).eval()
    for layer in layers_of(like).values():
        layer.train()
    for name, inputs in inputs_of_layers(like, batches).items():
        layer = layers_of(model)[name]
        for found, true in zip((layer.running_mean, layer.running_var), two_pass(inputs), strict=True):
            torch.testing.assert_close(found, true.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.num_batches_tracked, torch.tensor(len(inputs))), name


def assert_layerwise_statistics(model: nn.Module, like: nn.Module, batches: Sequence[Tensor]) -> None:
    """Compare with float64 passes through `like`, in which the layers before each layer have their final statistics."""
    like = copy.deepcopy(like).double().eval()
    for name in call_order(like, batches[0]):
        inputs = inputs_of_layers(like, batches)[name]
        layer, oracle = layers_of(model)[name], layers_of(like)[name]
        oracle.running_mean, oracle.running_var = (
            per_instance(inputs) if not isinstance(layer, _BatchNorm) else two_pass(inputs)
        )
        for statistic in ("running_mean", "running_var"):
            true: Tensor = getattr(oracle, statistic)
            torch.testing.assert_close(getattr(layer, statistic), true.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.num_batches_tracked, torch.tensor(len(inputs))), name


def call_order(model: nn.Module, batch: Tensor) -> list[str]:
    """Return the names of the layers in the order of their first call in a forward."""
    order: dict[str, None] = {}
    model = copy.deepcopy(model)
    for name, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda *_, name=name: order.update({name: None}))
    with torch.no_grad():
        model(batch.to(next(model.parameters()).dtype))
    return list(order)
