"""A schedule that a run does not meet is told of once, as soon as it can be known; a correct run warns of nothing."""

import warnings
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from torch import nn

from dist_swa import EMA, SWA
from dist_swa.schedule import Progress, Schedule, Time

EPOCH = 4  # steps


def swa_with(**options: Any) -> SWA:
    return SWA(nn.Linear(2, 2), **options)


def steps_that_warn(swa: SWA, num_steps: int, message: str, **counts: int) -> list[int]:
    """Return the steps that warn with a text that begins with `message`. Other warnings raise."""
    found = []
    for step in range(1, num_steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            swa.step(**counts)
        assert all(str(warning.message).startswith(message) for warning in caught), caught
        assert all(warning.filename == __file__ for warning in caught)
        found += [step] * len(caught)
    return found


# --- A start after the end of the run


@pytest.mark.parametrize(
    ("swa_start", "max_duration", "steps_per_epoch"),
    [("4ba", "3ba", None), ("4ep", "3ep", None), ("2.1ep", "8ba", EPOCH), ("9ba", "2ep", EPOCH), ("9sp", "8sp", None)],
)
def test_a_start_after_max_duration_warns_once_at_construction(
    swa_start: str, max_duration: str, steps_per_epoch: int | None
) -> None:
    message = rf"averaging never starts: .* got swa_start={swa_start}, max_duration={max_duration}, .*; start earlier"
    with pytest.warns(UserWarning, match=message) as warned:
        swa = swa_with(swa_start=swa_start, max_duration=max_duration, steps_per_epoch=steps_per_epoch)
    assert len(warned) == 1
    swa.step(samples=1)


@pytest.mark.parametrize(
    ("swa_start", "max_duration", "steps_per_epoch"),
    [("3ba", "3ba", None), ("3ep", "3ep", EPOCH), ("1dur", "9ba", None), ("9ep", "8ba", None), ("9tok", "8sp", None)],
)
def test_a_start_that_may_be_reached_does_not_warn(
    swa_start: str, max_duration: str, steps_per_epoch: int | None
) -> None:
    swa_with(swa_start=swa_start, max_duration=max_duration, steps_per_epoch=steps_per_epoch)


def averages(schedule: Schedule) -> bool:
    """Whether a run of `schedule` that ends at `max_duration` averages a model."""
    while schedule._at(schedule.now, "dur") < 1:
        schedule.step()
        if schedule.steps_per_epoch is None and schedule.now.batches % EPOCH == 0:
            schedule.end_epoch()
    return schedule.first_update is not None


STARTS = ("0.7dur", "1dur", "0.1dur", "1ep", "2ep", "2.5ep", "3ep", "0ep", "7ba", "9ba", "10ba", "0ba")
LENGTHS = ("1ep", "2ep", "3ep", "2.5ep", "10ba", "8ba", "3ba")
CASES = [
    (start, length, interval, steps_per_epoch)
    for start, length, interval, steps_per_epoch in product(STARTS, LENGTHS, ("1ba", "1ep"), (None, EPOCH))
    if length != "2.5ep" or steps_per_epoch is not None  # no run ends there, if epochs count when they end
]


@pytest.mark.parametrize(("start", "length", "interval", "steps_per_epoch"), CASES)
def test_the_first_step_warns_where_no_update_of_the_run_comes_after_the_start(
    start: str, length: str, interval: str, steps_per_epoch: int | None
) -> None:
    arguments: dict[str, Any] = {"start": start, "end": None, "interval": interval, "max_duration": length}
    arguments["steps_per_epoch"] = steps_per_epoch
    schedule = Schedule(**arguments)
    unit, unit_of_length = (schedule._comparable(time)[1] for time in (schedule.start, Time.parse(length, "")))
    is_known = unit == unit_of_length and (interval == "1ba" or steps_per_epoch is not None or unit == "ep")
    schedule.unmet()
    schedule.step()
    assert len(schedule.unmet(Progress())) <= 1
    has_warned, is_averaged = "start" in schedule.told, averages(Schedule(**arguments))
    assert not (has_warned and is_averaged)
    assert has_warned or is_averaged or not is_known


def test_the_defaults_in_a_run_of_three_epochs_that_nobody_counts_warn_at_the_first_step() -> None:
    swa = swa_with(max_duration="3ep")
    assert steps_that_warn(swa, 3, "averaging never starts: swa_start needs to come before the last update") == [1]


def test_an_average_that_has_started_does_not_warn_that_it_never_starts() -> None:
    first, later = swa_with(swa_start="1ba"), swa_with(swa_start="2.5ep", max_duration="3ep")
    first.step()
    later.load_state_dict(first.state_dict())
    assert steps_that_warn(later, 1, "") == []


# --- Epochs that nobody counts

NOBODY = "schedule or rule read epochs, and no epoch has ended in {} steps; pass steps_per_epoch=, or call end_epoch()"
UNCOUNTED: dict[str, tuple[dict[str, Any], int]] = {  # arguments, and the step that warns
    "interval": ({"swa_start": "2ba", "update_interval": "1ep"}, 2),
    "end": ({"swa_start": "0.5dur", "max_duration": "8ba", "swa_end": "2ep"}, 4),
    "rule": ({"swa_start": "3sp", "rule": EMA(half_life="1ep")}, 3),
    "rule, from the start": ({"swa_start": "0ba", "rule": EMA(half_life="1ep")}, 2),
    "start, told at swa_end": ({"swa_start": "1ep", "swa_end": "5ba"}, 6),
}


@pytest.mark.parametrize("case", UNCOUNTED)
def test_epochs_that_nobody_counts_warn_once_when_it_can_be_known(case: str) -> None:
    options, step = UNCOUNTED[case]
    assert steps_that_warn(swa_with(**options), 7, NOBODY.format(step), samples=1) == [step]


@pytest.mark.parametrize("options", [{"swa_start": "1ep"}, {"swa_start": "0ba", "update_interval": "1ep"}])
def test_epochs_that_nobody_counts_warn_after_max_duration(options: dict[str, Any]) -> None:
    swa = swa_with(max_duration="3ba", **options)
    assert steps_that_warn(swa, 3, "") == []
    with pytest.warns(UserWarning, match="max_duration|no epoch") as warned:
        swa.step()
    over, nobody = sorted(str(warning.message) for warning in warned)
    assert over.startswith("max_duration=3ba was reached")
    assert nobody.startswith(NOBODY.format(4))
    assert steps_that_warn(swa, 3, "") == []


@pytest.mark.parametrize("options", [options for options, _ in UNCOUNTED.values()], ids=UNCOUNTED)
@pytest.mark.parametrize("counts_steps", [True, False])
def test_epochs_that_somebody_counts_do_not_warn(options: dict[str, Any], counts_steps: bool) -> None:
    swa = swa_with(**options, steps_per_epoch=3 if counts_steps else None)
    for _ in range(6):
        swa.step(samples=1)
        if not counts_steps:
            swa.end_epoch()


def test_a_half_life_in_epochs_with_an_update_at_the_end_of_each_does_not_warn() -> None:
    swa = swa_with(swa_start="0ba", update_interval="1ep", rule=EMA(half_life="1ep"))
    for _ in range(2):
        for _ in range(3):
            swa.step()
        swa.end_epoch()
    assert swa.num_averaged == 2


def test_finalize_says_that_the_start_came_after_the_last_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swa = swa_with(max_duration="3ep")
        for _ in range(3):
            swa.step()
            swa.end_epoch()
    with pytest.warns(UserWarning, match=r"in 3 steps: swa_start=0.7dur was only reached after the last step"):
        swa.finalize()


# --- Steps after max_duration


@pytest.mark.parametrize(
    ("max_duration", "steps_per_epoch", "step"),
    [("3ba", None, 4), ("10sp", None, 4), ("12sp", None, 4), ("13sp", None, 5), ("9tok", None, 2), ("2ep", 2, 5)],
)
@pytest.mark.parametrize("swa_end", [None, "2ba"])
def test_a_step_after_max_duration_warns_once(
    max_duration: str, steps_per_epoch: int | None, step: int, swa_end: str | None
) -> None:
    options: dict[str, Any] = {"max_duration": max_duration, "swa_start": "1ba", "swa_end": swa_end}
    swa = swa_with(**options, steps_per_epoch=steps_per_epoch)
    assert steps_that_warn(swa, 8, f"max_duration={max_duration} was reached", samples=4, tokens=9) == [step]
    assert (swa.schedule.now.batches, swa.num_averaged) == (8, 8 if swa_end is None else 2)
    resumed = swa_with(**options, steps_per_epoch=steps_per_epoch)
    resumed.load_state_dict(swa.state_dict())
    assert steps_that_warn(resumed, 3, f"max_duration={max_duration} was reached", samples=4, tokens=9) == [1]


def test_a_step_after_the_last_epoch_warns_once() -> None:
    swa = swa_with(max_duration="2ep", swa_start="1ep")
    for _ in range(2):
        assert steps_that_warn(swa, 2, "") == []
        swa.end_epoch()
    assert steps_that_warn(swa, 2, "max_duration=2ep was reached before step 5; pass the length") == [1]


def test_the_end_of_an_epoch_after_max_duration_does_not_warn() -> None:
    swa = swa_with(max_duration="2ba", swa_start="1ba")
    assert steps_that_warn(swa, 2, "") == []
    with warnings.catch_warnings(record=True) as caught:
        swa.end_epoch()
    assert caught == []


def test_a_step_after_finalize_does_not_warn() -> None:
    swa = swa_with(max_duration="2ba", swa_start="1ba")
    for _ in range(2):
        swa.step()
    swa.finalize()
    assert steps_that_warn(swa, 1, "") == []


def test_a_warning_that_is_an_error_keeps_the_step_from_being_counted() -> None:
    swa = swa_with(max_duration="2ba", swa_start="1ba")
    for _ in range(2):
        swa.step()
    before = swa.schedule.state_dict()
    with pytest.raises(UserWarning, match="max_duration=2ba was reached"):
        swa.step()
    assert (swa.schedule.state_dict(), swa.num_averaged) == (before, 2)


def test_an_estimated_duration_puts_a_step_where_it_is_in_the_run() -> None:
    schedule = Schedule(start="0.7dur", end=None, interval="1ba", max_duration="3ep")
    for step, done in enumerate(("0.1", "0.5", "0.69", "0.7"), start=1):
        schedule.estimate_duration(step, Fraction(done))
        assert schedule.step().update == (done == "0.7")
        assert schedule._at(schedule.now, "dur") == Fraction(done)
