"""Which parameters are averaged, and whether they are finite: the same on every rank, under every wrapper."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dist_swa import Equal, ShardedAverage
from models import WRAPPERS, Net, build, group_of, live_bytes, trajectory, wrap, write
from ranks import on_ranks

SELECTIONS: dict[str, tuple[Any, set[str]]] = {
    "pattern": ("down.*", {"down.weight", "down.bias"}),
    "several": (["up.weight", "*.bias"], {"up.weight", "up.bias", "down.bias", "norm.bias"}),
    "function": (lambda name: "norm" in name or "row" in name, {"norm.weight", "norm.bias", "one_row"}),
    "tied": ("again.weight", {"tied.weight", "again.weight"}),  # by any of its names
    "all": ("*", {name for name, p in Net().named_parameters(remove_duplicate=False) if p.requires_grad}),
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(1, 3)
def test_only_the_selected_parameters_are_averaged(wrapper: str, selection: str) -> None:
    parameters, names = SELECTIONS[selection]
    model, models = wrap(build(), wrapper), trajectory(3, build())
    average = ShardedAverage(model, Equal(), parameters=parameters, process_group=group_of(wrapper))
    for values in models:
        write(model, values)
        average.update()
    assert set(average.state_dict()["slots"]["0"]) == names - {"again.weight"}
    full = average.full_state_dict()
    with average.swapped_in():
        inside = ShardedAverage(model, process_group=group_of(wrapper))
        inside.update()
        swapped_in = inside.full_state_dict()
    models = [values | {"again.weight": values["tied.weight"]} for values in models]
    for name, last in models[-1].items() if full else ():
        expected = sum(values[name].double() for values in models) / 3 if name in names else last.double()
        torch.testing.assert_close(full[name].double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(swapped_in[name], full[name])


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        (3, TypeError, r"parameters needs a pattern such as 'head.\*', .* got parameters=3; leave it out"),
        (["up.*", 3], TypeError, r"parameters needs a pattern such as 'head.\*', .* got parameters=3; leave it out"),
        (
            "head.*",
            ValueError,
            r"parameters needs a pattern that a name matches, got parameters='head.\*'; as one_",
        ),
        ("frozen", ValueError, r"is selected by `parameters`, got none among num_parameters=9, num_trainable=8; set"),
        ([], ValueError, r"is selected by `parameters`, got none among num_parameters=9"),
    ],
)
def test_wrong_selections_raise(selection: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardedAverage(build(), parameters=selection)


def test_what_is_not_selected_may_be_frozen_and_unfrozen() -> None:
    model = build()
    average = ShardedAverage(model, parameters="up.*")
    average.update()
    model.frozen.requires_grad_()
    model.down.requires_grad_(False)
    average.update()
    model.up.bias.requires_grad_(False)  # stays in the average
    average.update()
    average.transfer()
    assert average.num_averaged == 3
    assert set(average.state_dict()["slots"]["0"]) == {"up.weight", "up.bias"}


@pytest.mark.parametrize("wrapper", ["plain", "group", "ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_frozen_parameters_cost_no_memory(wrapper: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 2, bias=False))
    wrapped = wrap(model, wrapper)
    before = live_bytes()
    average = ShardedAverage(wrapped, process_group=group_of(wrapper))
    assert live_bytes() - before < 4 * 64 * 2 + 1024  # the frozen ones have 8 KiB on each of two ranks
    assert set(average.state_dict()["slots"]["0"]) == {"1.weight"}


@pytest.mark.parametrize("selections", [("up.*", "down.*"), ("up.weight", "up.*")], ids=["disjoint", "subset"])
@on_ranks(2)
def test_replicas_that_select_other_parameters_raise(selections: tuple[str, str]) -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="replicas need the same names, shapes and values"):
        ShardedAverage(wrap(model, "ddp"), parameters=selections[dist.get_rank()])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(1, 3, 4)
def test_one_value_on_one_rank_makes_the_model_not_finite_on_all(wrapper: str, value: float) -> None:
    model, group = wrap(build(), wrapper), group_of(wrapper)
    average = ShardedAverage(model, process_group=group)
    assert average.is_model_finite()
    values = trajectory(1, build())[0]
    values["down.weight"] = values["down.weight"] * 1e38 / 4  # a sum of squares would overflow
    write(model, values)
    assert average.is_model_finite()
    values["down.weight"][4, 3] = value  # in the last row, which only one rank has if rows are sharded
    write(model, values)
    assert not average.is_model_finite()
    assert ShardedAverage(model, parameters="up.*", process_group=group).is_model_finite()


@on_ranks(2)
def test_a_value_that_is_not_finite_is_reported_along_every_mesh_dimension() -> None:
    """The parameter is sharded along one mesh dimension, and has a NaN on one rank of the other."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("outer", "inner"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parallelize_module(model[0], mesh["inner"], ColwiseParallel())
    fully_shard(model, mesh=mesh["outer"])
    average = ShardedAverage(model)
    if dist.get_rank() == 1:
        bias: Any = model[1].bias
        assert isinstance(bias, DTensor)
        bias.to_local().detach()[0] = math.nan
    assert not average.is_model_finite()


@pytest.mark.parametrize(
    ("wrapper", "num_calls"), [("plain", 0), ("ddp", 1), ("fsdp1", 1), ("fsdp2", 1), ("tp", 1), ("hsdp", 2)]
)
@on_ranks(2)
def test_is_model_finite_makes_one_all_reduce_per_mesh_dimension(wrapper: str, num_calls: int) -> None:
    average = ShardedAverage(wrap(build(), wrapper))
    with CommDebugMode() as mode:
        average.is_model_finite()
    counts = {str(op): count for op, count in mode.get_comm_counts().items() if count}
    assert sum(counts.values()) == num_calls
    assert all("allreduce" in op for op in counts)


@pytest.mark.parametrize("action", ["update", "transfer", "state_dict", "full_state_dict"])
@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp2", "tp"])
@on_ranks(2)
def test_a_wrapper_that_is_applied_after_the_average_raises(wrapper: str, action: str) -> None:
    model = build()
    average = ShardedAverage(model)
    average.update()
    if wrapper == "fsdp1":
        FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        wrap(model, wrapper)
    message = r"needs the parameters it was built on, got .*; build the average after the model has"
    with pytest.raises(ValueError, match=message):
        getattr(average, action)()
    assert average.num_averaged == 1


@on_ranks(2)
def test_ddp_may_be_applied_after_the_average() -> None:
    model = build()
    average = ShardedAverage(model)
    average.update()
    wrapped = wrap(model, "ddp")
    write(wrapped, trajectory(1, build())[0])
    average.update()
    expected = (build().down.weight + model.down.weight) / 2
    torch.testing.assert_close(average.full_state_dict()["down.weight"], expected.detach())
