"""The schedule updates and completes when a slow, obvious reference does, in every mixture of units."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from dist_swa.schedule import Progress, Schedule, Time

UNITS = ["ep", "ba", "sp", "tok", "dur"]
STEPS_PER_EPOCH = 7


class Event(NamedTuple):
    """A step with its samples and tokens, or the end of an epoch."""

    samples: int = 0
    tokens: int = 0
    ends_epoch: bool = False


class Outcome(NamedTuple):
    """What a check decides, and with an update the training since the one before."""

    update: bool = False
    complete: bool = False
    elapsed: dict[str, float] | None = None


@dataclass(frozen=True)
class Arguments:
    """Of a schedule: times as a number and a unit."""

    start: tuple[str, str]
    end: tuple[str, str] | None
    interval: tuple[str, str]
    max_duration: tuple[str, str]
    steps_per_epoch: int | None

    def schedule(self) -> Schedule:
        return Schedule(
            start="".join(self.start),
            end=None if self.end is None else "".join(self.end),
            interval="".join(self.interval),
            max_duration="".join(self.max_duration),
            steps_per_epoch=self.steps_per_epoch,
        )


def reference(arguments: Arguments, events: Sequence[Event]) -> Iterator[Outcome]:
    """Yield what each event leads to, read off the words of the documentation."""
    (start, start_unit), (every, every_unit) = arguments.start, arguments.interval
    length, length_unit = arguments.max_duration
    spe = arguments.steps_per_epoch
    totals = dict.fromkeys(["ep", "ba", "sp", "tok"], Fraction(0))
    last = totals
    checks, due, complete = 0, Fraction(0), False
    for event in events:
        totals = dict(totals)
        if event.ends_epoch:
            totals["ep"] += 1
        else:
            totals["ba"] += 1
            totals["sp"] += event.samples
            totals["tok"] += event.tokens
            if spe is not None:
                totals["ep"] = totals["ba"] / spe
        position = totals | {"dur": totals[length_unit] / Fraction(length)}

        epoch_is_over = event.ends_epoch if spe is None else totals["ba"] % spe == 0
        is_check = epoch_is_over if every_unit == "ep" else not event.ends_epoch
        if complete or not is_check or position[start_unit] < Fraction(start):
            yield Outcome()
            continue
        if every_unit in ("ba", "ep"):
            update = checks % Fraction(every) == 0
        else:
            if checks == 0:
                due = position[every_unit]
            update = position[every_unit] >= due
            while due <= position[every_unit]:
                due += Fraction(every)
        checks += 1
        if arguments.end is not None:
            end, end_unit = arguments.end
            complete = position[end_unit] >= Fraction(end)
        elapsed = {unit: float(totals[unit] - last[unit]) for unit in totals} if update and last["ba"] else None
        if update:
            last = totals
        yield Outcome(update, complete, elapsed)


def outcomes(schedule: Schedule, events: Sequence[Event]) -> Iterator[Outcome]:
    """Yield what `schedule` decides at each event."""
    for event in events:
        had_update = schedule.first_update is not None
        if event.ends_epoch:
            decision = schedule.end_epoch()
        else:
            decision = schedule.step(samples=event.samples, tokens=event.tokens)
        yield Outcome(decision.update, decision.complete, decision.elapsed if decision.update and had_update else None)


def some_events(random: Random, num_steps: int, steps_per_epoch: int | None) -> list[Event]:
    """A run with another batch every step; epochs end where the schedule does not count them itself."""
    events: list[Event] = []
    for step in range(1, num_steps + 1):
        events.append(Event(random.choice([0, 1, 3, 8, 8, 25]), random.choice([10, 64, 64, 101, 700])))
        if steps_per_epoch is None and step % STEPS_PER_EPOCH == 0:
            events.append(Event(ends_epoch=True))
    return events


# About 60 steps, 8.5 epochs, 450 samples and 11000 tokens long; every start is before every end.
STARTS = {
    "ep": ["0", "1", "2.5", "4"],
    "ba": ["0", "1", "20", "20.5"],
    "sp": ["0", "99", "1.5e2"],
    "tok": ["0", "3e3", "2500.5"],
    "dur": ["0", "0.25", ".33"],
}
ENDS = {
    "ep": ["5", "6.25", "100"],
    "ba": ["29", "50", "50.1", "100"],
    "sp": ["200", "3.3e2", "1e6"],
    "tok": ["5e3", "9000.5", "1e6"],
    "dur": ["0.6", "0.97", "1"],
}
INTERVALS = {
    "ep": ["1", "2", "3"],
    "ba": ["1", "3", "5", "1e1"],
    "sp": ["1", "8", "20", "33.3", "100"],
    "tok": ["64", "1e2", "999.5", "2e3"],
    "dur": ["0.01", "0.1", "0.33"],
}
DURATIONS = {"ep": ["8", "8.5"], "ba": ["60", "57"], "sp": ["450"], "tok": ["1.1e4"]}


def some_arguments(random: Random, interval_unit: str, steps_per_epoch: int | None) -> Iterator[Arguments]:
    def pick(times: dict[str, list[str]], unit: str) -> tuple[str, str]:
        return random.choice(times[unit]), unit

    for start_unit in UNITS:
        for end_unit in [*UNITS, None]:
            for duration_unit in DURATIONS:
                yield Arguments(
                    pick(STARTS, start_unit),
                    None if end_unit is None else pick(ENDS, end_unit),
                    pick(INTERVALS, interval_unit),
                    pick(DURATIONS, duration_unit),
                    steps_per_epoch,
                )


@pytest.mark.parametrize("steps_per_epoch", [None, STEPS_PER_EPOCH])
@pytest.mark.parametrize("interval_unit", UNITS)
def test_every_mixture_of_units_is_the_reference(interval_unit: str, steps_per_epoch: int | None) -> None:
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
def test_restored_position_has_the_same_future(interval_unit: str, steps_per_epoch: int | None) -> None:
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


# Composer 0.32.1, 8 batches an epoch


def updates_of(schedule: Schedule, num_batches: int, *, batches_per_epoch: int = 8) -> tuple[list[int], int | None]:
    """After which batches the average is updated, and after which one it is complete."""
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


def test_end_that_composer_never_reaches() -> None:
    schedule = Schedule(start="0.7dur", end="0.97dur", interval="1ba", max_duration="8ep", steps_per_epoch=8)
    assert updates_of(schedule, 64) == (list(range(45, 64)), 63)  # 44.8 and 62.08 batches


# Single facts


@pytest.mark.parametrize("percent", range(1, 100))
def test_fractions_are_exact(percent: int) -> None:
    """In floating point 0.57 * 100 is 56.99..., 0.29 * 100 28.99..., and 0.07 * 100 is above 7."""
    schedule = Schedule(start=f"{percent / 100}dur", end=None, interval="1ba", max_duration="100ba")
    assert updates_of(schedule, 100) == (list(range(percent, 101)), None)


def test_without_an_end_updates_go_on_beyond_the_duration() -> None:
    schedule = Schedule(start="0.5dur", end=None, interval="10ba", max_duration="20ba")
    assert updates_of(schedule, 50) == ([10, 20, 30, 40, 50], None)
    assert not schedule.completed


def test_start_of_zero_updates_at_the_first_check() -> None:
    assert updates_of(Schedule(start="0ba", end="1ba", interval="5ba"), 9) == ([1], 1)
    assert updates_of(Schedule(start="0ep", end=None, interval="2ep", steps_per_epoch=3), 12) == ([3, 9], None)


def test_one_step_over_many_intervals_updates_once() -> None:
    schedule = Schedule(start="0sp", end=None, interval="10sp")
    steps = [3, 9, 1, 100, 1, 8, 2, 0]  # 3 12 13 113 114 122 124 124; due at 3, 13, 23, ..., 113, 123
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


def test_position_is_the_checkpoints_and_the_schedule_the_constructors() -> None:
    first = Schedule(start="2ba", end="6ba", interval="2ba")
    assert updates_of(first, 3) == ([2], None)
    second = Schedule(start="2ba", end="9ba", interval="3ba")
    second.load_state_dict(first.state_dict())
    assert updates_of(second, 7) == ([2, 5], 6)  # batches 5 and 8; complete at 9


def test_state_is_whole_numbers_of_a_fixed_shape() -> None:
    schedule = Schedule(start="2ba", end="3ba", interval="1ba")
    shapes = []
    for _ in range(4):
        state = schedule.state_dict()
        assert all(type(number) is int for numbers in state.values() for number in numbers)
        shapes.append({key: len(numbers) for key, numbers in state.items()})
        schedule.step(samples=3)
    assert all(shape == shapes[0] for shape in shapes)


def test_units_and_blindness_to_epochs() -> None:
    schedule = Schedule(start="0.5dur", end="5tok", interval="1ba", max_duration="2ep")
    assert schedule.units == {"ep", "tok", "ba"}
    schedule.step(tokens=0)
    assert schedule.epochs_unknown
    schedule.end_epoch()
    assert not schedule.epochs_unknown
    assert not Schedule(start="1ep", end=None, interval="1ep", steps_per_epoch=3).epochs_unknown
    assert not Schedule(start="1ba", end=None, interval="1ba", max_duration="2ep").epochs_unknown


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


# Bad input

GOOD: dict[str, Any] = {"start": "2ba", "end": "8ba", "interval": "1ba"}
NAMES = {"start": "swa_start", "end": "swa_end", "interval": "update_interval", "max_duration": "max_duration"}


@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "ba",
        "5 ba",
        "-1ba",
        "+1ba",
        "1e999999ba",
        "1_0ba",
        "0x1ba",
        "1,5ba",
        "5s",
        "5BA",
        "nanba",
        "infba",
        "٣ba",
    ],
)
def test_unreadable_times(argument: str, text: str) -> None:
    message = f"{NAMES[argument]} needs a number and a unit of ep, ba, sp, tok, dur, got {NAMES[argument]}={text!r}; "
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(**GOOD | {argument: text})


@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize("value", [5, 0.7, b"5ba", Fraction(1, 2)])
def test_times_are_strings(argument: str, value: object) -> None:
    message = f"{NAMES[argument]} needs a time string, got {NAMES[argument]}={value!r}; write '3ep'"
    with pytest.raises(TypeError, match=re.escape(message)):
        Schedule(**GOOD | {argument: value})


@pytest.mark.parametrize("argument", ["start", "end", "interval"])
def test_fractions_above_one(argument: str) -> None:
    message = f"{NAMES[argument]} needs a fraction in [0, 1] before 'dur', got {NAMES[argument]}='1.01dur'; "
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(**GOOD | {"max_duration": "90ba", argument: "1.01dur"})


@pytest.mark.parametrize(
    ("arguments", "start", "end"),
    [
        ({"start": "8ba", "end": "8ba"}, "8ba", "8ba"),
        ({"start": "9sp", "end": "8sp"}, "9sp", "8sp"),
        ({"start": "0.5dur", "end": "0.5dur", "max_duration": "9tok"}, "0.5dur", "0.5dur"),
        ({"start": "0.5dur", "end": "50ba", "max_duration": "100ba"}, "0.5dur", "50ba"),
        ({"start": "51ba", "end": "0.5dur", "max_duration": "100ba"}, "51ba", "0.5dur"),
        ({"start": "3ep", "end": "0.3dur", "max_duration": "10ep"}, "3ep", "0.3dur"),
        ({"start": "2ep", "end": "16ba", "steps_per_epoch": 8}, "2ep", "16ba"),
        ({"start": "16ba", "end": "1.9ep", "steps_per_epoch": 8}, "16ba", "1.9ep"),
        ({"start": "0.5dur", "end": "40ba", "max_duration": "10ep", "steps_per_epoch": 8}, "0.5dur", "40ba"),
        ({"start": "5ep", "end": "0.5dur", "max_duration": "80ba", "steps_per_epoch": 8}, "5ep", "0.5dur"),
    ],
)
def test_start_at_or_after_end(arguments: dict[str, Any], start: str, end: str) -> None:
    message = f"swa_start needs to be before swa_end, got swa_start={start}, swa_end={end}; move one"
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(**GOOD | arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": "9ep", "end": "8ba"},
        {"start": "9sp", "end": "8tok"},
        {"start": "0.9dur", "end": "1ba", "max_duration": "10ep"},
        {"start": "2ep", "end": "17ba", "steps_per_epoch": 8},
        {"start": "0.49dur", "end": "50ba", "max_duration": "100ba"},
    ],
)
def test_start_before_end_or_not_comparable(arguments: dict[str, Any]) -> None:
    Schedule(**GOOD | arguments)


def test_start_too_large_for_a_float_is_an_error_like_others() -> None:
    with pytest.raises(ValueError, match="swa_start needs to be before swa_end"):
        Schedule(**GOOD | {"start": "1e999ba"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": "0ba"}, "update_interval needs to be above 0, got update_interval=0ba; write '1ba'"),
        ({"interval": "0.0tok"}, "update_interval needs to be above 0, got update_interval=0.0tok; "),
        (
            {"interval": "1.5ba"},
            "update_interval needs whole numbers of ba and ep, got update_interval=1.5ba; round it",
        ),
        ({"interval": "25e-1ep"}, "update_interval needs whole numbers of ba and ep, got update_interval=25e-1ep; "),
        (
            {"start": "0.5dur"},
            "a schedule in 'dur' needs max_duration, got max_duration=None; pass the length of the run",
        ),
        ({"end": "0.5dur"}, "a schedule in 'dur' needs max_duration, got max_duration=None; "),
        ({"interval": "0.5dur"}, "a schedule in 'dur' needs max_duration, got max_duration=None; "),
        ({"max_duration": "1dur"}, "max_duration needs a length above 0 in ep, ba, sp or tok, got max_duration=1dur"),
        ({"max_duration": "0ep"}, "max_duration needs a length above 0 in ep, ba, sp or tok, got max_duration=0ep"),
        *(
            (
                {"steps_per_epoch": value},
                f"steps_per_epoch needs a whole number >= 1, got steps_per_epoch={value}; count the batches",
            )
            for value in (0, -8, 8.0, "8", math.nan)
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(**GOOD | arguments)


@pytest.mark.parametrize("argument", ["start", "end", "interval", "max_duration"])
@pytest.mark.parametrize(("unit", "name"), [("sp", "samples"), ("tok", "tokens")])
def test_steps_need_what_the_schedule_counts(argument: str, unit: str, name: str) -> None:
    arguments = {"start": "0.1dur", "end": None, "interval": "1ba", "max_duration": "100ba"}
    schedule = Schedule(**arguments | {argument: f"5{unit}"})  # type: ignore[arg-type]
    schedule.step(samples=3, tokens=30)
    before = schedule.state_dict()
    others = {"samples": 3, "tokens": 30}
    del others[name]
    message = f"step needs {name} for a schedule in {unit!r}, got {name}=None; pass their sum over all ranks"
    with pytest.raises(ValueError, match=re.escape(message)):
        schedule.step(**others)
    assert schedule.state_dict() == before


@pytest.mark.parametrize("name", ["samples", "tokens"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "step needs {name} >= 0, got {name}=-1; pass their sum over all ranks"),
        (32.0, TypeError, "step needs whole {name}, got {name}=32.0; pass their sum over all ranks"),
        (0.0, TypeError, "step needs whole {name}, got {name}=0.0; "),
        (math.nan, TypeError, "step needs whole {name}, got {name}=nan; "),
        ("32", TypeError, "step needs whole {name}, got {name}='32'; "),
        ("", TypeError, "step needs whole {name}, got {name}=''; "),
    ],
)
def test_bad_counts_count_nothing(name: str, value: Any, error: type[Exception], message: str) -> None:
    schedule = Schedule(**GOOD)
    schedule.step(samples=3, tokens=30)
    before = schedule.state_dict()
    with pytest.raises(error, match=re.escape(message.format(name=name))):
        schedule.step(**{"samples": 3, "tokens": 30} | {name: value})
    assert schedule.state_dict() == before


def test_counts_may_be_integer_tensors() -> None:
    schedule = Schedule(**GOOD)
    schedule.step(samples=torch.tensor(32), tokens=torch.tensor(0))  # type: ignore[arg-type]
    assert schedule.now == Progress(batches=1, samples=32)


def test_end_epoch_with_steps_per_epoch() -> None:
    schedule = Schedule(**GOOD, steps_per_epoch=8)
    message = "end_epoch needs a schedule that does not count epochs, got steps_per_epoch=8; leave out one of the two"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        schedule.end_epoch()
    assert schedule.now == Progress()
