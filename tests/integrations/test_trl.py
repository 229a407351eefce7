"""TRL's SFTTrainer with LoRA, gradient checkpointing and an average: trains, resumes, exports, ends with the best."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from accelerate_on_cpu import launched
from dist_swa import checkpoint
from dist_swa.integrations.transformers import SWAMixin, add_swa
from models import same_bits
from ranks import run_on_ranks

peft = pytest.importorskip("peft", exc_type=ImportError)
trl = pytest.importorskip("trl", exc_type=ImportError)
tokenizers = pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")
SFTTrainer: Any = trl.SFTTrainer

STEPS, STOP, START = 6, 4, 3


class MixedIn(SWAMixin, SFTTrainer):  # type: ignore[misc]
    pass


def sft_trainer(folder: Path, is_mixed_in: bool, **options: Any) -> Any:
    warnings.filterwarnings("ignore", ".* is deprecated and will be removed in v6")  # peft's and trl's
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    words = tokenizers.models.WordLevel({"end": 0, **{str(i): i for i in range(1, 16)}}, unk_token="end")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="end", pad_token="end", bos_token="end"
    )
    texts = torch.randint(16, (24, 8), generator=torch.Generator().manual_seed(1)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": texts})
    arguments: dict[str, Any] = {"use_cpu": True, "bf16": False, "max_steps": STEPS, "per_device_train_batch_size": 6}
    arguments |= {
        "gradient_checkpointing": True,
        "packing": False,
        "learning_rate": 0.05,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.0,
        "save_steps": 1,
    }
    arguments |= {"lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    arguments |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_length": None,
        "train_sampling_strategy": "sequential",
    }
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = (MixedIn if is_mixed_in else SFTTrainer)(
        model,
        trl.SFTConfig(str(folder), **(arguments | options)),
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=tokenizer,
        peft_config=lora,
        **({"swa_options": {"swa_start": f"{START}ba"}} if is_mixed_in else {}),
    )
    return trainer if is_mixed_in else add_swa(trainer, swa_start=f"{START}ba")


class Run(NamedTuple):
    averaged: dict[str, Tensor]
    saved: dict[str, Tensor]  # the adapter that `save_model` saved
    log: dict[tuple[int, str], float]
    metrics: dict[str, float]  # of an evaluation at the end
    best: float | None


def run(folder: Path, is_mixed_in: bool, resumes: Path | None = None, **options: Any) -> Run:
    with launched():
        trainer = sft_trainer(folder, is_mixed_in, **options)
        trainer.train(resume_from_checkpoint=resumes and str(resumes))
        trainer.save_model(str(folder / "final"))
        dist.barrier()
        averaged = short_names(trainer.swa.average.full_state_dict(only="averaged"))
        saved = short_names(load_file(folder / "final/adapter_model.safetensors"))
        logged = {(entry["step"], name): entry[name] for entry in trainer.state.log_history for name in entry}
        return Run(averaged, saved, logged, trainer.evaluate(), trainer.state.best_metric)


def short_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of an adapter without the names of the adapter and of the wrapper."""
    return {name.replace(".default", "").removeprefix("base_model.model."): value for name, value in state.items()}


def exported(path: Path, out: Path) -> dict[str, Tensor]:
    checkpoint.export(path, out, only="averaged")
    (file,) = out.glob("*.safetensors")
    return short_names(load_file(file))


def test_lora_trains_resumes_on_other_ranks_exports_and_ends_with_the_best(tmp_path: Path) -> None:
    (whole,) = run_on_ranks(run, 1, tmp_path / "whole", True)
    assert len(whole.averaged) == 2  # A and B of the one layer
    assert same_bits(whole.saved, whole.averaged)
    assert same_bits(exported(tmp_path / f"whole/checkpoint-{STEPS}", tmp_path / "last"), whole.averaged)
    accuracies = ("eval_mean_token_accuracy", "eval_swa_mean_token_accuracy")  # which SFTTrainer adds in `log`
    entropies = ("eval_entropy", "eval_swa_entropy")
    assert whole.log[STEPS, entropies[0]] != whole.log[STEPS, entropies[1]]
    for of_trained, of_average in (accuracies, entropies):
        assert whole.metrics[of_trained] == pytest.approx(whole.log[STEPS, of_average], rel=1e-6)

    stopped = tmp_path / f"whole/checkpoint-{STOP}"
    halves: dict[str, Any] = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
    resumed = run_on_ranks(run, 2, tmp_path / "2 ranks", False, stopped, **halves)[0]
    for name, value in whole.averaged.items():
        torch.testing.assert_close(resumed.averaged[name], value, rtol=0, atol=1e-6)
    for name in ("eval_loss", "eval_swa_loss", *accuracies):
        assert resumed.log[STEPS, name] == pytest.approx(whole.log[STEPS, name], rel=1e-5)
    assert same_bits(resumed.saved, resumed.averaged)

    first_is_best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "swa_loss"}
    first_is_best |= {"greater_is_better": True, "eval_delay": STOP + 1}  # the loss falls
    (best,) = run_on_ranks(run, 1, tmp_path / "best", False, stopped, **first_is_best)
    expected = exported(tmp_path / f"best/checkpoint-{STOP + 1}", tmp_path / "best average")
    assert same_bits(best.saved, expected)
    assert not same_bits(expected, whole.averaged)
    assert best.metrics["eval_loss"] == best.metrics["eval_swa_loss"] == pytest.approx(best.best, rel=1e-6)
