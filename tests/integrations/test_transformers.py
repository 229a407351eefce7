"""Hugging Face Trainer: DDP and accelerate's own FSDP2 code, with models from a config, beside plain loops."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from accelerate_on_cpu import enter_fsdp, launched
from dist_swa import SWA
from dist_swa.integrations.transformers import SWACallback
from models import same_bits
from ranks import run_on_ranks

GLOBAL_BATCH, STEPS, STOP, START = 12, 6, 4, 3
LR, EPS = 0.03, 1e-3  # so large that a gradient of nothing but rounding moves nothing
KINDS = ["gpt2 ddp", "gpt2 fsdp2", "resnet ddp", "resnet fsdp2"]
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}


class SmallResNetForImageClassification(ResNetForImageClassification):
    def get_input_embeddings(self) -> Any:
        """None; accelerate asks for them under FSDP2, and transformers has no answer for a ResNet."""


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind.startswith("gpt2"):
        sizes: dict[str, Any] = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        sizes |= {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**sizes))
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    return SmallResNetForImageClassification(ResNetConfig(**sizes | {"num_labels": 3}))


def data(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if kind.startswith("gpt2"):
        texts = torch.randint(16, (2 * GLOBAL_BATCH, 8), generator=generator)
        return [{"input_ids": text, "labels": text} for text in texts]
    images = torch.randn(2 * GLOBAL_BATCH, 1, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)]


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trainer_for(kind: str, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // dist.get_world_size(),
        "per_device_eval_batch_size": GLOBAL_BATCH // dist.get_world_size(),
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "learning_rate": LR,
        "adam_epsilon": EPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_steps": STOP,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "ddp_find_unused_parameters": False,
    }
    if kind.endswith("fsdp2"):
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2}}
    return Trainer(
        build(kind),
        TrainingArguments(**(arguments | options)),
        train_dataset=data(kind),
        eval_dataset=data(kind)[:GLOBAL_BATCH],
        callbacks=list(callbacks),
    )


def plain_loop(kind: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The average by `SWA` in a loop without a trainer, and the whole models that were averaged."""
    model, ranks = build(kind).train(), dist.get_world_size()
    if kind.endswith("ddp"):
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0)
    swa = SWA(model, swa_start=f"{START}ba", swa_end=None, update_interval="1ba")
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
            last = SWA(model, swa_start="0ba", swa_end=None, update_interval="1ba")
            last.step()
            models.append(last.average.full_state_dict())
    return swa.average.full_state_dict(), models


def whole_runs(folder: Path) -> dict[str, Any]:
    """For each kind: of a plain loop average and models, of the Trainer the average, and its log."""
    enter_fsdp()
    results = {}
    for kind in KINDS:
        plain = plain_loop(kind)
        with launched():
            callback = SWACallback(swa_start=f"{START}ba", num_processes=2)
            trainer = trainer_for(kind, folder / kind, callback, eval_strategy="steps", eval_steps=2)
            trainer.train()
            assert isinstance(trainer.model_wrapped, WRAPPERS[kind.split()[1]])
            results[kind] = (*plain, callback.swa.average.full_state_dict(), trainer.state.log_history)
    return results


def resumed_runs(folder: Path) -> dict[str, Any]:
    """For each kind the average, and what `save_model` saved; resumed from a checkpoint that was moved."""
    enter_fsdp()
    results = {}
    for kind in KINDS:
        out = folder / f"{kind} on {dist.get_world_size()} ranks"
        with launched():
            callback = SWACallback(swa_start=f"{START}ba")
            trainer = trainer_for(kind, out, callback)
            trainer.train(resume_from_checkpoint=str(folder / kind / "moved"))
            assert callback.swa.num_averaged == STEPS - START + 1
            trainer.save_model(str(out / "final"))
            results[kind] = callback.swa.average.full_state_dict()
        dist.barrier()
        saved = type(build(kind)).from_pretrained(out / "final").state_dict()
        results[f"{kind}, saved"] = saved
    return results


def mean(models: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([model[name].double() for model in models]).mean(0)


def test_averages_as_a_plain_loop_also_when_resumed(tmp_path: Path) -> None:
    whole = run_on_ranks(whole_runs, 2, tmp_path)[0]
    for kind in KINDS:
        expected, models, average, log = whole[kind]
        names = [name for name, _ in build(kind).named_parameters()]  # the Trainer has recalibrated the statistics
        assert same_bits(average, expected, names), kind  # though it looked at averages in between
        assert len(models) == STEPS - START + 1
        for name in names:
            torch.testing.assert_close(average[name].double(), mean(models, name), rtol=0, atol=1e-6)
        check_log(kind, models, average, log)
        (tmp_path / kind / f"checkpoint-{STOP}").rename(tmp_path / kind / "moved")
    for ranks in (2, 3):
        resumed = run_on_ranks(resumed_runs, ranks, tmp_path)[0]
        for kind, (_, models, average, _) in whole.items():
            if ranks == 2:
                assert same_bits(resumed[kind], average), kind
            elif kind.startswith("gpt2"):  # BatchNorm trains otherwise on other ranks
                for name in average:
                    torch.testing.assert_close(resumed[kind][name].double(), mean(models, name), rtol=0, atol=1e-6)
            saved = resumed[f"{kind}, saved"]
            assert same_bits(resumed[kind], saved, saved), kind
            if kind.startswith("resnet"):
                check_statistics(kind, saved)


def check_log(kind: str, models: Sequence[dict[str, Tensor]], average: dict[str, Tensor], log: Any) -> None:
    """The losses in the Trainer's log are those of trained and averaged models, the last one's with its statistics."""
    losses = {(entry["step"], key): entry[key] for entry in log for key in entry if key.endswith("_loss")}
    keys = [(2, "eval_loss"), (4, "eval_loss"), (4, "eval_swa_loss"), (6, "eval_loss"), (6, "eval_swa_loss")]
    assert list(losses) == [*keys, (6, "train_loss")]
    expected: dict[tuple[int, str], dict[str, Tensor]] = {keys[-1]: average}
    if kind.startswith("gpt2"):
        expected |= {(step, "eval_loss"): models[step - START] for step in (4, 6)}
        expected[4, "eval_swa_loss"] = {name: mean(models[: 4 - START + 1], name) for name in models[0]}
    batch = stack(data(kind)[:GLOBAL_BATCH])
    scale = 2 if kind.startswith("resnet") else 1  # the Trainer's: ranks, though this loss is a mean already
    for key, state in expected.items():
        model = build(kind).eval()
        model.load_state_dict(state)
        loss = float(model(**batch, num_items_in_batch=batch["labels"].numel()).loss.detach())
        assert losses[key] == pytest.approx(scale * loss, rel=1e-5), (kind, key)


def check_statistics(kind: str, saved: dict[str, Tensor]) -> None:
    """The first BatchNorm has the statistics of all the data, whatever the ranks."""
    images, embedder = stack(data(kind))["pixel_values"], "resnet.embedder.embedder"
    hidden = nn.functional.conv2d(images, saved[f"{embedder}.convolution.weight"], stride=2, padding=3)
    hidden = hidden.transpose(0, 1).flatten(1)
    torch.testing.assert_close(saved[f"{embedder}.normalization.running_mean"], hidden.mean(1))
    torch.testing.assert_close(saved[f"{embedder}.normalization.running_var"], hidden.var(1))


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Looks(TrainerCallback):
    """Evaluates by itself, with arguments by their places, and breaks the run off."""

    trainer: Trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        metrics = self.trainer.evaluate(self.trainer.eval_dataset, None, "mine")
        if self.trainer.state.global_step == STOP:
            assert set(metrics) >= {"mine_loss", "mine_swa_loss"}
            raise ZeroDivisionError
        assert "mine_loss" in metrics


class Endless(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(data("gpt2"))


def uses(folder: Path) -> None:
    enter_fsdp()
    kind = "gpt2 ddp"
    start: dict[str, Any] = {"swa_start": f"{START}ba"}
    phase: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.01, "anneal_steps": 2}
    with launched():
        rates = Rates()
        callback = SWACallback(**start, **phase, evaluate="averaged")
        trainer = trainer_for(
            kind,
            folder,
            callback,
            rates,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=GLOBAL_BATCH // 4,
            lr_scheduler_type="linear",
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
        trainer.train()
        assert callback.swa.schedule.now.batches == STEPS
        assert callback.swa.schedule.steps_per_epoch == 2
        # The Trainer's own scheduler goes on all the time; from START on, the rate is that of the phase.
        linear = [LR * (1 - step / STEPS) for step in range(1, STEPS + 1)]
        phase_rates = [(linear[START - 1] + 0.01) / 2, 0.01, 0.01, 0.01]
        assert rates.rates == pytest.approx([*linear[: START - 1], *phase_rates])
        looks = [key for entry in trainer.state.log_history for key in entry if key.endswith("_loss")]
        averaged = ["eval_swa_a_loss", "eval_swa_b_loss"]
        assert looks == ["eval_a_loss", "eval_b_loss", *averaged, *averaged, "train_loss"]
        assert set(trainer.evaluate()) >= {"eval_a_loss", "eval_b_loss"}  # training is over
        assert "evaluate" not in vars(trainer)
        trainer.train()  # again, with an average of its own
        assert callback.swa.num_averaged == STEPS - START + 1
    with launched():
        callback = SWACallback(swa_start="1ba", evaluate="trained")
        trainer = trainer_for(kind, folder, callback, eval_strategy="steps", eval_steps=2)
        shutil.rmtree(folder / f"checkpoint-{STOP}/dist_swa", ignore_errors=True)
        dist.barrier()
        with pytest.warns(UserWarning, match="dist_swa is not there: averaging starts anew") as caught:
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}"))
        assert sum("averaging" in str(warning.message) for warning in caught) == 1
        assert callback.swa.schedule.now.batches == STEPS
        assert callback.swa.num_averaged == STEPS - STOP
        looks = [key for entry in trainer.state.log_history for key in entry if key in ("eval_loss", "eval_swa_loss")]
        assert looks == ["eval_loss"]  # but for those of the run before, of two datasets
    with launched():
        callback = SWACallback(**start)
        trainer = trainer_for(kind, folder / "other", callback, eval_strategy="steps", eval_steps=2)
        plain = trainer.evaluate

        def evaluate(eval_dataset: Any = None, examples: Any = None, metric_key_prefix: str = "eval") -> Any:
            """One with other arguments than the Trainer's, as for question answering."""
            seen.append(metric_key_prefix)
            return plain(eval_dataset, metric_key_prefix=metric_key_prefix)

        seen: list[str] = []
        trainer.evaluate = lambda ignore_keys=None, **kwargs: evaluate(**kwargs)  # type: ignore[method-assign]
        own = trainer.evaluate
        trainer.train()
        assert seen == ["eval", "eval", "eval_swa", "eval", "eval_swa"]
        assert trainer.evaluate is own
    with launched():
        callback = SWACallback(**start)
        trainers = [trainer_for(kind, folder / "twice", callback, *more) for more in ((Looks(),), ())]
        Looks.trainer = trainers[0]
        with pytest.raises(ZeroDivisionError):
            trainers[0].train()
        trainers[1].train()  # the same callback, of a run that had raised
        assert all("evaluate" not in vars(one) for one in trainers)
    with launched():
        callback = SWACallback(swa_start="1ep", update_interval="1ep")
        trainer = trainer_for(kind, folder / "endless", callback)
        trainer.train_dataset = Endless()
        trainer.train()
        assert callback.swa.num_averaged == STEPS // 2
    weights = []
    for looks_every in (1, STEPS):
        with launched():
            options: dict[str, Any] = {"train_sampling_strategy": "random", "eval_strategy": "steps"}
            callback = SWACallback(swa_start="1ba")
            trainer = trainer_for("resnet ddp", folder / "looks", callback, eval_steps=looks_every, **options)
            trainer.train()
            weights.append(callback.swa.average.full_state_dict())
    assert same_bits(*weights)  # looking, with a pass over the training data, has changed nothing


def alone(folder: Path) -> None:
    """One process, without a launcher."""
    callback = SWACallback(swa_start=f"{START}ba", num_processes=1)
    trainer = trainer_for("resnet", folder, callback, eval_strategy="steps", eval_steps=STEPS)
    trainer.train()
    assert type(trainer.model_wrapped) is SmallResNetForImageClassification
    assert callback.swa.num_averaged == STEPS - START + 1
    assert same_bits(trainer.model.state_dict(), callback.swa.average.full_state_dict())  # type: ignore[union-attr]
    check_statistics("resnet", trainer.model.state_dict())  # type: ignore[union-attr]


class Interrupts(TrainerCallback):
    """Raises in an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, self._raise)
        self.step = step

    def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError


class AskedToSave(TrainerCallback):
    """Does in an event what the handler of SIGTERM does."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (jit,) = (one for one in kwargs["model"].callbacks if type(one).__name__ == "JITCheckpointCallback")
        jit.jit_manager.is_checkpoint_requested = state.global_step == STOP


class OwnLoss(Trainer):
    """Takes something out of a batch that the model does not."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop("weight")
        return super().compute_loss(model, inputs, *args, **kwargs)


def interrupted(folder: Path) -> None:
    """Stopped by an error or a signal, at any moment, the run goes on with its average."""
    start: dict[str, Any] = {"swa_start": f"{START}ba"}

    def run(name: str, *more: TrainerCallback, resume: bool = False, **options: Any) -> tuple[SWACallback, Any]:
        callback = SWACallback(**start)
        trainer: Any = trainer_for("gpt2", folder / name, *more, callback, **options)
        trainer.model.callbacks = trainer.callback_handler.callbacks
        if more:
            with contextlib.suppress(ZeroDivisionError):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return callback, trainer

    whole = run("whole")[0].swa.average.full_state_dict()
    # Between the Trainer's own files and on_save of what comes later, when the checkpoint before is gone.
    often: dict[str, Any] = {"save_steps": 2, "save_total_limit": 1}
    run("saving", Interrupts("on_save", STOP), **often)
    resumed = run("saving", resume=True, **often)[0].swa
    assert (resumed.num_averaged, same_bits(resumed.average.full_state_dict(), whole)) == (STEPS - START + 1, True)
    # At the last step, within an epoch: the Trainer itself makes one step more when it resumes there.
    run("last", Interrupts("on_save", 3), max_steps=3, save_steps=1, num_train_epochs=2)
    callback, trainer = run("last", resume=True, max_steps=3)
    assert (trainer.state.global_step, callback.swa.num_averaged) == (4, 1)
    # On SIGTERM, for which there is no event.
    for event, saved in (("on_step_begin", STOP), ("on_optimizer_step", STOP + 1)):  # heard before and after a step
        run(event, AskedToSave(event), enable_jit_checkpoint=True, save_strategy="no")
        assert (folder / event / f"checkpoint-{saved}").exists()
        assert same_bits(run(event, resume=True)[0].swa.average.full_state_dict(), whole)
    # By hand, and then with another callback.
    _, trainer = run("another", Interrupts("on_step_end", STOP))
    for refused in (SWACallback(swa_start="9sp"), SWACallback(**start)):
        trainer.remove_callback(SWACallback)
        trainer.remove_callback(Interrupts)
        trainer.add_callback(refused)
        with contextlib.suppress(ValueError):
            trainer.train()
    assert refused.swa.num_averaged == STEPS - START + 1
    assert not {"evaluate", "_save_checkpoint"} & set(vars(trainer))


def own_batches(folder: Path) -> None:
    """A loss of its own takes a forward of its own; loaders of the training data do not stay."""
    seen = []

    def forward(module: nn.Module, batch: dict[str, Tensor]) -> None:
        seen.append(module(pixel_values=batch["pixel_values"]))

    for finalize_options in ({"forward": forward}, None):
        callback = SWACallback(swa_start=f"{START}ba", finalize_options=finalize_options)
        options: dict[str, Any] = {"remove_unused_columns": False, "eval_strategy": "steps", "eval_steps": 1}
        trainer = trainer_for("resnet", folder, callback, **options)
        if finalize_options:
            trainer.__class__ = OwnLoss
            trainer.train_dataset = [row | {"weight": torch.ones(())} for row in data("resnet")]
            trainer.eval_dataset = trainer.train_dataset[:GLOBAL_BATCH]
        trainer.train()
        loaders = trainer.accelerator._dataloaders
        assert sum(loader.dataset is trainer.train_dataset for loader in loaders) == 1
        assert len(seen) == 2 * (STEPS - START + 2)  # batches, in each evaluation of the average and at the end
        check_statistics("resnet", trainer.model.state_dict())  # type: ignore[union-attr]


def test_goes_on_after_an_interruption(tmp_path: Path) -> None:
    run_on_ranks(interrupted, 1, tmp_path)


def test_a_forward_of_ones_own(tmp_path: Path) -> None:
    run_on_ranks(own_batches, 1, tmp_path)


def test_follows_the_trainer(tmp_path: Path) -> None:
    run_on_ranks(uses, 2, tmp_path)
    run_on_ranks(alone, 1, tmp_path / "alone")


def wrong_uses(folder: Path) -> None:
    enter_fsdp()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    metric, averaged = "metric_for_best_model", SWACallback(evaluate="averaged")
    callbacks: list[tuple[type[Exception], str, list[SWACallback], dict[str, Any]]] = [
        (RuntimeError, r"needs one SWACallback, got 2; .*rule=", [SWACallback(), SWACallback()], {}),
        (ValueError, r"needs load_best_model_at_end=False, got True", [SWACallback()], best),
        (ValueError, r"needs a schedule in ep, ba or dur, got units=\['sp'\]", [SWACallback(swa_start="9sp")], {}),
        (ValueError, r"every evaluation has, got .*'loss' with evaluate='averaged'", [averaged], {metric: "loss"}),
        (ValueError, r"every evaluation has, got .*'eval_swa_loss' with", [SWACallback()], {metric: "eval_swa_loss"}),
        (ValueError, r"needs num_processes=4, got 2 of them", [SWACallback(num_processes=4)], {}),
    ]
    for error, message, given, options in callbacks:
        with launched():
            trainer = trainer_for("gpt2 fsdp2", folder, *given, **options)
            with pytest.raises(error, match=message):
                trainer.train()


def test_wrong_uses_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate needs one of averaged, trained, both, got evaluate='swa'"):
        SWACallback(evaluate="swa")
    with pytest.raises(RuntimeError, match=r"needs to be called by Trainer.train, got another caller"):
        SWACallback().on_train_begin(None, None, None)  # type: ignore[arg-type]
    run_on_ranks(wrong_uses, 2, tmp_path)
