"""Every kind of layer: subclasses, SyncBatchNorm, InstanceNorm, and batches with one value per channel."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from batch_norm_models import HANG_S, batches_of, dealt, images_of, random, uneven
from batch_norm_oracle import has_statistics_of, per_instance, two_pass
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks


class Activated(nn.BatchNorm2d):
    """A layer with its own forward, as in timm."""

    def forward(self, input: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps
        ).relu_()


class SyncActivated(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu_()


KINDS: dict[str, tuple[Callable[[], Any], int, Any]] = {
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


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@on_ranks(1, 2, 3, timeout_s=HANG_S)
def test_kinds_of_layers(kind: str, exact: bool) -> None:
    make, num_dims, oracle = KINDS[kind]
    batches = [random(2 + i, 3, *[4] * num_dims, seed=i) * (1 + i) + i for i in range(7)]
    model = nn.Sequential(nn.Identity(), make())
    sync_forward, momentum = nn.SyncBatchNorm.forward, model[1].momentum
    recalibrate_batch_norm(model, uneven(batches), exact=exact)
    for actual, expected in zip((model[1].running_mean, model[1].running_var), oracle(batches), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    assert model[1].num_batches_tracked == len(batches)
    assert nn.SyncBatchNorm.forward is sync_forward
    assert model[1].momentum == momentum


def test_instances_without_a_batch_dim() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True)
    batches = [random(3, 5, seed=i) + i for i in range(4)]
    recalibrate_batch_norm(nn.Sequential(layer), batches)
    assert layer.running_mean is not None
    torch.testing.assert_close(layer.running_mean.double(), per_instance([torch.stack(batches)])[0])


@on_ranks(1)
def test_sync_batch_norm_of_another_model_still_communicates() -> None:
    other, errors = nn.SyncBatchNorm(3), []

    def forward(module: nn.Module, batch: Tensor) -> None:
        module(batch)
        with pytest.raises(ValueError, match="expected input tensor to be on GPU") as error:
            other(batch)
        errors.append(error)

    recalibrate_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)), batches_of(2), forward=forward)
    assert len(errors) == 2


# One value per channel


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.pooled, self.after = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.images(given)
        out: Tensor = self.after(hidden * self.pooled(hidden.mean((2, 3), keepdim=True)))
        return out


@pytest.mark.parametrize("layerwise", [False, True])
@on_ranks(1, 2, 3)
def test_one_value_per_channel_is_not_counted(layerwise: bool) -> None:
    batches, model = images_of(6), Pooled()
    batches[4] = batches[4][:1]  # one image has one value per channel for the pooled layer only
    with pytest.warns(UserWarning, match="do not count batches with one value per channel: pooled$") as warned:
        recalibrate_batch_norm(model, dealt(batches), layerwise=layerwise)
    assert len(warned) == 1
    assert has_statistics_of(model.images, batches)
    assert model.images.num_batches_tracked == model.after.num_batches_tracked == 6
    assert model.pooled.num_batches_tracked == 5
    if layerwise:
        like = copy.deepcopy(model).double().eval()
        hidden = [like.images(batch.double()) for batch in batches]
        pooled = [h.mean((2, 3)) for i, h in enumerate(hidden) if i != 4]
        after = [h * like.pooled(h.mean((2, 3), keepdim=True)) for h in hidden]
        torch.testing.assert_close(model.pooled.running_var, two_pass(pooled)[1].float())
        torch.testing.assert_close(model.after.running_var, two_pass(after)[1].float())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (1, 3)),
        (nn.SyncBatchNorm(3), (1, 3)),
        (nn.InstanceNorm2d(3, track_running_stats=True), (2, 3, 1, 1)),
    ],
    ids=["BatchNorm", "SyncBatchNorm", "InstanceNorm"],
)
def test_a_layer_with_one_value_per_channel_in_every_batch_keeps_its_statistics(layer: Any, shape: Any) -> None:
    layer.running_mean.fill_(7)
    model, before = nn.Sequential(layer, nn.Identity()), copy.deepcopy(layer.state_dict())
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda *args: outputs.append(args[2]))
    with pytest.warns(UserWarning, match="BatchNorm layers") as warned:
        recalibrate_batch_norm(model, [random(*shape)])
    assert sorted("reached" in str(w.message) for w in warned) == [False, True]
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.training
    assert torch.equal(outputs[0], layer.eval()(random(*shape)))


def test_initial_nan_does_not_return_with_one_value_per_channel() -> None:
    layer, batches = nn.BatchNorm1d(3), [random(4, 3), random(1, 3), random(5, 3)]
    for statistic in (layer.running_mean, layer.running_var):
        cast(Tensor, statistic).fill_(torch.nan)
    with pytest.warns(UserWarning, match="one value per channel: 0$"):
        recalibrate_batch_norm(nn.Sequential(layer), batches)
    assert has_statistics_of(layer, [batches[0], batches[2]])
