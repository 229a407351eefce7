"""Invalid arguments of a schedule and of its steps raise one clear error, and change nothing."""

import math
import re
from fractions import Fraction
from typing import Any

import pytest

from dist_swa.schedule import Progress, Schedule

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
def test_a_string_that_is_not_a_time(argument: str, text: str) -> None:
    message = f"{NAMES[argument]} needs a number and a unit of ep, ba, sp, tok, dur, got {NAMES[argument]}={text!r}; "
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(**GOOD | {argument: text})


@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize("value", [5, 0.7, b"5ba", Fraction(1, 2)])
def test_a_time_that_is_not_a_string(argument: str, value: object) -> None:
    message = f"{NAMES[argument]} needs a time string, got {NAMES[argument]}={value!r}; write '3ep'"
    with pytest.raises(TypeError, match=re.escape(message)):
        Schedule(**GOOD | {argument: value})


@pytest.mark.parametrize("argument", ["start", "end", "interval"])
def test_a_fraction_above_one(argument: str) -> None:
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
def test_a_start_at_or_after_the_end(arguments: dict[str, Any], start: str, end: str) -> None:
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
def test_a_start_before_the_end_or_in_another_unit_is_valid(arguments: dict[str, Any]) -> None:
    Schedule(**GOOD | arguments)


def test_a_start_too_large_for_a_float() -> None:
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
def test_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(**GOOD | arguments)


@pytest.mark.parametrize("argument", ["start", "end", "interval", "max_duration"])
@pytest.mark.parametrize(("unit", "name"), [("sp", "samples"), ("tok", "tokens")])
def test_a_step_needs_what_the_schedule_counts(argument: str, unit: str, name: str) -> None:
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
def test_invalid_counts_change_nothing(name: str, value: Any, error: type[Exception], message: str) -> None:
    schedule = Schedule(**GOOD)
    schedule.step(samples=3, tokens=30)
    before = schedule.state_dict()
    with pytest.raises(error, match=re.escape(message.format(name=name))):
        schedule.step(**{"samples": 3, "tokens": 30} | {name: value})
    assert schedule.state_dict() == before


def test_end_epoch_with_steps_per_epoch() -> None:
    schedule = Schedule(**GOOD, steps_per_epoch=8)
    message = "end_epoch needs a schedule that does not count epochs, got steps_per_epoch=8; leave out one of the two"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        schedule.end_epoch()
    assert schedule.now == Progress()
