"""After every step of the learning-rate phase the rates are what the phase says, whatever a scheduler wrote."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from dist_swa import SWA
from dist_swa.lr_phase import phase_lr

ignore_single_process = pytest.mark.filterwarnings(
    "ignore:.*assuming the intent is to (save|load) in a single process:UserWarning"
)

Rates = list[float]
LRS = [0.4, 0.01]
SWA_LR = 0.05
# Updates after 5, 7, ..., 21; complete at 21.
TIMES: dict[str, Any] = {"swa_start": "5ba", "swa_end": "21ba", "update_interval": "2ba"}
START, END, INTERVAL, ANNEAL_STEPS = 5, 21, 2, 4
STEPS = 30


class Run:
    """A model, an optimizer with two param groups, a scheduler or none, and their SWA."""

    def __init__(self, scheduler: str | None = None, *, lrs: Sequence[float | torch.Tensor] = LRS, **options: Any):
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        groups = [{"params": [parameter], "lr": lr} for parameter, lr in zip(self.model.parameters(), lrs, strict=True)]
        self.optimizer = torch.optim.SGD(groups, momentum=0.5)
        self.scheduler = make_scheduler(scheduler, self.optimizer)
        arguments: dict[str, Any] = {**TIMES, "schedule_swa_lr": True, "swa_lr": SWA_LR, "anneal_steps": ANNEAL_STEPS}
        self.swa = SWA(self.model, self.optimizer, **arguments | options)
        self.num_steps = 0

    @property
    def lrs(self) -> Rates:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def train(self, num_steps: int) -> list[Rates]:
        """Return the rates after each step."""
        seen = []
        for _ in range(num_steps):
            self.num_steps += 1
            for parameter in self.model.parameters():
                parameter.grad = torch.sin(parameter.detach() + self.num_steps)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.swa.step()
            seen.append(self.lrs)
        return seen

    def save(self, path: Path) -> None:
        save(self._state(), checkpoint_id=path)

    def resume(self, path: Path, stopped: "Run") -> None:
        state = self._state()
        load(state, checkpoint_id=path)
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=state["optimizer"])
        self.num_steps = stopped.num_steps
        if self.scheduler is not None and stopped.scheduler is not None:
            self.scheduler.load_state_dict(stopped.scheduler.state_dict())

    def _state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"model": self.model, "optimizer": optimizer, "swa": self.swa}


def make_scheduler(name: str | None, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    match name:
        case "step":
            return StepLR(optimizer, step_size=3, gamma=0.7)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=STEPS)
    return None


def without_phase(scheduler: str | None) -> list[Rates]:
    """The rates of a run whose rates are the scheduler's alone."""
    return Run(scheduler, schedule_swa_lr=False, swa_lr=None).train(STEPS)


def annealed(start: float, swa_lr: float, strategy: str, step: int) -> float:
    """The rate after `step`, one of the phase, of a group that had `start` in front of it."""
    fraction = min(((step - START) // INTERVAL + 1) / ANNEAL_STEPS, 1.0)
    remaining = 1 - fraction if strategy.startswith("lin") else math.cos(fraction * math.pi / 2) ** 2
    return swa_lr + (start - swa_lr) * remaining


def close(rates: Sequence[float]) -> object:
    return pytest.approx(list(rates), rel=1e-12, abs=1e-15)


# The phase


@pytest.mark.parametrize("scheduler", [None, "step", "cosine"])
@pytest.mark.parametrize("strategy", ["linear", "lin", "cosine", "cos"])
def test_rates_after_every_step(strategy: str, scheduler: str | None) -> None:
    """The scheduler steps before every swa.step(), and has its say before and after the phase only."""
    run = Run(scheduler, anneal_strategy=strategy)
    rates, free = run.train(STEPS), without_phase(scheduler)
    assert rates[: START - 1] == free[: START - 1]
    start = free[START - 1]  # what the scheduler made of step 5, the one that starts the phase
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


def test_nothing_is_touched_without_schedule_swa_lr() -> None:
    run = Run("cosine", schedule_swa_lr=False, swa_lr=None)
    alone = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in LRS])
    scheduler = CosineAnnealingLR(alone, T_max=STEPS)
    for rates in run.train(STEPS):
        alone.step()
        scheduler.step()
        assert rates == scheduler.get_last_lr()


def test_averages_to_the_end_keep_the_phase_to_the_end() -> None:
    rates = Run("step", swa_end=None).train(STEPS)
    assert rates[START + (ANNEAL_STEPS - 1) * INTERVAL - 1 :] == [[SWA_LR, SWA_LR]] * 20


def test_finalize_ends_the_phase() -> None:
    run = Run(swa_end=None)
    run.train(START)
    run.swa.finalize()
    before = run.lrs
    assert run.train(5) == [before] * 5


def test_one_annealing_step_is_a_jump() -> None:
    rates = Run(anneal_steps=1).train(START)
    assert rates == [LRS] * (START - 1) + [[SWA_LR, SWA_LR]]


def test_rate_may_rise_and_be_zero() -> None:
    assert Run(swa_lr=2.0).train(STEPS)[-1] == [2.0, 2.0]
    assert Run(swa_lr=0.0).train(STEPS)[-1] == [0.0, 0.0]


def test_phase_in_epochs_goes_on_at_their_ends() -> None:
    run = Run(swa_start="1ep", swa_end="3ep", update_interval="1ep", anneal_steps=2)
    rates = []
    for _ in range(4):
        run.train(3)
        run.swa.end_epoch()
        rates.append(run.lrs)
    half = [(lr + SWA_LR) / 2 for lr in LRS]
    assert rates == [close(half), [SWA_LR, SWA_LR], [SWA_LR, SWA_LR], [SWA_LR, SWA_LR]]


@pytest.mark.parametrize("scheduler", [None, "step"])
def test_tensor_rates_are_written_in_place(scheduler: str | None) -> None:
    tensors = [torch.tensor(lr) for lr in LRS]
    run = Run(scheduler, lrs=tensors)
    free = Run(scheduler, lrs=[torch.tensor(lr) for lr in LRS], schedule_swa_lr=False, swa_lr=None).train(START)
    rates = run.train(START + INTERVAL)
    assert rates[-1] == pytest.approx([annealed(lr, SWA_LR, "linear", START + INTERVAL) for lr in free[-1]], rel=1e-6)
    for group, tensor in zip(run.optimizer.param_groups, tensors, strict=True):
        assert group["lr"] is tensor


def test_phase_lr() -> None:
    assert phase_lr(0.5, None, "cosine", 0.3) == 0.5
    assert phase_lr(0.5, 0.1, "linear", 0.5) == pytest.approx(0.3)
    assert phase_lr(0.5, 0.1, "cosine", 0.5) == pytest.approx(0.3)
    assert phase_lr(0.5, 0.1, "cosine", 0.25) == pytest.approx(0.5 - 0.4 * (1 - math.sqrt(0.5)) / 2)
    assert phase_lr(0.5, 0.1, "linear", 1) == phase_lr(0.5, 0.1, "cosine", 7.5) == 0.1


# Resume


@ignore_single_process
@pytest.mark.parametrize("stop", [3, 4, 5, 6, 9, 10, 20, 21, 22])
@pytest.mark.parametrize("scheduler", [None, "step", "cosine"])
def test_resume_equals_never_having_stopped(tmp_path: Path, scheduler: str | None, stop: int) -> None:
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
def test_resume_takes_the_swa_lr_of_the_constructor(tmp_path: Path, saved_with_phase: bool) -> None:
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
def test_resume_without_swa_lr_holds_the_rates_of_the_start(tmp_path: Path) -> None:
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
    """One saved without an optimizer has no rates to start from."""
    state = SWA(nn.Linear(3, 2), **TIMES).state_dict()
    with pytest.raises(ValueError, match="load_state_dict needs"):
        Run().swa.load_state_dict(state)
