"""The schedule makes the same decisions as a slow reference implementation, in every mixture of units."""

import json
from fractions import Fraction
from random import Random
from typing import Any

import pytest
import torch

from dist_swa.schedule import Progress, Schedule, Time
from schedule_reference import STEPS_PER_EPOCH, UNITS, outcomes, reference, some_arguments, some_events


@pytest.mark.parametrize("steps_per_epoch", [None, STEPS_PER_EPOCH])
@pytest.mark.parametrize("interval_unit", UNITS)
def test_every_mixture_of_units_equals_the_reference(interval_unit: str, steps_per_epoch: int | None) -> None:
    random = Random(f"{interval_unit} {steps_per_epoch}")
    num_updates = num_completed = 0
    for arguments in some_arguments(random, interval_unit, steps_per_epoch):
        events = some_events(random, 60, steps_per_epoch)
        expected = list(reference(arguments, events))
        assert list(outcomes(arguments.schedule(), events)) == expected, arguments
        num_updates += sum(outcome.update for outcome in expected)
        num_completed += sum(outcome.complete for outcome in expected)
    assert num_updates > 300
    assert num_completed > 60


@pytest.mark.parametrize("steps_per_epoch", [None, STEPS_PER_EPOCH])
@pytest.mark.parametrize("interval_unit", UNITS)
def test_a_resumed_schedule_makes_the_same_decisions(interval_unit: str, steps_per_epoch: int | None) -> None:
    random = Random(f"{interval_unit} {steps_per_epoch}")
    for arguments in list(some_arguments(random, interval_unit, steps_per_epoch))[::15]:
        events = some_events(random, 60, steps_per_epoch)
        schedule = arguments.schedule()
        expected, states = [], []
        for outcome in outcomes(schedule, events):
            expected.append(outcome)
            states.append(json.dumps(schedule.state_dict()))
        for done, state in enumerate(states, start=1):
            resumed = arguments.schedule()
            resumed.load_state_dict(json.loads(state))
            assert list(outcomes(resumed, events[done:])) == expected[done:], (arguments, done)
            assert resumed.state_dict() == schedule.state_dict()


# The schedules of Composer 0.32.1, with 8 batches in an epoch


def updates_of(schedule: Schedule, num_batches: int, *, batches_per_epoch: int = 8) -> tuple[list[int], int | None]:
    """Return the batches after which the average is updated, and the one after which it is complete."""
    updated, completed = [], None
    for batch in range(1, num_batches + 1):
        decisions = [schedule.step(samples=4, tokens=100)]
        if schedule.steps_per_epoch is None and batch % batches_per_epoch == 0:
            decisions.append(schedule.end_epoch())
        updated += [batch for decision in decisions if decision.update]
        if any(decision.complete for decision in decisions):
            assert completed is None
            completed = batch
    return updated, completed


@pytest.mark.parametrize("steps_per_epoch", [None, 8])
def test_composer_fractions_every_epoch(steps_per_epoch: int | None) -> None:
    schedule = Schedule(
        start="0.25dur", end="0.8dur", interval="1ep", max_duration="8ep", steps_per_epoch=steps_per_epoch
    )
    assert updates_of(schedule, 64) == ([16, 24, 32, 40, 48, 56], 56)


def test_composer_epochs_every_two_batches() -> None:
    schedule = Schedule(start="1ep", end="3ep", interval="2ba", max_duration="4ep")
    assert updates_of(schedule, 32) == (list(range(9, 26, 2)), 25)


def test_epochs_every_two_batches_with_steps_per_epoch() -> None:
    schedule = Schedule(start="1ep", end="3ep", interval="2ba", max_duration="4ep", steps_per_epoch=8)
    assert updates_of(schedule, 32) == (list(range(8, 25, 2)), 24)


def test_an_end_that_composer_never_reaches() -> None:
    schedule = Schedule(start="0.7dur", end="0.97dur", interval="1ba", max_duration="8ep", steps_per_epoch=8)
    assert updates_of(schedule, 64) == (list(range(45, 64)), 63)  # 44.8 and 62.08 batches


# Single properties


@pytest.mark.parametrize("percent", range(1, 100))
def test_fractions_are_exact(percent: int) -> None:
    """In floating point 0.57 * 100 is below 57, 0.29 * 100 below 29, and 0.07 * 100 above 7."""
    schedule = Schedule(start=f"{percent / 100}dur", end=None, interval="1ba", max_duration="100ba")
    assert updates_of(schedule, 100) == (list(range(percent, 101)), None)


def test_without_an_end_updates_continue_after_max_duration() -> None:
    schedule = Schedule(start="0.5dur", end=None, interval="10ba", max_duration="20ba")
    assert updates_of(schedule, 50) == ([10, 20, 30, 40, 50], None)
    assert not schedule.completed


def test_start_of_zero_updates_at_the_first_check() -> None:
    assert updates_of(Schedule(start="0ba", end="1ba", interval="5ba"), 9) == ([1], 1)
    assert updates_of(Schedule(start="0ep", end=None, interval="2ep", steps_per_epoch=3), 12) == ([3, 9], None)


def test_a_step_over_several_intervals_updates_once() -> None:
    schedule = Schedule(start="0sp", end=None, interval="10sp")
    steps = [3, 9, 1, 100, 1, 8, 2, 0]  # sums: 3 12 13 113 114 122 124 124; updates are due at 3, 13, 23, ...
    updates = [schedule.step(samples=samples).update for samples in steps]
    assert updates == [True, False, True, True, False, False, True, False]


def test_completing_needs_no_update() -> None:
    assert updates_of(Schedule(start="2ba", end="6ba", interval="3ba"), 9) == ([2, 5], 6)


def test_end_passed_before_the_first_check_updates_once() -> None:
    assert updates_of(Schedule(start="1ba", end="2ba", interval="1ep", steps_per_epoch=8), 24) == ([8], 8)


def test_epochs_without_steps_per_epoch_rise_after_the_check() -> None:
    schedule = Schedule(start="1ep", end=None, interval="1ba")
    assert updates_of(schedule, 10) == ([9, 10], None)
    assert schedule.now == Progress(batches=10, samples=40, tokens=1000, epochs=1)


def test_epochs_may_end_anywhere() -> None:
    schedule = Schedule(start="1ep", end="3ep", interval="1ep")
    decisions = [(schedule.step().update, schedule.step().update, schedule.end_epoch()) for _ in range(4)]
    assert [(a, b, end.update, end.complete) for a, b, end in decisions] == [
        (False, False, True, False),
        (False, False, True, False),
        (False, False, True, True),
        (False, False, False, False),
    ]


def test_elapsed_is_the_training_since_the_last_update() -> None:
    schedule = Schedule(start="1ba", end=None, interval="2ba", steps_per_epoch=4)
    decisions = [schedule.step(samples=10 * step, tokens=step) for step in range(1, 6)]
    assert [decision.elapsed for decision in decisions if decision.update][1:] == [
        {"ba": 2.0, "ep": 0.5, "sp": 50.0, "tok": 5.0},
        {"ba": 2.0, "ep": 0.5, "sp": 90.0, "tok": 9.0},
    ]


def test_a_checkpoint_holds_the_position_but_not_the_schedule() -> None:
    first = Schedule(start="2ba", end="6ba", interval="2ba")
    assert updates_of(first, 3) == ([2], None)
    second = Schedule(start="2ba", end="9ba", interval="3ba")
    second.load_state_dict(first.state_dict())
    assert updates_of(second, 7) == ([2, 5], 6)  # batches 5 and 8; complete at 9


def test_the_state_is_integers_of_a_fixed_shape() -> None:
    schedule = Schedule(start="2ba", end="3ba", interval="1ba")
    shapes = []
    for _ in range(4):
        state = schedule.state_dict()
        assert all(type(number) is int for numbers in state.values() for number in numbers)
        shapes.append({key: len(numbers) for key, numbers in state.items()})
        schedule.step(samples=3)
    assert all(shape == shapes[0] for shape in shapes)


def test_dur_counts_as_the_unit_of_max_duration() -> None:
    schedule = Schedule(start="0.5dur", end="5tok", interval="1ba", max_duration="2ep")
    assert schedule.units == {"ep", "tok", "ba"}


def test_epochs_are_unknown_until_one_ends() -> None:
    schedule = Schedule(start="0.5dur", end="5tok", interval="1ba", max_duration="2ep")
    schedule.step(tokens=0)
    assert schedule.epochs_unknown
    schedule.end_epoch()
    assert not schedule.epochs_unknown


@pytest.mark.parametrize(
    "arguments",
    [{"start": "1ep", "interval": "1ep", "steps_per_epoch": 3}, {"start": "1ba", "interval": "1ba"}],
    ids=["steps_per_epoch", "no epochs"],
)
def test_epochs_are_known(arguments: dict[str, Any]) -> None:
    assert not Schedule(end=None, max_duration="2ep", **arguments).epochs_unknown


def test_undo_update_makes_the_update_due_again() -> None:
    schedule = Schedule(start="2ba", end="3ba", interval="1ba")
    schedule.step()
    for decision in ((True, False), (True, True)):
        before = schedule.state_dict()
        assert schedule.step()[:2] == decision
        schedule.undo_update(before)
        assert (schedule.first_update, schedule.completed) == (None, False)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("3ep", Fraction(3), "ep"),
        ("1e6sp", Fraction(10**6), "sp"),
        ("2E+9tok", Fraction(2 * 10**9), "tok"),
        ("0.7dur", Fraction(7, 10), "dur"),
        (".5dur", Fraction(1, 2), "dur"),
        ("1.dur", Fraction(1), "dur"),
        ("25e-1ba", Fraction(5, 2), "ba"),
        (" 500ba ", Fraction(500), "ba"),
    ],
)
def test_time_strings(text: str, value: Fraction, unit: str) -> None:
    assert Time.parse(text, "swa_start") == Time(value, unit)


def test_counts_may_be_integer_tensors() -> None:
    schedule = Schedule(start="2ba", end="8ba", interval="1ba")
    schedule.step(samples=torch.tensor(32), tokens=torch.tensor(0))  # type: ignore[arg-type]
    assert schedule.now == Progress(batches=1, samples=32)
