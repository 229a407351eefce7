"""Export averages as safetensors, from a sharded training run or from a checkpoint."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_swa.averaging.average import ShardedAverage
from dist_swa.checkpoint.adapter import open_adapter
from dist_swa.checkpoint.beside import ADAPTER_FILES, copy_beside
from dist_swa.checkpoint.cast import check_dtype, checked_cast, has_nan
from dist_swa.checkpoint.safetensors_io import SUFFIX, Spec, atomic_output, files_of, write_safetensors
from dist_swa.checkpoint.sources import open_source
from dist_swa.collectives import all_gather, raise_on_all, rank_and_world_size
from dist_swa.sharding.opaque import is_subclass
from dist_swa.sharding.shard import LoadOnlyTensor, to_local
from dist_swa.storage.save_load import no_group_is_fine, unwrap_dcp_errors
from dist_swa.swa import SWA

_SHARDED = "sharded"  # the temporary folder of the shards


def export(
    source: SWA | ShardedAverage | str | Path,
    out: str | Path,
    *,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    only: str | None = None,
    progress: bool = False,
) -> None:
    """Write the averaged model as safetensors for ``load_state_dict(strict=True)`` and transformers.

    The output has all parameters (frozen ones too, tied ones under all names) and persistent buffers. The extra state
    of modules (`get_extra_state`) is left out with a warning, unless it is a tensor.

    Args:
        source: a live average, then every rank must call (a collective). Or a path; this needs no process group and
            no GPU. In a process group every rank must call, and the ranks share the files. A path is a checkpoint of
            torch.distributed.checkpoint, the checkpoint of a trainer with an average in it (transformers, accelerate,
            Lightning), safetensors or a file of torch.save, or a folder of one of the two as transformers saves it.
        out: a path where nothing exists. A name that ends in ".safetensors" becomes one file; any other a folder with
            ``model.safetensors``, or above 5 GB several files and ``model.safetensors.index.json``. From a Hugging Face
            folder (or its ``model.safetensors``) or a checkpoint of the Trainer, the files that from_pretrained reads
            are copied into the folder: configurations, tokenizer, processor, chat templates. A ``config.json`` gets
            `dtype`. With `only`, nothing is copied unless PEFT saved an adapter: from_pretrained would start the other
            parameters at random.
        key: the name of one of several live averages. Of a path the entry, such as "swa", "swa.ema_long", "model" or
            "app.model", or a prefix of several; default: the only average, or without one the only entry that is not
            the state of an optimizer. "" is the top level, as of ``dcp.save(model.state_dict())``; if it has no
            tensors, all entries. A file that is one state dict needs no key. Parameters that are not averaged come from
            the entry "model" or "state_dict".
        dtype: of all floating tensors, buffers included. Default: the dtype of the average for parameters, their own
            for others. Complex tensors keep theirs.
        only: "averaged" writes the averaged parameters only, as of a LoRA adapter. Quantised weights that are not
            averaged need it, unless safetensors can hold what their module's ``state_dict()`` has. Where PEFT saved an
            adapter beside the average (``adapter_config.json``), a folder `out` becomes an adapter that
            ``PeftModel.from_pretrained`` opens, in one file; a file `out` keeps the names of the model. An adapter that
            PEFT or `export` saved becomes such a folder without `only`.
        progress: whether the first rank shows a progress bar.

    Memory per rank: of a live source, three times the rank's share of one output file plus twice the largest tensor; of
    a path, three times the largest tensor, but all of a file that torch before version 1.6 saved. Disk: a live source
    needs twice the model while it is written. All ranks must see one file system.

    Raises ValueError if the key is ambiguous or has an optimizer inside (the message lists the keys), a parameter that
    is not averaged is missing, an adapter is not the only one or has no place for an averaged parameter, safetensors
    cannot hold one, or a value overflows `dtype`; RuntimeError before the first update; FileExistsError; OSError if the
    disk is full or read-only; CheckpointError if a file is damaged or asks to run code. Every rank raises the same
    error, and `out` is not created. NaN in the output warns.

    Example:

    >>> import torch
    >>> from safetensors.torch import load_file
    >>> from dist_swa import ShardedAverage, checkpoint
    >>> model = torch.nn.Linear(2, 2)
    >>> average = ShardedAverage(model)
    >>> average.update()
    >>> checkpoint.export(average, "average.safetensors")
    >>> model.load_state_dict(load_file("average.safetensors"))
    <All keys matched successfully>
    """
    out = Path(out)
    check_dtype("export", dtype)
    if isinstance(source, SWA | ShardedAverage):
        _export_live(source.average if isinstance(source, SWA) else source, out, key, dtype, only, progress)
    elif isinstance(source, str | Path):
        _export_stored(source, out, key, dtype, only, progress)
    else:
        raise TypeError(
            f"export needs an SWA, a ShardedAverage or a path, got source={type(source).__name__}; pass one"
        )


def _export_stored(
    path: str | Path, out: Path, key: str | None, dtype: torch.dtype | None, only: str | None, progress: bool
) -> None:
    with raise_on_all():
        average = open_source(path, key, only)
        adapter = None if out.suffix == SUFFIX else open_adapter(path, average, is_averaged=only is not None)
        source = adapter or average
        specs = {name: spec.in_dtype(dtype) for name, spec in source.specs.items()}
        files = files_of(specs, out, ADAPTER_FILES[0] if adapter else None)
        _warn_of_skipped(source.skipped)
    having_nan: list[str] = []

    def read(name: str) -> Tensor:
        tensor = checked_cast(name, source.read(name), specs[name].dtype)
        having_nan.extend([name] * has_nan(tensor))
        return tensor

    with atomic_output(out, None) as partial:
        write_safetensors(files, partial, read, None, progress)
        has_files = adapter is not None or (out.suffix != SUFFIX and only is None)
        if has_files and rank_and_world_size(None)[0] == 0:
            copy_beside(path, partial, dtype, adapter.folder if adapter else None)
    _warn_of_nan(having_nan, None)


def _export_live(
    average: ShardedAverage, out: Path, key: str | None, dtype: torch.dtype | None, only: str | None, progress: bool
) -> None:
    """Write the shards of each rank with DCP, then consolidate them.

    DCP's own consolidation (torch 2.13) writes 0 for 0-dim tensors and wrong headers for complex tensors, and fails for
    integers.
    """
    group = average.process_group
    average.check_ranks(group, with_others=only is None)
    with raise_on_all(group):
        state = average.sharded_state_dict(key, only=only)
    with raise_on_all(group):
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        _check_are_plain(tensors)
        specs = {name: Spec(tensor.shape, tensor.dtype).in_dtype(dtype) for name, tensor in tensors.items()}
        files = files_of(specs, out)
        _warn_of_skipped(sorted(state.keys() - tensors.keys()))
    having_nan: list[str] = []
    with atomic_output(out, group) as partial:
        shards = partial / _SHARDED
        planner = _ConvertingPlanner(specs)
        with unwrap_dcp_errors(), no_group_is_fine():
            dcp_save(tensors, storage_writer=_ShardWriter(shards, files), planner=planner, process_group=group)
        with raise_on_all(group):
            reader = _ShardReader(shards, specs, having_nan)
            write_safetensors(files, partial, reader.read, group, progress)
        if rank_and_world_size(group)[0] == 0:
            shutil.rmtree(shards)
    _warn_of_nan(having_nan, group)


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes one file per rank and output file: DCP has all tensors of a file in memory."""

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
    """Converts and copies a tensor when it is written: safetensors refuse tied tensors and strided views."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self._specs = specs

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        name = write_item.index.fqn
        tensor = checked_cast(name, object.detach().cpu(), self._specs[name].dtype)
        return tensor.clone(memory_format=torch.contiguous_format)


class _ShardReader:
    """Reads full tensors from the shards of all ranks. The names of those with NaN are added to `having_nan`."""

    def __init__(self, folder: Path, specs: Mapping[str, Spec], having_nan: list[str]) -> None:
        self._specs, self._having_nan = specs, having_nan
        self._shards: dict[str, list[tuple[Path, list[int]]]] = {name: [] for name in specs}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            with safe_open(path, framework="pt") as file:
                for name, info in json.loads(file.metadata()["DCP_SHARDING_INFO"]).items():
                    self._shards[name].append((path, info["saved_offsets"]))

    def read(self, name: str) -> Tensor:
        shape, dtype = self._specs[name]
        full = torch.empty(shape, dtype=dtype)
        num_read = 0
        for path, offsets in self._shards[name]:
            with safe_open(path, framework="pt") as file:
                shard = file.get_tensor(name)
            full[tuple(slice(start, start + size) for start, size in zip(offsets, shard.shape, strict=True))] = shard
            num_read += shard.numel()
        if num_read != full.numel():
            raise RuntimeError(
                f"export needs the {full.numel()} elements of {name}, got {num_read} from the ranks; let every rank"
                " call it, on a file system that all of them see"
            )
        self._having_nan.extend([name] * has_nan(full))
        return full


def _check_are_plain(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, LoadOnlyTensor) and is_subclass(tensor):
            raise ValueError(
                f"safetensors need plain tensors, got {name}={type(to_local(tensor)).__name__}; pass only='averaged' to"
                " leave it out, or save its module's state dict with torch.save"
            )


def _warn_of_skipped(names: list[str]) -> None:
    if names:
        warnings.warn(f"safetensors store tensors only; not written: {', '.join(names)}", stacklevel=4)


def _warn_of_nan(names: list[str], group: dist.ProcessGroup | None) -> None:
    """Warn on every rank of the tensors with NaN that the ranks have written. A collective."""
    if found := sorted(name for part in all_gather(names, group) for name in part):
        warnings.warn(
            f"an export needs finite weights, got NaN in {len(found)} tensors, such as {found[0]}; export an average"
            " from before the loss was NaN",
            stacklevel=4,
        )
