"""Averages as safetensors: from a training run, sharded as it is, or from a checkpoint on disk."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_swa.averaging.average import ShardedAverage
from dist_swa.checkpoint.cast import checked_cast
from dist_swa.checkpoint.safetensors_io import SUFFIX, Spec, atomic_output, files_of, write_safetensors
from dist_swa.checkpoint.sources import open_source
from dist_swa.collectives import raise_on_all, rank_and_world_size
from dist_swa.storage.save_load import no_group_is_fine, unwrap_dcp_errors
from dist_swa.swa import SWA

_SHARDED = "sharded"  # the folder of what the ranks have written, until it is consolidated


def export(
    source: SWA | ShardedAverage | str | Path,
    out: str | Path,
    *,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> None:
    """Write the averaged model as safetensors, as `load_state_dict(strict=True)` and transformers take them.

    `out`, where nothing may be yet, becomes a folder: ``model.safetensors``, or, above 5 GB, several files and
    ``model.safetensors.index.json``. A name that ends in ".safetensors" becomes that one file. It holds parameters,
    frozen ones too, under all names where they are tied, and persistent buffers.

    Args:
        source: a live average: every rank calls, a collective. Or the path of a checkpoint, which needs no process
            group and no GPU; in a process group every rank calls, too, and they share the files among them.
        key: of a live source, the name of one of several averages. Of a path, the entry, as "swa", "swa.ema_long" or
            "model"; by default the only average, or, without any, the only entry. "" is what stands at the top level,
            as in ``dcp.save(model.state_dict())``. Parameters that are not averaged come from the entry "model".
        dtype: of all floating tensors, buffers included; default: parameters as they are averaged, others as they are.
            Complex tensors stay as they are.
        progress: whether the first rank shows a progress bar.

    Memory per rank: of a live source, three times the part of one output file that the rank holds, and twice the
    largest tensor; of a path, three times the largest tensor. Disk: the model twice, while a live source is written.
    All ranks see one file system. What modules keep besides tensors (`get_extra_state`) is left out, with a warning.

    Raises ValueError where the key is not clear (the message lists them), where a parameter that is not averaged is
    missing, and where a value exceeds `dtype`; RuntimeError before the first update; FileExistsError; OSError where the
    disk is full or read-only; and what `open_checkpoint` raises. On every rank alike; nothing appears then.
    """
    out = Path(out)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"export needs a floating torch.dtype, got dtype={dtype!r}; leave it out, or pass torch.bfloat16"
        )
    if isinstance(source, SWA | ShardedAverage):
        _export_live(source.average if isinstance(source, SWA) else source, out, key, dtype, progress)
    elif isinstance(source, str | Path):
        _export_stored(source, out, key, dtype, progress)
    else:
        raise TypeError(
            f"export needs an SWA, a ShardedAverage or a path, got source={type(source).__name__}; pass one"
        )


def _export_stored(path: str | Path, out: Path, key: str | None, dtype: torch.dtype | None, progress: bool) -> None:
    with raise_on_all():
        source = open_source(path, key)
        specs = {name: _converted_spec(spec, dtype) for name, spec in source.specs.items()}
        files = files_of(specs, out)
        _warn_of_skipped(source.skipped)
    with atomic_output(out, None) as partial:
        write_safetensors(files, partial, lambda name: _converted(name, source.read(name), dtype), None, progress)


def _export_live(
    average: ShardedAverage, out: Path, key: str | None, dtype: torch.dtype | None, progress: bool
) -> None:
    """Let each rank write its shards, then put them together: not by DCP.

    DCP's own consolidation (torch 2.13) writes 0 for tensors without dimensions, wrong headers for complex ones, and
    fails with integers.
    """
    group = average.process_group
    with raise_on_all(group):
        state = average.sharded_state_dict(key)
    with raise_on_all(group):
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        files = files_of({n: _converted_spec(Spec(t.shape, t.dtype), dtype) for n, t in tensors.items()}, out)
        _warn_of_skipped(sorted(state.keys() - tensors.keys()))
    with atomic_output(out, group) as partial:
        shards = partial / _SHARDED
        planner = _ConvertingPlanner(dtype)
        with unwrap_dcp_errors(), no_group_is_fine():
            dcp_save(tensors, storage_writer=_ShardWriter(shards, files), planner=planner, process_group=group)
        pieces = _Pieces(shards, {name: spec for file in files.values() for name, spec in file.items()})
        with raise_on_all(group):
            write_safetensors(files, partial, pieces.read, group, progress)
        if rank_and_world_size(group)[0] == 0:
            shutil.rmtree(shards)


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes what a rank holds into a file for each output file: torch keeps all of a file in memory."""

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Spec]]) -> None:
        super().__init__(
            str(folder),
            fqn_to_index_mapping={name: i for i, specs in enumerate(files.values(), start=1) for name in specs},
            save_distributed=True,
        )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        Path(self.path).mkdir(exist_ok=True)
        return plan


class _ConvertingPlanner(DefaultSavePlanner):
    """Converts a tensor when it is written. A copy: safetensors refuse tied tensors, and views with gaps."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self._dtype = dtype

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        tensor = _converted(write_item.index.fqn, object.detach().cpu(), self._dtype)
        return tensor.clone(memory_format=torch.contiguous_format)


class _Pieces:
    """Whole tensors, read from the shards that all ranks have written."""

    def __init__(self, folder: Path, specs: Mapping[str, Spec]) -> None:
        self._specs = specs
        self._places: dict[str, list[tuple[Path, list[int]]]] = {name: [] for name in specs}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            with safe_open(path, framework="pt") as file:
                for name, where in json.loads(file.metadata()["DCP_SHARDING_INFO"]).items():
                    self._places[name].append((path, where["saved_offsets"]))

    def read(self, name: str) -> Tensor:
        shape, dtype = self._specs[name]
        whole = torch.empty(shape, dtype=dtype)
        num_read = 0
        for path, offsets in self._places[name]:
            with safe_open(path, framework="pt") as file:
                piece = file.get_tensor(name)
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, piece.shape, strict=True))] = piece
            num_read += piece.numel()
        if num_read != whole.numel():
            raise RuntimeError(
                f"export needs the {whole.numel()} elements of {name}, got {num_read} from the ranks; let every rank"
                " call it, on a file system that all of them see"
            )
        return whole


def _converted_spec(spec: Spec, dtype: torch.dtype | None) -> Spec:
    return Spec(spec.shape, dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype)


def _converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return checked_cast(name, tensor, dtype, "choose torch.bfloat16")


def _warn_of_skipped(names: list[str]) -> None:
    if names:
        warnings.warn(f"safetensors hold tensors only: left out {', '.join(names)}", stacklevel=4)
