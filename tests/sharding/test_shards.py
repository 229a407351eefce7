"""Which parameters are averaged, and whether they are finite: the same answer on every rank, under every wrapper."""

import math
from collections.abc import Callable
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

SELECTIONS: list[tuple[Any, set[str]]] = [
    ("down.*", {"down.weight", "down.bias"}),
    (["up.weight", "*.bias"], {"up.weight", "up.bias", "down.bias", "norm.bias"}),
    (lambda name: "norm" in name or "row" in name, {"norm.weight", "norm.bias", "one_row"}),
    ("again.weight", {"tied.weight", "again.weight"}),  # tied: by any of its names
    ("*", {name for name, p in Net().named_parameters(remove_duplicate=False) if p.requires_grad}),
]


@on_ranks(1, 3)
def test_only_the_selected_parameters_are_averaged() -> None:
    for wrapper in WRAPPERS:
        for selection, names in SELECTIONS:
            model, unwrapped = wrap(build(), wrapper), build()
            average = ShardedAverage(model, Equal(), parameters=selection, process_group=group_of(wrapper))
            models = trajectory(3, unwrapped)
            for values in models:
                write(model, values)
                average.update()
            slots = average.state_dict()["slots"]["0"]
            assert set(slots) == names - {"again.weight"}, (wrapper, selection)
            full = average.full_state_dict()
            models = [values | {"again.weight": values["tied.weight"]} for values in models]
            for name, last in models[-1].items() if full else ():
                mean = sum(values[name].double() for values in models) / 3
                expected = mean if name in names else last.double()
                torch.testing.assert_close(full[name].double(), expected, rtol=1e-6, atol=1e-6)
            with average.swapped_in():
                inside = ShardedAverage(model, process_group=group_of(wrapper))
                inside.update()
                carried = inside.full_state_dict()
            assert all(carried[name].equal(full[name]) for name in (models[-1] if full else ())), (wrapper, selection)


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
def test_selections_of_nothing(selection: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ShardedAverage(build(), parameters=selection)


def test_what_is_not_selected_may_be_frozen_and_unfrozen() -> None:
    model = build()
    average = ShardedAverage(model, parameters="up.*")
    average.update()
    model.frozen.requires_grad_()
    model.down.requires_grad_(False)
    average.update()
    model.up.bias.requires_grad_(False)  # goes on being averaged
    average.update()
    average.transfer()
    selected_later = ShardedAverage(model, parameters=["down.*", "frozen"])
    model.down.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"needs frozen parameters to stay .* now for parameter='down.weight'; build"):
        selected_later.update()


@on_ranks(2)
def test_frozen_parameters_cost_no_memory() -> None:
    for wrapper in ("plain", "group", "ddp", "fsdp1", "fsdp2"):
        model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 2, bias=False))
        wrapped = wrap(model, wrapper)
        before = live_bytes()
        average = ShardedAverage(wrapped, process_group=group_of(wrapper))
        assert live_bytes() - before < 4 * 64 * 2 + 1024, wrapper  # the frozen ones: 8 KiB on each of two ranks
        assert set(average.state_dict()["slots"]["0"]) == {"1.weight"}


@on_ranks(2)
def test_replicas_that_select_other_parameters_are_refused() -> None:
    for selections in (("up.*", "down.*"), ("up.weight", "up.*")):  # the second: in the same order
        model = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)})
        with pytest.raises(ValueError, match="replicas need the same names, shapes and values"):
            ShardedAverage(wrap(model, "ddp"), parameters=selections[dist.get_rank()])


@on_ranks(1, 3, 4)
def test_one_value_on_one_rank_makes_the_model_not_finite_on_all() -> None:
    for wrapper in WRAPPERS:
        for value in (math.nan, math.inf, -math.inf):
            model = wrap(build(), wrapper)
            average = ShardedAverage(model, process_group=group_of(wrapper))
            assert average.is_model_finite(), wrapper
            values = trajectory(1, build())[0]
            values["down.weight"] = values["down.weight"] * 1e38 / 4  # a sum of squares would overflow
            write(model, values)
            assert average.is_model_finite(), wrapper
            values["down.weight"][4, 3] = value  # the last row: on one rank alone, where rows are sharded
            write(model, values)
            assert not average.is_model_finite(), (wrapper, value)
            frozen_only = ShardedAverage(model, parameters="up.*", process_group=group_of(wrapper))
            assert frozen_only.is_model_finite(), wrapper


@on_ranks(2)
def test_a_replica_in_tensor_parallelism_is_heard_on_every_axis() -> None:
    """A parameter that is sharded on one axis only, and bad on one rank of the other."""
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


@on_ranks(2)
def test_finiteness_costs_one_small_all_reduce() -> None:
    for wrapper, num in (("plain", 0), ("ddp", 1), ("fsdp1", 1), ("fsdp2", 1), ("tp", 1), ("hsdp", 2)):
        average = ShardedAverage(wrap(build(), wrapper))
        with CommDebugMode() as mode:
            average.is_model_finite()
        counts = {str(op): count for op, count in mode.get_comm_counts().items() if count}
        assert (list(counts.values()) or [0]) == [num], (wrapper, counts)
        assert all("allreduce" in op for op in counts), counts


def put_ddp_around(model: nn.Module) -> nn.Module:
    return wrap(model, "ddp")


def put_fsdp1_around(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def put_fsdp1_around_flat(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def put_fsdp2_around(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def put_tp_around(model: nn.Module) -> nn.Module:
    return wrap(model, "tp")


@on_ranks(2)
def test_a_wrapper_that_comes_after_the_average_is_refused() -> None:
    wrappers: list[Callable[[nn.Module], nn.Module]] = [put_fsdp1_around, put_fsdp2_around, put_tp_around]
    for put_around in wrappers:
        model = build()
        average = ShardedAverage(model)
        average.update()
        put_around(model)
        for action in (average.update, average.transfer, average.state_dict, average.full_state_dict):
            with pytest.raises(
                ValueError, match=r"needs the parameters it was built on, got .*; build the average after the model has"
            ):
                action()
        assert average.num_averaged == 1


@on_ranks(2)
def test_ddp_that_comes_after_the_average_leaves_it_whole_and_right() -> None:
    model = build()
    average = ShardedAverage(model)
    average.update()
    wrapped = wrap(model, "ddp")
    write(wrapped, trajectory(1, build())[0])
    average.update()
    expected = (build().down.weight + model.down.weight) / 2
    torch.testing.assert_close(average.full_state_dict()["down.weight"], expected.detach())
