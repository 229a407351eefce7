"""The README's code runs as it stands there, but for what it leaves out."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from accelerate_on_cpu import launched
from cases import CASES
from dist_swa import SWA
from models import same_bits
from ranks import on_ranks, run_on_ranks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_block(first_words: str, left_out: Mapping[str, str], **names: Any) -> dict[str, Any]:
    """Run the code that begins so, with the rest of what it leaves out, and return its names."""
    (code,) = [block for block in BLOCKS if block.startswith(first_words)]
    for short, whole in left_out.items():
        assert short in code, short
        code = code.replace(short, whole)
    exec(compile(code, "README.md", "exec"), names)
    return names


@on_ranks(2)
def test_the_lines_of_use_run(tmp_path: Path) -> None:
    left_out = {
        '"90ep"': '"4ep"',
        "range(90)": "range(4)",
        "        ...  ": "        optimizer.zero_grad(); model(images).square().mean().backward()  ",
        '"model": ...': '"model": model.state_dict()',
        '"optimizer": ...': '"optimizer": optimizer.state_dict()',
        'f"checkpoints/': 'f"{folder}/',
    }
    looks = []

    def evaluate(model: nn.Module) -> None:
        looks.append(model.eval()(torch.ones(2, 4)))
        model.train()

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    loader = [(torch.randn(8, 4), torch.zeros(8)) for _ in range(5)]
    names: dict[str, Any] = {"model": model, "loader": loader, "evaluate": evaluate, "folder": tmp_path}
    names = run_block("import torch\n", left_out, **names)
    assert names["swa"].num_averaged == 7  # from batch 14 of 20 on
    assert names["swa"].completed
    assert len(looks) == 2
    assert len(list(tmp_path.iterdir())) == 4


@on_ranks(2)
def test_the_lines_for_a_folder_run(tmp_path: Path) -> None:
    swa = SWA(nn.Linear(2, 2), swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    for found in (None, 0):
        folder = {'"checkpoints"': repr(str(tmp_path)), "step or 0": "0 if step is None else 1"}
        names = run_block("from dist_swa.checkpoint", folder, state={"swa": swa})
        assert names["step"] == found
        names.pop("folder")  # which holds a lock


@on_ranks(2)
def test_the_lines_for_accelerate_and_the_trainer_run(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    with launched():
        accelerator = Accelerator(gradient_accumulation_steps=2)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        names = run_block(
            "from dist_swa.integrations.accelerate",
            {
                '"9000ba"': '"5ba"',
                "        ...  ": "        accelerator.backward(model(*batch).square().mean()); optimizer.step();"
                " optimizer.zero_grad()  ",
            },
            accelerator=accelerator,
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            loader=DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4),
        )
        assert names["swa"].num_averaged == 2  # steps 4 and 5
        assert Path("checkpoint/dist_swa").is_dir()
    with launched():
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

        data = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(4) + i} for i in range(8)]
        config = GPT2Config(vocab_size=16, n_positions=4, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
        names = run_block(
            "from dist_swa.integrations.transformers",
            {},
            Trainer=Trainer,
            model=GPT2LMHeadModel(config),
            args=TrainingArguments(
                str(tmp_path), max_steps=5, save_steps=4, eval_strategy="steps", eval_steps=4, use_cpu=True
            ),
            data=data,
            held_out=data,
        )
        assert any("eval_swa_loss" in entry for entry in names["trainer"].state.log_history)
        assert Path("checkpoint-4/dist_swa").is_dir()
        if dist.get_rank() == 0:
            assert Path("averaged/model.safetensors").exists()


class ModelWrapper(Stateful):
    """As torchtitan's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict)


class Optimizers(Stateful):
    """A list of optimizers, as torchtitan's container."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.options = model, StateDictOptions(flatten_optimizer_state_dict=True)
        first, *others = model.parameters()
        self.optimizers = [torch.optim.AdamW([first], lr=0.1), torch.optim.AdamW(others, lr=0.1)]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for optimizer in self.optimizers:
            states |= get_optimizer_state_dict(self.model, optimizer, options=self.options)
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            set_optimizer_state_dict(self.model, optimizer, state_dict, options=self.options)


class TitanTrainer(Stateful):
    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])


def titan(folder: Path, resume: str | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for part in (*model, model):
        fully_shard(part)

    def batch(step: int) -> Any:
        whole = torch.randn(12, 4, generator=torch.Generator().manual_seed(step))
        return whole.chunk(dist.get_world_size())[dist.get_rank()]

    names = run_block(
        "swa = SWA(model",
        {
            "    ...  ": "    model(batch(trainer.step)).square().mean().backward()  ",
            "checkpoints/step": "{folder}/step",
        },
        SWA=SWA,
        dcp=checkpoint,
        ModelWrapper=ModelWrapper,
        model=model,
        optimizers=Optimizers(model),
        trainer=TitanTrainer(),
        steps=10,
        resume=resume,
        folder=folder,
        batch=batch,
    )
    assert names["swa"].num_averaged == 4
    return dict(names["swa"].average.full_state_dict())


def test_the_lines_for_torchtitan_run_and_resume_on_any_number_of_ranks(tmp_path: Path) -> None:
    whole = run_on_ranks(titan, 2, tmp_path / "whole")[0]
    for ranks in (2, 3):
        resumed = run_on_ranks(titan, ranks, tmp_path / f"on {ranks}", str(tmp_path / "whole/step-8"))[0]
        if ranks == 2:
            assert same_bits(resumed, whole)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-5)


def test_its_commands_and_files_are_there() -> None:
    commands = ["launch/train", "launch/test", "launch/chaos"]
    commands += ["tests/benchmarks/update.py", "tests/benchmarks/batch_norm.py"]
    for path in [*commands, *re.findall(r"\]\(([\w/.]+)\)", README)]:
        assert (ROOT / path).exists(), path
    assert os.access(ROOT / "launch/train", os.X_OK)
    assert os.access(ROOT / "launch/test", os.X_OK)
    assert os.access(ROOT / "launch/chaos", os.X_OK)


def test_its_table_names_every_case_of_the_matrix() -> None:
    table = README.partition("| model | variants |")[2].partition("\n\n")[0]
    named = []
    for family, variants in re.findall(r"^\| ([\w+. ]+?) \| (.*?) \|", table, re.MULTILINE):
        named += [
            family if variant == "alone" else f"{family}, {variant.strip('`')}" for variant in variants.split("; ")
        ]
    assert sorted(named) == sorted(CASES)
