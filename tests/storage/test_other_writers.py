"""Checkpoints of other libraries are read: their `.metadata` has more attributes, or classes of their own."""

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedTensorProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_swa import checkpoint
from dist_swa.__main__ import main
from dist_swa.storage.save_load import no_group_is_fine
from models import same_bits

MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
OLMO = "olmo_core.distributed.checkpoint.filesystem"
NEMO = "nemo_automodel.components.checkpoint._backports.filesystem"


@contextmanager
def in_module(name: str, *classes: type) -> Iterator[None]:
    """Let pickle find `classes` in the module `name`, which need not be installed."""
    parts = name.split(".")
    with pytest.MonkeyPatch.context() as patch:
        for module in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
            patch.setitem(sys.modules, module, sys.modules.get(module, ModuleType(module)))
        for cls in classes:
            cls.__module__ = name
            patch.setattr(sys.modules[name], cls.__name__, cls, raising=False)
        yield


def plans(metadata: Metadata, plan: Any = SavePlan) -> list[Any]:
    """Return the plan of the save that wrote `metadata`, with all that a plan may contain."""
    items = []
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            data = TensorWriteData(entry.chunks[0], entry.properties, entry.size)
            kind = WriteItemType.SHARD if len(entry.size) > 1 else WriteItemType.TENSOR
            items.append(WriteItem(MetadataIndex(key, entry.chunks[0].offsets, 0), kind, tensor_data=data))
        else:
            items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, BytesIOWriteData(7)))
    return [plan(items, storage_data=_StoragePrefix("__0_"), planner_data=metadata.planner_data)] * 2


def megatron(metadata: Any) -> bytes:
    metadata.mcore_data = {"model.weight": {"nd_reformulated_orig_global_shape": (3, 4)}}
    metadata.all_local_plans = plans(metadata)
    return pickle.dumps(metadata)


def megatron_0_5(metadata: Any) -> bytes:
    @dataclass(frozen=True)
    class MCoreSavePlan(SavePlan):
        mcore_data: Any = None

    MCoreSavePlan.__qualname__ = "MCoreSavePlan"
    with in_module(MEGATRON, MCoreSavePlan):
        metadata.all_local_plans = plans(metadata, MCoreSavePlan)
        return pickle.dumps(metadata)


def megatron_0_15(metadata: Any) -> bytes:
    subclass: Any = make_dataclass("MCoreMetadata", [("mcore_data", Any, None)], bases=(Metadata,))
    with in_module(MEGATRON, subclass):
        return pickle.dumps(subclass(**vars(metadata), mcore_data={"model.weight": {}}))


def resiliency_extension(metadata: Any) -> bytes:
    metadata.planner_data = {**metadata.planner_data, "__plans__": plans(metadata)}
    return pickle.dumps(metadata)


def with_places_of(module: str, **more: Any) -> Callable[[Any], bytes]:
    def write(metadata: Any) -> bytes:
        fields: list[Any] = ["relative_path", "offset", "length", *more]
        cls: Any = make_dataclass("_StorageInfo", fields)
        places = metadata.storage_data.items()
        with in_module(module, cls):
            metadata.storage_data = {
                index: cls(place.relative_path, place.offset, place.length, **more) for index, place in places
            }
            return pickle.dumps(metadata)

    return write


def torch_2_2(metadata: Any) -> bytes:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            properties: Any = ShardedTensorProperties(entry.properties.dtype)
            entry.properties = properties
    return pickle.dumps(metadata)


def enums_by_name(metadata: Any) -> bytes:
    """Some releases of Python 3.11 pickle the member of an enum as ``getattr(cls, name)``."""

    def reduce(self: Any, protocol: int) -> Any:
        return getattr, (type(self), self.name)

    with pytest.MonkeyPatch.context() as patch:
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                patch.setattr(type(TensorProperties.__getstate__(entry.properties)[3]), "__reduce_ex__", reduce)
        patch.setattr(WriteItemType, "__reduce_ex__", reduce)
        metadata.all_local_plans = plans(metadata)
        return pickle.dumps(metadata)


def python_3_13(metadata: Any) -> bytes:
    metadata.storage_meta.checkpoint_id = Path("/data/checkpoint")
    return pickle.dumps(metadata, protocol=2).replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")


def windows(metadata: Any) -> bytes:
    return python_3_13(metadata).replace(b"cpathlib._local\nPosixPath", b"cpathlib\nWindowsPath")


WRITERS: dict[str, Callable[[Any], bytes]] = {
    "Megatron-Core": megatron,
    "Megatron-Core 0.5": megatron_0_5,
    "Megatron-Core 0.15": megatron_0_15,
    "NVIDIA Resiliency Extension": resiliency_extension,
    "OLMo-core": with_places_of(OLMO),
    "NeMo Automodel": with_places_of(NEMO, transform_descriptors=None),
    "torch 2.2": torch_2_2,
    "enums by name": enums_by_name,
    "Python 3.13": python_3_13,
    "Windows": windows,
}


def saved(folder: Path, write: Callable[[Any], bytes]) -> dict[str, Tensor]:
    """Save a checkpoint whose metadata another library has written; return its model."""
    model = {"weight": torch.arange(12.0).view(3, 4), "half": torch.ones(5).bfloat16(), "count": torch.tensor(7)}
    with no_group_is_fine():
        dcp_save({"model": model, "epoch": 3}, checkpoint_id=folder)
    before = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(write(pickle.loads(before)))
    assert (folder / ".metadata").read_bytes() != before
    return model


@pytest.mark.parametrize("writer", WRITERS)
def test_a_checkpoint_of_another_writer_is_read(
    tmp_path: Path, writer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "a", WRITERS[writer])
    reader = checkpoint.open_checkpoint(tmp_path / "a")
    assert same_bits({name: reader.read(f"model.{name}") for name in model}, model)
    assert reader.read("epoch") == 3
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert (entry["key"], entry["tensors"], entry["elements"]) == ("model", 3, 18)
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "out.safetensors"), "--quiet"]) == 0
    assert same_bits(load_file(tmp_path / "out.safetensors"), model)
    state = {"model": {name: torch.zeros_like(value) for name, value in model.items()}}
    with pytest.warns(UserWarning, match="was not written by dist_swa"):
        checkpoint.load(state, tmp_path / "a")
    assert same_bits(state["model"], model)


def test_what_no_tensor_needs_is_not_constructed(tmp_path: Path) -> None:
    saved(tmp_path / "a", megatron)
    metadata = checkpoint.open_checkpoint(tmp_path / "a").metadata
    assert vars(metadata).keys() <= Metadata.__dataclass_fields__.keys()
    assert {type(place) for place in metadata.storage_data.values()} == {_StorageInfo}


@pytest.mark.parametrize("module", ["os", "torch.distributed.checkpoint.filesystem", "my_lab.writer"])
def test_a_class_that_is_not_known_is_refused_by_its_name(tmp_path: Path, module: str) -> None:
    unknown = make_dataclass("Plan", [])

    def write(metadata: Any) -> bytes:
        with in_module(module, unknown):
            metadata.my_plans = [unknown()]
            return pickle.dumps(metadata)

    saved(tmp_path / "a", write)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.open_checkpoint(tmp_path / "a")
    message = str(caught.value)
    assert f"{tmp_path / 'a/.metadata'}: it wants to run {module}.Plan, which is not known to be safe; " in message
    assert "save it with torch.distributed.checkpoint.save" in message
    assert "restore" not in message
    assert "as they were written" not in message
