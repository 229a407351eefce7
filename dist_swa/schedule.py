"""Time strings, the progress of a run, and the schedule that decides when the average is updated."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from operator import index
from typing import NamedTuple

# Unit of a time string -> field of `Progress`. The unit "dur" is a fraction of max_duration.
UNITS = {"ep": "epochs", "ba": "batches", "sp": "samples", "tok": "tokens"}


@dataclass(frozen=True)
class Time:
    """An exact amount of training, such as ``Time.parse("0.7dur", "swa_start")``."""

    value: Fraction
    unit: str
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str, name: str) -> Time:
        """Parse the time string passed as argument `name`. Raises TypeError or ValueError if it is not valid."""
        if not isinstance(text, str):
            raise TypeError(f"{name} needs a time string, got {name}={text!r}; write '3ep', '500ba' or '0.7dur'")
        match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)(ep|ba|sp|tok|dur)", text.strip(), re.ASCII)
        if match is None:
            raise ValueError(
                f"{name} needs a number and a unit of {', '.join(UNITS)}, dur, got {name}={text!r}; write '0.7dur'"
            )
        time = cls(Fraction(match[1]), match[2], match[0])
        if time.unit == "dur" and time.value > 1:
            raise ValueError(f"{name} needs a fraction in [0, 1] before 'dur', got {name}={text!r}; write '0.7dur'")
        return time

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Progress:
    """The training done so far. `epochs` counts complete epochs."""

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    epochs: int = 0


class Decision(NamedTuple):
    """The result of a check: update the average now? Is averaging complete after that?"""

    update: bool = False
    complete: bool = False
    elapsed: dict[str, float] | None = None  # training since the last update, per unit


class Schedule:
    """Decides after every step or epoch whether to update the average, and whether averaging is complete.

    There is one check after every step, or one at the end of every epoch if `interval` is in epochs. Checks before
    `start` do nothing. The first check after it updates. A later check updates if at least one more multiple of
    `interval`, counted from the first update, has been reached. The first check at or after `end` completes averaging.
    Without `is_length_known` times in "dur" need no `max_duration`. Such a schedule makes no steps.
    """

    def __init__(
        self,
        *,
        start: str,
        end: str | None,
        interval: str,
        max_duration: str | None = None,
        steps_per_epoch: int | None = None,
        rule_units: Iterable[str] = (),
        is_length_known: bool = True,
    ) -> None:
        self.max_duration = None if max_duration is None else Time.parse(max_duration, "max_duration")
        self.start = Time.parse(start, "swa_start")
        self.end = None if end is None else Time.parse(end, "swa_end")
        self.interval = Time.parse(interval, "update_interval")
        self.steps_per_epoch = steps_per_epoch
        self.rule_units = frozenset(rule_units)
        self.told: set[str] = set()  # the kinds of warnings that `unmet` does not return any more
        self._check_arguments(is_length_known)
        self.reset(Progress())

    def reset(self, now: Progress) -> None:
        """Start at `now`, with no update so far."""
        self.now = now
        self.first_update: Progress | None = None
        self.last_update: Progress | None = None
        self.completed = False

    def step(self, *, samples: int | None = None, tokens: int | None = None) -> Decision:
        """Count one optimizer step. `samples` and `tokens` of the step are sums over all ranks."""
        batches = self.now.batches + 1
        is_epoch_end = self.steps_per_epoch is not None and batches % self.steps_per_epoch == 0
        self.now = replace(
            self.now,
            batches=batches,
            epochs=self.now.epochs + is_epoch_end,
            samples=self.now.samples + self._count("sp", samples),
            tokens=self.now.tokens + self._count("tok", tokens),
        )
        return self._check() if is_epoch_end or self.interval.unit != "ep" else Decision()

    def end_epoch(self) -> Decision:
        """Count one epoch. Raises RuntimeError if `steps_per_epoch` already counts them."""
        if self.steps_per_epoch is not None:
            raise RuntimeError(
                f"end_epoch needs a schedule that does not count epochs, got steps_per_epoch={self.steps_per_epoch}"
                "; leave out one of the two"
            )
        self.now = replace(self.now, epochs=self.now.epochs + 1)
        return self._check() if self.interval.unit == "ep" else Decision()

    @property
    def units(self) -> set[str]:
        """The units that the schedule and the rules read. "dur" counts as the unit of `max_duration`."""
        units = {time.unit for time in (self.start, self.end, self.interval) if time is not None}
        units |= self.rule_units
        if "dur" in units and self.max_duration is not None:
            units = units - {"dur"} | {self.max_duration.unit}
        return units

    @property
    def epochs_unknown(self) -> bool:
        """Whether the schedule reads epochs, but no epoch has been counted."""
        return "ep" in self.units and self.steps_per_epoch is None and self.now.epochs == 0

    def why_no_update(self) -> str:
        """Return the reason why no update was due so far."""
        if self.epochs_unknown:
            return "no epoch has ended, got steps_per_epoch=None and no end_epoch call"
        if not self.started:
            return f"swa_start={self.start} was not reached"
        if self.interval.unit != "ep":
            return f"swa_start={self.start} was only reached after the last step, got steps_per_epoch=None"
        return f"no update was made, got update_interval={self.interval}"

    def unmet(self, before: Progress | None = None) -> list[str]:
        """Return warnings about a schedule that this run cannot meet. Each kind is returned once.

        Call it after construction, and with the position `before` after each step.
        """
        found, limit = {}, self.max_duration
        if limit is not None and self.first_update is None and self._starts_after(limit, is_certain=before is None):
            found["start"] = (
                "averaging never starts: swa_start needs to come before the last update of the run, got swa_start="
                f"{self.start}, max_duration={limit}, update_interval={self.interval}, steps_per_epoch="
                f"{self.steps_per_epoch}; start earlier, or pass steps_per_epoch where only end_epoch() counts epochs"
            )
        is_over = before is not None and limit is not None and self._is_reached(limit, before)
        if is_over and (not self.completed or self.end is not None):  # completed without an end: it was finalized
            found["max_duration"] = (
                f"max_duration={limit} was reached before step {self.now.batches}; pass the length of the whole run"
            )
        if before is not None and self.epochs_unknown:
            is_averaging = before.batches > 0 and self._is_reached(self.start, before) and self.interval.unit != "ep"
            has_no_weight = "ep" in self.rule_units and is_averaging  # a model after no epoch
            is_late = not self.started and self.end is not None and self._is_reached(self.end, before)
            if is_over or is_late or has_no_weight or (self.started and self.start.value > 0):
                found["epochs"] = (
                    f"schedule or rule read epochs, and no epoch has ended in {self.now.batches} steps; pass"
                    " steps_per_epoch=, or call end_epoch() after each epoch"
                )
        new = {kind: text for kind, text in found.items() if kind not in self.told}
        self.told |= new.keys()
        return list(new.values())

    def estimate_duration(self, step: int, done: Fraction) -> None:
        """Set `max_duration` to a number of steps of which `step` are the fraction `done`."""
        self.told.add("start")  # an estimate may be wrong
        self.max_duration = Time(step / done, "ba", f"{float(step / done):g}ba")

    def undo_update(self, before: Mapping[str, list[int]]) -> None:
        """Undo the update of the last check. `before` is the state before it. The update is due at the next check."""
        self.first_update, self.last_update = _update_at(before["first_update"]), _update_at(before["last_update"])
        self.completed = self.completed and self.first_update is not None  # without an update nothing is complete

    def state_dict(self) -> dict[str, list[int]]:
        """Return the position as lists of integers of fixed length. -1 stands for an update that has not happened."""
        never = Progress(-1, -1, -1, -1)
        positions = {"now": self.now, "first_update": self.first_update, "last_update": self.last_update}
        state = {key: list(asdict(position or never).values()) for key, position in positions.items()}
        return state | {"completed": [int(self.completed)]}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        """Load the position from `state`. Start, end and interval remain those of the constructor."""
        self.now = Progress(*state["now"])
        self.first_update, self.last_update = _update_at(state["first_update"]), _update_at(state["last_update"])
        self.completed = bool(state["completed"][0])

    def reopen_if_not_over(self) -> bool:
        """Clear `completed` if `end` is later than now: a resumed run may have a later end. True if it was cleared."""
        was_completed, self.completed = self.completed, self.completed and self._is_over()
        return was_completed and not self.completed

    @property
    def started(self) -> bool:
        """Whether `start` has been reached."""
        return self._is_reached(self.start, self.now)

    def _is_over(self) -> bool:
        return self.end is not None and self._is_reached(self.end, self.now)

    def _is_reached(self, time: Time, at: Progress) -> bool:
        return self._at(at, time.unit) >= time.value

    def _starts_after(self, limit: Time, is_certain: bool) -> bool:
        """Whether `start` is known to come after `limit`, or (not `is_certain`) after the last check before it."""
        (start, start_unit), (last, unit) = self._comparable(self.start), self._comparable(limit)
        epoch = {"ep": 1, "ba": self.steps_per_epoch}.get(unit)
        if not is_certain and self.interval.unit == "ep" and epoch is not None:
            last = Fraction(last // epoch * epoch) or Fraction(-1)  # -1: no epoch ends, so there is no check
        elif not is_certain and unit == "ep":  # the last epoch counts after its last step
            last = Fraction(math.ceil(last) - 1)
        return start_unit == unit and start > last

    def _check(self) -> Decision:
        if self.completed or not self.started:
            return Decision()
        first, last = self.first_update or self.now, self.last_update or self.now
        update = self.first_update is None or self._intervals_at(self.now, first) > self._intervals_at(last, first)
        if update:
            self.first_update, self.last_update = first, self.now
        self.completed = self._is_over()
        elapsed = {unit: float(self._at(self.now, unit) - self._at(last, unit)) for unit in UNITS}
        return Decision(update, self.completed, elapsed)

    def _intervals_at(self, progress: Progress, first: Progress) -> int:
        """Return the number of whole intervals from `first` to `progress`."""
        unit = self.interval.unit
        return math.floor((self._at(progress, unit) - self._at(first, unit)) / self.interval.value)

    def _at(self, progress: Progress, unit: str) -> Fraction:
        """Return `progress` in `unit`."""
        if unit == "dur" and self.max_duration is not None:
            return self._at(progress, self.max_duration.unit) / self.max_duration.value
        if unit == "ep" and self.steps_per_epoch is not None:
            return Fraction(progress.batches, self.steps_per_epoch)
        return Fraction(getattr(progress, UNITS[unit]))

    def _count(self, unit: str, value: int | None) -> int:
        name = UNITS[unit]
        if value is None and unit in self.units:
            raise ValueError(
                f"step needs {name} for a schedule in {unit!r}, got {name}=None; pass their sum over all ranks"
            )
        try:
            count = index(0 if value is None else value)
        except TypeError:
            raise TypeError(f"step needs whole {name}, got {name}={value!r}; pass their sum over all ranks") from None
        if count < 0:
            raise ValueError(f"step needs {name} >= 0, got {name}={count}; pass their sum over all ranks")
        return count

    def _check_arguments(self, is_length_known: bool) -> None:
        limit, spe = self.max_duration, self.steps_per_epoch
        if limit is not None and (limit.unit == "dur" or limit.value == 0):
            raise ValueError(
                f"max_duration needs a length above 0 in ep, ba, sp or tok, got max_duration={limit}; write '90ep'"
            )
        if limit is None and is_length_known and "dur" in self.units:
            raise ValueError(
                "a schedule in 'dur' needs max_duration, got max_duration=None; pass the length of the run, as '90ep'"
            )
        if spe is not None and not (isinstance(spe, int) and not isinstance(spe, bool) and spe >= 1):
            raise ValueError(f"steps_per_epoch needs a whole number >= 1, got steps_per_epoch={spe}; count the batches")
        if self.interval.value == 0:
            raise ValueError(f"update_interval needs to be above 0, got update_interval={self.interval}; write '1ba'")
        if self.interval.unit in ("ba", "ep") and self.interval.value.denominator != 1:
            raise ValueError(
                f"update_interval needs whole numbers of ba and ep, got update_interval={self.interval}; round it"
            )
        if self.end is not None:
            (start, start_unit), (end, end_unit) = self._comparable(self.start), self._comparable(self.end)
            if start_unit == end_unit and start >= end:
                raise ValueError(
                    f"swa_start needs to be before swa_end, got swa_start={self.start}, swa_end={self.end}; move one"
                )

    def _comparable(self, time: Time) -> tuple[Fraction, str]:
        """Return `time` as a number and a unit; in batches, or else in the unit of `max_duration`, if possible."""
        value, unit = time.value, time.unit
        if unit == "dur" and self.max_duration is not None:
            value, unit = value * self.max_duration.value, self.max_duration.unit
        if unit == "ep" and self.steps_per_epoch is not None:
            value, unit = value * self.steps_per_epoch, "ba"
        return value, unit


def _update_at(position: Sequence[int]) -> Progress | None:
    return None if position[0] < 0 else Progress(*position)
