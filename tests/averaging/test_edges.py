"""What cannot be averaged, saved or exported right raises or warns, on every rank, and names the remedy."""

import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dist_swa import EMA, SWA, ShardedAverage, Window, checkpoint, recalibrate_batch_norm
from dist_swa.integrations.full_state_dict import full_state_dict
from models import build, local_tensor, same_bits, train, wrap
from ranks import on_ranks

Use = Callable[[SWA, Path], object]


def enter_a_swap(swa: SWA, folder: Path) -> None:
    with swa.swapped_in():
        raise AssertionError("entered")


USES: dict[str, Use] = {
    "swapped_in": enter_a_swap,
    "transfer": lambda swa, folder: swa.average.transfer(),
    "finalize": lambda swa, folder: swa.finalize([torch.ones(2, 4)]),
    "save": lambda swa, folder: checkpoint.save({"swa": swa}, folder / "saved"),
    "export": lambda swa, folder: checkpoint.export(swa, folder / "exported"),
    "full_state_dict": lambda swa, folder: swa.average.full_state_dict(),
    "one file": lambda swa, folder: full_state_dict(swa),
}


def run_in_which_rank_1_misses_an_update(wrapper: str, first: int) -> SWA:
    swa = SWA(wrap(build(), wrapper), swa_start="1ba")
    for step in range(2):
        if dist.get_rank() != 1 or step != first:
            swa.step()
    return swa


SHARED_USES = [
    *(("ddp", use) for use in USES),
    *(("fsdp2", use) for use in ("save", "export", "finalize", "full_state_dict", "one file")),
]


@pytest.mark.parametrize(("wrapper", "use"), [*SHARED_USES, ("fsdp1", "finalize"), ("tp", "finalize")])
@on_ranks(2, timeout_s=30.0)
def test_a_missed_update_raises_on_every_rank_and_names_both_numbers(wrapper: str, use: str, tmp_path: Path) -> None:
    swa = run_in_which_rank_1_misses_an_update(wrapper, first=1)
    with pytest.raises(RuntimeError, match="same number of models, got num_averaged=1 to 2; call update on every rank"):
        USES[use](swa, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrapper", "use"),
    [
        ("ddp", "swapped_in"),
        ("ddp", "transfer"),
        *product(("ddp", "fsdp1", "fsdp2", "tp"), ("finalize", "full_state_dict", "one file")),
    ],
)
@on_ranks(2, timeout_s=30.0)
def test_a_rank_without_any_update_raises_on_every_rank(wrapper: str, use: str, tmp_path: Path) -> None:
    swa = SWA(wrap(build(), wrapper), swa_start="1ba")
    if dist.get_rank() == 0:
        swa.step()
    with pytest.raises(RuntimeError, match="got num_averaged=0"):
        USES[use](swa, tmp_path)


class Experts(nn.Module):
    """A dense layer, and an expert that is another one on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.expert = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.dense.weight, 0.5)
        nn.init.zeros_(self.dense.bias)
        nn.init.constant_(self.expert.weight, dist.get_rank() + 1)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.expert(self.dense(given))
        return out


def plain() -> nn.Module:
    return Experts()


def ignored_by_fsdp2() -> nn.Module:
    model = Experts()
    fully_shard(model, ignored_params={model.get_parameter("expert.weight")})
    return model


def frozen() -> nn.Module:
    model = ignored_by_fsdp2()
    model.get_parameter("expert.weight").requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("new", "use"),
    [(plain, "save"), (plain, "export"), (ignored_by_fsdp2, "save"), (ignored_by_fsdp2, "export"), (frozen, "export")],
)
@on_ranks(2, timeout_s=30.0)
def test_plain_parameters_that_differ_between_ranks_are_not_saved(
    new: Callable[[], nn.Module], use: str, tmp_path: Path
) -> None:
    swa = SWA(new(), swa_start="1ba")
    swa.step()
    with pytest.raises(ValueError, match=r"same values on every rank, got other ones of parameter='expert.weight'"):
        USES[use](swa, tmp_path)
    assert list(tmp_path.iterdir()) == []


@on_ranks(2, timeout_s=30.0)
def test_a_stage_that_only_one_rank_has_is_not_saved(tmp_path: Path) -> None:
    swa = SWA(nn.ModuleDict({f"stage{dist.get_rank()}": nn.Linear(2, 2)}), swa_start="1ba")
    swa.step()
    with pytest.raises(ValueError, match=r"got other ones of parameter='stage0.weight'"):
        checkpoint.save({"swa": swa}, tmp_path / "saved")


@on_ranks(2)
def test_dtensor_experts_beside_ddp_are_averaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "expert": nn.Linear(2, 4, bias=False)})
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    expert = distribute_tensor(model.get_parameter("expert.weight").data, mesh, [Shard(0)])
    model["expert"].weight = nn.Parameter(expert)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["expert.weight"])
    average = ShardedAverage(DistributedDataParallel(model))
    average.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2)
    average.update()
    full = average.full_state_dict()
    checkpoint.save({"swa": average}, tmp_path / "saved")
    if full:
        torch.testing.assert_close(full["expert.weight"], expert.full_tensor() - 1)
    else:
        expert.full_tensor()


def linear() -> nn.Linear:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 1.0)
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("swa_end", [None, "3ba"])
def test_an_average_that_is_not_finite_never_replaces_finite_weights(value: float, swa_end: str | None) -> None:
    model = linear()
    swa = SWA(model, swa_start="1ba", swa_end=swa_end)
    for weight in (1.0, value):
        nn.init.constant_(model.weight, weight)
        swa.step()
    nn.init.constant_(model.weight, 3.0)
    if swa_end is None:
        swa.step()
    with pytest.warns(UserWarning, match=r"average of 3 models has NaN or inf; the model keeps its trained weights"):
        swa.finalize() if swa_end is None else swa.step()
    assert model.weight.eq(3).all()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "tp"])
@on_ranks(2)
def test_an_average_that_is_not_finite_on_one_rank_is_left_out_on_all(wrapper: str) -> None:
    model = wrap(build(), wrapper)
    swa = SWA(model, swa_start="1ba")
    with torch.no_grad():
        bias = next(p for name, p in model.named_parameters() if name.endswith("up.bias"))
        bias.mul_(torch.nan)
    swa.step()
    with torch.no_grad():
        bias.zero_()
        bias.nan_to_num_(0.0)
    with pytest.warns(UserWarning, match="has NaN or inf; the model keeps its trained weights"):
        swa.finalize([torch.ones(2, 4)])
    assert not swa.completed


def test_skip_nonfinite_reads_averaged_buffers() -> None:
    model = nn.BatchNorm1d(2)
    swa = SWA(model, swa_start="1ba", buffers="average", skip_nonfinite=True)
    swa.step()
    model.get_buffer("running_var").fill_(torch.nan)
    with pytest.warns(UserWarning, match="a model with NaN or inf was not averaged, at step 2"):
        assert not swa.step()
    assert (swa.num_averaged, swa.num_skipped) == (1, 1)


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_an_added_parameter_raises_in_the_next_update(wrapper: str) -> None:
    model = wrap(build(), wrapper)
    average = ShardedAverage(model, EMA(0.9))
    average.update()
    next(module for module in model.modules() if hasattr(module, "again")).register_parameter(
        "prompt", nn.Parameter(torch.ones(2))
    )
    with pytest.raises(ValueError, match="got other names, another shape or layout of parameter='prompt'"):
        average.update()
    assert average.num_averaged == 1


def test_data_parallel_has_the_names_of_its_module() -> None:
    inner = build()
    model = nn.DataParallel(inner)
    average = ShardedAverage(model, Window(1))
    average.update()
    full = average.full_state_dict()
    assert same_bits(full, dict(inner.state_dict()))


WRAPPED = ("plain", "ddp", "fsdp1", "fsdp2", "hsdp")


def step_to(model: nn.Module, swa: SWA, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).fill_(value)
    swa.step()


@pytest.mark.parametrize("wrapper", WRAPPED)
@on_ranks(2)
def test_until_the_first_update_what_is_averaged_follows_requires_grad(wrapper: str) -> None:
    model = build()
    model.up.requires_grad_(False)
    wrapped = wrap(model, wrapper)
    swa = SWA(wrapped, swa_start="2ba")
    step_to(wrapped, swa, 1.0)
    names = {name: p for name, p in wrapped.named_parameters() if "up." in name or "down.bias" in name}
    for name, parameter in names.items():
        parameter.requires_grad_("up." in name)
    for value in (2.0, 4.0):
        step_to(wrapped, swa, value)
    full = swa.average.full_state_dict()
    if full:
        assert full["up.weight"].eq(3).all()
        assert full["down.weight"].eq(3).all()
        assert full["down.bias"].eq(4).all()  # frozen before the first update: the model's value


@pytest.mark.parametrize("wrapper", WRAPPED)
@on_ranks(2)
def test_a_parameter_that_is_unfrozen_joins_as_if_it_had_always_had_its_value(wrapper: str, tmp_path: Path) -> None:
    model = build()
    model.up.requires_grad_(False)
    wrapped = wrap(model, wrapper)
    swa = SWA(wrapped, swa_start="1ba")
    for value in (1.0, 2.0):
        step_to(wrapped, swa, value)
    for name, parameter in wrapped.named_parameters():
        if "up." in name:
            parameter.requires_grad_(True)
    swa.state_dict()  # what was averaged can be saved before the next update
    with pytest.warns(UserWarning, match=r"averaged from now on, and .*: up.bias, up.weight"):
        step_to(wrapped, swa, 3.0)
    step_to(wrapped, swa, 5.0)
    full = swa.average.full_state_dict()
    if full:
        assert full["down.weight"].eq((1 + 2 + 3 + 5) / 4).all()
        assert full["up.weight"].eq((3 + 3 + 3 + 5) / 4).all()
    checkpoint.save({"swa": swa}, tmp_path / "saved")
    again = SWA(wrap(build(), wrapper), swa_start="1ba")
    checkpoint.load({"swa": again}, tmp_path / "saved")
    assert same_bits(full, again.average.full_state_dict(), [name for name in full if "up." in name or "down." in name])


@pytest.mark.parametrize("wrapper", WRAPPED)
@on_ranks(2)
def test_a_parameter_that_is_frozen_later_stays_in_the_average(wrapper: str) -> None:
    model = wrap(build(), wrapper)
    swa = SWA(model, swa_start="1ba")
    step_to(model, swa, 1.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "up." not in name)
    step_to(model, swa, 3.0)
    full = swa.average.full_state_dict()
    assert not full or full["up.weight"].eq(2).all()


class MomentumEncoder(nn.Module):
    """A trained encoder, and a frozen one that its forward moves towards the trained one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.key = nn.Linear(4, 4).requires_grad_(False)
        self.moves, self.assigns = True, False

    def forward(self, given: Tensor) -> Tensor:
        with torch.no_grad():
            query = self.query.weight
            if self.moves and self.assigns:
                self.key.weight.data = self.key.weight.data * 0.9 + query.data * 0.1
            elif self.moves:
                self.key.weight.lerp_(query, 0.1)
        out: Tensor = self.norm(self.query(given)) * self.key(given)
        return out


def weights_after_training(wrapper: str, assigns: bool, evaluates: bool) -> list[Tensor]:
    encoder = MomentumEncoder()
    encoder.assigns = assigns
    model = wrap(encoder, wrapper)
    swa = SWA(model, swa_start="1ba")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(1)
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        swa.step()
        if evaluates and step in (2, 4):
            with swa.swapped_in():
                recalibrate_batch_norm(model, [torch.ones(4, 4) * i for i in range(3)])
    return [local_tensor(p).clone() for p in model.parameters()]


@pytest.mark.parametrize("assigns", [False, True])
@pytest.mark.parametrize("wrapper", ["plain", "ddp"])
@on_ranks(2)
def test_an_evaluation_restores_parameters_that_the_model_moves(wrapper: str, assigns: bool) -> None:
    trained = weights_after_training(wrapper, assigns, evaluates=False)
    evaluated = weights_after_training(wrapper, assigns, evaluates=True)
    assert all(torch.equal(*pair) for pair in zip(trained, evaluated, strict=True))


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp1", "fsdp2"])
@on_ranks(2)
def test_evaluations_of_a_frozen_backbone_do_not_warn(wrapper: str) -> None:
    model = build()
    model.up.requires_grad_(False)
    wrapped = wrap(model, wrapper)
    swa = SWA(wrapped, swa_start="1ba")
    for step in range(3):
        train(wrapped, torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1), 1, first=step)
        swa.step()
        with swa.swapped_in(), torch.no_grad():
            wrapped.eval()(torch.ones(2, 4))


def test_a_frozen_parameter_that_is_written_inside_for_the_first_time_is_named() -> None:
    model = MomentumEncoder()
    model.moves = False
    swa = SWA(model, swa_start="1ba")
    swa.step()
    message = r"written inside swapped_in, for the first time, .*: key.weight; evaluate"
    with pytest.warns(UserWarning, match=message), swa.swapped_in():
        nn.init.ones_(model.key.weight)
    assert model.key.weight.eq(1).all()


@on_ranks(2)
def test_a_compiled_module_inside_fsdp1_keeps_its_shards() -> None:
    compiled: Any = torch.compile(build(), backend="eager")
    model = FullyShardedDataParallel(compiled, device_id=torch.device("cpu"), use_orig_params=True)
    average = ShardedAverage(model)
    average.update()
    full = average.full_state_dict()
    whole = build().state_dict()
    assert not full or {name: value.shape for name, value in full.items()} == {n: v.shape for n, v in whole.items()}


class Forwarding(nn.Module):
    """A wrapper whose attributes are those of the module in it, as PEFT's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(2, 2)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def test_a_wrapper_that_forwards_attributes_keeps_its_own_parameters() -> None:
    inner: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    average = ShardedAverage(Forwarding(inner))
    average.update()
    assert {"head.weight", "inner.weight"} <= set(average.full_state_dict())


@on_ranks(2, timeout_s=30.0)
def test_replicas_that_average_other_parameters_raise_on_every_rank() -> None:
    model = build()
    model.up.requires_grad_(False)
    average = ShardedAverage(model, process_group=dist.group.WORLD)
    average.update()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.up.requires_grad_(dist.get_rank() == 0)
        average.update()
    with pytest.raises(ValueError, match="every rank to average the same parameters, got num_parameters="):
        average.swapped_in().__enter__()


@pytest.mark.parametrize("is_frozen_at_first", [False, True])
def test_a_checkpoint_loads_where_requires_grad_was_set_after_construction(
    is_frozen_at_first: bool, tmp_path: Path
) -> None:
    def new() -> tuple[nn.Module, SWA]:
        model = build()
        model.up.requires_grad_(not is_frozen_at_first)
        swa = SWA(model, swa_start="1ba")
        model.up.requires_grad_(is_frozen_at_first)
        return model, swa

    model, swa = new()
    step_to(model, swa, 1.0)
    step_to(model, swa, 2.0)
    checkpoint.save({"swa": swa}, tmp_path / "saved")
    _, again = new()
    checkpoint.load({"swa": again}, tmp_path / "saved")
    assert again.num_averaged == 2
    assert same_bits(again.average.state_dict()["slots"]["0"], swa.average.state_dict()["slots"]["0"])


def test_an_update_without_anything_to_average_changes_nothing() -> None:
    model = build()
    average = ShardedAverage(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="needs a parameter that requires a gradient and is selected"):
        average.update()
    for parameter in trainable:
        parameter.requires_grad_(True)
    average.update()
    assert len(average.state_dict()["slots"]["0"]) == len(trainable)
