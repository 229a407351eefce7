"""Checkpoints from before averaging was switched on, and from before the model got, or lost, a buffer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from dist_swa import EMA, SWA, Equal, ShardedAverage, Window, checkpoint
from dist_swa.averaging.rules import Rule
from dist_swa.checkpoint import CheckpointFolder
from models import Net, build, group_of, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks
from reference import closed_form, weighted_sum

STEP, STEPS = 6, 10  # without averaging, and in total
RUN: dict[str, Any] = {"max_duration": f"{STEPS}ba", "swa_start": "0.8dur"}

# --- Averaging is switched on


def train_without_averaging(folder: Path, wrapper: str) -> None:
    model = wrap(build(), wrapper)
    for values in trajectory(STEP, build()):
        write(model, values)
    CheckpointFolder(folder).save(STEP, {"model": get_model_state_dict(model)})


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders of runs on two ranks, one for each wrapper."""
    folder = tmp_path_factory.mktemp("old")
    for wrapper in ("ddp", "fsdp2"):
        run_on_ranks(train_without_averaging, 2, folder / wrapper, wrapper)
    return folder


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@on_ranks(1, 2, 3)
def test_averaging_that_is_switched_on_starts_at_the_step_of_the_folder(old: Path, wrapper: str) -> None:
    model = wrap(build(), wrapper)
    swa = SWA(model, **RUN, steps_per_epoch=4)
    state: dict[str, Any] = {"model": get_model_state_dict(model), "swa": swa}
    message = rf"has nothing under \['swa'\]: these entries are reset; the schedule starts at step {STEP}$"
    with pytest.warns(UserWarning, match=message) as warned:
        assert CheckpointFolder(old / wrapper).load_latest(state) == STEP
    assert len(warned) == 1
    set_model_state_dict(model, state["model"])
    now = swa.schedule.now
    assert (now.batches, now.epochs, swa.num_averaged, swa.started) == (STEP, STEP // 4, 0, False)
    models = trajectory(STEPS, build())
    for values in models[STEP:]:
        write(model, values)
        swa.step()
    assert swa.num_averaged == 3  # steps 8 to 10
    swa.finalize([torch.ones(4, 4)])
    full = ShardedAverage(model)
    full.update()
    found, expected = full.full_state_dict(), weighted_sum(closed_form(Equal(), 3), models[-3:])
    assert not found or all(torch.allclose(found[name].double(), expected[name], atol=1e-6) for name in expected)


def load_old(path: Path, *swas: SWA, position: dict[str, int] | None = None) -> str:
    """Load a checkpoint without averages, and return the one warning."""
    checkpoint.save({"x": torch.ones(1)}, path)
    with pytest.warns(UserWarning, match="these entries are reset") as warned:
        checkpoint.load(
            {"x": torch.zeros(1), **{f"swa{i}": swa for i, swa in enumerate(swas)}}, path, position=position
        )
    assert len(warned) == 1
    return str(warned[0].message)


STEP_6_AND_MORE = "step 6; if training has done more, call swa.reset(batches=6"


@pytest.mark.parametrize(
    ("options", "position", "text"),
    [
        ({}, None, "step 0; if training has done more, call swa.reset(batches=...)"),
        ({"steps_per_epoch": 2}, None, "step 0; if training has done more, call swa.reset(batches=...)"),
        ({}, {"batches": 6}, "step 6"),
        ({"update_interval": "1ep", "steps_per_epoch": 2}, {"batches": 6}, "step 6"),
        ({"update_interval": "1ep"}, {"batches": 6}, f"{STEP_6_AND_MORE}, epochs=...)"),
        ({"rule": EMA(half_life="9tok")}, {"batches": 6}, f"{STEP_6_AND_MORE}, tokens=...)"),
        ({"update_interval": "1ep"}, {"batches": 6, "epochs": 2}, "step 6"),
    ],
)
def test_the_warning_names_what_the_checkpoint_does_not_tell(
    tmp_path: Path, options: dict[str, Any], position: dict[str, int] | None, text: str
) -> None:
    swa = SWA(build(), **RUN, **options)
    assert load_old(tmp_path / "a", swa, position=position).endswith(f"; the schedule starts at {text}")
    batches = (position or {}).get("batches", 0)
    epochs = (position or {}).get("epochs", batches // options.get("steps_per_epoch", 100))
    assert (swa.schedule.now.batches, swa.schedule.now.epochs) == (batches, epochs)


def test_several_missing_averages_give_one_warning(tmp_path: Path) -> None:
    text = load_old(tmp_path / "a", SWA(build(), **RUN), SWA(build(), **RUN), position={"batches": 6})
    assert text.endswith("['swa0', 'swa1']: these entries are reset; the schedule starts at step 6")


# --- Buffers that come and go


def with_buffers(*names: str, is_tied: bool = False) -> Net:
    model = build()
    for name in names:
        model.register_buffer(name, torch.full((3,), 5.0))
    if is_tied:
        model.up.register_buffer("again", getattr(model, names[0]))
    return model


class Averaged:
    """A model and its average of some models."""

    def __init__(self, wrapper: str, model: nn.Module, rule: Any, seed: int, buffers: str = "copy") -> None:
        self.model = wrap(model, wrapper) if wrapper else model
        self.average = ShardedAverage(self.model, rule, buffers=buffers, process_group=group_of(wrapper))
        for values in trajectory(3, build(), seed):
            write(self.model, values)
            self.average.update()

    def buffer(self, name: str) -> Tensor:
        return next(buffer for key, buffer in self.model.named_buffers() if key.endswith(name))

    def values(self) -> dict[str, Tensor]:
        names = self.average.names or (None,)
        return {f"{n} {key}": value for n in names for key, value in self.average.full_state_dict(n).items()}


RULES: dict[str, Any] = {"one": Equal(), "window": Window(2), "several": {"a": Equal(), "b": EMA(decay=0.9)}}
WRAPPERS = ("plain", "ddp", "fsdp1", "fsdp2", "fsdp2+tp")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(1, 2)
def test_a_new_buffer_gets_the_value_of_the_model(tmp_path: Path, wrapper: str, rule: str) -> None:
    saved = Averaged(wrapper, build(), RULES[rule], seed=1)
    saved.buffer("offset").fill_(4)  # after the last update: not in the average
    checkpoint.save({"swa": saved.average}, tmp_path / "a")
    loaded = Averaged(wrapper, with_buffers("new"), RULES[rule], seed=2)
    loaded.buffer("new").fill_(9)
    loaded.buffer("offset").fill_(9)
    checkpoint.load({"swa": loaded.average}, tmp_path / "a")
    found, expected = loaded.values(), saved.values()
    new = {key: found.pop(key) for key in [*found] if key.endswith(" new")}
    assert same_bits(found, expected)
    assert all(value.eq(9).all() for value in new.values())
    assert dist.get_rank() > 0 or len(new) == len(loaded.average.names or "1")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(1, 2)
def test_a_buffer_that_was_removed_is_ignored(tmp_path: Path, wrapper: str) -> None:
    saved = Averaged(wrapper, with_buffers("more"), Equal(), seed=1)
    checkpoint.save({"swa": saved.average}, tmp_path / "a")
    loaded = Averaged(wrapper, build(), Equal(), seed=2)
    checkpoint.load({"swa": loaded.average}, tmp_path / "a")
    found, expected = loaded.values(), saved.values()
    assert expected.pop("None more", torch.tensor(5.0)).eq(5).all()
    assert same_bits(found, expected)


def bare(*names: str) -> nn.Module:
    model = nn.Linear(2, 2)
    for name in names:
        model.register_buffer(name, torch.full((3,), 5.0))
    return model


@pytest.mark.parametrize(("before", "after"), [((), ("new",)), (("more",), ())])
def test_the_only_buffer_comes_or_goes(tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    saved, loaded = ShardedAverage(bare(*before)), ShardedAverage(bare(*after))
    saved.update()
    checkpoint.save({"swa": saved}, tmp_path / "a")
    checkpoint.load({"swa": loaded}, tmp_path / "a")
    found = loaded.full_state_dict()
    assert same_bits(found, saved.full_state_dict(), ["weight", "bias"])
    assert set(found) == {"weight", "bias", *after}


def test_a_new_buffer_may_be_tied(tmp_path: Path) -> None:
    saved, loaded = Averaged("", build(), Equal(), 1), Averaged("", with_buffers("new", is_tied=True), Equal(), 2)
    assert "up.again" in loaded.average.full_state_dict()
    checkpoint.save({"swa": saved.average}, tmp_path / "a")
    checkpoint.load({"swa": loaded.average}, tmp_path / "a")
    full = loaded.average.full_state_dict()
    assert same_bits(full, saved.average.full_state_dict(), list(saved.average.full_state_dict()))
    assert full["new"].eq(5).all()


REFUSED: dict[str, tuple[Callable[[], Net], Callable[[], Net], Rule, str, str]] = {
    "a new averaged buffer": (build, partial(with_buffers, "new"), Equal(), "average", "Missing key .*: swa.*[.]new"),
    "an averaged buffer that was removed": (
        partial(with_buffers, "more"),
        build,
        Equal(),
        "average",
        "was averaged with, got slots.0.more",
    ),
    "another rule": (build, partial(with_buffers, "new"), EMA(decay=0.9), "copy", "Missing key .*: swa.rule.EMA"),
    "another shape": (
        partial(with_buffers, "norm_of"),
        lambda: with_shape(with_buffers("new")),
        Equal(),
        "copy",
        "Size mismatch .*swa.buffers.norm_of",
    ),
}


def with_shape(model: Net) -> Net:
    model.register_buffer("norm_of", torch.zeros(7))
    return model


@pytest.mark.parametrize("case", REFUSED)
@on_ranks(2)
def test_what_does_not_fit_beside_a_new_buffer_changes_nothing(tmp_path: Path, case: str) -> None:
    before, after, rule, buffers, message = REFUSED[case]
    saved = Averaged("fsdp2", before(), Equal(), 1, buffers)
    checkpoint.save({"swa": saved.average}, tmp_path / "a")
    loaded = Averaged("fsdp2", after(), rule, 2, buffers)
    values = loaded.values()
    with pytest.raises(ValueError, match=message):
        checkpoint.load({"swa": loaded.average}, tmp_path / "a")
    assert same_bits(loaded.values(), values)


def test_a_new_parameter_beside_a_new_buffer_is_refused(tmp_path: Path) -> None:
    saved, model = ShardedAverage(build()), with_buffers("new")
    saved.update()
    checkpoint.save({"swa": saved}, tmp_path / "a")
    model.register_parameter("more", nn.Parameter(torch.zeros(2, 5)))
    loaded = ShardedAverage(model)
    with pytest.raises(ValueError, match=r"Missing key in checkpoint state_dict: swa\.slots\.0\.more"):
        checkpoint.load({"swa": loaded}, tmp_path / "a")
    assert loaded.num_averaged == 0
