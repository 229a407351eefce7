"""Hugging Face Trainer in one process, under DDP and in accelerate's own FSDP2 code, compared with plain loops."""

import contextlib
import copy
import pickle
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from accelerate_on_cpu import enter_fsdp, launched
from dist_swa import SWA
from dist_swa.integrations.transformers import SWAMixin, add_swa
from models import same_bits
from ranks import on_ranks, run_on_ranks
from small_run import full_tensors, mean
from trainer_run import EPS, GLOBAL_BATCH, LR, START, STEPS, STOP, build, data, losses, stack, trainer_for

KINDS = ["gpt2 ddp", "gpt2 fsdp2", "resnet ddp", "resnet fsdp2"]
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}


class PlainRun(NamedTuple):
    average: dict[str, Tensor]  # by `SWA`
    models: list[dict[str, Tensor]]  # the full tensors of each averaged model


def plain_run(kind: str) -> PlainRun:
    """Train without a Trainer."""
    model, ranks = build(kind).train(), dist.get_world_size()
    if kind.endswith("ddp"):
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0)
    swa = SWA(model, swa_start=f"{START}ba")
    models, rows = [], data(kind)
    for step in range(STEPS):
        first = step * GLOBAL_BATCH % len(rows)
        batch = stack(rows[first : first + GLOBAL_BATCH])
        total = torch.tensor(float(batch["labels"].numel()))  # what the Trainer divides by
        mine = {key: values.chunk(ranks)[dist.get_rank()] for key, values in batch.items()}
        optimizer.zero_grad()
        (model(**mine, num_items_in_batch=total).loss * ranks).backward()
        optimizer.step()
        if swa.step():
            models.append(full_tensors(model))
    return PlainRun(swa.average.full_state_dict(), models)


def whole_run(kind: str, folder: Path) -> tuple[PlainRun, dict[str, Tensor], list[dict[str, Any]]]:
    """Return a plain run, and of a run of the Trainer the average and the log."""
    enter_fsdp()
    plain = plain_run(kind)
    with launched():
        trainer = trainer_for(kind, folder, eval_strategy="steps", eval_steps=2)
        trainer = add_swa(trainer, swa_start=f"{START}ba", num_processes=2)
        trainer.train()
        assert isinstance(trainer.model_wrapped, WRAPPERS[kind.split()[1]])
        return plain, trainer.swa.average.full_state_dict(), trainer.state.log_history


def resumed_run(kind: str, checkpoint: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the average, and the weights that `save_model` saved."""
    enter_fsdp()
    with launched():
        trainer = add_swa(trainer_for(kind, folder), swa_start=f"{START}ba")
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.swa.num_averaged == STEPS - START + 1
        trainer.save_model(str(folder / "final"))
        average = trainer.swa.average.full_state_dict()
    dist.barrier()
    return average, type(build(kind)).from_pretrained(folder / "final").state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_average_is_that_of_a_plain_loop_also_when_resumed_on_other_ranks(tmp_path: Path, kind: str) -> None:
    plain, average, log = run_on_ranks(whole_run, 2, kind, tmp_path / "whole")[0]
    parameters = [name for name, _ in build(kind).named_parameters()]  # the Trainer has recalibrated the buffers
    assert same_bits(average, plain.average, parameters)
    assert len(plain.models) == STEPS - START + 1
    for name in parameters:
        torch.testing.assert_close(average[name].double(), mean(plain.models, name), rtol=0, atol=1e-6)
    check_log(kind, plain.models, average, log)
    checkpoint = (tmp_path / f"whole/checkpoint-{STOP}").rename(tmp_path / "moved")
    for ranks in (2, 3):
        resumed, saved = run_on_ranks(resumed_run, ranks, kind, checkpoint, tmp_path / f"{ranks} ranks")[0]
        if ranks == 2:
            assert same_bits(resumed, average)
        elif kind.startswith("gpt2"):  # with BatchNorm, training depends on the number of ranks
            for name in average:
                torch.testing.assert_close(resumed[name].double(), mean(plain.models, name), rtol=0, atol=1e-6)
        assert same_bits(resumed, saved, saved)
        if kind.startswith("resnet"):
            check_statistics(saved)


def check_log(kind: str, models: Sequence[dict[str, Tensor]], average: dict[str, Tensor], log: Any) -> None:
    """Check the logged losses: those of trained and averaged weights, the last one with recalibrated statistics."""
    logged = losses(log)
    keys = [(step, name) for step in (2, 4, 6) for name in ("eval_loss", "eval_swa_loss")]
    assert list(logged) == [*keys, (6, "train_loss")]
    assert logged[2, "eval_loss"] == logged[2, "eval_swa_loss"]  # before the first update
    expected: dict[tuple[int, str], dict[str, Tensor]] = {keys[-1]: average}
    if kind.startswith("gpt2"):
        expected |= {(step, "eval_loss"): models[step - START] for step in (4, 6)}
        expected[4, "eval_swa_loss"] = {name: mean(models[: 4 - START + 1], name) for name in models[0]}
    batch = stack(data(kind)[:GLOBAL_BATCH])
    scale = 2 if kind.startswith("resnet") else 1  # the Trainer multiplies by the ranks, also where the loss is a mean
    for key, state in expected.items():
        model = build(kind).eval()
        model.load_state_dict(state)
        loss = float(model(**batch, num_items_in_batch=batch["labels"].numel()).loss.detach())
        assert logged[key] == pytest.approx(scale * loss, rel=1e-5), key


def check_statistics(saved: dict[str, Tensor]) -> None:
    """Check that the first BatchNorm has the statistics of all the data, for any number of ranks."""
    images, embedder = stack(data("resnet"))["pixel_values"], "resnet.embedder.embedder"
    hidden = nn.functional.conv2d(images, saved[f"{embedder}.convolution.weight"], stride=2, padding=3)
    hidden = hidden.transpose(0, 1).flatten(1)
    torch.testing.assert_close(saved[f"{embedder}.normalization.running_mean"], hidden.mean(1))
    torch.testing.assert_close(saved[f"{embedder}.normalization.running_var"], hidden.var(1))


@on_ranks(1)
def test_one_process_ends_with_the_recalibrated_average_in_the_model(tmp_path: Path) -> None:
    trainer = trainer_for("resnet", tmp_path, eval_strategy="steps", eval_steps=STEPS)
    trainer = add_swa(trainer, swa_start=f"{START}ba", num_processes=1)
    trainer.train()
    assert type(trainer.model_wrapped) is type(build("resnet"))
    assert trainer.swa.num_averaged == STEPS - START + 1
    assert same_bits(trainer.model_wrapped.state_dict(), trainer.swa.average.full_state_dict())
    check_statistics(trainer.model_wrapped.state_dict())


class RecordMeans(TrainerCallback):
    """Records the running mean of the first BatchNorm after each step."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.means.append(model.resnet.embedder.embedder.normalization.running_mean.clone())


@on_ranks(1)
def test_averaged_statistics_are_evaluated_and_kept_at_the_end(tmp_path: Path) -> None:
    record = RecordMeans()
    trainer = trainer_for("resnet", tmp_path, record, eval_strategy="steps", eval_steps=STEPS)
    trainer = add_swa(trainer, swa_start=f"{START}ba", buffers="average")
    trainer.train()
    model, average = trainer.model_wrapped, trainer.swa.average
    mean_of_steps = torch.stack(record.means[START - 1 :]).mean(0)
    for state in (model.state_dict(), average.full_state_dict()):
        torch.testing.assert_close(state["resnet.embedder.embedder.normalization.running_mean"], mean_of_steps)


class MixedIn(SWAMixin, Trainer):
    pass


@on_ranks(1)
def test_mixin_and_add_swa_give_the_same_run(tmp_path: Path) -> None:
    mixed_in = trainer_for("gpt2", tmp_path, cls=partial(MixedIn, swa_options={"swa_start": f"{START}ba"}))
    added = add_swa(trainer_for("gpt2", tmp_path), swa_start=f"{START}ba")
    for trainer in (mixed_in, added):
        assert not hasattr(trainer, "swa")
        trainer.train()
        assert trainer.swa.num_averaged == STEPS - START + 1
    assert same_bits(mixed_in.swa.average.full_state_dict(), added.swa.average.full_state_dict())


class Plain(Trainer):
    pass


@on_ranks(1)
def test_add_swa_returns_a_trainer_that_copies_and_pickles(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, cls=Plain, save_strategy="no")
    assert add_swa(trainer, swa_start=f"{START}ba") is trainer
    assert isinstance(trainer, Plain)
    assert "SWAPlain object" in repr(trainer)
    for one in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        assert issubclass(type(one), Plain)
        one.train()
        assert one.swa.num_averaged == STEPS - START + 1


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@on_ranks(2)
def test_rate_of_the_swa_phase_wins_over_the_scheduler_and_only_optimizer_steps_count(tmp_path: Path) -> None:
    with launched():
        rates = Rates()
        options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": GLOBAL_BATCH // 4}
        trainer = trainer_for("gpt2 ddp", tmp_path, rates, lr_scheduler_type="linear", **options)
        phase: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.01, "anneal_steps": 2}
        add_swa(trainer, swa_start=f"{START}ba", **phase).train()
        assert trainer.swa.schedule.now.batches == STEPS
        assert trainer.swa.schedule.steps_per_epoch == 2
        linear = [LR * (1 - step / STEPS) for step in range(1, STEPS + 1)]
        phase_rates = [(linear[START - 1] + 0.01) / 2, 0.01, 0.01, 0.01]
        assert rates.rates == pytest.approx([*linear[: START - 1], *phase_rates])


@on_ranks(2)
def test_checkpoint_without_an_average_warns_and_averaging_starts_anew(tmp_path: Path) -> None:
    with launched():
        trainer_for("gpt2 ddp", tmp_path, max_steps=STOP).train()
    with launched():
        trainer = trainer_for("gpt2 ddp", tmp_path, eval_strategy="steps", eval_steps=2)
        trainer = add_swa(trainer, swa_start="1ba", evaluate="trained")
        message = rf"dist_swa does not exist: averaging starts anew; the schedule starts at step {STOP}$"
        with pytest.warns(UserWarning, match=message) as caught:
            trainer.train(resume_from_checkpoint=True)
        assert sum("averaging" in str(warning.message) for warning in caught) == 1
        assert (trainer.swa.schedule.now.batches, trainer.swa.schedule.now.epochs) == (STEPS, STEPS // 2)
        assert trainer.swa.num_averaged == STEPS - STOP
        assert list(losses(trainer.state.log_history)) == [(6, "eval_loss"), (6, "train_loss")]


class WithoutLength(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


UNMET: dict[str, tuple[dict[str, Any], str]] = {
    "start": (
        {"swa_start": f"{STEPS + 1}ba"},
        "averaging never starts: swa_start needs to come before the last update",
    ),
    "max_duration": (
        {"swa_start": "1ba", "max_duration": f"{STOP}ba"},
        f"max_duration={STOP}ba was reached before step",
    ),
}


@pytest.mark.parametrize("case", UNMET)
@on_ranks(1)
def test_a_schedule_that_the_run_does_not_meet_is_told_once(tmp_path: Path, case: str) -> None:
    options, message = UNMET[case]
    with launched(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add_swa(trainer_for("gpt2 ddp", tmp_path), **options).train()
    texts = [str(warning.message) for warning in caught]
    assert [text.startswith(message) for text in texts if "max_duration" in text] == [True]


@on_ranks(1)
def test_epochs_that_the_trainer_ends_are_no_reason_to_warn(tmp_path: Path) -> None:
    with launched():
        trainer = trainer_for("gpt2 ddp", tmp_path)
        trainer.train_dataset = WithoutLength(trainer.train_dataset)
        add_swa(trainer, swa_start="1ba", update_interval="1ep").train()
    assert (trainer.swa.schedule.steps_per_epoch, trainer.swa.num_averaged) == (None, STEPS // 2)


class EvaluatesAndRaises(TrainerCallback):
    """Evaluates with positional arguments in each step, and raises at step `STOP`."""

    trainer: Trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        metrics = self.trainer.evaluate(self.trainer.eval_dataset, None, "mine")
        assert "mine_loss" in metrics
        if self.trainer.state.global_step == STOP:
            assert "mine_swa_loss" in metrics
            raise ZeroDivisionError


@on_ranks(2)
def test_training_that_raised_or_ended_starts_again_with_a_new_average(tmp_path: Path) -> None:
    with launched():
        callback = EvaluatesAndRaises()
        trainer = add_swa(trainer_for("gpt2 ddp", tmp_path, callback), swa_start=f"{START}ba")
        callback.trainer = trainer
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert trainer.swa.num_averaged == STOP - START + 1
        trainer.remove_callback(callback)
        for _ in range(2):
            trainer.train()
            assert trainer.swa.num_averaged == STEPS - START + 1


class Endless(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(data("gpt2"))


@on_ranks(2)
def test_epochs_are_counted_where_the_loader_has_no_length(tmp_path: Path) -> None:
    with launched():
        trainer = trainer_for("gpt2 ddp", tmp_path)
        trainer.train_dataset = Endless()
        add_swa(trainer, swa_start="1ep", update_interval="1ep").train()
        assert trainer.swa.num_averaged == STEPS // 2


class Raises(TrainerCallback):
    """Raises in an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, self._raise)
        self.step = step

    def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError


class RequestsCheckpoint(TrainerCallback):
    """Does in an event of step `STOP` what the handler of SIGTERM does."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._request)

    def _request(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (jit,) = (one for one in kwargs["model"].callbacks if type(one).__name__ == "JITCheckpointCallback")
        jit.jit_manager.is_checkpoint_requested = state.global_step == STOP


def run_and_resume(folder: Path, interruption: TrainerCallback, options: dict[str, Any], **resumed: Any) -> SWAMixin:
    """Train until the interruption, then resume in a new Trainer and return that."""
    trainer: Any = add_swa(trainer_for("gpt2", folder, interruption, **options), swa_start=f"{START}ba")
    trainer.model.callbacks = trainer.callback_handler.callbacks
    with contextlib.suppress(ZeroDivisionError):
        trainer.train()
    trainer = add_swa(trainer_for("gpt2", folder, **resumed), swa_start=f"{START}ba")
    trainer.train(resume_from_checkpoint=True)
    return trainer  # type: ignore[no-any-return]


ON_SIGTERM: dict[str, Any] = {"enable_jit_checkpoint": True, "save_strategy": "no"}
OFTEN: dict[str, Any] = {"save_steps": 2, "save_total_limit": 1}
# The callback, further training arguments, and the step of the checkpoint that the run is resumed from.
INTERRUPTIONS: dict[str, tuple[TrainerCallback, dict[str, Any], int]] = {
    "between saving and on_save": (Raises("on_save", STOP), OFTEN, STOP),
    "SIGTERM before a step": (RequestsCheckpoint("on_step_begin"), ON_SIGTERM, STOP),
    "SIGTERM after a step": (RequestsCheckpoint("on_optimizer_step"), ON_SIGTERM, STOP + 1),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
@on_ranks(1)
def test_an_interrupted_run_resumes_with_its_average(tmp_path: Path, interruption: str) -> None:
    callback, options, saved = INTERRUPTIONS[interruption]
    whole = add_swa(trainer_for("gpt2", tmp_path / "whole"), swa_start=f"{START}ba")
    whole.train()
    resumed = run_and_resume(tmp_path / "interrupted", callback, options)
    assert (tmp_path / f"interrupted/checkpoint-{saved}/dist_swa").exists()
    assert resumed.swa.num_averaged == STEPS - START + 1
    assert same_bits(resumed.swa.average.full_state_dict(), whole.swa.average.full_state_dict())


@on_ranks(1)
def test_the_additional_step_of_a_run_resumed_at_its_end_is_not_averaged(tmp_path: Path) -> None:
    """The Trainer makes one more step when it resumes at its last step, within an epoch."""
    options = {"max_steps": START, "save_steps": 1, "num_train_epochs": 2}
    trainer = run_and_resume(tmp_path, Raises("on_save", START), options, max_steps=START)
    assert (trainer.state.global_step, trainer.swa.num_averaged) == (START + 1, 1)


class OwnLoss(Trainer):
    """Takes an entry out of each batch that the model does not accept."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop("weight")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("own_forward", [True, False])
@on_ranks(1)
def test_recalibration_takes_a_forward_and_leaves_no_loader_behind(tmp_path: Path, own_forward: bool) -> None:
    batches = []

    def forward(module: nn.Module, batch: dict[str, Tensor]) -> None:
        batches.append(module(pixel_values=batch["pixel_values"]))

    options: dict[str, Any] = {"remove_unused_columns": False, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_for("resnet", tmp_path, cls=OwnLoss if own_forward else Trainer, **options)
    if own_forward:
        trainer.train_dataset = [row | {"weight": torch.ones(())} for row in data("resnet")]
        trainer.eval_dataset = trainer.train_dataset[:GLOBAL_BATCH]
    add_swa(trainer, swa_start=f"{START}ba", finalize_options={"forward": forward} if own_forward else None).train()
    loaders = trainer.accelerator._dataloaders
    assert sum(loader.dataset is trainer.train_dataset for loader in loaders) == 1
    if own_forward:
        assert len(batches) == 2 * (STEPS - START + 2)  # in each evaluation of the average and at the end
    check_statistics(trainer.model_wrapped.state_dict())
