"""A slow reference implementation of the schedule, and random runs for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import NamedTuple

from dist_swa.schedule import Schedule

UNITS = ["ep", "ba", "sp", "tok", "dur"]
STEPS_PER_EPOCH = 7


class Event(NamedTuple):
    """One step with its samples and tokens, or the end of an epoch."""

    samples: int = 0
    tokens: int = 0
    ends_epoch: bool = False


class Outcome(NamedTuple):
    """The decision of a check. `elapsed` is set for all updates but the first."""

    update: bool = False
    complete: bool = False
    elapsed: dict[str, float] | None = None


@dataclass(frozen=True)
class Arguments:
    """The arguments of a schedule, each time as a number and a unit."""

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
    """Yield the outcome of each event, as the documentation of `Schedule` describes it."""
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
    """Yield the decision of `schedule` at each event."""
    for event in events:
        had_update = schedule.first_update is not None
        if event.ends_epoch:
            decision = schedule.end_epoch()
        else:
            decision = schedule.step(samples=event.samples, tokens=event.tokens)
        yield Outcome(decision.update, decision.complete, decision.elapsed if decision.update and had_update else None)


def some_events(random: Random, num_steps: int, steps_per_epoch: int | None) -> list[Event]:
    """Return a run with random batches. Epochs end explicitly unless the schedule counts them itself."""
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
