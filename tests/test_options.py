"""`check_options`, `check_finalize_options`: an adapter finds bad options of `SWA` before there is a model."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from dist_swa import EMA, SWA, Equal, Window, recalibrate_batch_norm
from dist_swa.options import check_finalize_options, check_options

WRONG: dict[str, dict[str, Any]] = {
    "time": {"swa_start": "abc"},
    "type of a time": {"swa_start": 3},
    "interval": {"update_interval": "0ba"},
    "end": {"swa_start": "5ba", "swa_end": "5ba"},
    "end of a known run": {"swa_start": "50ba", "swa_end": "0.5dur", "max_duration": "100ba"},
    "length": {"max_duration": "0ba"},
    "steps_per_epoch": {"steps_per_epoch": 0},
    "rule": {"rule": 3},
    "rules": {"rule": {}},
    "name of a rule": {"rule": {"a b": Equal()}},
    "transfer": {"transfer": "ema"},
    "transfer of several": {"rule": {"swa": Equal(), "ema": EMA(0.9)}},
    "swa_lr without a phase": {"swa_lr": 0.1},
    "swa_lr": {"schedule_swa_lr": True, "swa_lr": -0.1},
    "anneal_strategy": {"anneal_strategy": "cubic"},
    "anneal_steps": {"anneal_steps": 0},
    "dtype": {"dtype": torch.int32},
    "device": {"device": "meta"},
    "buffers": {"buffers": 3},
    "parameters": {"parameters": [["*"], 3]},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_for_every_model_raises_as_swa_does(case: str) -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises((TypeError, ValueError)) as error:
        SWA(model, torch.optim.SGD(model.parameters()), **{"max_duration": "100ba"} | WRONG[case])
    with pytest.raises(type(error.value), match=f"^{re.escape(str(error.value))}$"):
        check_options(WRONG[case])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"swa_start": "2ep", "swa_end": "0.7dur"},
        {"swa_start": "500ba", "swa_end": "0.7dur"},
        {"schedule_swa_lr": True, "swa_lr": [0.1, 0.2]},
        {"rule": {"swa": Equal(), "last": Window(2)}, "transfer": "swa"},
        {"parameters": "head.*", "buffers": ["*.count", str.isidentifier]},
    ],
)
def test_what_a_model_or_a_length_may_fit_does_not_raise(options: dict[str, Any]) -> None:
    check_options(options)


def test_the_units_of_the_schedule_are_returned() -> None:
    options = {"swa_start": "0.5dur", "update_interval": "9sp", "rule": EMA(half_life="5tok")}
    assert check_options(options).units == {"dur", "sp", "tok"}
    assert check_options({**options, "max_duration": "3ep"}).units == {"ep", "sp", "tok"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swa_strt": "1ba"}, r"needs options that it knows, got swa_strt='1ba'; did you mean swa_start\?"),
        ({"evalute": "both"}, r"got evalute='both'; did you mean evaluate\?"),
        ({"x": 1}, r"got x=1; the options are max_duration, .*, process_group, evaluate"),
        ({"model": 1}, r"got model=1; "),
    ],
)
def test_a_name_that_is_no_option_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"{message}$" if message.endswith("?") else message):
        check_options(options, also=["evaluate"])


WRONG_IN_FINALIZE: dict[str, dict[str, Any]] = {
    "forward": {"forward": 3},
    "max_batches": {"max_batches": 0},
    "type of max_batches": {"max_batches": 0.5},
    "skip": {"skip": 3},
}


@pytest.mark.parametrize("case", WRONG_IN_FINALIZE)
def test_what_is_wrong_in_every_recalibration_raises_as_it_does(case: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        recalibrate_batch_norm(nn.BatchNorm1d(2), [torch.ones(2, 2)], **WRONG_IN_FINALIZE[case])
    with pytest.raises(type(error.value), match=f"^{re.escape(str(error.value))}$"):
        check_finalize_options(WRONG_IN_FINALIZE[case])


def test_other_options_of_a_recalibration_do_not_raise() -> None:
    check_finalize_options({"forward": print, "max_batches": 3, "layerwise": True, "skip": ["head.*", callable]})


def test_a_name_that_is_no_option_of_a_recalibration_raises() -> None:
    with pytest.raises(TypeError, match=r"^recalibrate_batch_norm needs .* got foward=3; did you mean forward\?$"):
        check_finalize_options({"foward": 3})
