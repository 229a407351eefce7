"""The promised precision of statistics, low-precision models, and compiled models."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

from batch_norm_models import batches_of, build, dealt, layers_of, random, uneven
from batch_norm_oracle import ULP, assert_all_statistics, has_statistics_of, record_inputs, two_pass
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks

IMAGES, ROWS = (8, 4, 8, 8), (50, 4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("mean_over_std", "shape", "limit"), [(0, IMAGES, 1e-6), (10, IMAGES, 1e-6), (-10, ROWS, 1e-6), (1e5, IMAGES, 2e-3)]
)
@on_ranks(1, 2, 3, 4)
def test_the_promised_precision(mean_over_std: float, shape: tuple[int, ...], limit: float, exact: bool) -> None:
    num_batches = 2 * dist.get_world_size()
    batches = [(random(*shape, seed=i).double() * 1e-2 + mean_over_std * 1e-2).float() for i in range(num_batches)]
    mean, variance = two_pass(batches)
    layer = nn.BatchNorm2d(4) if shape == IMAGES else nn.BatchNorm1d(4)
    recalibrate_batch_norm(nn.Sequential(layer), dealt(batches), exact=exact)
    variance_error = (cast(Tensor, layer.running_var).double() - variance).abs()
    assert (variance_error <= (ULP / 2 if exact else limit) * variance).all()
    mean_error = (cast(Tensor, layer.running_mean).double() - mean).abs()
    assert (mean_error <= (ULP / 2 * mean.abs() if exact else 10 * ULP * mean.abs() + 1e-6 * 1e-2)).all()


@pytest.mark.parametrize(("exact", "limit"), [(False, 1e-2), (True, ULP)])
@pytest.mark.parametrize("shape", [(256, 64), (2, 64, 16, 16)], ids=["rows", "channels_last"])
def test_the_precision_where_torch_sums_sequentially(shape: tuple[int, ...], exact: bool, limit: float) -> None:
    """Torch sums these inputs in float32 one after the other: an error of 4e-3 was measured. exact=True has none."""
    layer = nn.BatchNorm1d(64) if len(shape) == 2 else nn.BatchNorm2d(64)
    memory_format = torch.contiguous_format if len(shape) == 2 else torch.channels_last
    batches = [(random(*shape, seed=i).double() * 1e-2 + 1e3).float() for i in range(8)]
    recalibrate_batch_norm(nn.Sequential(layer), [b.to(memory_format=memory_format) for b in batches], exact=exact)
    _, variance = two_pass(batches)
    assert ((cast(Tensor, layer.running_var) - variance).abs() <= limit * variance).all()


# bfloat16


def has_statistics_of_bf16(layer: Any, inputs: list[Tensor], rtol: float = 1e-5) -> bool:
    mean, variance = two_pass(inputs)
    return (
        inputs[0].dtype == torch.bfloat16
        and torch.allclose(layer.running_mean.double(), mean, rtol, rtol)
        and torch.allclose(layer.running_var.double(), variance, rtol, rtol)
    )


@pytest.mark.parametrize("exact", [False, True])
def test_autocast(exact: bool) -> None:
    model = build()
    inputs = record_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        recalibrate_batch_norm(model, batches_of(6), exact=exact)
    assert has_statistics_of(model[0], batches_of(6))
    assert has_statistics_of_bf16(model[2], inputs["2"])


@pytest.mark.parametrize("exact", [False, True])
def test_bf16_models(exact: bool) -> None:
    model = build().to(torch.bfloat16)
    inputs = record_inputs(model)
    recalibrate_batch_norm(model, [batch.to(torch.bfloat16) for batch in batches_of(6)], exact=exact)
    for name, layer in layers_of(model).items():
        assert layer.running_mean.dtype == torch.bfloat16
        assert has_statistics_of_bf16(layer, inputs[name], rtol=2**-8 if exact else 2**-6)


def fsdp1_in_mixed_precision(model: nn.Sequential) -> None:
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    for i in (1, 4):
        bf16 = MixedPrecision(param_dtype=torch.bfloat16)
        model[i] = FullyShardedDataParallel(model[i], mixed_precision=bf16, **options)


def fsdp2_in_mixed_precision(model: nn.Sequential) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    for i in (1, 4):
        fully_shard(model[i], mp_policy=policy)
    fully_shard(model)


@pytest.mark.parametrize("shard", [fsdp1_in_mixed_precision, fsdp2_in_mixed_precision])
@on_ranks(1, 2, 3)
def test_mixed_precision_of_fsdp(shard: Callable[[nn.Sequential], None]) -> None:
    """BatchNorm stays in float32, as torch's CPU kernels need; its inputs are bfloat16."""
    model, like, batches = build(), build(), batches_of(7)
    shard(model)
    inputs = record_inputs(model)
    recalibrate_batch_norm(model, uneven(batches))
    assert has_statistics_of(layers_of(model)["0"], batches)
    assert inputs["2"][0].dtype == torch.bfloat16
    like[1].to(torch.bfloat16)
    like[1].register_forward_pre_hook(lambda _, args: args[0].to(torch.bfloat16))
    expected_inputs = record_inputs(like)
    for batch in batches:
        like[2](like[1](like[0](batch)))
    assert has_statistics_of_bf16(layers_of(model)["2"], expected_inputs["2"], rtol=1e-3)


# torch.compile


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.inner(given)
        return out + 1


def compiled(model: Outer, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def compiled_in_place(model: Outer, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def compiled_inside(model: Outer, backend: Any) -> nn.Module:
    part: Any = torch.compile(model.inner[2], backend=backend)
    model.inner[2] = part
    return model


@pytest.mark.parametrize("compile_model", [compiled, compiled_in_place, compiled_inside])
@torch.no_grad()
def test_compiled_models_run_uncompiled(compile_model: Callable[[Outer, Any], nn.Module]) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, batches = compile_model(Outer(), backend), batches_of(6)
    model(batches[0])
    num_graphs = len(graphs)
    assert num_graphs > 0
    recalibrate_batch_norm(model, batches, skip="inner.0")
    recalibrate_batch_norm(model, batches)
    assert len(graphs) == num_graphs
    assert_all_statistics(model._modules.get("_orig_mod") or model, Outer(), batches)
    model.eval()(batches[0])
    assert len(graphs) > num_graphs, "compiled again afterwards"
