"""Checks of the options for accelerate and the Hugging Face Trainer, as early as these can be known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn

from dist_swa.integrations.trainer_metrics import is_of_average
from dist_swa.options import check_finalize_options, check_options_of_trainer

_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
_EVALUATE = ("averaged", "trained", "both")


def check_trainer(trainer: Any, evaluate: str, finalize_options: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise for options of `add_swa` and training arguments that do not fit together."""
    if evaluate not in _EVALUATE:
        raise ValueError(f"evaluate needs one of {', '.join(_EVALUATE)}, got {evaluate=}; 'both' is the default")
    check_finalize_options(finalize_options)
    own = {"num_processes", "name"} & options.keys()
    known = ["num_processes", "name", "evaluate", "finalize_options"]
    check_options_of_trainer("SWA in a Trainer", options, also=known)
    check_accelerator(trainer.accelerator, trainer.model, **{name: options[name] for name in own})
    best = str(trainer.args.metric_for_best_model or "")
    if best and evaluate == ("trained" if is_of_average(best) else "averaged"):
        raise ValueError(
            "SWA in a Trainer needs a metric_for_best_model that its evaluations give, got metric_for_best_model="
            f"{best!r} with {evaluate=}; metrics of the average begin with 'swa_', and evaluate='both' gives all"
        )
    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    if named := [name for name in datasets if str(name).startswith("swa_")]:
        raise ValueError(
            f"SWA in a Trainer needs evaluation data with names that do not begin with 'swa_', got {named=}; metrics of"
            " the average begin so"
        )
    if replaced := sorted(vars(trainer).keys() & {"evaluate", "_save_checkpoint", "_inner_training_loop"}):
        raise ValueError(
            f"SWA in a Trainer needs the methods of its class, got {replaced=} on the trainer itself; override them in"
            " a subclass"
        )


def check_accelerator(
    accelerator: Accelerator, model: nn.Module | None, num_processes: int | None = None, name: str = "dist_swa"
) -> None:
    """Raise what `prepare_swa` raises for the accelerator and its own arguments, also before `prepare`. Local."""
    kind = accelerator.distributed_type
    parameters = [] if model is None else model.parameters()
    if kind in _UNSUPPORTED or any(hasattr(parameter, "ds_id") for parameter in parameters):
        kind = kind if kind in _UNSUPPORTED else DistributedType.DEEPSPEED
        raise ValueError(
            f"prepare_swa needs a model in DDP, FSDP1, FSDP2 or one process, got distributed_type={kind.value}; FSDP2"
            " (fsdp_version: 2) shards as DeepSpeed's ZeRO-3 does"
        )
    if num_processes not in (None, accelerator.num_processes):
        raise ValueError(
            f"prepare_swa needs num_processes={num_processes}, got {accelerator.num_processes} of them, with"
            f" distributed_type={kind.value}; see launch/accelerate for launches that run them all"
        )
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        raise ValueError(f"prepare_swa needs a name for a folder in each checkpoint, got {name=}; write 'ema'")


def existing(folder: Path | None) -> Path | None:
    """Return the `folder` of the first rank if it exists there, or None. A collective."""
    (found,) = broadcast_object_list([folder if folder is not None and folder.exists() else None])
    return cast("Path | None", found)
