"""SWA: when it updates, completes and finalizes, and which calls raise."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from dist_swa import EMA, SWA, DecayShaped, Equal, ShardedAverage, recalibrate_batch_norm
from models import build, trajectory, wrap, write
from ranks import on_ranks
from reference import closed_form, weighted_sum

DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))


def linear() -> nn.Linear:
    return nn.Linear(2, 2, bias=False)


def run(swa: SWA, model: nn.Linear, num_steps: int) -> list[int]:
    """Set the weight to the number of each step; return the steps that updated the average."""
    updated = []
    for step in range(1, num_steps + 1):
        if not swa.completed:
            nn.init.constant_(model.weight, step)
        if swa.step():
            updated.append(step)
    return updated


def test_updates_by_the_schedule_and_finalizes() -> None:
    model = linear()
    swa = SWA(model, max_duration="20ba", swa_start="0.5dur", swa_end=None, update_interval="3ba")
    assert (swa.started, swa.completed, swa.num_averaged) == (False, False, 0)
    assert run(swa, model, 20) == [10, 13, 16, 19]
    assert (swa.started, swa.completed, swa.num_averaged) == (True, False, 4)
    assert model.weight.eq(20).all()
    with swa.swapped_in():
        assert model.weight.eq(14.5).all()
    assert model.weight.eq(20).all()
    swa.finalize()
    assert model.weight.eq(14.5).all()
    assert swa.completed
    assert not swa.step()


@pytest.mark.parametrize(("end", "later_end"), [(None, None), ("10ba", "12ba"), ("10ba", None)])
def test_a_checkpoint_of_a_completed_run_continues_by_the_new_schedule(end: str | None, later_end: str | None) -> None:
    model = linear()
    options: dict[str, Any] = {"swa_start": "8ba", "update_interval": "1ba"}
    first = SWA(model, swa_end=end, **options)
    run(first, model, 10)
    first.finalize()
    assert first.completed
    state = first.state_dict()
    same = SWA(model, swa_end=end, **options)
    same.load_state_dict(state)
    assert (same.completed, same.num_averaged) == (end is not None, 3)
    longer = SWA(model, swa_end=later_end, **options)
    longer.load_state_dict(state)
    assert not longer.completed
    assert run(longer, model, 2) == [1, 2]  # the weights 1 and 2 after 8, 9 and 10
    longer.finalize()
    assert model.weight.eq(6).all()


def test_a_later_swa_start_discards_the_average_of_a_completed_run() -> None:
    model = linear()
    options: dict[str, Any] = {"swa_start": "0.5dur", "swa_end": None, "update_interval": "1ba"}
    first = SWA(model, max_duration="10ba", **options)
    run(first, model, 10)
    first.finalize()
    longer = SWA(model, max_duration="40ba", **options)
    longer.load_state_dict(first.state_dict())
    assert (longer.started, longer.num_averaged, longer.schedule.now.batches) == (False, 0, 10)
    assert run(longer, model, 30) == list(range(10, 31))
    longer.finalize()
    assert model.weight.eq(20).all()


def test_reset_starts_a_new_average_within_the_run() -> None:
    model = linear()
    options: dict[str, Any] = {"max_duration": "10ba", "swa_start": "0.8dur", "swa_end": None, "update_interval": "1ba"}
    options |= {"schedule_swa_lr": True, "swa_lr": 0.0, "anneal_steps": 4}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    swa = SWA(model, optimizer, **options, rule={"mean": Equal(), "ema": EMA(decay=0.5)}, transfer="mean")
    assert run(swa, model, 9) == [8, 9]
    assert optimizer.param_groups[0]["lr"] == 0.5
    with swa.swapped_in(), pytest.raises(RuntimeError, match="reset needs the model to have its trained weights"):
        swa.reset()
    assert swa.num_averaged == 2
    swa.num_skipped = 1
    swa.reset(batches=6)
    assert (swa.started, swa.completed, swa.num_averaged, swa.num_skipped) == (False, False, 0, 0)
    optimizer.param_groups[0]["lr"] = 0.8
    assert run(swa, model, 4) == [2, 3, 4]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)  # annealed from the rate at the first of these steps
    assert swa.average.full_state_dict("mean")["weight"].eq(3).all()
    assert swa.average.full_state_dict("ema")["weight"].eq(3.25).all()
    swa.reset()
    assert swa.schedule.now.batches == 0


def test_by_default_every_step_from_seven_tenths_to_the_end_counts() -> None:
    model = linear()
    swa = SWA(model, max_duration="100ba", steps_per_epoch=10)
    assert run(swa, model, 100) == list(range(70, 101))
    assert not swa.completed
    assert model.weight.eq(100).all()
    swa.finalize()
    assert swa.completed
    assert model.weight.eq(85).all()


def test_completion_transfers_and_training_continues_from_the_average() -> None:
    model = linear()
    swa = SWA(model, swa_start="2ba", swa_end="6ba", update_interval="2ba")
    for step in range(1, 6):
        nn.init.constant_(model.weight, step)
        swa.step()
    nn.init.constant_(model.weight, 6)
    assert swa.step()
    assert swa.completed
    assert model.weight.eq(4).all()
    nn.init.constant_(model.weight, 9)
    assert not swa.step()
    assert model.weight.eq(9).all()
    swa.finalize()  # transfers again, after further training
    assert model.weight.eq(4).all()


def test_end_epoch_counts_epochs_without_steps_per_epoch() -> None:
    model = linear()
    swa = SWA(model, swa_start="1ep", swa_end="3ep", update_interval="1ep")
    updated = []
    for epoch in range(1, 5):
        for _ in range(2):
            assert not swa.step()
        updated.append((epoch, swa.end_epoch(), swa.completed))
    assert updated == [(1, True, False), (2, True, False), (3, True, True), (4, False, True)]


def test_a_half_life_is_measured_by_the_schedule() -> None:
    model = linear()
    rule = EMA(half_life="64tok")
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba", rule=rule)
    expected = 1.0
    for step in range(1, 9):
        nn.init.constant_(model.weight, step)
        swa.step(tokens=step * 16)
        expected = step + (expected - step) * (0.5 ** (step * 16 / 64) if step > 1 else 0)
    swa.finalize()
    torch.testing.assert_close(model.weight.data, torch.full((2, 2), expected))


def test_nothing_averaged_warns_once_and_changes_nothing() -> None:
    model = linear()
    swa = SWA(model, max_duration="20ba", swa_start="0.9dur", swa_end=None, update_interval="1ba")
    run(swa, model, 5)
    with pytest.warns(
        UserWarning, match=r"averaged in 5 steps: swa_start=0.9dur was not reached; the model keeps"
    ) as warned:
        swa.finalize()
    assert len(warned) == 1
    assert model.weight.eq(5).all()
    assert not swa.completed


@pytest.mark.parametrize(
    "options", [{"swa_start": "0ba", "update_interval": "1ep"}, {"swa_start": "0.1dur", "max_duration": "9ep"}]
)
def test_finalize_warns_where_nobody_counted_epochs(options: dict[str, Any]) -> None:
    model = linear()
    swa = SWA(model, **options)
    run(swa, model, 5)
    with pytest.warns(UserWarning, match=r"averaged in 5 steps: no epoch has ended, .* no end_epoch call; the model"):
        swa.finalize()
    assert model.weight.eq(5).all()


def finalized(wrapper: str, batches: list[Tensor]) -> dict[str, Any]:
    """Return the full weights of a model after `finalize`, on the first rank."""
    model = wrap(build(), wrapper)
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    for values in trajectory(3, build()):
        write(model, values)
        swa.step()
    swa.finalize(batches, max_batches=4)
    full = ShardedAverage(model)
    full.update()  # gathers the model's weights
    return full.full_state_dict()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "hsdp"])
@on_ranks(1, 2, 3)
def test_finalize_leaves_the_average_in_the_model(wrapper: str) -> None:
    weights = finalized(wrapper, [DATA])
    oracle = weighted_sum(closed_form(Equal(), 3), trajectory(3, build()))
    assert not weights or all(torch.allclose(weights[n].double(), oracle[n], atol=1e-6) for n in oracle)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "hsdp"])
@on_ranks(1, 2)
def test_finalize_recalibrates_over_the_batches_of_all_ranks(wrapper: str) -> None:
    only_me, _ = dist.new_subgroups(1)
    batches = list(DATA.chunk(4))
    weights = finalized(wrapper, batches[dist.get_rank() :: dist.get_world_size()])
    if weights:
        alone = build()
        alone.load_state_dict(weights)
        recalibrated = {name: buffer.clone() for name, buffer in alone.named_buffers()}
        recalibrate_batch_norm(alone, batches, process_group=only_me)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(recalibrated[name], buffer, rtol=1e-5, atol=1e-6)


@on_ranks(2)
def test_only_the_completing_step_communicates_under_ddp() -> None:
    model = wrap(build(), "ddp")
    swa = SWA(model, swa_start="1ba", swa_end="3ba", update_interval="1ba")
    counts = []
    for _ in range(4):
        with CommDebugMode() as mode:
            swa.step()
        counts.append(mode.get_total_counts())
    assert counts[:2] == [0, 0]
    assert counts[2] > 0
    assert counts[3] == 0
    assert swa.completed


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@on_ranks(2)
def test_averaging_beats_the_last_iterate_of_a_noisy_run(wrapper: str) -> None:
    """On a quadratic with constant noise, the ratio of the variances of average and iterate is known."""
    lr, num_steps = 0.2, 400
    generator = torch.Generator().manual_seed(0)
    model = wrap(nn.Linear(64, 64, bias=False), wrapper)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    swa = SWA(model, optimizer, max_duration=f"{num_steps}ba", swa_start="0.5dur", swa_end=None, update_interval="1ba")
    for _ in range(num_steps):
        optimizer.zero_grad()
        noise = torch.randn(64, 64, generator=generator)
        weight = model(torch.eye(64)).t()
        (0.5 * weight.square() + noise * weight).sum().backward()
        optimizer.step()
        swa.step()
    with torch.no_grad():
        last = model(torch.eye(64)).var()
        swa.finalize()
        averaged = model(torch.eye(64)).var()
    phi, window = 1 - lr, swa.num_averaged
    expected = (1 + phi) / ((1 - phi) * window) - 2 * phi * (1 - phi**window) / (window * (1 - phi)) ** 2
    assert 0.8 < averaged / last / expected < 1.25


@pytest.mark.parametrize("action", ["step", "end_epoch", "finalize", "state_dict", "load_state_dict"])
def test_a_call_inside_swapped_in_raises_before_it_counts(action: str) -> None:
    swa = SWA(linear(), swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    arguments: tuple[Any, ...] = ({},) if action == "load_state_dict" else ()
    with (
        swa.swapped_in(),
        pytest.raises(RuntimeError, match=r"needs the model .* got a call inside swapped_in; leave it first"),
    ):
        getattr(swa, action)(*arguments)
    assert swa.schedule.now.batches == 1
    assert swa.num_averaged == 1
    assert not swa.completed


def test_finalize_of_a_batch_norm_model_needs_batches() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"finalize needs batches for a model with BatchNorm, got batches=None; pass"):
        swa.finalize()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    swa.finalize([DATA])
    assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"swa_start": "0.9dur", "swa_end": "0.5dur"}, ValueError, "swa_start needs to be before swa_end"),
        ({"max_duration": None}, ValueError, "a schedule in 'dur' needs max_duration"),
        ({"update_interval": "0ba"}, ValueError, "update_interval needs to be above 0"),
        ({"update_interval": "often"}, ValueError, "update_interval needs a number and a unit"),
        ({"swa_start": "1.5dur"}, ValueError, r"swa_start needs a fraction in \[0, 1\] before 'dur'"),
        ({"rule": "mean"}, TypeError, "needs a rule, got rule='mean'"),
        ({"swa_lr": 0.1}, ValueError, "swa_lr needs schedule_swa_lr=True, got swa_lr=0.1"),
        ({"optimizer": "sgd"}, TypeError, "SWA needs a torch optimizer, got optimizer='sgd'; pass the one"),
        ({"schedule_swa_lr": True}, ValueError, "schedule_swa_lr needs an optimizer, got optimizer=None"),
    ],
)
def test_wrong_arguments_raise(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SWA(linear(), **({"max_duration": "10ba"} | options))


def test_a_step_that_raises_is_not_counted() -> None:
    model = linear()
    swa = SWA(model, swa_start="2ba", swa_end=None, update_interval="1ba", rule=DecayShaped("linear", 2))
    run(swa, model, 3)
    before = swa.schedule.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"needs at most total=2 models, got n=3"):
            swa.step()
    assert swa.schedule.state_dict() == before
    assert swa.num_averaged == 2


def test_a_resumed_run_may_count_epochs_by_end_epoch() -> None:
    model = linear()
    saved = SWA(model, swa_start="1ep", swa_end=None, update_interval="1ep", steps_per_epoch=2)
    run(saved, model, 6)
    resumed = SWA(model, swa_start="1ep", swa_end=None, update_interval="1ep")
    resumed.load_state_dict(saved.state_dict())
    assert resumed.schedule.now.epochs == 3
    assert not resumed.step()
    assert resumed.end_epoch()


def test_several_averages_share_one_schedule() -> None:
    model = linear()
    rules = {"swa": Equal(), "last": EMA(0.0), "short": EMA(half_life="1ba"), "tokens": EMA(half_life="10tok")}
    swa = SWA(model, swa_start="2ba", swa_end=None, update_interval="2ba", rule=rules, transfer="swa")
    for step in range(1, 7):
        nn.init.constant_(model.weight, step)
        assert swa.step(tokens=5) == (step % 2 == 0)
    assert swa.num_averaged == 3
    inside = {}
    for name in (None, *rules):
        with swa.swapped_in(name):
            inside[name] = model.weight[0, 0].item()
    # Models 2, 4, 6; two batches and ten tokens apart.
    expected = {None: 4, "swa": 4, "last": 6, "short": (2 / 4 + 4 * 3 / 4) / 4 + 6 * 3 / 4, "tokens": 4.5}
    assert inside == pytest.approx(expected)
    swa.finalize()
    assert model.weight.eq(4).all()


@pytest.mark.parametrize(("name", "expected"), [("swa", 1.5), ("last", 2.0)])
def test_completion_transfers_the_named_average(name: str, expected: float) -> None:
    model = linear()
    rules = {"swa": Equal(), "last": EMA(0.0)}
    swa = SWA(model, swa_start="1ba", swa_end="2ba", update_interval="1ba", rule=rules, transfer=name)
    run(swa, model, 3)
    assert swa.completed
    assert model.weight.eq(expected).all()


@pytest.mark.parametrize(
    ("rule", "transfer", "message"),
    [
        (
            {"swa": Equal(), "ema": EMA(0.9)},
            None,
            r"transfer=.* needs the name of an average, got name=None; pass",
        ),
        (
            {"swa": Equal(), "ema": EMA(0.9)},
            "lawa",
            r"needs the name of an average, got name='lawa'; pass one of",
        ),
        (Equal(), "swa", r"needs the name of an average, got name='swa'; leave it out, the average has no name"),
    ],
)
def test_an_unknown_transfer_raises(rule: Any, transfer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SWA(linear(), max_duration="9ba", rule=rule, transfer=transfer)


@on_ranks(2)
def test_parameters_and_process_group_are_passed_to_the_average() -> None:
    options: dict[str, Any] = {"swa_start": "1ba", "swa_end": None, "update_interval": "1ba"}
    swa = SWA(build(), parameters="up.*", process_group=dist.group.WORLD, **options)
    swa.step()
    slots = swa.average.state_dict()["slots"]["0"]
    assert {name: value.to_local().shape for name, value in slots.items()} == {"up.weight": (3, 4), "up.bias": (3,)}


def test_finalize_keeps_averaged_statistics_or_recalibrates_them() -> None:
    norm = nn.BatchNorm1d(4)
    assert norm.running_mean is not None
    swa = SWA(norm, swa_start="1ba", swa_end=None, update_interval="1ba", buffers="average")
    for value in (1.0, 2.0):
        norm.running_mean.fill_(value)
        swa.step()
    norm.running_mean.fill_(9)
    swa.finalize()
    assert norm.running_mean.eq(1.5).all()
    swa.finalize([DATA])
    torch.testing.assert_close(norm.running_mean, DATA.mean(0))


def test_finalize_without_batches_needs_the_statistics_of_all_layers_to_be_averaged() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    swa = SWA(model, swa_start="1ba", buffers=["0.*"])
    swa.step()
    assert [swa.average.averages_statistics(name) for name in ("", "0", "1")] == [False, True, False]
    with pytest.raises(ValueError, match="needs batches"):
        swa.finalize()
    model[0].get_buffer("running_mean").fill_(3)
    swa.finalize([DATA], skip=swa.average.averages_statistics)
    assert model[0].get_buffer("running_mean").eq(0).all()
    assert not model[1].get_buffer("running_mean").eq(0).any()
    swa.finalize(skip="1")


def steps_with_nan(swa: SWA, model: nn.Linear, bad: set[int], num_steps: int, first: int = 1) -> list[int]:
    updated = []
    for step in range(first, first + num_steps):
        if not swa.completed:
            nn.init.constant_(model.weight, float("nan") if step in bad else step)
        if swa.step():
            updated.append(step)
    return updated


def test_a_model_that_is_not_finite_is_skipped_and_the_update_stays_due() -> None:
    model = linear()
    swa = SWA(model, swa_start="2ba", swa_end=None, update_interval="3ba", skip_nonfinite=True)
    with pytest.warns(UserWarning, match=r"with NaN or inf was not averaged, at step 2; .* in num_skipped") as warned:
        assert steps_with_nan(swa, model, {2, 3}, 3) == []
    assert len(warned) == 1
    assert (swa.started, swa.num_skipped, swa.num_averaged) == (False, 2, 0)
    assert steps_with_nan(swa, model, {7, 8}, 8, first=4) == [4, 9, 10]  # and no further warning
    assert (swa.started, swa.num_skipped, swa.num_averaged) == (True, 4, 3)
    swa.finalize()
    torch.testing.assert_close(model.weight.data, torch.full((2, 2), (4 + 9 + 10) / 3))


def test_without_the_guard_the_average_is_lost() -> None:
    model = linear()
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    assert steps_with_nan(swa, model, {2}, 3) == [1, 2, 3]
    trained = model.weight.clone()
    with pytest.warns(UserWarning, match="the average of 3 models has NaN or inf; the model keeps its trained weights"):
        swa.finalize()
    assert swa.average.full_state_dict()["weight"].isnan().all()
    assert torch.equal(model.weight, trained)
    assert swa.num_skipped == 0


@pytest.mark.filterwarnings("ignore:a model with NaN or inf")
def test_completion_waits_for_a_finite_model_if_nothing_was_averaged() -> None:
    model = linear()
    options: dict[str, Any] = {"swa_start": "2ba", "swa_end": "4ba", "update_interval": "1ba", "skip_nonfinite": True}
    swa = SWA(model, **options)
    assert steps_with_nan(swa, model, {4}, 5) == [2, 3]
    assert swa.completed
    assert model.weight.eq(2.5).all()  # the average of those before it
    swa = SWA(model, **options)
    assert steps_with_nan(swa, model, {2, 3, 4, 5}, 5) == []
    assert not swa.completed  # nothing was averaged
    assert steps_with_nan(swa, model, set(), 2, first=6) == [6]
    assert swa.completed
    assert model.weight.eq(6).all()


@pytest.mark.filterwarnings("ignore:a model with NaN or inf")
def test_a_skipped_update_leaves_the_half_life_to_the_next() -> None:
    model = linear()
    rule = EMA(half_life="2ba")
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba", rule=rule, skip_nonfinite=True)
    assert steps_with_nan(swa, model, {2}, 3) == [1, 3]
    swa.finalize()
    assert model.weight.eq(2).all()  # two batches, a half-life, after the first


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "tp"])
@on_ranks(2)
def test_all_ranks_skip_the_same_models_and_checkpoints_count_them(wrapper: str) -> None:
    found = []
    state: dict[str, Any] = {}
    for first in (0, 4):
        model = wrap(build(), wrapper)
        swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba", skip_nonfinite=True)
        if state:
            swa.load_state_dict(state)
            assert swa.num_skipped == 1
        for step in range(first, first + 4):
            values = trajectory(1, build(), seed=step)[0]
            if step == 1:
                values["down.weight"][0, 0] = float("inf")  # in the shard of the first rank
            write(model, values)
            with pytest.warns(UserWarning, match="NaN or inf") if step == 1 else contextlib.nullcontext():
                found.append(swa.step())
        state = swa.state_dict()
    assert found == [True, False, *[True] * 6]
    assert (swa.num_averaged, swa.num_skipped) == (7, 1)
