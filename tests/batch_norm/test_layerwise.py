"""With layerwise=True every layer has the statistics of its final inputs, in one pass per BatchNorm depth."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from batch_norm_models import (
    HANG_S,
    Loader,
    batches_of,
    build,
    images_of,
    in_every_wrapper,
    layers_of,
    uneven,
    without_distributed,
    wrap,
)
from batch_norm_oracle import (
    assert_all_statistics,
    assert_layerwise_statistics,
    has_statistics_of,
    record_inputs,
    two_pass,
)
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks


class Residual(nn.Module):
    """Branches with different depths: 4 BatchNorm layers, the deepest behind 2 others. All operations propagate NaN."""

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


def residual() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Residual()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Tensor]], int]] = {
    "chain": (build, batches_of, 2),
    "residual": (residual, images_of, 3),
}


@in_every_wrapper
@pytest.mark.parametrize("name", MODELS)
@on_ranks(1, 2, 3, 4, timeout_s=2 * HANG_S)
def test_every_layer_is_exact_after_one_pass_per_depth(name: str, wrapper: str) -> None:
    build_model, some_batches, depth = MODELS[name]
    batches, model = some_batches(7), wrap(build_model(), wrapper)
    loader = Loader(uneven(batches))
    recalibrate_batch_norm(model, loader, layerwise=True)
    assert_layerwise_statistics(model, build_model(), batches)
    assert loader.num_passes == depth


def statistics_in_batches(num_batches: int, layerwise: bool) -> dict[str, Tensor]:
    model = build()
    samples: Sequence[Tensor] = torch.cat(batches_of(8)).tensor_split(num_batches)
    recalibrate_batch_norm(model, samples, layerwise=layerwise, exact=layerwise)
    return {name: layer.running_var for name, layer in layers_of(model).items()}


@pytest.mark.parametrize("num_batches", [7, 20])
def test_statistics_do_not_depend_on_the_batching(num_batches: int) -> None:
    expected = statistics_in_batches(1, layerwise=True)
    torch.testing.assert_close(statistics_in_batches(num_batches, layerwise=True), expected, rtol=1e-6, atol=0)


def test_statistics_of_a_single_pass_depend_on_the_batching() -> None:
    single = statistics_in_batches(20, layerwise=False)
    assert not torch.allclose(single["2"], statistics_in_batches(1, layerwise=True)["2"], rtol=0.01)


class Twice(nn.Module):
    """A layer that also gets its own output, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.shared, self.after = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.shared(self.linear(self.first(given)))
        out: Tensor = self.after(self.shared(self.linear(hidden)))
        return out


def test_a_layer_that_depends_on_its_own_output_gets_a_last_pass() -> None:
    torch.manual_seed(0)
    model, batches = Twice(), batches_of(4)
    like, loader = copy.deepcopy(model).eval(), Loader(batches)
    with pytest.warns(UserWarning, match="depends on their own output, or is NaN, .* by the batch: shared, after$"):
        recalibrate_batch_norm(model, loader, layerwise=True)
    assert loader.num_passes == 3
    assert has_statistics_of(model.first, batches)
    like.first.load_state_dict(model.first.state_dict())
    like.first.running_mean, like.first.running_var = (s.float() for s in two_pass(batches))
    inputs = record_inputs(like)
    like.shared.train()
    like.after.train()
    for batch in batches:
        like(batch)
    for name, calls in (("shared", 8), ("after", 4)):
        layer = layers_of(model)[name]
        torch.testing.assert_close(layer.running_var.double(), two_pass(inputs[name])[1], rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == len(inputs[name]) == calls


def test_every_pass_draws_the_same_random_numbers() -> None:
    seen = []

    class Augmented(Loader):
        def __iter__(self) -> Iterator[Tensor]:
            for batch in super().__iter__():
                seen.append(batch + torch.randn(3))
                yield seen[-1]

    recalibrate_batch_norm(build(), Augmented(batches_of(3)), layerwise=True)
    assert len(seen) == 6
    assert all(torch.equal(first, second) for first, second in zip(seen[:3], seen[3:], strict=True))


# Models of the transformers library


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes))


def mobile_net() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    sizes: dict[str, Any] = {"image_size": 32, "min_depth": 4, "depth_divisible_by": 4, "num_labels": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, **sizes))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("build_model", "layerwise"), [(resnet, False), (resnet, True), (mobile_net, False)])
@on_ranks(2, timeout_s=90.0)
def test_transformers_models_have_the_statistics_of_one_process(
    build_model: Callable[[], nn.Module], layerwise: bool, wrapper: str
) -> None:
    images = images_of(5, size=32)
    batches = [{"pixel_values": batch} for batch in images]
    alone, model = build_model(), wrap(build_model(), wrapper)
    with without_distributed():
        recalibrate_batch_norm(alone, batches, layerwise=layerwise)
    check = assert_layerwise_statistics if layerwise else assert_all_statistics
    check(alone, build_model(), images)
    recalibrate_batch_norm(model, batches[:1] if dist.get_rank() == 0 else batches[1:], layerwise=layerwise)
    for name, layer in layers_of(model).items():
        expected = layers_of(alone)[name].state_dict()
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layer, statistic), expected[statistic], rtol=1e-6, atol=1e-6)
