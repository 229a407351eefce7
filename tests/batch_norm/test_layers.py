"""Layer by layer, exact, and every kind of layer, precision and wrapper of a module that people have."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

from batch_norm_oracle import (
    HANG_S,
    ULP,
    WRAPPERS,
    assert_all_statistics,
    assert_layerwise_statistics,
    batches_of,
    build,
    dealt,
    has_statistics_of,
    images_of,
    norms,
    per_instance,
    random,
    two_pass,
    uneven,
    wrap,
)
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks


class Residual(nn.Module):
    """Branches of other depths: 4 BatchNorm layers, the deepest behind 2 others. NaN has to pass all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.left, self.left_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.right, self.right_norm = nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True)
        self.pool = nn.MaxPool2d(2)
        self.last, self.last_norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = nn.functional.relu6(self.stem_norm(self.stem(given)))
        hidden = self.left_norm(self.left(hidden)) + nn.functional.hardswish(self.right_norm(self.right(hidden)))
        out: Tensor = self.last_norm(self.last(self.pool(hidden.relu())))
        return out


def residual() -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Residual()


class Loader:
    """Batches that say how often they were asked for."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches, self.num_passes = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.num_passes += 1
        return iter(self.batches)


# Layer by layer


@on_ranks(1, 2, 3, 4, timeout_s=2 * HANG_S)
def test_layerwise_every_layer_is_exact_in_one_pass_per_depth() -> None:
    for wrapper in WRAPPERS:
        for build_model, batches, depth in ((build, batches_of(7), 2), (residual, images_of(7), 3)):
            loader, model = Loader(uneven(batches)), wrap(build_model(), wrapper)
            recalibrate_batch_norm(model, loader, layerwise=True)
            assert_layerwise_statistics(model, build_model(), batches)
            assert loader.num_passes == depth, wrapper


def test_layerwise_statistics_do_not_depend_on_how_samples_are_batched() -> None:
    samples, models = torch.cat(batches_of(8)), [build() for _ in range(3)]
    for model, num_batches in zip(models, (1, 7, 20), strict=True):
        recalibrate_batch_norm(model, samples.tensor_split(num_batches), layerwise=True, exact=True)
    single = build()
    recalibrate_batch_norm(single, samples.tensor_split(20))
    for name, layer in norms(models[0]).items():
        for other in models[1:]:
            torch.testing.assert_close(norms(other)[name].running_var, layer.running_var, rtol=1e-6, atol=0)
    assert not torch.allclose(norms(single)["2"].running_var, norms(models[0])["2"].running_var, rtol=0.01)


class Twice(nn.Module):
    """A layer that is given its own output, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.shared, self.after = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.shared(self.linear(self.first(given)))
        out: Tensor = self.after(self.shared(self.linear(hidden)))
        return out


def test_layerwise_ends_where_a_layer_is_given_its_own_output() -> None:
    torch.manual_seed(0)
    model, batches = Twice(), batches_of(4)
    like = copy.deepcopy(model).eval()
    loader = Loader(batches)
    with pytest.warns(UserWarning, match="depends on their own output, or is NaN, .* by the batch: shared, after$"):
        recalibrate_batch_norm(model, loader, layerwise=True)
    assert loader.num_passes == 3
    assert has_statistics_of(model.first, batches)
    like.first.load_state_dict(model.first.state_dict())
    like.first.running_mean, like.first.running_var = (s.float() for s in two_pass(batches))
    given: dict[str, list[Tensor]] = {"shared": [], "after": []}
    for name, inputs in given.items():
        layer = like.get_submodule(name).train()
        layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].double()))
    for batch in batches:
        like(batch)
    for name, inputs in given.items():
        torch.testing.assert_close(norms(model)[name].running_var.double(), two_pass(inputs)[1], rtol=1e-5, atol=1e-6)
        assert norms(model)[name].num_batches_tracked == len(inputs) == 4 * (1 + (name == "shared"))


def test_layerwise_draws_the_same_batches_in_every_pass() -> None:
    seen = []

    class Augmented(Loader):
        def __iter__(self) -> Iterator[Tensor]:
            for batch in super().__iter__():
                seen.append(batch + torch.randn(3))
                yield seen[-1]

    recalibrate_batch_norm(build(), Augmented(batches_of(3)), layerwise=True)
    assert len(seen) == 6
    assert all(torch.equal(first, second) for first, second in zip(seen[:3], seen[3:], strict=True))


# Precision


@on_ranks(1, 2, 3, 4)
def test_promised_precision() -> None:
    ranks, images = dist.get_world_size(), (8, 4, 8, 8)
    for ratio, shape, limit in ((0, images, 1e-6), (10, images, 1e-6), (-10, (50, 4), 1e-6), (1e5, images, 2e-3)):
        batches = [(random(*shape, seed=i).double() * 1e-2 + ratio * 1e-2).float() for i in range(2 * ranks)]
        mean, variance = two_pass(batches)
        for exact in (False, True):
            layer = nn.BatchNorm2d(4) if shape == images else nn.BatchNorm1d(4)
            recalibrate_batch_norm(nn.Sequential(layer), dealt(batches), exact=exact)
            found = [
                statistic.double() for statistic in (layer.running_mean, layer.running_var) if statistic is not None
            ]
            case = ratio, exact, found, mean, variance
            allowed = ULP / 2 if exact else limit
            assert ((found[1] - variance).abs() <= allowed * variance).all(), case
            allowed_mean = ULP / 2 * mean.abs() if exact else 10 * ULP * mean.abs() + 1e-6 * 1e-2
            assert ((found[0] - mean).abs() <= allowed_mean).all(), case


def test_rows_and_channels_last_at_the_limit() -> None:
    """Torch sums these in float32 one after the other: an error of 4e-3 was seen, and exact=True has none."""
    for layer, shape in ((nn.BatchNorm1d(64), (256, 64)), (nn.BatchNorm2d(64), (2, 64, 16, 16))):
        batches = [(random(*shape, seed=i).double() * 1e-2 + 1e3).float() for i in range(8)]
        if len(shape) == 4:
            batches = [batch.to(memory_format=torch.channels_last) for batch in batches]
        _, variance = two_pass(batches)
        for exact, limit in ((False, 1e-2), (True, ULP)):
            recalibrate_batch_norm(nn.Sequential(layer), batches, exact=exact)
            found = cast(Tensor, layer.running_var)
            assert ((found - variance).abs() <= limit * variance).all(), (shape, exact)


# Kinds of layers


class Activated(nn.BatchNorm2d):
    """A layer with a forward of its own, as timm has them."""

    def forward(self, input: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps
        ).relu_()


class SyncActivated(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


@on_ranks(1, 2, 3, timeout_s=HANG_S)
def test_kinds_of_layers() -> None:
    kinds: dict[str, tuple[Callable[[], Any], int, Any]] = {
        "subclass": (lambda: Activated(3), 2, two_pass),
        "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), 2, two_pass),
        "SyncBatchNorm, subclass": (lambda: SyncActivated(3), 2, two_pass),
        "SyncBatchNorm of rows": (lambda: nn.SyncBatchNorm(3), 1, two_pass),
        "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), 1, per_instance),
        "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 2, per_instance),
        "InstanceNorm3d": (lambda: nn.InstanceNorm3d(3, momentum=0.5, track_running_stats=True), 3, per_instance),
        "not affine": (lambda: nn.BatchNorm2d(3, affine=False), 2, two_pass),
        "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), 2, two_pass),
    }
    for (name, (make, num_dims, oracle)), exact in itertools.product(kinds.items(), (False, True)):
        batches = [random(2 + i, 3, *[4] * num_dims, seed=i) * (1 + i) + i for i in range(7)]
        model = nn.Sequential(nn.Identity(), make())
        sync_forward, momentum = nn.SyncBatchNorm.forward, model[1].momentum
        recalibrate_batch_norm(model, uneven(batches), exact=exact)
        for found, true in zip((model[1].running_mean, model[1].running_var), oracle(batches), strict=True):
            torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=1e-6)
        assert model[1].num_batches_tracked == len(batches), name
        assert nn.SyncBatchNorm.forward is sync_forward
        assert model[1].momentum == momentum


def test_instances_without_a_batch_dim() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True)
    batches = [random(3, 5, seed=i) + i for i in range(4)]
    recalibrate_batch_norm(nn.Sequential(layer), batches)
    assert layer.running_mean is not None
    torch.testing.assert_close(layer.running_mean.double(), per_instance([torch.stack(batches)])[0])


@on_ranks(1)
def test_sync_batch_norm_elsewhere_still_synchronises() -> None:
    """Only the layers of the pass are local: another model may train inside of it."""
    other, errors = nn.SyncBatchNorm(3), []

    def forward(module: nn.Module, batch: Tensor) -> None:
        module(batch)
        with pytest.raises(ValueError, match="expected input tensor to be on GPU") as error:
            other(batch)
        errors.append(error)

    recalibrate_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)), batches_of(2), forward=forward)
    assert len(errors) == 2


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.pooled, self.after = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.images(given)
        out: Tensor = self.after(hidden * self.pooled(hidden.mean((2, 3), keepdim=True)))
        return out


@on_ranks(1, 2, 3)
def test_one_value_per_channel_is_not_counted() -> None:
    batches = images_of(6)
    batches[4] = batches[4][:1]  # one image: enough for all layers but the pooled one
    for layerwise in (False, True):
        model = Pooled()
        with pytest.warns(UserWarning, match="do not count batches with one value per channel: pooled$") as warned:
            recalibrate_batch_norm(model, dealt(batches), layerwise=layerwise)
        assert len(warned) == 1
        assert has_statistics_of(model.images, batches)
        assert model.images.num_batches_tracked == model.after.num_batches_tracked == 6
        assert model.pooled.num_batches_tracked == 5
        if layerwise:
            like = copy.deepcopy(model).double().eval()
            pooled = [like.images(batch.double()).mean((2, 3)) for i, batch in enumerate(batches) if i != 4]
            torch.testing.assert_close(model.pooled.running_var, two_pass(pooled)[1].float())
            after = [
                hidden * like.pooled(hidden.mean((2, 3), keepdim=True))
                for hidden in map(like.images, map(Tensor.double, batches))
            ]
            torch.testing.assert_close(model.after.running_var, two_pass(after)[1].float())


def test_a_layer_with_nothing_but_one_value_per_channel_stays() -> None:
    for layer in (nn.BatchNorm1d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.SyncBatchNorm(3)):
        given = random(2, 3, 1, 1) if isinstance(layer, nn.InstanceNorm2d) else random(1, 3)
        assert layer.running_mean is not None
        layer.running_mean.fill_(7)
        model, before = nn.Sequential(layer, nn.Identity()), copy.deepcopy(layer.state_dict())
        outputs: list[Tensor] = []
        model[1].register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2]))
        with pytest.warns(UserWarning, match="BatchNorm layers") as warned:
            recalibrate_batch_norm(model, [given])
        assert sorted("reached" in str(w.message) for w in warned) == [False, True]
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert layer.training
        assert torch.equal(outputs[0], layer.eval()(given))


def test_statistics_that_were_not_finite_do_not_come_back_with_one_value() -> None:
    layer, batches = nn.BatchNorm1d(3), [random(4, 3), random(1, 3), random(5, 3)]
    for statistic in (layer.running_mean, layer.running_var):
        cast(Tensor, statistic).fill_(torch.nan)
    with pytest.warns(UserWarning, match="one value per channel: 0$"):
        recalibrate_batch_norm(nn.Sequential(layer), batches)
    assert has_statistics_of(layer, [batches[0], batches[2]])


# Precisions, compilers


def recorded(model: nn.Module) -> dict[str, list[Tensor]]:
    """Let layers record what they are given."""
    given: dict[str, list[Tensor]] = {name: [] for name in norms(model)}
    for name, layer in norms(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0].clone()))
    return given


def has_statistics_of_bf16(layer: Any, inputs: list[Tensor], rtol: float = 1e-5) -> bool:
    mean, variance = two_pass(inputs)
    return (
        inputs[0].dtype == torch.bfloat16
        and torch.allclose(layer.running_mean.double(), mean, rtol, rtol)
        and torch.allclose(layer.running_var.double(), variance, rtol, rtol)
    )


def test_bf16_models_and_autocast() -> None:
    for exact in (False, True):
        model = build()
        given = recorded(model)
        with torch.autocast("cpu", torch.bfloat16):
            recalibrate_batch_norm(model, batches_of(6), exact=exact)
        assert has_statistics_of(model[0], batches_of(6))
        assert has_statistics_of_bf16(model[2], given["2"])

        model = build().to(torch.bfloat16)
        given = recorded(model)
        recalibrate_batch_norm(model, [batch.to(torch.bfloat16) for batch in batches_of(6)], exact=exact)
        for name, inputs in given.items():
            layer = norms(model)[name]
            assert layer.running_mean.dtype == torch.bfloat16
            assert has_statistics_of_bf16(layer, inputs, rtol=2**-8 if exact else 2**-6)


@on_ranks(1, 2, 3)
def test_mixed_precision_of_fsdp() -> None:
    """Layers stay in float32, as torch's CPU kernels need; they are given bfloat16."""
    batches = batches_of(7)
    bf16 = MixedPrecision(param_dtype=torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    for wrapper in ("fsdp1", "fsdp2"):
        model = build()
        if wrapper == "fsdp1":
            for i in (1, 4):
                options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
                model[i] = FullyShardedDataParallel(model[i], mixed_precision=bf16, **options)
        else:
            for i in (1, 4):
                fully_shard(model[i], mp_policy=policy)
            fully_shard(model)
        given = recorded(model)
        recalibrate_batch_norm(model, uneven(batches))
        assert has_statistics_of(norms(model)["0"], batches), wrapper
        assert given["2"][0].dtype == torch.bfloat16
        like = build()
        like[1].to(torch.bfloat16)
        like[1].register_forward_pre_hook(lambda _, args: args[0].to(torch.bfloat16))
        alone = recorded(like)
        for layer in norms(like).values():
            layer.train()
        for batch in batches:
            like[2](like[1](like[0](batch)))
        assert has_statistics_of_bf16(norms(model)["2"], alone["2"], rtol=1e-3), wrapper


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.inner(given)
        return out + 1


@torch.no_grad()
def test_compiled_models_run_as_they_are_written() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def compiled_wrapper(model: Outer) -> nn.Module:
        wrapped: Any = torch.compile(model, backend=backend)
        return cast(nn.Module, wrapped)

    def compiled_in_place(model: Outer) -> nn.Module:
        model.compile(backend=backend)
        return model

    def compiled_inside(model: Outer) -> nn.Module:
        part: Any = torch.compile(model.inner[2], backend=backend)
        model.inner[2] = part
        return model

    for compile_model in (compiled_wrapper, compiled_in_place, compiled_inside):
        torch.compiler.reset()
        compiled.clear()
        given = batches_of(6)
        model = compile_model(Outer())
        model(given[0])
        num_graphs = len(compiled)
        assert num_graphs > 0, compile_model
        recalibrate_batch_norm(model, given, skip="inner.0")
        recalibrate_batch_norm(model, given)
        assert len(compiled) == num_graphs, compile_model
        plain = model._modules.get("_orig_mod") or model
        assert_all_statistics(plain, Outer(), given)
        model.eval()(given[0])
        assert len(compiled) > num_graphs, "compiled again afterwards"


# Models that nobody here wrote


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes))


def mobile_net() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    sizes: dict[str, Any] = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4}
    sizes["num_labels"] = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MobileNetV2ForImageClassification(MobileNetV2Config(**sizes))


@on_ranks(2, timeout_s=90.0)
def test_transformers_models_on_ranks_as_in_one_process() -> None:
    for build_model, layerwise in ((resnet, False), (resnet, True), (mobile_net, False)):
        images = [{"pixel_values": batch} for batch in images_of(5, size=32)]
        alone = build_model()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: False)
            recalibrate_batch_norm(alone, images, layerwise=layerwise)
        if not layerwise:
            assert_all_statistics(alone, build_model(), [image["pixel_values"] for image in images])
        else:
            assert_layerwise_statistics(alone, build_model(), [image["pixel_values"] for image in images])
        for wrapper in ("ddp", "fsdp2"):
            model = wrap(build_model(), wrapper)
            mine = images[:1] if dist.get_rank() == 0 else images[1:]
            recalibrate_batch_norm(model, mine, layerwise=layerwise)
            expected = norms(alone)
            for name, layer in norms(model).items():
                for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                    found, true = getattr(layer, statistic), getattr(expected[name], statistic)
                    torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-6)
