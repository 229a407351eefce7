"""`load_best_model_at_end` in a Hugging Face Trainer with an average: the model ends as what was scored."""

import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import EarlyStoppingCallback, TrainerCallback

from accelerate_on_cpu import enter_fsdp, launched
from dist_swa.integrations.transformers import add_swa
from models import same_bits
from ranks import on_ranks, run_on_ranks
from trainer_run import START, STEPS, STOP, build, trainer_for

State = dict[str, Tensor]
# The loss falls, so that the first evaluation is the best one.
FIRST_IS_BEST: dict[str, Any] = {"load_best_model_at_end": True, "greater_is_better": True, "learning_rate": 0.01}
FIRST_IS_BEST |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


class AtSave(TrainerCallback):
    """Records what each checkpoint has: the weights of the average and of the model. Stops after step `stop`."""

    trainer: Any

    def __init__(self, stop: int = STEPS) -> None:
        self.stop = stop
        self.averaged: dict[int, State] = {}
        self.trained: dict[int, State] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.trainer.swa.num_averaged:
            self.averaged[state.global_step] = self.trainer.swa.average.full_state_dict()
        self.trained[state.global_step] = full(self.trainer.model)
        control.should_training_stop |= state.global_step == self.stop


def full(model: nn.Module) -> State:
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}


class Run(NamedTuple):
    at_save: tuple[dict[int, State], dict[int, State]]  # averaged and trained weights by step
    best: tuple[int, float]  # the step and the metric
    metrics: dict[str, float]  # of an evaluation at the end
    saved: State  # by `save_model`


def run(kind: str, folder: Path, stop: int, resumes: bool, **options: Any) -> Run:
    enter_fsdp()
    at_save = AtSave(stop)
    with launched():
        trainer = trainer_for(kind, folder, at_save, **(FIRST_IS_BEST | options))
        at_save.trainer = add_swa(trainer, swa_start=f"{START}ba")
        trainer.train(resume_from_checkpoint=resumes or None)
        metrics = trainer.evaluate()
        trainer.save_model(str(folder / "final"))
        best = (trainer.state.best_global_step, trainer.state.best_metric)
        dist.barrier()
        saved = type(build(kind)).from_pretrained(folder / "final").state_dict()
        return Run((at_save.averaged, at_save.trained), best, metrics, saved)


@pytest.mark.parametrize("metric", ["eval_swa_loss", "loss"])
@pytest.mark.parametrize("kind", ["gpt2 ddp", "gpt2 fsdp2", "resnet ddp", "resnet fsdp2"])
def test_a_run_resumed_on_other_ranks_ends_as_the_best_checkpoint_scored(
    tmp_path: Path, kind: str, metric: str
) -> None:
    options: dict[str, Any] = {"metric_for_best_model": metric, "eval_delay": STOP}
    first = run_on_ranks(run, 2, kind, tmp_path, STOP + 1, False, **options)[0]
    more = 1 if kind.startswith("resnet") else 3  # the Trainer multiplies a mean loss by the ranks
    resumed = run_on_ranks(run, more, kind, tmp_path, STEPS, True, **options)[0]
    averaged, trained = first.at_save
    expected, other = (averaged, trained) if "swa" in metric else (trained, averaged)
    for ranks, one in ((2, first), (more, resumed)):
        step, score = one.best
        assert step == STOP
        assert same_bits(one.saved, expected[STOP])
        assert not same_bits(one.saved, other[STOP])
        names = {"eval_loss", "eval_swa_loss"} if "swa" in metric else {"eval_loss"}
        assert names == {name for name in one.metrics if name.endswith("_loss")}
        if kind.startswith("gpt2") or "swa" in metric:  # trained statistics differ between ranks
            scale = ranks / 2 if kind.startswith("resnet") else 1
            assert [one.metrics[name] for name in names] == pytest.approx([scale * score] * len(names), rel=1e-6)


@on_ranks(1)
def test_a_best_checkpoint_before_the_first_update_gives_its_trained_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = run("resnet", tmp_path, STEPS, False, metric_for_best_model="swa_loss", eval_delay=START - 1)
    assert one.best[0] == START - 1
    assert same_bits(one.saved, one.at_save[1][START - 1])
    assert one.metrics["eval_swa_loss"] == one.metrics["eval_loss"] == pytest.approx(one.best[1], rel=1e-6)


@pytest.mark.parametrize("save_only_model", [True, False])
@on_ranks(1)
def test_early_stopping_with_a_limit_of_checkpoints_and_frozen_parameters(
    tmp_path: Path, save_only_model: bool
) -> None:
    options = {"save_total_limit": 1, "save_only_model": save_only_model, "metric_for_best_model": "swa_loss"}
    at_save = AtSave()
    early = EarlyStoppingCallback(1)
    trainer = trainer_for("gpt2", tmp_path, at_save, early, **(FIRST_IS_BEST | options | {"eval_delay": STOP}))
    trainer.model.transformer.wte.weight.requires_grad_(False)  # tied to lm_head
    frozen = trainer.model.lm_head.weight.clone()
    at_save.trainer = add_swa(trainer, swa_start="1ba")
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (STOP + 1, STOP)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STOP}"]
    assert same_bits(trainer.model.state_dict(), at_save.averaged[STOP])
    assert torch.equal(trainer.model.lm_head.weight, frozen)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert trainer.swa.completed
    assert trainer.swa.num_averaged == STOP


class RemovesAverage(TrainerCallback):
    """Deletes the average of the best checkpoint, or all of it, before training ends."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_loss" in logs:
            shutil.rmtree(Path(state.best_model_checkpoint, self.folder))


# What is deleted, and training arguments that make the best evaluation one without a checkpoint.
LOST: dict[str, tuple[str | None, dict[str, Any]]] = {
    "average": ("dist_swa", {}),
    "checkpoint": (".", {}),
    "never saved": (None, {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}),
}


@pytest.mark.filterwarnings("ignore:.*Could not locate the best model")
@pytest.mark.parametrize(
    ("case", "metric"), [*((case, "swa_loss") for case in LOST), ("checkpoint", "loss"), ("never saved", "loss")]
)
@on_ranks(1)
def test_without_the_best_average_the_last_one_goes_into_the_model_with_a_warning(
    tmp_path: Path, case: str, metric: str
) -> None:
    folder, options = LOST[case]
    callbacks = [] if folder is None else [RemovesAverage(folder)]
    options = FIRST_IS_BEST | {"metric_for_best_model": metric, "eval_delay": STOP} | options
    trainer: Any = add_swa(trainer_for("gpt2", tmp_path, *callbacks, **options), swa_start=f"{START}ba")
    with pytest.warns(
        UserWarning, match="needs the best checkpoint, with the average that was scored, got best_model_checkpoint="
    ) as found:
        trainer.train()
    assert len([one for one in found if "best" in str(one.message)]) == 1
    assert trainer.swa.num_averaged == trainer.state.max_steps - START + 1
    assert same_bits(trainer.model.state_dict(), trainer.swa.average.full_state_dict())


@on_ranks(1)
def test_without_any_average_finalize_warns_and_the_best_trained_weights_stay(tmp_path: Path) -> None:
    at_save = AtSave()
    options: dict[str, Any] = {"metric_for_best_model": "swa_loss", "eval_delay": STOP}
    trainer = trainer_for("gpt2", tmp_path, at_save, **(FIRST_IS_BEST | options))
    at_save.trainer = add_swa(trainer, swa_start=f"{STEPS + 1}ba")
    never, none = "averaging never starts", f"no model was averaged in {STEPS} steps"
    with pytest.warns(UserWarning, match=never), pytest.warns(UserWarning, match=none):
        trainer.train()
    assert same_bits(trainer.model.state_dict(), at_save.trained[STOP])
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_swa_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
