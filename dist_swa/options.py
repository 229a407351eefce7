"""Checks of the options of `SWA` and `finalize`, for adapters that get them before there is a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from dist_swa.averaging.checks import check_storage
from dist_swa.batch_norm.recalibrate import check_arguments, recalibrate_batch_norm
from dist_swa.lr_phase import check_phase
from dist_swa.schedule import Schedule
from dist_swa.sharding.fqn import check_pattern
from dist_swa.sharding.model import check_group
from dist_swa.swa import SWA, checked_schedule


def check_options(options: Mapping[str, Any], also: Iterable[str] = ()) -> Schedule:
    """Raise what `SWA` of any model would raise for its keyword arguments `options`, and return their schedule. Local.

    For an adapter that takes the options before there is a model. Without `max_duration` the length of the run is
    unknown. `also` are further names that the adapter takes. The schedule makes no steps.
    """
    values = _with_defaults(SWA, options, also)
    check_phase(values["schedule_swa_lr"], values["swa_lr"], values["anneal_strategy"], values["anneal_steps"])
    check_storage(values["dtype"], values["device"])
    check_group(values["process_group"])
    check_pattern(values["buffers"], "buffers")
    if values["parameters"] is not None:
        check_pattern(values["parameters"], "parameters")
    return checked_schedule(**values, is_length_known=values["max_duration"] is not None)


def check_options_of_trainer(name: str, options: Mapping[str, Any], also: Iterable[str] = ()) -> None:
    """`check_options` for the adapter `name` of a trainer that counts neither samples nor tokens."""
    if units := sorted(check_options(options, also).units & {"sp", "tok"}):
        raise ValueError(f"{name} needs a schedule in ep, ba or dur, got {units=}; write '500ba' or '0.7dur'")


def check_finalize_options(options: Mapping[str, Any]) -> None:
    """Raise what `recalibrate_batch_norm` of any model would raise for its keyword arguments `options`. Local."""
    if not isinstance(options, Mapping):
        raise TypeError(
            f"finalize_options needs a mapping, got finalize_options={options!r}; pass a dict such as"
            " {'max_batches': 100}"
        )
    values = _with_defaults(recalibrate_batch_norm, options)
    check_arguments((), values["forward"], values["max_batches"], values["layerwise"])
    if values["skip"] is not None:
        check_pattern(values["skip"], "skip")


def _with_defaults(function: Any, options: Mapping[str, Any], also: Iterable[str] = ()) -> dict[str, Any]:
    """Return all keyword-only arguments of `function`. TypeError for a name that it does not have, unless in `also`."""
    defaults = {
        one.name: one.default for one in signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY
    }
    known = [*defaults, *also]
    for name in [one for one in options if one not in known]:
        close = get_close_matches(name, known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"the options are {', '.join(known)}"
        raise TypeError(f"{function.__name__} needs options that it knows, got {name}={options[name]!r}; {advice}")
    return {**defaults, **options}
