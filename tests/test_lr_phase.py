"""The rates after every step of the learning-rate phase are those of the phase and not those of a scheduler."""

import gc
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from dist_swa import SWA
from dist_swa.lr_phase import phase_lr
from phase_run import ANNEAL_STEPS, END, INTERVAL, LRS, START, STEPS, SWA_LR, TIMES, Run, annealed, without_phase

ignore_single_process = pytest.mark.filterwarnings(
    "ignore:.*assuming the intent is to (save|load) in a single process:UserWarning"
)


def close(rates: Sequence[float]) -> object:
    return pytest.approx(list(rates), rel=1e-12, abs=1e-15)


# The phase


@pytest.mark.parametrize("scheduler", [None, "step", "cosine"])
@pytest.mark.parametrize("strategy", ["linear", "lin", "cosine", "cos"])
def test_rates_after_every_step(strategy: str, scheduler: str | None) -> None:
    """The scheduler steps before every swa.step(). Its rates are used before and after the phase only."""
    run = Run(scheduler, anneal_strategy=strategy)
    rates, free = run.train(STEPS), without_phase(scheduler)
    assert rates[: START - 1] == free[: START - 1]
    start = free[START - 1]  # set by the scheduler after step 5, which starts the phase
    for step in range(START, END + 1):
        assert rates[step - 1] == close([annealed(lr, SWA_LR, strategy, step) for lr in start]), step
    assert rates[END - 1] == [SWA_LR, SWA_LR]
    assert run.swa.completed
    after = rates[END:]
    if scheduler is None:
        assert after == [[SWA_LR, SWA_LR]] * (STEPS - END)
    else:
        assert all(later[0] < SWA_LR for later in after[-2:])


@pytest.mark.parametrize("scheduler", ["step", "cosine"])
def test_no_swa_lr_holds_the_rates_of_the_start(scheduler: str) -> None:
    rates, free = Run(scheduler, swa_lr=None).train(STEPS), without_phase(scheduler)
    assert rates[: START - 1] == free[: START - 1]
    assert rates[START - 1 : END] == [free[START - 1]] * (END - START + 1)
    assert rates[-1] != rates[END - 1]


def test_without_schedule_swa_lr_the_rates_are_those_of_the_scheduler() -> None:
    run = Run("cosine", schedule_swa_lr=False, swa_lr=None)
    alone = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in LRS])
    scheduler = CosineAnnealingLR(alone, T_max=STEPS)
    for rates in run.train(STEPS):
        alone.step()
        scheduler.step()
        assert rates == scheduler.get_last_lr()


def test_without_swa_end_the_phase_lasts_to_the_end() -> None:
    rates = Run("step", swa_end=None).train(STEPS)
    assert rates[START + (ANNEAL_STEPS - 1) * INTERVAL - 1 :] == [[SWA_LR, SWA_LR]] * 20


def test_finalize_ends_the_phase() -> None:
    run = Run(swa_end=None)
    run.train(START)
    run.swa.finalize()
    before = run.lrs
    assert run.train(5) == [before] * 5


def test_one_annealing_step_sets_the_rate_at_once() -> None:
    rates = Run(anneal_steps=1).train(START)
    assert rates == [LRS] * (START - 1) + [[SWA_LR, SWA_LR]]


@pytest.mark.parametrize("swa_lr", [2.0, 0.0])
def test_swa_lr_may_be_higher_than_the_rate_or_zero(swa_lr: float) -> None:
    assert Run(swa_lr=swa_lr).train(STEPS)[-1] == [swa_lr, swa_lr]


def test_a_phase_in_epochs_advances_at_their_ends() -> None:
    run = Run(swa_start="1ep", swa_end="3ep", update_interval="1ep", anneal_steps=2)
    rates = []
    for _ in range(4):
        run.train(3)
        run.swa.end_epoch()
        rates.append(run.lrs)
    half = [(lr + SWA_LR) / 2 for lr in LRS]
    assert rates == [close(half), [SWA_LR, SWA_LR], [SWA_LR, SWA_LR], [SWA_LR, SWA_LR]]


@pytest.mark.parametrize("scheduler", [None, "step"])
def test_rates_that_are_tensors_are_set_in_place(scheduler: str | None) -> None:
    tensors = [torch.tensor(lr) for lr in LRS]
    run = Run(scheduler, lrs=tensors)
    free = Run(scheduler, lrs=[torch.tensor(lr) for lr in LRS], schedule_swa_lr=False, swa_lr=None).train(START)
    rates = run.train(START + INTERVAL)
    assert rates[-1] == pytest.approx([annealed(lr, SWA_LR, "linear", START + INTERVAL) for lr in free[-1]], rel=1e-6)
    for group, tensor in zip(run.optimizer.param_groups, tensors, strict=True):
        assert group["lr"] is tensor


@pytest.mark.parametrize(
    ("swa_lr", "strategy", "fraction", "expected"),
    [
        (None, "cosine", 0.3, 0.5),
        (0.1, "linear", 0.5, 0.3),
        (0.1, "cosine", 0.5, 0.3),
        (0.1, "cosine", 0.25, 0.5 - 0.4 * (1 - math.sqrt(0.5)) / 2),
        (0.1, "linear", 1, 0.1),
        (0.1, "cosine", 7.5, 0.1),
    ],
)
def test_phase_lr(swa_lr: float | None, strategy: str, fraction: float, expected: float) -> None:
    assert phase_lr(0.5, swa_lr, strategy, fraction) == pytest.approx(expected)


# Resume


@ignore_single_process
@pytest.mark.parametrize("stop", [3, 4, 5, 6, 9, 10, 20, 21, 22])
@pytest.mark.parametrize("scheduler", [None, "step", "cosine"])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, scheduler: str | None, stop: int) -> None:
    whole = Run(scheduler, anneal_strategy="cosine")
    expected = whole.train(STEPS)

    first = Run(scheduler, anneal_strategy="cosine")
    assert first.train(stop) == expected[:stop]
    first.save(tmp_path)
    second = Run(scheduler, anneal_strategy="cosine", lrs=[9.0, 9.0])
    second.resume(tmp_path, first)
    assert second.train(STEPS - stop) == expected[stop:]
    assert second.swa.num_averaged == whole.swa.num_averaged
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@ignore_single_process
@pytest.mark.parametrize("saved_with_phase", [True, False])
def test_a_resumed_run_uses_the_swa_lr_of_the_constructor(tmp_path: Path, saved_with_phase: bool) -> None:
    stop = 8
    phase: dict[str, Any] = {} if saved_with_phase else {"schedule_swa_lr": False, "swa_lr": None}
    first = Run("step", **phase)
    first.train(stop)
    first.save(tmp_path)
    start = without_phase("step")[START - 1]

    second = Run("step", swa_lr=0.2)
    second.resume(tmp_path, first)
    for step, rates in enumerate(second.train(STEPS - stop), start=stop + 1):
        if step <= END:
            assert rates == close([annealed(lr, 0.2, "linear", step) for lr in start]), step


@ignore_single_process
def test_a_resumed_run_without_swa_lr_holds_the_rates_of_the_start(tmp_path: Path) -> None:
    first = Run("cosine")
    first.train(8)
    first.save(tmp_path)
    second = Run("cosine", swa_lr=None)
    second.resume(tmp_path, first)
    start = without_phase("cosine")[START - 1]
    assert second.train(END - 8) == [close(start)] * (END - 8)


# Bad input


@pytest.mark.parametrize("swa_lr", [math.nan, math.inf, -math.inf, -0.1])
def test_bad_swa_lr(swa_lr: float) -> None:
    message = f"swa_lr needs a finite number >= 0, got swa_lr={swa_lr}; None holds the rate of swa_start"
    with pytest.raises(ValueError, match=re.escape(message)):
        Run(swa_lr=swa_lr)


@pytest.mark.parametrize(
    ("anneal_steps", "error"),
    [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("3", TypeError), (True, TypeError)],
)
def test_bad_anneal_steps(anneal_steps: Any, error: type[Exception]) -> None:
    with pytest.raises(
        error, match=re.escape("anneal_steps needs a whole number") + ".*got anneal_steps=.*; 10 is the"
    ):
        Run(anneal_steps=anneal_steps)


@pytest.mark.parametrize("strategy", ["exp", "", "Linear", None])
def test_bad_anneal_strategy(strategy: Any) -> None:
    message = f"anneal_strategy needs one of linear, lin, cosine, cos, got anneal_strategy={strategy!r}; choose one"
    with pytest.raises(ValueError, match=re.escape(message)):
        Run(anneal_strategy=strategy)


@pytest.mark.parametrize("swa_lr", [0.05, 0.0])
def test_swa_lr_needs_schedule_swa_lr(swa_lr: float) -> None:
    message = f"swa_lr needs schedule_swa_lr=True, got swa_lr={swa_lr}; set it, or leave swa_lr out"
    with pytest.raises(ValueError, match=re.escape(message)):
        Run(schedule_swa_lr=False, swa_lr=swa_lr)


def test_schedule_swa_lr_needs_an_optimizer() -> None:
    message = "schedule_swa_lr needs an optimizer, got optimizer=None; pass the optimizer"
    with pytest.raises(ValueError, match=re.escape(message)):
        SWA(nn.Linear(3, 2), **TIMES, schedule_swa_lr=True)


def test_param_groups_may_be_added_before_the_start_only() -> None:
    run = Run()
    run.train(START - 1)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    lrs = [*LRS, 0.3]
    assert run.train(1) == [close([annealed(lr, SWA_LR, "linear", START) for lr in lrs])]
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    message = "the learning-rate phase needs the 3 param groups of swa_start, got num_groups=4; add groups before"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run.train(1)


def test_load_needs_the_param_groups_of_the_checkpoint() -> None:
    run = Run()
    run.train(START)
    state = run.swa.state_dict()
    model = nn.Linear(3, 2)
    swa = SWA(model, torch.optim.SGD(model.parameters(), lr=0.1), **TIMES, schedule_swa_lr=True)
    message = "load_state_dict needs the 2 param groups of the checkpoint, got num_groups=1; build the optimizer"
    with pytest.raises(ValueError, match=re.escape(message)):
        swa.load_state_dict(state)
    assert not swa.started
    assert swa.num_averaged == 0


def test_load_needs_a_checkpoint_with_rates() -> None:
    """A checkpoint of an SWA without an optimizer has no rates."""
    state = SWA(nn.Linear(3, 2), **TIMES).state_dict()
    with pytest.raises(ValueError, match="load_state_dict needs"):
        Run().swa.load_state_dict(state)


class RatesOfSteps:
    """Records the rates that each step of an optimizer uses."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates: list[list[float]] = []
        optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])


@pytest.mark.parametrize("when", ["before swa.step", "after swa.step", "once an epoch"])
def test_each_step_is_made_at_the_rate_of_the_phase_whenever_a_scheduler_writes(when: str) -> None:
    run = Run(anneal_steps=1)
    steps, scheduler = RatesOfSteps(run.optimizer), StepLR(run.optimizer, step_size=1, gamma=0.5)
    for step in range(END - 1):
        if when == "before swa.step":
            run.scheduler = scheduler
        run.train(1)
        if when == "after swa.step" or (when == "once an epoch" and step % 4 == 3):
            scheduler.step()
    assert steps.rates[START:] == [[SWA_LR, SWA_LR]] * (END - 1 - START)


@ignore_single_process
def test_a_resumed_run_makes_its_first_step_at_the_rate_of_the_phase(tmp_path: Path) -> None:
    run = Run(anneal_steps=1)
    run.train(START + 1)
    run.save(tmp_path / "saved")
    again = Run(anneal_steps=1)
    again.resume(tmp_path / "saved", run)
    for group in again.optimizer.param_groups:
        group["lr"] = 9.0  # as a scheduler does that was built after the load
    steps = RatesOfSteps(again.optimizer)
    again.train(1)
    assert steps.rates == [[SWA_LR, SWA_LR]]


def test_dcp_saves_plain_sgd_in_the_phase_without_moving_the_weights() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    swa = SWA(model, optimizer, swa_start="1ba", schedule_swa_lr=True, swa_lr=0.2)
    swa.step()
    before = [parameter.clone() for parameter in model.parameters()]
    get_optimizer_state_dict(model, optimizer)  # steps an optimizer without state, at lr=0
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_the_phase_of_another_swa_does_not_outlive_it() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swa = SWA(model, optimizer, swa_start="1ba", schedule_swa_lr=True, swa_lr=0.2, anneal_steps=1)
    swa.step()
    del swa
    gc.collect()
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_swa_lr_may_be_one_number_per_param_group() -> None:
    run = Run(swa_lr=[0.3, 0.02], anneal_steps=1)
    steps = RatesOfSteps(run.optimizer)
    run.train(START + 3)
    assert steps.rates[START:] == [[0.3, 0.02]] * 3


def test_swa_lr_needs_a_rate_for_each_param_group() -> None:
    with pytest.raises(ValueError, match=r"needs a rate for each of 2 param groups, got swa_lr=\[0.3\]; pass"):
        Run(swa_lr=[0.3])


def test_a_step_of_plain_sgd_at_a_rate_of_zero_is_made_at_the_rate_of_the_phase() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swa = SWA(model, optimizer, swa_start="1ba", schedule_swa_lr=True, swa_lr=0.5, anneal_steps=1)
    swa.step()
    optimizer.param_groups[0]["lr"] = 0.0  # the end of a schedule
    before = model.bias.detach().clone()
    model.bias.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before - 0.5)


def test_a_phase_needs_an_optimizer_of_torch() -> None:
    class Wrapper:
        param_groups: tuple[Any, ...] = ()

    wrapper: Any = Wrapper()
    with pytest.raises(TypeError, match="SWA needs a torch optimizer, got optimizer="):
        SWA(nn.Linear(3, 2), wrapper, **TIMES, schedule_swa_lr=True)
