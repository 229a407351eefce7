"""Small runs of Hugging Face's Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

GLOBAL_BATCH, STEPS, STOP, START = 12, 6, 4, 3
LR, EPS = 0.03, 1e-3  # a large eps, so that gradients that are rounding errors only do not move the parameters


class SmallResNetForImageClassification(ResNetForImageClassification):
    def get_input_embeddings(self) -> Any:
        """Return None: accelerate calls this under FSDP2, and transformers does not implement it for a ResNet."""


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


def trainer_for(
    kind: str,
    folder: Path,
    *callbacks: TrainerCallback,
    cls: Any = Trainer,
    arguments_cls: Any = TrainingArguments,
    **options: Any,
) -> Any:
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
    return cls(
        build(kind),
        arguments_cls(**(arguments | options)),
        train_dataset=data(kind),
        eval_dataset=data(kind)[:GLOBAL_BATCH],
        callbacks=list(callbacks),
    )


def losses(log: Sequence[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Return all losses of a Trainer's log by step and name, in order."""
    return {(entry["step"], key): entry[key] for entry in log for key in entry if key.endswith("_loss")}
