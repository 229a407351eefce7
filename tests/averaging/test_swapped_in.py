"""Evaluating with swapped-in weights never changes parameters, buffers, random state and the next training steps."""

import contextlib
import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dist_swa import EMA, SWA, ShardedAverage, recalibrate_batch_norm
from models import (
    ALL_WRAPPERS,
    WRAPPERS,
    Net,
    Stop,
    build,
    group_of,
    local_tensor,
    same_bits,
    train,
    trajectory,
    wrap,
    write,
)
from ranks import on_ranks

DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(5))


def do_nothing(model: nn.Module, average: ShardedAverage) -> None:
    """The reference: training that never swaps."""


def evaluate_twice(model: nn.Module, average: ShardedAverage) -> None:
    for _ in range(2):
        with average.swapped_in(), torch.no_grad():
            model.eval()(DATA)


def evaluate_after_a_forward(model: nn.Module, average: ShardedAverage) -> None:
    model.eval()
    with torch.no_grad():  # FSDP2's root stays unsharded; DDP's own forward would broadcast buffers
        (model.module if isinstance(model, DistributedDataParallel) else model)(DATA)
    evaluate_twice(model, average)


def forward_and_backward_in_training_mode(model: nn.Module, average: ShardedAverage) -> None:
    with average.swapped_in():
        model.train()(DATA).sum().backward()  # writes running statistics, draws for dropout
        torch.rand(3)


def recalibrate(model: nn.Module, average: ShardedAverage) -> None:
    with average.swapped_in():
        recalibrate_batch_norm(model, DataLoader(DATA, batch_size=4, shuffle=True))  # type: ignore[arg-type]


def export(model: nn.Module, average: ShardedAverage) -> None:
    outside = average.full_state_dict()
    with average.swapped_in():
        assert same_bits(outside, average.full_state_dict())
        with torch.no_grad():
            model.eval()(DATA)
        assert same_bits(outside, average.full_state_dict())
    average.state_dict()


def raise_before_a_forward(model: nn.Module, average: ShardedAverage) -> None:
    with pytest.raises(Stop), average.swapped_in():
        raise Stop


def raise_inside_a_forward(model: nn.Module, average: ShardedAverage) -> None:
    def fail(*_: Any) -> None:
        raise Stop

    for part in ("down", "up"):
        module = next(module for name, module in model.named_modules() if name.endswith(part))
        handle = module.register_forward_pre_hook(fail, prepend=True)  # before FSDP waits for the all-gather
        with pytest.raises(Stop), average.swapped_in():
            model.eval()(DATA)
        handle.remove()


def replace_a_buffer(model: nn.Module, average: ShardedAverage) -> None:
    net = next(module for module in model.modules() if isinstance(module, Net))
    cache = net.cache
    with average.swapped_in():
        net.cache = nn.Buffer(torch.ones(9), persistent=False)
    assert net.cache is cache
    with average.swapped_in():
        assert net.cache.shape == cache.shape


Use = Callable[[nn.Module, ShardedAverage], None]
USES: list[Use] = [
    evaluate_twice,
    evaluate_after_a_forward,
    forward_and_backward_in_training_mode,
    recalibrate,
    export,
    raise_before_a_forward,
    raise_inside_a_forward,
    replace_a_buffer,
]


def bits_of_a_run(wrapper: str, use: Use) -> dict[str, Tensor]:
    """Train, use the average, train on; return all bits of the run on this rank."""
    torch.manual_seed(dist.get_rank())
    model = wrap(build(), wrapper)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = ShardedAverage(model, EMA(0.9), process_group=group_of(wrapper))
    for step in range(3):
        train(model, optimizer, 1, first=step)
        average.update()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    use(model, average)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    train(model, optimizer, 5, first=3)
    average.update()
    bits = {f"model {name}": value for name, value in model.state_dict().items()}
    bits |= {f"momentum {i}": state["momentum_buffer"] for i, state in enumerate(optimizer.state.values())}
    bits |= {f"average {name}": value for name, value in average.state_dict()["slots"]["0"].items()}
    bits["random state"] = torch.get_rng_state()
    return {name: local_tensor(value).clone() for name, value in bits.items()}


@functools.cache  # the ids of a test share the processes of their ranks
def bits_without_use(wrapper: str) -> dict[str, Tensor]:
    return bits_of_a_run(wrapper, do_nothing)


def assert_never_changes_the_run(wrapper: str, use: Use) -> None:
    found, expected = bits_of_a_run(wrapper, use), bits_without_use(wrapper)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


NO_TP = [wrapper for wrapper in ALL_WRAPPERS if wrapper != "tp"]  # DTensor does not split 6 features over 4 ranks


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wrapper", NO_TP)
@on_ranks(2, 4)
def test_evaluating_never_changes_the_run(wrapper: str, use: Use) -> None:
    assert_never_changes_the_run(wrapper, use)


@pytest.mark.parametrize("use", USES)
@on_ranks(2, 3)
def test_evaluating_never_changes_the_run_under_tensor_parallelism(use: Use) -> None:
    assert_never_changes_the_run("tp", use)


def accumulated_gradients(wrapper: str, use: Use) -> list[Tensor]:
    """Accumulate over two backward passes, the first one without synchronization, and use the average between them."""
    torch.manual_seed(dist.get_rank())
    model = wrap(build(), wrapper)
    average = ShardedAverage(model, process_group=group_of(wrapper))
    average.update()
    for is_last in (False, True):
        with ExitStack() as stack:
            if isinstance(model, FSDPModule) and wrapper == "hsdp":
                model.set_requires_all_reduce(is_last)
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(is_last)
            elif not is_last and isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
                stack.enter_context(model.no_sync())
            model.train()(DATA + dist.get_rank() + is_last).square().mean().backward()
        if not is_last:
            use(model, average)
    return [local_tensor(p.grad).clone() for p in model.parameters() if p.grad is not None]


@functools.cache
def gradients_without_use(wrapper: str) -> list[Tensor]:
    return accumulated_gradients(wrapper, do_nothing)


@pytest.mark.parametrize("use", [evaluate_twice, raise_before_a_forward, raise_inside_a_forward])
@pytest.mark.parametrize("wrapper", [wrapper for wrapper in WRAPPERS if wrapper != "tp"])
@on_ranks(4)
def test_evaluating_keeps_accumulated_gradients(wrapper: str, use: Use) -> None:
    found, expected = accumulated_gradients(wrapper, use), gradients_without_use(wrapper)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(DATA)
    return out


def trained_on_a_trajectory(wrapper: str) -> tuple[nn.Module, ShardedAverage, Tensor | None]:
    """Return a model, its average, and what an unwrapped model with the averaged weights returns, on the first rank."""
    model = wrap(build(), wrapper)
    average = ShardedAverage(model, process_group=group_of(wrapper))
    outputs(model)
    for values in trajectory(3, build()):
        write(model, values)
        average.update()
    full, alone = average.full_state_dict(), build()
    if not full:
        return model, average, None
    alone.load_state_dict(full)
    return model, average, outputs(alone)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(2, 3)
def test_the_model_has_the_average_inside_swapped_in_alone(wrapper: str) -> None:
    model, average, expected = trained_on_a_trajectory(wrapper)
    with average.swapped_in():
        inside = outputs(model)
    outside = outputs(model)
    if expected is not None:
        torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outside, expected, rtol=1e-3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(2, 3)
def test_the_model_has_the_average_after_transfer(wrapper: str) -> None:
    model, average, expected = trained_on_a_trajectory(wrapper)
    average.transfer()
    after = outputs(model)
    if expected is not None:
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_swapped_in_clears_the_weights_that_autocast_has_cached() -> None:
    model = nn.Linear(4, 4)
    average = ShardedAverage(model)
    average.update()
    expected = model(DATA.bfloat16().float()).bfloat16()
    with torch.no_grad():
        model.weight.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(DATA)  # caches the cast of the zeros
        with average.swapped_in():
            averaged = model(DATA)
        again = model(DATA)
    torch.testing.assert_close(averaged, expected, rtol=0.05, atol=0.05)
    assert torch.equal(trained, again)


def mean(norm: nn.BatchNorm1d) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def test_buffers_that_are_written_inside_swapped_in_stay_with_the_average() -> None:
    linear, norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
    model = nn.Sequential(linear, norm)
    average = ShardedAverage(model)
    average.update()
    with torch.no_grad():
        linear.weight.zero_()
        mean(norm).fill_(7)
    with average.swapped_in():
        assert mean(norm).eq(0).all()
        recalibrate_batch_norm(model, [DATA])
        recalibrated = mean(norm).clone()
        assert torch.equal(average.full_state_dict()["1.running_mean"], recalibrated)
    assert mean(norm).eq(7).all()
    assert torch.equal(average.full_state_dict()["1.running_mean"], recalibrated)
    assert torch.equal(average.state_dict()["buffers"]["1.running_mean"], recalibrated)
    average.transfer()
    assert torch.equal(mean(norm), recalibrated)
    average.update()
    mean(norm).fill_(3)
    assert torch.equal(average.full_state_dict()["1.running_mean"], recalibrated)  # a copy


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "group"])
@on_ranks(2)
def test_an_error_of_one_rank_inside_swapped_in_does_not_hang(wrapper: str) -> None:
    model = wrap(build(), wrapper)
    average = ShardedAverage(model, process_group=group_of(wrapper))
    average.update()
    trained = {name: local_tensor(value).clone() for name, value in model.state_dict().items()}
    with contextlib.suppress(Stop), average.swapped_in():
        if dist.get_rank() == 1:
            raise Stop
    assert same_bits(trained, {name: local_tensor(value) for name, value in model.state_dict().items()})


@pytest.mark.parametrize("action", ["swapped_in", "transfer", "full_state_dict"])
def test_what_needs_an_average_raises_before_the_first_update(action: str) -> None:
    average = ShardedAverage(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"needs an average, got num_averaged=0; call update first"):
        actions_of(average)[action]()


@pytest.mark.parametrize("action", ["update", "transfer", "state_dict", "load_state_dict", "swapped_in"])
def test_what_needs_the_trained_weights_raises_inside_swapped_in(action: str) -> None:
    average = ShardedAverage(nn.Linear(2, 2))
    average.update()
    with (
        average.swapped_in(),
        pytest.raises(RuntimeError, match=r"needs the model .* got a call inside swapped_in; leave it first"),
    ):
        actions_of(average)[action]()
    assert average.num_averaged == 1


def actions_of(average: ShardedAverage) -> dict[str, Callable[[], Any]]:
    return {
        "update": average.update,
        "transfer": average.transfer,
        "state_dict": average.state_dict,
        "full_state_dict": average.full_state_dict,
        "load_state_dict": lambda: average.load_state_dict({}),
        "swapped_in": lambda: average.swapped_in().__enter__(),
    }


class Caches(nn.Module):
    """Buffers that may be None, change their shape, and cannot be written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.mask: Tensor | None
        self.table: Tensor | None
        self.register_buffer("mask", None)
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("ones", torch.ones(1).expand(3))


@pytest.mark.parametrize("is_inside", [True, False])
def test_buffers_may_be_replaced_and_removed(is_inside: bool) -> None:
    model = Caches()
    average = ShardedAverage(model)
    average.update()
    model.steps.fill_(5)  # type: ignore[operator]
    changes: tuple[tuple[str, Tensor | None], ...] = (
        ("mask", torch.ones(4)),
        ("mask", torch.ones(6)),
        ("table", None),
        ("mask", None),
        ("table", torch.zeros(3)),
    )
    for name, buffer in changes:
        if not is_inside:
            setattr(model, name, buffer)
        before = dict(model._buffers)
        with average.swapped_in():
            assert model.steps == 0
            if is_inside:
                setattr(model, name, buffer)
        assert all(model._buffers[key] is value for key, value in before.items())
        assert model.steps == 5
    average.update()
    average.transfer()
    full = average.full_state_dict()
    assert set(full) == set(model.state_dict())
    model.load_state_dict({name: value.clone() for name, value in full.items() if name != "ones"}, strict=False)


def test_update_copies_the_buffers_that_the_model_has_now() -> None:
    model = Caches()
    average = ShardedAverage(model)
    for mask in (None, torch.ones(4), torch.ones(6), None):
        model.mask = mask
        average.update()
        expected = {"table", "steps", "ones"} | ({"mask"} if mask is not None else set())
        assert set(average.state_dict()["buffers"]) == expected
    assert average.num_averaged == 4


def test_finalize_keeps_statistics_with_the_average() -> None:
    norm = nn.BatchNorm1d(4)
    swa = SWA(norm, swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    swa.finalize([DATA])
    assert mean(norm).any()
    assert torch.equal(swa.average.full_state_dict()["running_mean"], mean(norm))


class Failing:
    def __iter__(self) -> Any:
        raise Stop


@pytest.mark.parametrize(
    ("batches", "options", "error"),
    [([], {}, ValueError), (Failing(), {}, Stop), ([DATA], {"max_batch": 3}, TypeError), (None, {}, ValueError)],
)
def test_finalize_that_fails_changes_nothing(batches: Any, options: dict[str, Any], error: type[Exception]) -> None:
    norm = nn.BatchNorm1d(4)
    swa = SWA(norm, swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    nn.init.constant_(norm.weight, 3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises(error):
        swa.finalize(batches, **options)
    assert same_bits(dict(norm.state_dict()), before)
    assert not swa.completed
    swa.finalize([DATA])
    assert swa.completed


def build_on_meta() -> None:
    model = build().to("meta" if dist.get_rank() == 1 else "cpu")
    ShardedAverage(model, process_group=dist.group.WORLD)


def transfer_into_a_changed_model() -> None:
    model = wrap(build(), "ddp")
    average = ShardedAverage(model)
    average.update()
    if dist.get_rank() == 1:
        model.get_submodule("module").register_parameter("extra", nn.Parameter(torch.ones(1)))
    average.transfer()


def finalize_without_batches() -> None:
    swa = SWA(wrap(build(), "ddp"), swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    swa.finalize([DATA] if dist.get_rank() == 0 else None)


ERRORS_OF_RANK_1: dict[Callable[[], None], str] = {
    build_on_meta: "needs tensors with values, got one_row=meta",
    transfer_into_a_changed_model: "needs the parameters it was built on, .* parameter='extra'",
    finalize_without_batches: "needs batches|needs every rank, got an error on another one",
}


@pytest.mark.parametrize("action", ERRORS_OF_RANK_1)
@on_ranks(2, timeout_s=20.0)
def test_an_error_on_one_rank_raises_on_all(action: Callable[[], None]) -> None:
    with pytest.raises((ValueError, RuntimeError), match=ERRORS_OF_RANK_1[action]):
        action()


INPUTS = (torch.ones(1, 2),)
TAKEN: dict[str, Callable[[nn.Module], Any]] = {
    "state_dict": lambda model: model.state_dict(),
    "torch.export": lambda model: torch.export.export(model, INPUTS),
    "jit.trace": lambda model: torch.jit.trace(model, INPUTS),
}


@pytest.mark.parametrize("take", TAKEN)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`isinstance.treespec:FutureWarning")
def test_what_is_taken_inside_has_the_average_afterwards_if_it_is_copied(take: str) -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        average.update()
    with average.swapped_in():
        reference = TAKEN[take](model)
        copied = copy.deepcopy(reference)
    values = [one if isinstance(one, dict) else dict(one.named_parameters()) for one in (reference, copied)]
    assert [state["weight"].mean().item() for state in values] == [2.0, 1.5]
