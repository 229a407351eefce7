"""Options and training arguments that do not fit raise in `add_swa`, or in the constructor, and change nothing."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from dist_swa.integrations.transformers import SWAMixin, add_swa
from ranks import on_ranks
from trainer_run import START, trainer_for

# The options of `add_swa`, the training arguments, and the error.
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "name": ({"swa_strt": "1ba"}, {}, "got swa_strt='1ba'; did you mean swa_start?"),
    "own name": ({"evalute": "both"}, {}, "got evalute='both'; did you mean evaluate?"),
    "choice": ({"evaluate": "swa"}, {}, "evaluate needs one of averaged, trained, both, got evaluate='swa'; "),
    "time": ({"swa_start": "abc"}, {}, "swa_start needs a number and a unit of ep, ba, sp, tok, dur, got "),
    "rule": ({"rule": 3}, {}, "needs a rule, got rule=3; "),
    "samples": ({"swa_start": "9sp"}, {}, "needs a schedule in ep, ba or dur, got units=['sp']; "),
    "length in tokens": ({"max_duration": "9tok"}, {}, "needs a schedule in ep, ba or dur, got units=['tok']; "),
    "name of a folder": ({"name": "a/b"}, {}, "needs a name for a folder in each checkpoint, got name='a/b'; "),
    "finalize": ({"finalize_options": {"foward": print}}, {}, "did you mean forward?"),
    "number of processes": ({"num_processes": 4}, {}, "needs num_processes=4, got 1 of them"),
    "no metric of trained weights": (
        {"evaluate": "averaged"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        "got metric_for_best_model='loss' with evaluate='averaged'; metrics of the average begin with 'swa_'",
    ),
    "no metric of the average": (
        {"evaluate": "trained"},
        {"metric_for_best_model": "eval_swa_loss"},
        "got metric_for_best_model='eval_swa_loss' with evaluate='trained'; ",
    ),
}


class MixedIn(SWAMixin, Trainer):
    pass


@pytest.mark.parametrize("case", WRONG)
@on_ranks(1)
def test_wrong_options_raise_where_they_are_passed(tmp_path: Path, case: str) -> None:
    options, arguments, message = WRONG[case]
    trainer = trainer_for("gpt2", tmp_path, **arguments)
    before = vars(trainer).keys(), list(trainer.callback_handler.callbacks)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        add_swa(trainer, **options)
    assert (type(trainer), vars(trainer).keys(), trainer.callback_handler.callbacks) == (Trainer, *before)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        trainer_for("gpt2", tmp_path, cls=partial(MixedIn, swa_options=options), **arguments)


@on_ranks(1)
def test_training_arguments_that_were_changed_raise_when_training_begins(tmp_path: Path) -> None:
    trainer = add_swa(trainer_for("gpt2", tmp_path), evaluate="averaged")
    trainer.args.metric_for_best_model = "loss"
    with pytest.raises(ValueError, match="got metric_for_best_model='loss' with evaluate='averaged'"):
        trainer.train()


@on_ranks(1)
def test_a_method_that_was_replaced_on_the_trainer_raises_when_training_begins(tmp_path: Path) -> None:
    trainer: Any = add_swa(trainer_for("gpt2", tmp_path), swa_start=f"{START}ba")
    trainer.evaluate = print
    with pytest.raises(ValueError, match=r"needs the methods of its class, got replaced=\['evaluate'\]"):
        trainer.train()
    del trainer.evaluate
    trainer.train()


def test_add_swa_takes_trainers_only() -> None:
    with pytest.raises(TypeError, match=r"add_swa needs a transformers.Trainer, got trainer='trainer'"):
        add_swa("trainer")  # type: ignore[arg-type]


@on_ranks(1)
def test_add_swa_raises_when_it_comes_twice_or_late(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(RuntimeError, match=r"needs a Trainer before train\(\), got .* at global_step=1; call it"):
        add_swa(trainer)
    trainer = add_swa(trainer_for("gpt2", tmp_path))
    with pytest.raises(RuntimeError, match=r"needs a Trainer without an average, got a SWATrainer; .*rule="):
        add_swa(trainer)


@on_ranks(1)
def test_evaluation_data_that_is_named_as_a_metric_of_the_average_raises(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    trainer.eval_dataset = {"swa_x": trainer.eval_dataset, "b": trainer.eval_dataset}
    with pytest.raises(ValueError, match=r"names that do not begin with 'swa_', got named=\['swa_x'\]"):
        add_swa(trainer)
