"""The average has the same bits under every wrapper, and `update` neither communicates nor allocates."""

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
from models import ALL_WRAPPERS, WRAPPERS, Net, build, group_of, live_bytes, same_bits, trajectory, wrap, write
from ranks import on_ranks
from reference import closed_form, weighted_sum

RULES: tuple[Rule, ...] = (Equal(), EMA(decay=0.7), EMA(decay=0.99, warmup=True), Polynomial(3.0), Window(3))
NUM_MODELS = 7


class Unusual(nn.Module):
    """0-dim, transposed, bf16 and empty parameters, which FSDP2 does not shard."""

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


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_average_is_the_closed_form(rule: Rule) -> None:
    full = averages_of(build(), build(), rule)
    oracle = weighted_sum(closed_form(rule, NUM_MODELS), trajectory(NUM_MODELS, build()))
    ulps = 2**-24 * math.sqrt(NUM_MODELS) * 8
    for name, expected in oracle.items():
        torch.testing.assert_close(full[name].double(), expected, rtol=ulps, atol=ulps)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("wrapper", ALL_WRAPPERS)
@on_ranks(1, 2, 3, 4)
def test_bits_do_not_depend_on_ranks_and_wrapper(wrapper: str, rule: Rule) -> None:
    full = averages_of(wrap(build(), wrapper), build(), rule, group_of(wrapper))
    has_result = wrapper == "plain" or dist.get_rank() == 0
    assert same_bits(full, averages_of(build(), build(), rule) if has_result else {})


@pytest.mark.parametrize("wrapper", ["plain", "group", "ddp"])
@on_ranks(1, 2, 3, 4)
def test_bits_of_unusual_parameters_do_not_depend_on_ranks_and_wrapper(wrapper: str) -> None:
    full = averages_of(wrap(Unusual(), wrapper), Unusual(), Equal(), group_of(wrapper))
    has_result = wrapper == "plain" or dist.get_rank() == 0
    assert same_bits(full, averages_of(Unusual(), Unusual(), Equal()) if has_result else {})


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


def collectives_in(call: Callable[[], Any]) -> list[str]:
    """Return the names of all collectives that `call` makes, including those below the dispatcher."""
    with CommDebugMode() as mode, profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        call()
    found = [event.name for event in profiler.events() if "c10d::" in event.name or "gloo:" in event.name]
    return found + [str(op) for op, count in mode.get_comm_counts().items() if count]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(4)
def test_update_makes_no_collective(wrapper: str) -> None:
    average = ShardedAverage(wrap(build(), wrapper), EMA(0.9), process_group=group_of(wrapper))
    average.update()
    assert collectives_in(average.update) == []
    assert collectives_in(dist.barrier) != []  # the check itself works


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "group"])
@on_ranks(4)
def test_memory_is_the_model_over_the_ranks(wrapper: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(301, 257), nn.Linear(257, 1), nn.BatchNorm1d(1)).to(dtype)
    numels = [parameter.numel() for parameter in model.parameters()]
    rows = [parameter.numel() // parameter.shape[0] for parameter in model.parameters()]
    wrapped = wrap(model, wrapper)
    before = live_bytes()
    average = ShardedAverage(wrapped, process_group=group_of(wrapper))
    taken = live_bytes() - before
    assert average.num_averaged == 0  # keeps the average alive
    staging = 0 if dtype == torch.float32 else min(sum(numels) * 4, 4 << 20)
    assert taken <= 4 * sum(numels) / 4 + 4 * sum(rows) + staging + 1024
    assert taken >= (4 * sum(numels) / 4 if dist.get_rank() == 0 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_allocates_nothing_that_grows_with_the_model(dtype: torch.dtype) -> None:
    model = nn.Linear(2048, 1024).to(dtype)  # 8 MiB in fp32: more than one staging buffer
    average = ShardedAverage(model, EMA(0.9))
    average.update()
    average.update()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True) as profiler:
        average.update()
    allocated = [event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0]
    assert sum(allocated) < 4096, allocated


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
    assert stuck.full_state_dict()["weight"].eq(1).all()  # each step is below half an ulp


def test_staged_update_has_the_bits_of_a_direct_one() -> None:
    # Larger than the staging buffer in one row and in many rows, and several small ones.
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


def test_a_first_model_of_nan_does_not_stay_in_a_window() -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model, Window(2))
    for value in (float("nan"), 1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, value)
        average.update()
    assert average.full_state_dict()["weight"].eq(2.5).all()


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp2", "tp"])
@on_ranks(3)
def test_update_reads_parameters_that_were_replaced(wrapper: str) -> None:
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
    assert not full or all(torch.allclose(full[name].double(), oracle[name], atol=1e-6) for name in oracle)


def test_update_reads_a_submodule_that_was_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    average = ShardedAverage(model, EMA(0.0))
    average.update()
    model[0] = nn.Linear(2, 2, bias=False)
    average.update()
    assert torch.equal(average.full_state_dict()["0.weight"], model.state_dict()["0.weight"])


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.tensor(3)

    def set_extra_state(self, state: Any) -> None:
        assert state == 3


def test_full_state_dict_has_extra_state_under_every_name() -> None:
    part = WithExtraState(2, 2)
    model = nn.Sequential(part, part)
    average = ShardedAverage(model)
    average.update()
    full = average.full_state_dict()
    assert full.keys() == model.state_dict().keys()
    assert full["0._extra_state"] == full["1._extra_state"] == 3
    model.load_state_dict(full, strict=True)


@on_ranks(3)
def test_update_reads_weights_that_were_loaded_into_uneven_fsdp2_shards() -> None:
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


REPLICAS = "replicas need the same names, shapes and values"
DIFFERING_REPLICAS = {
    "value": rf"{REPLICAS} .* parameter='down.bias'; broadcast",
    "order": rf"{REPLICAS} .* parameter='up.weight'; broadcast",
    "name": REPLICAS,
    "count": r"replicas need the same parameters on every rank, got num_parameters=9 to 10; build",
}


@pytest.mark.parametrize("difference", DIFFERING_REPLICAS)
@on_ranks(3)
def test_replicas_that_differ_raise_on_every_rank(difference: str) -> None:
    model = build()
    rank = dist.get_rank()
    if difference == "value" and rank == 1:
        model.down.bias.data[3] += 1e-7
    if difference == "order" and rank == 1:
        model.up.weight.data = model.up.weight.data.flip(0)
    if difference == "name":
        model.register_parameter(f"weight_{rank}", nn.Parameter(torch.ones(1)))
    if difference == "count" and rank == 2:
        model.extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=DIFFERING_REPLICAS[difference]) as raised:
        ShardedAverage(model, process_group=dist.group.WORLD)
    assert difference != "name" or f"parameter='weight_{rank}'" in str(raised.value)


def with_partial_weight() -> nn.Module:
    model = nn.Linear(2, 2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))
    return model


def sharded() -> nn.Module:
    model = nn.Linear(4, 4)
    fully_shard(model)
    return model


UNFIT_MODELS: dict[str, tuple[Callable[[], Any], bool, type[Exception], str]] = {
    "partial": (
        with_partial_weight,
        False,
        ValueError,
        r"needs shards or replicas, got weight=\(Partial\(sum\),\); redistribute",
    ),
    "meta": (
        lambda: nn.Linear(2, 2, device="meta"),
        False,
        ValueError,
        "needs tensors with values, got weight=meta; materialise",
    ),
    "lazy": (lambda: nn.LazyLinear(2), False, ValueError, "needs tensors with values, got weight=lazy; materialise"),
    "frozen": (
        lambda: nn.Linear(2, 2).requires_grad_(False),
        False,
        ValueError,
        "requires a gradient and is selected .* got none among num_parameters=2, num_trainable=0; set",
    ),
    "no module": (lambda: "model", False, TypeError, "needs to be a torch.nn.Module, got model=str; pass"),
    "DDP with a group": (
        lambda: wrap(build(), "ddp"),
        True,
        ValueError,
        "DDP model needs no process_group, got one besides its own; leave",
    ),
    "FSDP2 with a group": (
        sharded,
        True,
        ValueError,
        r"process_group needs a model with replicated .* got sharded ones; leave",
    ),
}


@pytest.mark.parametrize("case", UNFIT_MODELS)
@on_ranks(2)
def test_models_that_cannot_be_averaged_raise(case: str) -> None:
    build_model, has_group, error, message = UNFIT_MODELS[case]
    with pytest.raises(error, match=message):
        ShardedAverage(build_model(), process_group=dist.group.WORLD if has_group else None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "ema"}, TypeError, r"needs a rule, got rule='ema'; pass Equal\(\)"),
        ({"dtype": torch.int64}, ValueError, "needs a floating dtype, got dtype=torch.int64; torch.float32"),
        ({"dtype": "float32"}, TypeError, "needs a torch.dtype, got dtype='float32'; torch.float32"),
        ({"buffers": "sum"}, ValueError, "buffers needs a pattern that a name matches, got buffers='sum'; as"),
    ],
)
def test_wrong_arguments_raise(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardedAverage(nn.Linear(2, 2), **options)


def actions_of(average: ShardedAverage) -> dict[str, Callable[[], Any]]:
    return {
        "update": average.update,
        "transfer": average.transfer,
        "state_dict": average.state_dict,
        "full_state_dict": average.full_state_dict,
        "swapped_in": lambda: average.swapped_in().__enter__(),
    }


def rename(model: Net) -> None:
    model.another_row = model.one_row
    del model.one_row


def reshape(model: Net) -> None:
    model.one_row.data = torch.zeros(2, 5)


def add(model: Net) -> None:
    model.one_row_more = nn.Parameter(torch.ones(1))


CHANGES = ((rename, "one_row"), (reshape, "one_row"), (add, "one_row_more"))
CHANGES_AND_ACTIONS = [
    (change, name, action)
    for change, name in CHANGES
    for action in ("update", "transfer", "state_dict", "full_state_dict", "swapped_in")
]


@pytest.mark.parametrize(("change", "name", "action"), CHANGES_AND_ACTIONS)
def test_a_changed_model_raises_and_leaves_the_average(change: Callable[[Net], None], name: str, action: str) -> None:
    model = build()
    average = ShardedAverage(model)
    average.update()
    slots = average.state_dict()["slots"]["0"]
    before = {name: value.clone() for name, value in slots.items()}
    change(model)
    with pytest.raises(ValueError, match=rf"needs .* parameter='{name}'; build the average"):
        actions_of(average)[action]()
    assert average.num_averaged == 1
    assert same_bits(before, slots)


def replace_by_assign(model: nn.Linear) -> None:
    model.load_state_dict({"weight": torch.ones(1, 2)}, assign=True)


def replace_data(model: nn.Linear) -> None:
    model.weight.data = torch.ones(1, 2)


def replace_by_conversion(model: nn.Linear) -> None:
    model.double().float()


@pytest.mark.parametrize("replace_storage", [replace_by_assign, replace_data, replace_by_conversion])
@pytest.mark.parametrize("between", ["swapped_in", "state_dict", "full_state_dict", "transfer", None])
def test_update_reads_replaced_storage_after_any_other_call(
    replace_storage: Callable[[nn.Linear], None], between: str | None
) -> None:
    model = nn.Linear(2, 1, bias=False)
    average = ShardedAverage(model, Window(1))
    average.update()
    replace_storage(model)
    if between == "swapped_in":
        with average.swapped_in():
            pass
    elif between:
        getattr(average, between)()
    with torch.no_grad():
        model.weight.fill_(5.0)
    average.update()
    assert average.full_state_dict()["weight"].tolist() == [[5.0, 5.0]]
