"""Metrics of trained and averaged weights from a Hugging Face Trainer, in one log entry and one event."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

Metrics = dict[str, Any]
_EVENTS = ("on_log", "on_evaluate")


def is_of_average(metric: str) -> bool:
    """Whether `metric`, as in `metric_for_best_model`, is one of the averaged weights."""
    return metric.removeprefix("eval_").startswith("swa_")


class Names(NamedTuple):
    """The names of the metrics of one pass over the evaluation data."""

    prefix: str  # of the evaluation: "eval"
    weights: str  # "trained", "averaged", or "both" where the averaged weights are the trained ones

    @property
    def prefix_of_pass(self) -> str:
        return f"{self.prefix}_swa" if self.weights == "averaged" else self.prefix

    def apply(self, metrics: Mapping[str, Any]) -> Metrics:
        """Return `metrics` with the names that they have in the results."""
        if self.weights == "trained":
            return dict(metrics)
        averaged = {self._of_average(name): value for name, value in metrics.items()}
        return averaged if self.weights == "averaged" else {**metrics, **averaged}

    def _of_average(self, name: str) -> str:
        for prefix in (f"{self.prefix}_", "eval_"):  # a Trainer may write "eval_" with any prefix
            if name.startswith(prefix):
                return name if name.startswith(f"{prefix}swa_") else f"{prefix}swa_{name.removeprefix(prefix)}"
        return name


class Recorded(NamedTuple):
    """What one pass has logged, and the metrics of its events."""

    on_log: list[Metrics]
    on_evaluate: list[Metrics]


@contextmanager
def recorded(trainer: Any, names: Names) -> Iterator[Recorded]:
    """Record what is logged, and the events with metrics, instead of passing them on."""
    found, handler, history = Recorded([], []), trainer.callback_handler, trainer.state.log_history
    first = len(history)
    for event in _EVENTS:
        setattr(handler, event, _recorder(getattr(found, event), names))
    try:
        yield found
    finally:
        for event in _EVENTS:
            delattr(handler, event)
        del history[first:]


def _recorder(found: list[Metrics], names: Names) -> Callable[..., Any]:
    def record(args: Any, state: Any, control: Any, *metrics: Metrics, **named: Metrics) -> Any:
        found.append(names.apply([*metrics, *named.values()][0]))
        return control

    return record


def merged(passes: Sequence[Sequence[Metrics]]) -> list[Metrics]:
    """Return the first metrics of all passes in one dict, the second ones, and so on: one for each dataset."""
    return [
        {name: value for metrics in of_passes for name, value in metrics.items()}
        for of_passes in zip_longest(*passes, fillvalue={})
    ]
