"""The average is right to the bit on every layout, costs what it says, and never communicates in `update`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile

from dist_swa import EMA, Equal, Polynomial, ShardedAverage, Window
from dist_swa.averaging.rules import Rule
from models import WRAPPERS, Net, build, every_wrapper, group_of, live_bytes, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks
from reference import closed_form, weighted_sum

RULES: tuple[Rule, ...] = (Equal(), EMA(decay=0.7), EMA(decay=0.99, warmup=True), Polynomial(3.0), Window(3))
NUM_MODELS = 7


class Scalar(nn.Module):
    """What FSDP2 cannot shard: 0-dim, transposed, bf16 and empty parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.zero_dim = nn.Parameter(torch.tensor(1.5))
        self.transposed = nn.Parameter(torch.arange(15.0).view(3, 5).t())
        self.in_half = nn.Parameter(torch.ones(5, 3, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.ones(0, 3))


def averages_of(model: nn.Module, unwrapped: nn.Module, rule: Rule, group: Any = None) -> dict[str, Tensor]:
    average = ShardedAverage(model, rule, process_group=group)
    for values in trajectory(NUM_MODELS, unwrapped):
        write(model, values)
        average.update()
    return average.full_state_dict()


def averages_on_rank() -> dict[str, dict[str, Tensor]]:
    found = {
        f"{wrapper}, {rule}": averages_of(wrap(build(), wrapper), build(), rule, group_of(wrapper))
        for wrapper in every_wrapper()
        for rule in RULES
    }
    for wrapper in ("plain", "group", "ddp"):
        found[f"scalar {wrapper}"] = averages_of(wrap(Scalar(), wrapper), Scalar(), Equal(), group_of(wrapper))
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_bits_do_not_depend_on_ranks_and_wrapper(num_ranks: int) -> None:
    found = run_on_ranks(averages_on_rank, num_ranks)
    for rule in RULES:
        alone = averages_of(build(), build(), rule)
        oracle = weighted_sum(closed_form(rule, NUM_MODELS), trajectory(NUM_MODELS, build()))
        ulps = 2**-24 * math.sqrt(NUM_MODELS) * 8
        assert all(torch.allclose(alone[name].double(), oracle[name], rtol=ulps, atol=ulps) for name in oracle)
        for wrapper in {key.split(",")[0] for key in found[0] if f", {rule}" in key}:
            assert same_bits(found[0][f"{wrapper}, {rule}"], alone), (wrapper, rule)
            on_others = {} if wrapper != "plain" else alone
            assert all(same_bits(rank[f"{wrapper}, {rule}"], on_others) for rank in found[1:]), (wrapper, rule)
    for wrapper in ("plain", "group", "ddp"):
        assert same_bits(found[0][f"scalar {wrapper}"], averages_of(Scalar(), Scalar(), Equal())), wrapper


def test_full_state_dict_loads_strictly_with_all_names() -> None:
    model = build()
    average = ShardedAverage(model)
    average.update()
    full = average.full_state_dict()
    assert set(full) == set(build().state_dict())
    assert full["again.weight"] is full["tied.weight"]
    build().load_state_dict(full, strict=True)
    full["one_row"].zero_()  # a copy: neither the average nor the frozen parameter of the model
    full["frozen"].zero_()
    assert average.full_state_dict()["one_row"].any()
    assert model.frozen.any()


@on_ranks(4)
def test_update_makes_no_collective() -> None:
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        average = ShardedAverage(model, EMA(0.9), process_group=group_of(wrapper))
        average.update()
        for call, is_silent in ((average.update, True), (dist.barrier, False)):  # the second: could it be heard?
            with CommDebugMode() as mode, profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
                call()
            heard = [event.name for event in profiler.events() if "c10d::" in event.name or "gloo:" in event.name]
            assert (mode.get_total_counts() == 0 and not heard) == is_silent, (wrapper, heard)


@on_ranks(4)
def test_memory_is_the_model_over_the_ranks() -> None:
    for wrapper in ("ddp", "fsdp2", "group"):
        for dtype in (torch.float32, torch.bfloat16):
            model = nn.Sequential(nn.Linear(301, 257), nn.Linear(257, 1), nn.BatchNorm1d(1)).to(dtype)
            numels = [parameter.numel() for parameter in model.parameters()]
            rows = [parameter.numel() // parameter.shape[0] for parameter in model.parameters()]
            wrapped = wrap(model, wrapper)
            before = live_bytes()
            average = ShardedAverage(wrapped, process_group=group_of(wrapper))
            taken = live_bytes() - before
            staging = 0 if dtype == torch.float32 else min(sum(numels) * 4, 4 << 20)
            assert taken <= 4 * sum(numels) / 4 + 4 * sum(rows) + staging + 1024, (wrapper, dtype, taken)
            assert taken >= (4 * sum(numels) / 4 if dist.get_rank() == 0 else 1), (wrapper, taken)
            del average


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1 << 12), (torch.bfloat16, 1 << 12)])
def test_update_allocates_nothing_that_grows(dtype: torch.dtype, limit: int) -> None:
    model = nn.Linear(2048, 1024).to(dtype)  # 8 MiB in fp32: more than is staged at a time
    average = ShardedAverage(model, EMA(0.9))
    average.update()
    average.update()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True) as profiler:
        average.update()
    allocated = [event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0]
    assert sum(allocated) < limit, allocated


def test_average_is_fp32_whatever_the_model_is() -> None:
    model = nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    moving = ShardedAverage(model, EMA(0.999))
    stuck = ShardedAverage(model, EMA(0.999), dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    for average in (moving, stuck):
        average.update()
    nn.init.constant_(model.weight, 1.5)
    for _ in range(100):
        moving.update()
        stuck.update()
    expected = 1.5 - 0.5 * 0.999**100
    torch.testing.assert_close(moving.full_state_dict()["weight"], torch.full((2, 3), expected), rtol=1e-6, atol=0)
    assert stuck.full_state_dict()["weight"].eq(1).all()  # what the default protects from


def test_staged_update_has_the_bits_of_a_direct_one() -> None:
    # Larger than the staging area in one row, in many rows, and a few small ones behind each other.
    shapes = [(1, 3 << 20), (1025, 1025), (7,), (), (5, 3)]
    half = nn.ParameterList(nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes)
    full = nn.ParameterList(nn.Parameter(parameter.detach().float()) for parameter in half)
    averages = [ShardedAverage(model, EMA(0.9)) for model in (half, full)]
    for _ in range(3):
        for parameter, twin in zip(half, full, strict=True):
            parameter.data.copy_(torch.randn(parameter.shape))
            twin.data.copy_(parameter)
        for average in averages:
            average.update()
    assert same_bits(averages[0].full_state_dict(), averages[1].full_state_dict())


def test_first_model_is_copied_over_whatever_was_there() -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model, Window(2))
    for value in (float("nan"), 1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, value)
        average.update()
    assert average.full_state_dict()["weight"].eq(2.5).all()


@on_ranks(3)
def test_follows_parameters_that_were_replaced() -> None:
    for wrapper in ("plain", "ddp", "fsdp2", "tp"):
        model, unwrapped = wrap(build(), wrapper), build()
        average = ShardedAverage(model)
        first, second, third = trajectory(3, unwrapped)
        write(model, first)
        average.update()
        model.to(torch.float64)
        write(model, {name: value.double() for name, value in second.items()})
        average.update()
        if wrapper != "ddp":
            shards = {name: value.float().clone() for name, value in model.state_dict().items()}
            shards["again.weight"] = shards["tied.weight"] = nn.Parameter(shards["tied.weight"])
            model.load_state_dict(shards, assign=True)
        write(model, third)
        average.update()
        full = average.full_state_dict()
        oracle = weighted_sum([1 / 3] * 3, [first, second, third])
        assert not full or all(torch.allclose(full[name].double(), oracle[name], atol=1e-6) for name in oracle), wrapper


def test_follows_a_submodule_that_was_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    average = ShardedAverage(model, EMA(0.0))
    average.update()
    model[0] = nn.Linear(2, 2, bias=False)
    average.update()
    assert torch.equal(average.full_state_dict()["0.weight"], model.state_dict()["0.weight"])


class Remembers(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.tensor(3)

    def set_extra_state(self, state: Any) -> None:
        assert state == 3


def test_extra_state_is_there_under_every_name() -> None:
    part = Remembers(2, 2)
    model = nn.Sequential(part, part)
    average = ShardedAverage(model)
    average.update()
    full = average.full_state_dict()
    assert full.keys() == model.state_dict().keys()
    assert full["0._extra_state"] == full["1._extra_state"] == 3
    model.load_state_dict(full, strict=True)


@on_ranks(3)
def test_fsdp2_load_replaces_uneven_shards() -> None:
    model = wrap(build(), "fsdp2")
    average = ShardedAverage(model)
    average.update()
    options = StateDictOptions(full_state_dict=True)
    values: dict[str, Any] = {name: torch.zeros_like(value) for name, value in build().state_dict().items()}
    set_model_state_dict(model, values, options=options)
    average.update()
    expected = {name: value / 2 for name, value in build().named_parameters()}
    full = average.full_state_dict()
    assert not full or all(full[name].equal(value) for name, value in expected.items() if value.requires_grad)


def test_replicas_that_differ_are_refused_on_every_rank() -> None:
    for problem, message in {
        "value": r"replicas need the same names, shapes and values .* parameter='down.bias'; broadcast",
        "order": r"replicas need the same names, shapes and values .* parameter='up.weight'; broadcast",
        "name": r"replicas need the same names, shapes and values .* parameter='weight_2'; broadcast",
        "count": r"replicas need the same parameters on every rank, got num_parameters=9 to 10; build",
    }.items():
        assert all(run_on_ranks(refusal_of_replicas, 3, problem, message)), problem


def refusal_of_replicas(problem: str, message: str) -> bool:
    model = build()
    rank = dist.get_rank()
    if problem == "value" and rank == 1:
        model.down.bias.data[3] += 1e-7
    if problem == "order" and rank == 1:
        model.up.weight.data = model.up.weight.data.flip(0)
    if problem == "name":
        model.register_parameter(f"weight_{2 if rank == 0 else rank}", nn.Parameter(torch.ones(1)))
    if problem == "count" and rank == 2:
        model.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=message if problem != "name" or rank == 0 else "replicas need"):
        ShardedAverage(model, process_group=dist.group.WORLD)
    return True


@on_ranks(2)
def test_models_that_cannot_be_averaged() -> None:
    partial = nn.Linear(2, 2)
    mesh = init_device_mesh("cpu", (2,))
    partial.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
    for model, error, message in (
        (partial, ValueError, r"needs shards or replicas, got weight=\(Partial\(sum\),\); redistribute"),
        (nn.Linear(2, 2, device="meta"), ValueError, "needs tensors with values, got weight=meta; materialise"),
        (nn.LazyLinear(2), ValueError, "needs tensors with values, got weight=lazy; materialise"),
        (
            nn.Linear(2, 2).requires_grad_(False),
            ValueError,
            "requires a gradient and is selected .* got none among num_parameters=2, num_trainable=0; set",
        ),
        ("model", TypeError, "needs to be a torch.nn.Module, got model=str; pass"),
    ):
        with pytest.raises(error, match=message):
            ShardedAverage(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="DDP model needs no process_group, got one besides its own; leave"):
        ShardedAverage(wrap(build(), "ddp"), process_group=dist.group.WORLD)
    sharded = nn.Linear(4, 4)
    fully_shard(sharded)
    with pytest.raises(ValueError, match=r"process_group needs a model with replicated .* got sharded ones; leave"):
        ShardedAverage(sharded, process_group=dist.group.WORLD)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "ema"}, TypeError, r"needs a rule, got rule='ema'; pass Equal\(\)"),
        ({"dtype": torch.int64}, ValueError, "needs a floating dtype, got dtype=torch.int64; torch.float32"),
        ({"dtype": "float32"}, TypeError, "needs a torch.dtype, got dtype='float32'; torch.float32"),
        ({"buffers": "sum"}, ValueError, "needs to be 'copy' or 'average', got buffers='sum'; 'copy'"),
    ],
)
def test_arguments_that_make_no_average(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardedAverage(nn.Linear(2, 2), **options)


@pytest.mark.parametrize("change", ["name", "shape", "count", "trainable", "wrapped"])
def test_another_model_is_refused_with_nothing_changed(change: str) -> None:
    model: Net = build()
    average = ShardedAverage(model)
    average.update()
    slots = average.state_dict()["slots"]["0"]
    before = {name: value.clone() for name, value in slots.items()}
    if change == "name":
        model.another_row = model.one_row
        del model.one_row
    elif change == "shape":
        model.one_row.data = torch.zeros(2, 5)
    elif change == "count":
        model.one_row_more = nn.Parameter(torch.ones(1))
    elif change == "trainable":
        model.frozen.requires_grad_()
    elif change == "wrapped":
        assert all(run_on_ranks(refusal_of_late_wrapper, 2))
        return
    names = {"name": "one_row", "shape": "one_row", "count": "one_row_more", "trainable": "frozen"}
    actions: list[Callable[[], Any]] = [
        average.transfer,
        average.state_dict,
        average.full_state_dict,
        lambda: average.swapped_in().__enter__(),
    ]
    if change != "count":  # update looks at the parameters it knows; the others look at all
        actions.append(average.update)
    for action in actions:
        with pytest.raises(ValueError, match=rf"needs .* parameter='{names[change]}'; build the average"):
            action()
    assert average.num_averaged == 1
    assert same_bits(before, slots)


def refusal_of_late_wrapper() -> bool:
    model = build()
    average = ShardedAverage(model)
    average.update()
    fully_shard(model)
    for action in (average.update, average.transfer):
        with pytest.raises(ValueError, match=r"needs the parameters it was built on, .* after the model has its"):
            action()
    return True


def replace_by_assign(model: nn.Linear) -> None:
    model.load_state_dict({"weight": torch.ones(1, 2)}, assign=True)


def replace_data(model: nn.Linear) -> None:
    model.weight.data = torch.ones(1, 2)


def replace_by_conversion(model: nn.Linear) -> None:
    model.double().float()


@pytest.mark.parametrize("replace_storage", [replace_by_assign, replace_data, replace_by_conversion])
@pytest.mark.parametrize("look", ["swapped_in", "state_dict", "full_state_dict", "transfer", None])
def test_update_finds_replaced_storage_whatever_has_looked_before(
    replace_storage: Callable[[nn.Linear], None], look: str | None
) -> None:
    model = nn.Linear(2, 1, bias=False)
    average = ShardedAverage(model, Window(1))
    average.update()
    replace_storage(model)
    if look == "swapped_in":
        with average.swapped_in():
            pass
    elif look:
        getattr(average, look)()
    with torch.no_grad():
        model.weight.fill_(5.0)
    average.update()
    assert average.full_state_dict()["weight"].tolist() == [[5.0, 5.0]]
