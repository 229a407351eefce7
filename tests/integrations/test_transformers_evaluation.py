"""Evaluations in a Hugging Face Trainer: metrics of trained and averaged weights, in one log entry and one event."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from accelerate_on_cpu import launched
from dist_swa.integrations.transformers import SWAMixin, add_swa
from models import same_bits
from ranks import on_ranks
from trainer_run import START, STEPS, losses, trainer_for


@on_ranks(2)
def test_average_alone_is_evaluated_on_several_datasets_until_training_ends(tmp_path: Path) -> None:
    with launched():
        trainer = trainer_for("gpt2 ddp", tmp_path, eval_strategy="steps", eval_steps=2)
        trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
        add_swa(trainer, swa_start=f"{START}ba", evaluate="averaged").train()
        averaged = [(step, f"eval_swa_{name}_loss") for step in (2, 4, 6) for name in "ab"]
        assert list(losses(trainer.state.log_history)) == [*averaged, (6, "train_loss")]
        metrics = trainer.evaluate()  # the average is in the model
        assert metrics["eval_b_loss"] == metrics["eval_swa_b_loss"] == metrics["eval_a_loss"]


seen_prefixes: list[str] = []


class QuestionAnswering(Trainer):
    """Has an `evaluate` with other arguments."""

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, examples: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        seen_prefixes.append(metric_key_prefix)
        metrics = super().evaluate(eval_dataset, metric_key_prefix=metric_key_prefix)
        model: Any = self.model
        weights = next(iter(model.parameters()))
        metrics |= {f"{metric_key_prefix}_exact": weights.detach().square().sum().item()}
        self.log(metrics)
        return metrics


class MixedInQuestionAnswering(SWAMixin, QuestionAnswering):  # type: ignore[misc]
    pass


@pytest.mark.parametrize("is_mixed_in", [False, True])
@on_ranks(2)
def test_an_evaluate_with_other_arguments_is_called_for_both(tmp_path: Path, is_mixed_in: bool) -> None:
    with launched():
        start: dict[str, Any] = {"swa_start": f"{START}ba"}
        cls: Any = partial(MixedInQuestionAnswering, swa_options=start) if is_mixed_in else QuestionAnswering
        trainer = trainer_for("gpt2 ddp", tmp_path, cls=cls, eval_strategy="steps", eval_steps=2)
        (trainer if is_mixed_in else add_swa(trainer, **start)).train()
        prefixes, seen_prefixes[:] = seen_prefixes[:], []  # other cases run in the same process
        assert prefixes == ["eval", "eval", "eval_swa", "eval", "eval_swa"]
        last = trainer.state.log_history[-2]
        assert last["eval_exact"] != last["eval_swa_exact"] > 0


@on_ranks(2)
def test_evaluating_the_average_does_not_change_the_run(tmp_path: Path) -> None:
    """Each evaluation makes a pass over the training data."""
    averages = []
    for eval_steps in (1, STEPS):
        with launched():
            options: dict[str, Any] = {"train_sampling_strategy": "random", "eval_strategy": "steps"}
            trainer = trainer_for("resnet ddp", tmp_path, eval_steps=eval_steps, **options)
            trainer = add_swa(trainer, swa_start="1ba")
            trainer.train()
            averages.append(trainer.swa.average.full_state_dict())
    assert same_bits(*averages)


class Events(TrainerCallback):
    """Records the metrics of each evaluation, and whether the model then had its trained weights."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, set[str]]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        assert metrics.items() <= state.log_history[-1].items()
        self.metrics.append((state.global_step, {name for name in metrics if name.endswith("_loss")}))
        assert not control.should_evaluate


NAMES = {"both": {"eval_loss", "eval_swa_loss"}, "averaged": {"eval_swa_loss"}, "trained": {"eval_loss"}}


@pytest.mark.parametrize("evaluate", NAMES)
@on_ranks(1)
def test_each_evaluation_is_one_event_with_the_same_names_and_one_log_entry(tmp_path: Path, evaluate: str) -> None:
    events = Events()
    trainer = trainer_for("gpt2", tmp_path, events, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    add_swa(trainer, swa_start=f"{START}ba", evaluate=evaluate).train()
    assert events.metrics == [(step, NAMES[evaluate]) for step in (0, 2, 4, 6)]
    assert [entry["step"] for entry in trainer.state.log_history] == [0, 2, 4, 6, 6]  # the last: of the training
    last = trainer.state.log_history[-2]
    prefixes = [name.removesuffix("loss") for name in NAMES[evaluate]]
    assert {f"{prefix}runtime" for prefix in prefixes} == {name for name in last if name.endswith("_runtime")}


@on_ranks(1)
def test_outside_of_training_an_evaluation_gives_both_names_in_one_pass(tmp_path: Path) -> None:
    trainer: Any = add_swa(trainer_for("resnet", tmp_path), swa_start=f"{START}ba", evaluate="averaged")
    before = trainer.evaluate(metric_key_prefix="mine")
    trainer.train()
    after = trainer.evaluate(metric_key_prefix="mine")
    for metrics in (before, after):
        assert metrics["mine_loss"] == metrics["mine_swa_loss"] > 0
        assert metrics["mine_runtime"] == metrics["mine_swa_runtime"]  # of the same pass
    assert after["mine_loss"] != before["mine_loss"]
    assert not any("swa" in name for name in trainer.predict(trainer.eval_dataset).metrics or {})


@pytest.mark.parametrize("metric", ["loss", "eval_swa_loss"])
@on_ranks(2)
def test_early_stopping_counts_each_evaluation_of_its_metric_once(tmp_path: Path, metric: str) -> None:
    """No evaluation is better than the first: the metric is to grow."""
    options: dict[str, Any] = {"metric_for_best_model": metric, "greater_is_better": True, "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 1}
    with launched():
        trainer = trainer_for("gpt2 ddp", tmp_path, EarlyStoppingCallback(4), **options)
        add_swa(trainer, swa_start=f"{START}ba").train()
    assert trainer.state.best_global_step == 1
    assert trainer.state.global_step == 5


@on_ranks(1)
def test_reduce_lr_on_plateau_follows_the_average(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
    options |= {"metric_for_best_model": "swa_loss", "greater_is_better": True}
    trainer = trainer_for("gpt2", tmp_path, eval_strategy="steps", eval_steps=1, **options)
    add_swa(trainer, swa_start=f"{START}ba", evaluate="averaged").train()
    assert trainer.lr_scheduler.best == pytest.approx(losses(trainer.state.log_history)[STEPS, "eval_swa_loss"])


@on_ranks(1)
def test_a_trainer_that_sets_up_each_evaluation_does_so_for_both(tmp_path: Path) -> None:
    """Seq2SeqTrainer sets how predictions are gathered, and its evaluation loop resets that."""
    seen = []

    class Generates(Seq2SeqTrainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.gather_function.__name__)
            return Trainer.prediction_step(self, *args, **kwargs)

    options = {"arguments_cls": Seq2SeqTrainingArguments, "eval_strategy": "steps", "eval_steps": STEPS}
    trainer = trainer_for("gpt2", tmp_path, cls=Generates, **options)
    add_swa(trainer, swa_start=f"{START}ba").train()
    assert seen == ["gather", "gather"]


class RaisesInEvaluation(TrainerCallback):
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError


@on_ranks(1)
def test_after_an_evaluation_that_raised_everything_is_as_before(tmp_path: Path) -> None:
    trainer = add_swa(trainer_for("gpt2", tmp_path), swa_start=f"{START}ba")
    callback = RaisesInEvaluation()
    trainer.add_callback(callback)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert not {"on_log", "on_evaluate"} & vars(trainer.callback_handler).keys()
    trainer.remove_callback(callback)
    assert trainer.evaluate().keys() >= {"eval_loss", "eval_swa_loss"}
    assert len(trainer.state.log_history) == 1


class FrozenEmbedder(Trainer):
    """Keeps the statistics of the first BatchNorm, as fine-tuning often does."""

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.train = partial(train_all_but_the_embedder, model)
        return super().training_step(model, *args, **kwargs)


def train_all_but_the_embedder(model: Any, mode: bool = True) -> Any:
    type(model).train(model, mode)
    model.resnet.embedder.eval()
    return model


@on_ranks(1)
def test_the_last_evaluation_scores_what_finalize_puts_into_the_model(tmp_path: Path) -> None:
    trainer = trainer_for("resnet", tmp_path, cls=FrozenEmbedder, eval_strategy="steps", eval_steps=STEPS)
    add_swa(trainer, swa_start=f"{START}ba").train()
    scored = losses(trainer.state.log_history)
    assert not trainer.model.resnet.embedder.embedder.normalization.running_mean.any()  # frozen at its first value
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scored[STEPS, "eval_swa_loss"], rel=1e-6)
    assert scored[STEPS, "eval_swa_loss"] != pytest.approx(scored[STEPS, "eval_loss"], rel=1e-3)
