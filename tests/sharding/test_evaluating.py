"""Evaluations that leave FSDP1, FSDP2 or DDP in an unusual state: the training after them has the same bits."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_swa import ShardedAverage, Window
from models import Stop, local_tensor
from ranks import on_ranks

DATA = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        raise Stop


class Net(nn.Module):
    """Skips its head in evaluation; raises in the forward or the backward if `fails` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.offset = nn.Buffer(torch.zeros(4))
        self.fails = ""

    def forward(self, given: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.body(given))
        hidden = hidden - self.offset.to(hidden.dtype)
        if self.training:
            self.offset.lerp_(hidden.detach().mean(0).float(), 0.1)
        if self.fails == "forward":
            raise Stop
        if self.fails == "backward":
            apply: Any = FailingBackward.apply
            hidden = apply(hidden)
        hidden = self.norm(hidden)
        return self.head(hidden) if self.training else hidden


def fsdp1(**options: Any) -> nn.Module:
    net = Net()
    options |= {"device_id": torch.device("cpu"), "use_orig_params": True}
    net.head = FullyShardedDataParallel(net.head, **options)  # type: ignore[assignment]
    return FullyShardedDataParallel(net, **options)


def fsdp1_unsharded_bf16() -> nn.Module:
    return fsdp1(
        sharding_strategy=ShardingStrategy.NO_SHARD, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)
    )


def fsdp2() -> nn.Module:
    net = Net()
    head = fully_shard(net.head)
    fully_shard(net).set_modules_to_forward_prefetch([head])
    return net


def fsdp2_in_groups() -> nn.Module:
    net = Net()
    fully_shard([net.norm, net.head], reshard_after_forward=False)  # like torchtitan
    fully_shard(net)
    return net


def ddp_inside() -> nn.Module:
    net = Net()
    return nn.Sequential(DistributedDataParallel(net), nn.Identity())


def net_in(model: nn.Module) -> Net:
    return next(module for module in model.modules() if isinstance(module, Net))


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(DATA)


def evaluate_the_norm(model: nn.Module) -> None:
    with torch.no_grad():
        net_in(model).norm(DATA)


def fail_in_a_forward(model: nn.Module) -> None:
    net_in(model).fails = "forward"
    evaluate(model)


def fail_in_a_backward(model: nn.Module) -> None:
    net_in(model).fails = "backward"
    model(DATA).sum().backward()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None]]] = {
    "FSDP1, an all-gather that is not used": (lambda: fsdp1(forward_prefetch=True), evaluate),
    "FSDP1, a forward that raises in bfloat16": (fsdp1_unsharded_bf16, fail_in_a_forward),
    "FSDP2, an all-gather that is not used": (fsdp2, evaluate),
    "FSDP2, a forward that raises before an all-gather is used": (fsdp2, fail_in_a_forward),
    "FSDP2, a backward that raises": (fsdp2, fail_in_a_backward),
    "FSDP2, a part of a group": (fsdp2_in_groups, evaluate_the_norm),
    "FSDP2, a backward of groups that raises": (fsdp2_in_groups, fail_in_a_backward),
    "DDP inside of a module": (ddp_inside, evaluate),
}


def bits_of_a_run(case: str, evaluates: bool) -> list[Tensor]:
    """Return losses, weights and the average of a training run, with an evaluation after every step, or without."""
    build, evaluation = CASES[case]
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = ShardedAverage(model, Window(2))
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        loss = (model.train()(DATA + step + dist.get_rank()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        average.update()
        losses.append(loss.detach())
        if evaluates:
            with contextlib.suppress(Stop), average.swapped_in():
                evaluation(model)
            net_in(model).fails = ""
    averages = average.state_dict()["slots"]["0"].values()
    return [*losses, *(local_tensor(tensor).clone() for tensor in (*averages, *model.parameters(), *model.buffers()))]


@pytest.mark.parametrize("case", CASES)
@on_ranks(2)
def test_training_after_an_evaluation_has_the_same_bits(case: str) -> None:
    found, expected = bits_of_a_run(case, evaluates=True), bits_of_a_run(case, evaluates=False)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def assigning_step(model: nn.Module) -> None:
    """Step like an optimizer that gives parameters new storage; FSDP1 copies it in the next forward."""
    model(DATA).square().mean().backward()
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.shape == parameter.shape:
            parameter.data = parameter.data - 0.1 * parameter.grad
            parameter.grad = None


def weights_after_assigning_steps(strategy: ShardingStrategy, is_averaged: bool) -> Tensor:
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True, sharding_strategy=strategy
    )
    average = ShardedAverage(model, Window(1)) if is_averaged else None
    for _ in range(3):
        assigning_step(model)
        if average:
            average.update()
    averaged = average.full_state_dict() if average else {}
    with FullyShardedDataParallel.summon_full_params(model):
        weight = next(model.parameters()).detach().clone()
    assert not averaged or torch.equal(averaged["weight"], weight)
    return weight


@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD])
@on_ranks(2)
def test_fsdp1_keeps_weights_that_were_assigned(strategy: ShardingStrategy) -> None:
    expected = weights_after_assigning_steps(strategy, is_averaged=False)
    assert torch.equal(weights_after_assigning_steps(strategy, is_averaged=True), expected)


@on_ranks(2)
def test_updates_do_not_fill_the_queue_of_fsdp1s_rate_limiter() -> None:
    model = fsdp1()
    average = ShardedAverage(model)
    lengths = []
    for _ in range(3):
        model(DATA).sum().backward()
        average.update()
        queue: Any = model._free_event_queue
        lengths.append(len(queue._queue))
    assert lengths[1] == lengths[2]


class Shared(nn.Module):
    """One layer under two names, such as the shared embeddings of an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
        self.block = nn.Sequential(self.first, nn.Linear(4, 4))

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.block(self.first(given))
        return out


@on_ranks(2)
def test_a_module_that_fsdp1_wraps_once_has_all_its_names() -> None:
    warnings.filterwarnings("ignore", "FlatParameter is being traversed more than once")
    model = FullyShardedDataParallel(Shared(), device_id=torch.device("cpu"))
    average = ShardedAverage(model, Window(1))
    model(DATA).sum().backward()
    average.update()
    names = [f"{module}.{key}" for module in ("first", "block.0", "block.1") for key in ("weight", "bias")]
    full = average.full_state_dict()
    assert sorted(full) == (sorted(names) if dist.get_rank() == 0 else [])
    assert not full or torch.equal(full["first.weight"], full["block.0.weight"])


@on_ranks(2)
def test_the_next_forward_does_not_wait_for_an_event_from_before_swapped_in() -> None:
    model = nn.Linear(4, 4)
    sharded = fully_shard(model)
    average = ShardedAverage(model)
    average.update()
    sharded.set_post_optim_event(torch.Event("cpu"))
    with average.swapped_in():
        pass
    assert sharded._get_fsdp_state()._state_ctx.post_optim_event is None


@on_ranks(2)
def test_an_update_leaves_an_unfinished_all_gather_alone() -> None:
    model = nn.Linear(4, 4)
    sharded = fully_shard(model)
    average = ShardedAverage(model)
    model(DATA).sum().backward()
    handle = sharded.unshard(async_op=True)
    assert handle is not None
    average.update()
    handle.wait()
    assert not isinstance(model.weight, DTensor)


@pytest.mark.parametrize("build_model", [fsdp1, fsdp2])
@on_ranks(2)
def test_an_update_inside_a_backward_raises(build_model: Callable[[], nn.Module]) -> None:
    model = build_model()
    average = ShardedAverage(model)
    out = model(DATA)
    out.register_hook(lambda _: average.update())
    with pytest.raises(RuntimeError, match="needs its backward to have ended, got a call inside of it; call it"):
        out.sum().backward()
    average.update()
