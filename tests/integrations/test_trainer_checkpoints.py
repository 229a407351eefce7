"""The checkpoints that trainers write: export, merge and inspect take the average in them."""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from accelerate_on_cpu import enter_fsdp, launched
from dist_swa import EMA, checkpoint
from dist_swa.__main__ import main
from dist_swa.integrations.accelerate import prepare_swa
from dist_swa.integrations.lightning import SWACallback
from dist_swa.integrations.transformers import add_swa
from lightning_run import EPOCHS, Module, fit, swa_of
from models import same_bits
from ranks import run_on_ranks

STEPS = 4


class Weights(NamedTuple):
    """Full tensors at the time of a checkpoint."""

    averaged: dict[str, Tensor]
    trained: dict[str, Tensor]


class Net(nn.Module):
    """Has frozen and tied weights and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last.weight = self.first.weight
        self.middle.weight.requires_grad_(False)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.middle(self.first(given).tanh())))
        return out


def full(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in state.items()}


def check(path: Path, weights: Weights, out: Path, key: str = "model") -> None:
    """Check what a checkpoint is exported to by default, and by the key of the trained weights."""
    check_average(path, weights, out)
    assert main(["export", str(path), str(out / "trained.safetensors"), "--key", key, "--quiet"]) == 0
    trained = load_file(out / "trained.safetensors")
    assert trained.keys() <= weights.averaged.keys()
    assert same_bits(trained, weights.trained, weights.trained.keys() & trained)
    assert not same_bits(trained, weights.averaged, trained)


def check_average(path: Path, weights: Weights, out: Path) -> None:
    """Check what a checkpoint is exported and merged to by default."""
    assert main(["export", str(path), str(out / "averaged.safetensors"), "--quiet"]) == 0
    found = load_file(out / "averaged.safetensors")
    assert found.keys() == weights.averaged.keys()
    assert same_bits(found, weights.averaged)
    checkpoint.merge([path, path], out / "merged.safetensors")
    assert same_bits(load_file(out / "merged.safetensors"), weights.averaged)


# transformers


class AtSave(TrainerCallback):
    def __init__(self) -> None:
        self.weights: Weights | None = None

    def on_save(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights = Weights(self.trainer.swa.average.full_state_dict(), full(model))

    trainer: Any = None


def run_transformers(folder: Path, is_tied: bool, frozen: str, dtype: torch.dtype = torch.float32) -> Weights:
    """Train GPT-2 whose parameters with `frozen` in their names are frozen. Return the weights at its checkpoint."""
    sizes: dict[str, Any] = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": is_tied}
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    return train_transformers(model.to(dtype), folder)


def train_transformers(model: nn.Module, folder: Path) -> Weights:
    texts = torch.randint(16, (8, 8), generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS, "per_device_train_batch_size": 4}
    arguments |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.03}
    at_save = AtSave()
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), logging_strategy="no", **arguments),
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
        callbacks=[at_save],
    )
    with launched():
        at_save.trainer = add_swa(trainer, swa_start="1ba")
        trainer.train()
    assert at_save.weights is not None
    return at_save.weights


class Scored(nn.Module):
    """A model that is none of transformers, with BatchNorm and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.net.last.weight = nn.Parameter(self.net.last.weight.clone())  # the Trainer saves no tied ones

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(input_ids.float().view(-1, 4)).square().mean()}


def run_scored(folder: Path) -> Weights:
    torch.manual_seed(0)
    return train_transformers(Scored(), folder)


def test_a_checkpoint_of_transformers_with_batch_norm(tmp_path: Path) -> None:
    (weights,) = run_on_ranks(run_scored, 1, tmp_path / "run")
    assert "net.norm.running_var" in weights.averaged
    check(tmp_path / "run" / f"checkpoint-{STEPS}", weights, tmp_path)


def test_a_checkpoint_of_transformers_in_bfloat16(tmp_path: Path) -> None:
    (weights,) = run_on_ranks(run_transformers, 1, tmp_path / "run", True, "wte", torch.bfloat16)
    assert {value.dtype for value in weights.averaged.values()} == {torch.float32, torch.bfloat16}
    check(tmp_path / "run" / f"checkpoint-{STEPS}", weights, tmp_path)


TIED = pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "not tied"])


@TIED
@pytest.mark.parametrize("frozen", ["wte", "lm_head", "mlp", "nothing"])
def test_a_checkpoint_of_transformers(tmp_path: Path, is_tied: bool, frozen: str) -> None:
    (weights,) = run_on_ranks(run_transformers, 1, tmp_path / "run", is_tied, frozen)
    path = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert ("lm_head.weight" in load_file(path / "model.safetensors")) == (not is_tied)  # why the ties matter
    assert "lm_head.weight" in weights.averaged
    check(path, weights, tmp_path)


@pytest.mark.parametrize("kind", ["shards", "bin", "bin shards"])
def test_the_trained_weights_may_be_in_any_files_of_transformers(tmp_path: Path, kind: str) -> None:
    (weights,) = run_on_ranks(run_transformers, 1, tmp_path / "run", True, "wte")
    path = tmp_path / "run" / f"checkpoint-{STEPS}"
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if kind == "shards":
        model = GPT2LMHeadModel(GPT2Config.from_pretrained(path))
        model.load_state_dict(weights.trained)
        model.save_pretrained(path, max_shard_size="2KB")
        assert (path / "model.safetensors.index.json").exists()
    elif kind == "bin":
        torch.save(state, path / "pytorch_model.bin")
    else:
        parts = [dict(list(state.items())[i::2]) for i in range(2)]
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for part, name in zip(parts, names, strict=True):
            torch.save(part, path / name)
        weight_map = {key: name for part, name in zip(parts, names, strict=True) for key in part}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(path, weights, tmp_path)


def test_frozen_parameters_that_are_missing_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_on_ranks(run_transformers, 1, tmp_path / "run", True, "wte")
    path = tmp_path / "run" / f"checkpoint-{STEPS}"
    (path / "model.safetensors").unlink()
    capfd.readouterr()
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    assert "needs the 1 parameters that are not averaged (frozen, or not selected), got 0" in capfd.readouterr().err


def test_inspect_shows_the_average_and_the_trained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_on_ranks(run_transformers, 1, tmp_path / "run", True, "wte")
    path = tmp_path / "run" / f"checkpoint-{STEPS}"
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(lines[0]) == f"{path}: checkpoint of a trainer"
    assert lines[2][:4] == ["swa", "Equal()", str(STEPS), str(STEPS)]
    assert lines[3][0] == "model"
    assert len(lines) == 4


def with_lora() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    return get_peft_model(model, LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True))


PEFTS_OWN_WARNING = "`is_gradient_checkpointing` is deprecated"


def run_lora(folder: Path) -> Weights:
    warnings.filterwarnings("ignore", PEFTS_OWN_WARNING)
    return train_transformers(with_lora(), folder)


@pytest.mark.filterwarnings(f"ignore:{PEFTS_OWN_WARNING}")
def test_a_checkpoint_of_transformers_with_an_adapter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (weights,) = run_on_ranks(run_lora, 1, tmp_path / "run")
    path, given, expected = tmp_path / "run" / f"checkpoint-{STEPS}", torch.arange(8)[None], with_lora().eval()
    trained = expected(given).logits
    expected.load_state_dict(weights.averaged)
    capfd.readouterr()
    assert main(["export", str(path), str(tmp_path / "whole")]) == 1
    assert "--only averaged" in capfd.readouterr().err
    assert main(["export", str(path), str(tmp_path / "out"), "--only", "averaged", "--quiet"]) == 0
    opened = PeftModel.from_pretrained(with_lora().unload(), str(tmp_path / "out"))
    assert torch.equal(opened(given).logits, expected(given).logits)
    assert not torch.equal(opened(given).logits, trained)


# accelerate


def run_accelerate(folder: Path, kind: str, names: list[str], models: int = 1) -> Weights:
    enter_fsdp()
    wrapper, _, form = kind.removeprefix("bf16 ").partition(", ")
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float32
    environment = {"FSDP_VERSION": wrapper[4:5] or "1", "FSDP_STATE_DICT_TYPE": form or "SHARDED_STATE_DICT"}
    environment |= {"ACCELERATE_USE_FSDP": str(wrapper != "ddp").lower(), "FSDP_USE_ORIG_PARAMS": "True"}
    with launched(**environment):
        accelerator = Accelerator()
        for _ in range(models - 1):
            accelerator.prepare(nn.Linear(3, 3))
        torch.manual_seed(0)
        model = Net().to(dtype)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
        averages = [
            prepare_swa(accelerator, model, optimizer, name=name, swa_start="1ba", rule=EMA(decay=0.5 / (i + 1)))
            for i, name in enumerate(names)
        ]
        for step in range(STEPS):
            given = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            accelerator.backward(model(given.to(dtype)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            for swa in averages:
                swa.step()
        accelerator.save_state(str(folder), safe_serialization=form != "bin")
        return Weights(averages[0].average.full_state_dict(), full(model))


KINDS = ["ddp", "ddp, bin", "fsdp1", "fsdp2", "fsdp2, FULL_STATE_DICT", "bf16 ddp", "bf16 fsdp1", "bf16 fsdp2"]


@pytest.mark.parametrize("name", ["dist_swa", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_accelerate(tmp_path: Path, kind: str, name: str) -> None:
    weights = run_on_ranks(run_accelerate, 2, tmp_path / "saved", kind, [name])[0]
    check(tmp_path / "saved", weights, tmp_path)


def test_each_average_of_an_accelerator_has_a_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = run_on_ranks(run_accelerate, 2, tmp_path / "saved", "ddp", ["ema", "dist_swa"])[0]
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "none")]) == 1
    assert "got key=None" in (err := capfd.readouterr().err)
    assert err.endswith("; pass one of swa, ema, model\n")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors", key="ema")
    assert same_bits(load_file(tmp_path / "out.safetensors"), weights.averaged)


def test_the_average_of_another_model_than_the_first_finds_its_own(tmp_path: Path) -> None:
    weights = run_on_ranks(run_accelerate, 2, tmp_path / "saved", "ddp", ["dist_swa"], 2)[0]
    check(tmp_path / "saved", weights, tmp_path, key="model_1")


# Lightning


class Logging(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.detach())
        return loss


def test_a_checkpoint_of_lightning_without_an_average_is_its_state_dict(tmp_path: Path) -> None:
    module = Logging()
    fit(module, [ModelCheckpoint(tmp_path, filename="last", monitor="loss", every_n_epochs=EPOCHS)])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "best_model_score" in str(saved["callbacks"])  # a tensor, too
    checkpoint.export(tmp_path / "last.ckpt", tmp_path / "out.safetensors")
    assert same_bits(load_file(tmp_path / "out.safetensors"), module.state_dict())


class Frozen(Module):
    """Has frozen and tied weights and BatchNorm."""

    def __init__(self) -> None:
        super().__init__(with_norm=True)
        self.net[2].weight.requires_grad_(False)
        self.net.append(nn.Linear(4, 4))
        self.net.append(nn.Linear(4, 4))
        self.net[-1].weight = self.net[-2].weight


class AtEpochEnd(Callback):
    """Keeps the average of a checkpoint: BatchNorm statistics are recalibrated after it."""

    def __init__(self, swa: SWACallback) -> None:
        self.swa, self.averaged = swa, dict[str, Tensor]()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.averaged = swa_of(self.swa).average.full_state_dict()


def run_lightning(folder: Path, strategy: str, precision: Any, evaluate: str) -> Weights:
    module, swa = Frozen(), SWACallback(swa_start="0.25dur", evaluate=evaluate)
    kept, saved = AtEpochEnd(swa), ModelCheckpoint(folder, filename="last", every_n_epochs=EPOCHS)
    fit(module, [swa, kept, saved], strategy, precision=precision)
    return Weights(kept.averaged, {f"net.{name}": value for name, value in module.steps[-1].items()})


@pytest.mark.parametrize(
    ("strategy", "key", "precision", "evaluate"),
    [
        ("ddp", "dist_swa", None, "trained"),
        ("ddp", "dist_swa", "bf16-true", "averaged"),
        ("fsdp2", "state_dict.dist_swa", "bf16-true", "trained"),
        ("fsdp2", "state_dict.dist_swa", None, "averaged"),
        ("fsdp2, one file", "dist_swa", None, "trained"),
    ],
)
def test_a_checkpoint_of_lightning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str, key: str, precision: Any, evaluate: str
) -> None:
    weights = run_on_ranks(run_lightning, 2, tmp_path, strategy, precision, evaluate)[0]
    check(tmp_path / "last.ckpt", weights, tmp_path, "state_dict" if evaluate == "trained" else f"{key}.trained")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "last.ckpt")]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == [key, "Equal()"]
    if evaluate == "averaged":
        checkpoint.export(tmp_path / "last.ckpt", tmp_path / "scored.safetensors", key="state_dict")
        scored = load_file(tmp_path / "scored.safetensors")
        assert same_bits(scored, {name: value.to(scored[name].dtype) for name, value in weights.averaged.items()})
