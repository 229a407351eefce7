"""Looking never changes the run: after a swap, parameters, buffers, random state and further steps are the same."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dist_swa import EMA, SWA, ShardedAverage, recalibrate_batch_norm
from models import FSDP1_STRATEGIES, WRAPPERS, Net, build, group_of, same_bits, train, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks

DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(5))


class Stop(Exception):
    """Raised by a look."""


def look_at_nothing(model: nn.Module, average: ShardedAverage) -> None:
    """Leave all as it is."""


def look_twice(model: nn.Module, average: ShardedAverage) -> None:
    for _ in range(2):
        with average.swapped_in(), torch.no_grad():
            model.eval()(DATA)


def look_after_a_forward(model: nn.Module, average: ShardedAverage) -> None:
    model.eval()
    with torch.no_grad():  # FSDP2's root stays unsharded; DDP's own forward would broadcast buffers
        (model.module if isinstance(model, DistributedDataParallel) else model)(DATA)
    look_twice(model, average)


def look_in_training_mode(model: nn.Module, average: ShardedAverage) -> None:
    with average.swapped_in():
        model.train()(DATA).sum().backward()  # writes running statistics, draws for dropout
        torch.rand(3)


def look_and_recalibrate(model: nn.Module, average: ShardedAverage) -> None:
    with average.swapped_in():
        recalibrate_batch_norm(model, DataLoader(DATA, batch_size=4, shuffle=True))  # type: ignore[arg-type]


def look_and_export(model: nn.Module, average: ShardedAverage) -> None:
    outside = average.full_state_dict()
    with average.swapped_in():
        assert same_bits(outside, average.full_state_dict())
        with torch.no_grad():
            model.eval()(DATA)
        assert same_bits(outside, average.full_state_dict())
    average.state_dict()


def look_and_fail(model: nn.Module, average: ShardedAverage) -> None:
    with pytest.raises(Stop), average.swapped_in():
        raise Stop


def look_and_fail_inside_a_forward(model: nn.Module, average: ShardedAverage) -> None:
    def fail(*_: Any) -> None:
        raise Stop

    for part in ("down", "up"):
        module = next(module for name, module in model.named_modules() if name.endswith(part))
        handle = module.register_forward_pre_hook(fail, prepend=True)  # before the gathered weights are waited for
        with pytest.raises(Stop), average.swapped_in():
            model.eval()(DATA)
        handle.remove()


def look_with_another_buffer(model: nn.Module, average: ShardedAverage) -> None:
    net = next(module for module in model.modules() if isinstance(module, Net))
    cache = net.cache
    with average.swapped_in():
        net.cache = nn.Buffer(torch.ones(9), persistent=False)
    assert net.cache is cache
    with average.swapped_in():
        assert net.cache.shape == cache.shape


LOOKS: list[Callable[[nn.Module, ShardedAverage], None]] = [
    look_twice,
    look_after_a_forward,
    look_in_training_mode,
    look_and_recalibrate,
    look_and_export,
    look_and_fail,
    look_and_fail_inside_a_forward,
    look_with_another_buffer,
]


def run(wrapper: str, look: Callable[[nn.Module, ShardedAverage], None]) -> dict[str, Tensor]:
    """Train, look, train on; return all bits of the run on this rank."""
    torch.manual_seed(dist.get_rank())
    model = wrap(build(), wrapper)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = ShardedAverage(model, EMA(0.9), process_group=group_of(wrapper))
    for step in range(3):
        train(model, optimizer, 1, first=step)
        average.update()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    look(model, average)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    train(model, optimizer, 10, first=3)
    average.update()
    bits = {f"model {name}": value for name, value in model.state_dict().items()}
    bits |= {f"momentum {i}": state["momentum_buffer"] for i, state in enumerate(optimizer.state.values())}
    bits |= {f"average {name}": value for name, value in average.state_dict()["slots"]["0"].items()}
    bits["random state"] = torch.get_rng_state()
    return {name: local(value).clone() for name, value in bits.items()}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def differences(wrapper: str) -> list[str]:
    undisturbed = run(wrapper, look_at_nothing)
    found = []
    for look in LOOKS:
        after = run(wrapper, look)
        found += [f"{look.__name__}: {name}" for name in undisturbed if not torch.equal(after[name], undisturbed[name])]
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("wrapper", [*WRAPPERS, *sorted(set(FSDP1_STRATEGIES) - set(WRAPPERS))])
def test_looking_never_changes_the_run(wrapper: str, num_ranks: int) -> None:
    if (wrapper, num_ranks) == ("tp", 4):
        num_ranks = 3  # DTensor's own forward does not split 6 features in 4
    assert run_on_ranks(differences, num_ranks, wrapper) == [[]] * num_ranks


def gradients(wrapper: str, look: Callable[[nn.Module, ShardedAverage], None]) -> list[Tensor]:
    """Return what two backward passes accumulate, the first one not synchronized, with a look between them."""
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
            look(model, average)
    return [local(p.grad).clone() for p in model.parameters() if p.grad is not None]


@on_ranks(4)
def test_looking_keeps_gradients_that_accumulate() -> None:
    found_other = []
    for wrapper in sorted(set(WRAPPERS) - {"tp"}):  # its own forward does not split 6 features in 4
        expected = gradients(wrapper, look_at_nothing)
        for look in (look_twice, look_and_fail, look_and_fail_inside_a_forward):
            found = gradients(wrapper, look)
            if not all(torch.equal(*pair) for pair in zip(found, expected, strict=True)):
                found_other.append((wrapper, look.__name__))
    assert not found_other


@on_ranks(2, 3)
def test_model_carries_the_average_inside() -> None:
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        average = ShardedAverage(model, process_group=group_of(wrapper))
        with torch.no_grad():
            model.eval()(DATA)
        for values in trajectory(3, build()):
            write(model, values)
            average.update()
        full = average.full_state_dict()
        alone = build().eval()
        if full:
            alone.load_state_dict(full)
        actions: tuple[Callable[[], Any], ...] = (average.swapped_in, average.transfer)
        for action in actions:
            context = action()
            if context is not None:
                context.__enter__()
            with torch.no_grad():
                out = model.eval()(DATA)
            if full:
                torch.testing.assert_close(out, alone(DATA), rtol=1e-4, atol=1e-5)
            if context is not None:
                context.__exit__(None, None, None)
                with torch.no_grad():
                    out = model.eval()(DATA)
                assert not full or not torch.allclose(out, alone(DATA), rtol=1e-3), wrapper


def test_swap_inside_autocast_forgets_cast_weights() -> None:
    model = nn.Linear(4, 4)
    average = ShardedAverage(model)
    average.update()
    expected = model(DATA.bfloat16().float()).bfloat16()
    with torch.no_grad():
        model.weight.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(DATA)  # keeps the cast of the zeros
        with average.swapped_in():
            averaged = model(DATA)
        again = model(DATA)
    torch.testing.assert_close(averaged, expected, rtol=0.05, atol=0.05)
    assert torch.equal(trained, again)


def mean(norm: nn.BatchNorm1d) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def test_buffers_belong_to_a_side() -> None:
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
    assert torch.equal(average.full_state_dict()["1.running_mean"], recalibrated)  # never aliased


@on_ranks(2)
def test_one_ranks_error_hangs_nobody() -> None:
    for wrapper in ("ddp", "fsdp2", "group"):
        model = wrap(build(), wrapper)
        average = ShardedAverage(model, process_group=group_of(wrapper))
        average.update()
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            with average.swapped_in():
                if dist.get_rank() == 1:
                    raise Stop
        except Stop:
            pass
        assert same_local_bits(trained, model.state_dict())


def same_local_bits(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(local(left[name]), local(right[name])) for name in left)


def test_calls_in_a_wrong_order() -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model)
    action: Callable[[], Any]
    for action in (average.swapped_in().__enter__, average.transfer, average.full_state_dict):
        with pytest.raises(RuntimeError, match=r"needs an average, got num_averaged=0; call update first"):
            action()
    average.update()
    with average.swapped_in():
        for action in (
            average.update,
            average.transfer,
            average.state_dict,
            lambda: average.load_state_dict({}),
            average.swapped_in().__enter__,
        ):
            with pytest.raises(RuntimeError, match=r"needs the model .* got a call inside swapped_in; leave it first"):
                action()
    assert average.num_averaged == 1


class Caches(nn.Module):
    """Buffers that come, grow, go, and cannot be written."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.mask: Tensor | None
        self.table: Tensor | None
        self.register_buffer("mask", None)
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("ones", torch.ones(1).expand(3))


@pytest.mark.parametrize("inside", [True, False])
def test_buffers_that_come_grow_and_go(inside: bool) -> None:
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
        if inside:
            before = dict(model._buffers)
            with average.swapped_in():
                assert model.steps == 0
                setattr(model, name, buffer)
            assert all(model._buffers[key] is value for key, value in before.items())
        else:
            setattr(model, name, buffer)
            with average.swapped_in():
                assert model.steps == 0
        assert model.steps == 5
    average.update()
    average.transfer()
    full = average.full_state_dict()
    assert set(full) == set(model.state_dict())
    model.load_state_dict({name: value.clone() for name, value in full.items() if name != "ones"}, strict=False)


def test_update_takes_buffers_that_come_and_forgets_those_that_go() -> None:
    model = Caches()
    average = ShardedAverage(model)
    for mask in (None, torch.ones(4), torch.ones(6), None):
        model.mask = mask
        average.update()
        assert set(average.state_dict()["buffers"]) == {"table", "steps", "ones"} | (
            {"mask"} if mask is not None else set()
        )
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


def errors_of_one_rank(case: str) -> str:
    rank = dist.get_rank()
    model = wrap(build(), "ddp" if case != "meta" else "group")
    if case == "meta" and rank == 1:
        model.to("meta")
    try:
        average = ShardedAverage(model, process_group=group_of("group") if case == "meta" else None)
        if case == "other model" and rank == 1:
            model.get_submodule("module").register_parameter("extra", nn.Parameter(torch.ones(1)))
        average.update()
        if case == "other model":
            average.transfer()
        swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
        swa.step()
        swa.finalize([DATA] if rank == 0 else None)
    except Exception as error:
        return type(error).__name__
    return "none"


@pytest.mark.parametrize(
    ("case", "on_rank_0"), [("meta", "ValueError"), ("other model", "ValueError"), ("no batches", "RuntimeError")]
)
def test_an_error_on_one_rank_raises_on_all(case: str, on_rank_0: str) -> None:
    assert run_on_ranks(errors_of_one_rank, 2, case, timeout_s=20.0) == [on_rank_0, "ValueError"]
