"""Checkpoints load anywhere, damaged ones nowhere, and none of them runs code."""

import argparse
import copy
import datetime
import hashlib
import io
import os
import pickle
import random
import resource
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_swa import EMA, SWA, Equal, ShardedAverage, Window, checkpoint
from dist_swa.averaging.rules import Rule
from dist_swa.storage import writer
from dist_swa.storage.save_load import save_async
from models import Net, build, group_of, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks

WRAPPERS = ("plain", "ddp", "fsdp1", "fsdp2+tp")
NO_CHECKSUMS = "without checksums, damage inside"


class Training:
    """A model, its average after some models, and the state of both."""

    def __init__(
        self, wrapper: str = "", rule: Rule = Equal(), models: int = 3, build: Callable[[], Any] = build
    ) -> None:
        self.model = wrap(build(), wrapper) if wrapper else build()
        self.average = ShardedAverage(self.model, rule, process_group=group_of(wrapper))
        for values in trajectory(models, build()):
            write(self.model, values)
            self.average.update()

    def state(self) -> dict[str, Any]:
        return {"model": get_model_state_dict(self.model), "swa": self.average, "notes": {"lr": 0.1, "betas": (0.9, 1)}}

    def values(self) -> dict[str, Tensor]:
        """Return copies of all that a load writes."""
        tensors = self.average.full_state_dict() if self.average.num_averaged else {}
        tensors = {f"swa {name}": value for name, value in tensors.items()}
        return tensors | {f"model {name}": value.clone() for name, value in self.model.state_dict().items()}


def save_all(folder: Path, save: Callable[..., Any] = checkpoint.save) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        training = Training(wrapper)
        wait = save(training.state(), folder / wrapper)
        if wait:
            wait()
    return training.average.full_state_dict()


def load_all(folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for source in WRAPPERS:
        for wrapper in WRAPPERS:
            training = Training(wrapper, models=0)
            state = training.state()
            state["notes"] = {"lr": 0.0, "betas": ()}
            checkpoint.load(state, folder / source)
            assert state["notes"] == {"lr": 0.1, "betas": (0.9, 1)}
            found.append(training.average.full_state_dict())
    return found


@pytest.mark.parametrize(("saving", "loading", "save"), [(2, 3, checkpoint.save), (3, 1, save_async)])
def test_loads_on_other_ranks_under_other_wrappers(
    tmp_path: Path, saving: int, loading: int, save: Callable[..., Any]
) -> None:
    expected = run_on_ranks(save_all, saving, tmp_path, save)[0]
    found = run_on_ranks(load_all, loading, tmp_path)[0]
    assert len(found) == len(WRAPPERS) ** 2
    assert all(same_bits(result, expected) for result in found)


@on_ranks(2)
def test_dcp_loads_ours_and_we_load_dcps(tmp_path: Path) -> None:
    saved = Training("fsdp2")
    checkpoint.save(saved.state(), tmp_path / "ours")
    dcp_save(saved.state(), checkpoint_id=tmp_path / "dcps")
    loaded = Training("fsdp2", models=0)
    dcp_load({"swa": loaded.average}, checkpoint_id=tmp_path / "ours")
    also_loaded = Training("fsdp2", models=0)
    with pytest.warns(UserWarning, match=NO_CHECKSUMS) as warned:
        checkpoint.load({"swa": also_loaded.average}, tmp_path / "dcps")
    assert len(warned) == 1
    for training in (loaded, also_loaded):
        assert same_bits(training.average.full_state_dict(), saved.average.full_state_dict())


class Buffers(nn.Module):
    """Many buffers of several sizes, which plain DCP would take from different ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        for i in range(24):
            self.register_buffer(f"b{i}", torch.zeros(i % 5 + 1, 7))


def buffers_after(folder: Path, save: Callable[..., Any], wrapper: str) -> list[float]:
    """Save buffers that say which rank they are of, load them, and return what each became."""
    model = wrap(Buffers(), wrapper)
    for buffer in model.buffers():
        buffer.fill_(dist.get_rank())
    average = ShardedAverage(model)
    average.update()
    wait = save({"model": get_model_state_dict(model), "swa": average}, folder)
    for buffer in model.buffers():
        buffer.fill_(9)
    average.update()
    if wait:
        wait()
    state: dict[str, Any] = {"model": get_model_state_dict(model), "swa": average}
    checkpoint.load(state, folder)
    model_buffers = [float(value.max()) for name, value in state["model"].items() if name != "weight"]
    average.transfer()
    return model_buffers + [float(buffer.max()) for buffer in model.buffers()]


@on_ranks(4)
def test_buffers_of_model_and_average_are_rank_0s(tmp_path: Path) -> None:
    for save in (checkpoint.save, save_async):
        for wrapper in ("ddp", "fsdp2", "hsdp"):
            assert buffers_after(tmp_path / f"{wrapper} {save.__name__}", save, wrapper) == [0.0] * 48


def test_one_process_without_a_group_reads_what_ranks_have_written(tmp_path: Path) -> None:
    expected = run_on_ranks(save_all, 3, tmp_path)[0]
    reader = checkpoint.open_checkpoint(tmp_path / "fsdp2+tp")
    prefix = "swa.slots.0."
    names = {key.removeprefix(prefix) for key in reader.keys if key.startswith(prefix)}
    assert names == {name for name, _ in build().named_parameters()} - {"frozen"}
    for name in names:
        tensor = reader.read(prefix + name)
        assert (reader.shape(prefix + name), reader.dtype(prefix + name)) == (tensor.shape, tensor.dtype)
        assert torch.equal(tensor, expected[name])
    assert (reader.read("notes.betas"), reader.shape("notes.betas"), reader.dtype("notes.lr")) == ((0.9, 1), None, None)
    with pytest.raises(KeyError, match=r"nothing is not in the checkpoint .*fsdp2\+tp"):
        reader.read("nothing")
    training = Training(models=0)
    checkpoint.load(training.state(), tmp_path / "fsdp2+tp")
    assert same_bits(training.average.full_state_dict(), expected)


# --- Damage


def reseal(folder: Path) -> None:
    """Write the checksums anew, as an attacker would."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def save_two(folder: Path) -> None:
    for name, models in (("one", 3), ("other", 4)):
        checkpoint.save(Training("fsdp2", models=models).state(), folder / name)
    dcp_save(Training("fsdp2").state(), checkpoint_id=folder / "plain dcp")


def damages(one: Path, other: Path) -> Iterator[tuple[str, Path]]:
    """Damage the checkpoint `one` in one way after the other; yield what was done to which file."""
    names, draw = sorted(path.name for path in one.iterdir()), random.Random(0)
    contents = {name: (one / name).read_bytes() for name in names}
    for name in names:
        path, content = one / name, contents[name]
        for place in draw.sample(range(len(content)), 30):
            flipped = bytearray(content)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            yield f"bit flipped at {place}", path
        for size in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            yield f"cut to {size} bytes", path
        path.write_bytes(content + b"\0")
        yield "a byte more", path
        path.unlink()
        yield "missing", path
        path.with_name("renamed").write_bytes(content)
        yield "renamed", path
        path.with_name("renamed").unlink()
        path.write_bytes((other / name).read_bytes())
        yield "of another checkpoint", path
        for wrong in names:
            if wrong != name:
                path.write_bytes(contents[wrong])
                (one / wrong).write_bytes(content)
                yield f"swapped with {wrong}", path
                (one / wrong).write_bytes(contents[wrong])
        path.write_bytes(content)


def test_damage_of_any_file_is_named_and_changes_nothing(tmp_path: Path, record_property: Any) -> None:
    run_on_ranks(save_two, 2, tmp_path)
    training = Training(models=1)
    before, count = training.values(), 0
    for what, path in damages(tmp_path / "one", tmp_path / "other"):
        with pytest.raises(checkpoint.CheckpointError) as raised:
            checkpoint.load(training.state(), tmp_path / "one")
        named = [path.name, what.removeprefix("swapped with ")] if "swapped" in what else [path.name]
        text = str(raised.value).replace("checksum in SHA256SUMS", f"{tmp_path}/one/SHA256SUMS: ")  # one of both it is
        assert any(f"{tmp_path}/one/{name}: " in text for name in named), (what, path, text)
        assert same_bits(training.values(), before), (what, path)
        assert training.average.num_averaged == 1
        count += 1
    print(f"{count} damaged checkpoints, {count} errors that name the file, 0 bits changed")
    record_property("damaged_checkpoints", count)
    assert count == 4 * (30 + 4 + 4 + 3)
    checkpoint.load(training.state(), tmp_path / "one")  # undamaged it loads
    assert training.average.num_averaged == 3


@on_ranks(2)
def test_every_rank_hears_of_damage(tmp_path: Path) -> None:
    training = Training("fsdp2")
    checkpoint.save(training.state(), tmp_path / "one")
    training = Training("fsdp2", models=1)
    before = training.values()
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "SHA256SUMS"):
        path = tmp_path / "one" / name
        content = path.read_bytes()
        dist.barrier()
        path.write_bytes(content[:-5] + bytes(5))
        dist.barrier()
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.load(training.state(), tmp_path / "one")
        dist.barrier()
        path.write_bytes(content)
    assert same_bits(training.values(), before)


def test_a_checkpoint_by_plain_dcp_is_looked_at_for_missing_and_short_files(tmp_path: Path) -> None:
    run_on_ranks(save_two, 2, tmp_path)
    folder, training = tmp_path / "plain dcp", Training(models=1)
    before = training.values()
    for name in sorted(path.name for path in folder.iterdir()):
        content = (folder / name).read_bytes()
        for damaged in (None, b"", content[:-300]):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            with pytest.raises(checkpoint.CheckpointError, match=f"{folder / name}: "):
                checkpoint.load(training.state(), folder)
            (folder / name).write_bytes(content)
    assert same_bits(training.values(), before)


# --- Code


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.call = (module, name, arguments)

    def pickled(self) -> bytes:
        """Return the pickle that makes the call; dotted names are for protocol 4."""
        module, name, arguments = self.call
        return b"\x80\x04" + global_(module, name) + pickle.dumps(arguments, protocol=2)[2:-1] + b"R."


def global_(module: str, name: str) -> bytes:
    """Return the opcodes that put what has this name on the stack."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def payloads(marker: Path) -> list[Payload]:
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    inner = io.BytesIO()
    torch.save(Touch(marker), inner)
    return [
        Payload("os", "system", touch),
        Payload("posix", "system", touch),
        Payload("builtins", "eval", code),
        Payload("builtins", "exec", code),
        Payload("subprocess", "getoutput", touch),
        Payload("torch.distributed.checkpoint.metadata", "os.system", touch),
        Payload("torch.distributed.checkpoint.filesystem", "os.system", touch),
        Payload("torch.storage", "_load_from_bytes", inner.getvalue()),
        Payload("pathlib", "PosixPath.touch", marker),
        Payload("pathlib", "Path.touch", marker),
    ]


class Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    folder, marker, training = tmp_path / "checkpoint", tmp_path / "code ran".replace(" ", "_"), Training()
    checkpoint.save(training.state(), folder)
    metadata, before = (folder / ".metadata").read_bytes(), training.values()
    for payload in payloads(marker):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pickle.loads(payload.pickled())
        assert marker.exists(), payload.call  # so it does run where it is let
        marker.unlink()
        for content in (payload.pickled(), payload.pickled()[:-1] + b"0" + metadata[2:]):
            (folder / ".metadata").write_bytes(content)
            reseal(folder)
            for read in (lambda: checkpoint.load(training.state(), folder), lambda: checkpoint.open_checkpoint(folder)):
                with pytest.raises(checkpoint.CheckpointError, match=r"\.metadata: it wants to run "):
                    read()
                assert not marker.exists(), payload.call
    assert same_bits(training.values(), before)


def test_metadata_changes_nothing(tmp_path: Path) -> None:
    """What BUILD sets attributes of may be a class, a function or an enum's member."""
    folder, dcp = tmp_path / "checkpoint", "torch.distributed.checkpoint.metadata"
    checkpoint.save({"x": torch.ones(2)}, folder)
    metadata = (folder / ".metadata").read_bytes()
    attributes, slots = b"}\x8c\x06poisonK\x01sb", b"N}\x8c\x06poisonK\x01s\x86b"
    for named, change in (
        (global_("pathlib", "PosixPath"), slots),
        (global_("torch", "Size"), slots),
        (global_(dcp, "ChunkStorageMetadata"), slots),
        (global_("torch.serialization", "_get_layout"), attributes),
        (global_(dcp, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R", attributes),
        (global_(dcp, "ChunkStorageMetadata") + b")\x81", attributes),  # of an instance, but no field
    ):
        target = pickle.loads(b"\x80\x04" + named + b".")
        before = dict(vars(target))
        for content in (b"\x80\x04" + named + change + b".", b"\x80\x04" + named + change + b"0" + metadata[2:]):
            (folder / ".metadata").write_bytes(content)
            reseal(folder)
            with pytest.raises(checkpoint.CheckpointError, match=r"\.metadata: it wants to change a "):
                checkpoint.open_checkpoint(folder)
            assert dict(vars(target)) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # The hash of a deep tuple overflows C's stack.
        (b"})" + b"\x85" * 3_000_000 + b"Ns.", "tuples in tuples"),
        (b"}N" + b"N\x86" * 3_000_000 + b"Ns.", "tuples in tuples"),
        (b"}" + b"(" * 300_000 + b"t" * 300_000 + b"Ns.", "tuples in tuples"),
        (b"b", "no pickle of metadata"),
        (b"", "no pickle of metadata"),
        (b"N.", "it holds NoneType where Metadata should be"),
    ],
)
def test_what_is_no_metadata_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    checkpoint.save({"x": torch.ones(2)}, tmp_path / "checkpoint")
    (tmp_path / "checkpoint/.metadata").write_bytes(b"\x80\x04" + content)
    reseal(tmp_path / "checkpoint")
    with pytest.raises(checkpoint.CheckpointError, match=rf"\.metadata: .*{message}"):
        checkpoint.open_checkpoint(tmp_path / "checkpoint")


def test_entries_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that are no tensors, nor a tensor's place in a file, which `.metadata` may have moved."""
    folder, marker, training = tmp_path / "checkpoint", tmp_path / "code_ran", Training(models=1)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_copy_of_value", lambda _, value: value)
        checkpoint.save(training.state() | {"evil": Touch(marker)}, folder)
    before = training.values()
    state = training.state() | {"evil": 0}
    with pytest.raises(checkpoint.CheckpointError, match=r"__0_0\.distcp: it holds other than tensors and"):
        checkpoint.load(state, folder)
    with pytest.raises(checkpoint.CheckpointError, match=r"__0_0\.distcp: it holds other than tensors and"):
        checkpoint.open_checkpoint(folder).read("evil")
    metadata = checkpoint.open_checkpoint(folder).metadata
    place = MetadataIndex("swa.slots.0.up.weight", [0, 0])
    metadata.storage_data[place] = metadata.storage_data[MetadataIndex("evil")]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder)
    with pytest.raises(checkpoint.CheckpointError, match=r"__0_0\.distcp: it holds other than tensors and"):
        checkpoint.open_checkpoint(folder).read("swa.slots.0.up.weight")
    assert not marker.exists()
    assert same_bits(training.values(), before)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp_load({"evil": 0}, checkpoint_id=folder)
    assert marker.exists()  # so it does run where it is let


def test_all_is_read_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, load, modes = Training(), torch.load, []

    def noting(*args: Any, **options: Any) -> Any:
        modes.append(options.get("weights_only"))
        return load(*args, **options)

    checkpoint.save(training.state(), tmp_path / "checkpoint")
    monkeypatch.setattr(torch, "load", noting)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    checkpoint.load(training.state(), tmp_path / "checkpoint")
    assert len(modes) > 2
    assert set(modes) == {True}


ROW = "swa.slots.0.one_row"
PINWHEEL = (((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 0), (1, 1)), ((1, 0), (1, 1)), ((2, 1), (1, 2)), ((1, 1), (1, 1)))


def set_chunks(metadata: Metadata, shape: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Give the tensor `ROW` another shape, and chunks of these offsets and sizes, all in its place in the file."""
    entry = metadata.state_dict_metadata[ROW]
    assert isinstance(entry, TensorStorageMetadata)
    (old,) = entry.chunks
    entry.size = torch.Size(shape)
    entry.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    for chunk in entry.chunks:
        metadata.storage_data[MetadataIndex(ROW, chunk.offsets)] = metadata.storage_data[
            MetadataIndex(ROW, old.offsets)
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../x"),
            "a file outside of the folder",
        ),
        (lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", 7), "where the place of an entry"),
        (lambda m: m.state_dict_metadata.update({7: None}), "it holds 7 where a key should be"),
        (lambda m: m.storage_data.popitem(), "it does not say where"),
        (lambda m: setattr(m, "storage_data", None), "it holds NoneType where a dict"),
        (lambda m: delattr(m, "storage_data"), "it holds NoneType where a dict"),
        (lambda m: setattr(m.storage_meta, "modules", 7), "not iterable"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "offset", -5), "where the place of an entry"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "length", "7"), "where the place of an entry"),
        (lambda m: setattr(m.state_dict_metadata[ROW], "properties", "hello"), f"does not describe {ROW} as"),
        (lambda m: setattr(m.state_dict_metadata[ROW].properties, "dtype", "hello"), f"does not describe {ROW} as"),
        (lambda m: delattr(m.state_dict_metadata[ROW], "size"), f"does not describe {ROW} as"),
        (lambda m: setattr(m.state_dict_metadata[ROW], "chunks", ["hello"]), f"does not describe {ROW} as"),
        (lambda m: setattr(m.state_dict_metadata[ROW], "size", torch.Size([2, 5])), "do not make up"),
        (lambda m: set_chunks(m, (2, 2), ((0, 0), (-2, -2))), f"does not describe {ROW} as"),
        (lambda m: set_chunks(m, (-2, -2), ((0, 0), (2, 2))), "do not make up"),
        (lambda m: set_chunks(m, (4,), ((0, 0), (2, 2))), "do not make up"),
        (lambda m: set_chunks(m, (8,), ((0,), (4,)), ((0,), (4,))), "do not make up"),
        (lambda m: set_chunks(m, (8,), ((0,), (4,)), ((8,), (4,))), "do not make up"),
        (lambda m: set_chunks(m, (4,), ((0,), (3,)), ((2,), (2,)), ((5,), (0,))), "do not make up"),
        (lambda m: set_chunks(m, (4, 4), *PINWHEEL[:-1], ((1, 2), (2, 1))), "do not make up"),
        (lambda m: set_chunks(m, (2**50,), ((0,), (2**50,))), f"it puts 4503599627370496 bytes of {ROW} into "),
        (lambda m: m.state_dict_metadata["swa.num_averaged"].chunks.clear(), "do not make up"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    checkpoint.save(Training().state(), tmp_path / "checkpoint")
    metadata = checkpoint.open_checkpoint(tmp_path / "checkpoint").metadata
    change(metadata)
    (tmp_path / "checkpoint/.metadata").write_bytes(pickle.dumps(metadata))
    reseal(tmp_path / "checkpoint")
    with pytest.raises(checkpoint.CheckpointError, match=rf"\.metadata: .*{message}"):
        checkpoint.open_checkpoint(tmp_path / "checkpoint")


def test_parts_of_any_layout_make_up_a_shape(tmp_path: Path) -> None:
    checkpoint.save(Training().state(), tmp_path / "checkpoint")
    content = (tmp_path / "checkpoint/.metadata").read_bytes()
    for shape, chunks in (
        ((3, 3), PINWHEEL),
        ((3, 3), (*PINWHEEL, ((5, 3), (0, 3)))),  # nothing, as of a rank that has no part
        ((0, 5), ()),
        ((5000, 2), tuple(((row, column), (1, 1)) for row in range(5000) for column in range(2))),
    ):
        metadata = pickle.loads(content)
        set_chunks(metadata, shape, *chunks)
        (tmp_path / "checkpoint/.metadata").write_bytes(pickle.dumps(metadata))
        reseal(tmp_path / "checkpoint")
        assert checkpoint.open_checkpoint(tmp_path / "checkpoint").shape(ROW) == shape


# --- Checkpoints that do not fit


def test_without_averaging_state_one_warning_and_a_new_average(tmp_path: Path) -> None:
    training = Training(models=2)
    expected = training.values()
    checkpoint.save({"model": get_model_state_dict(training.model)}, tmp_path / "model only")
    with torch.no_grad():
        dict(training.model.named_parameters())["one_row"].zero_()
    average = ShardedAverage(training.model)
    swa = SWA(training.model, swa_start="1ba", swa_end=None, update_interval="1ba")
    average.update()
    assert swa.step()
    state: dict[str, Any] = {"model": get_model_state_dict(training.model), "avg": average, "swa": swa}
    with pytest.warns(UserWarning, match=r"nothing under \['avg', 'swa'\]: these entries are reset") as warned:
        checkpoint.load(state, tmp_path / "model only")
    assert len(warned) == 1
    assert (average.num_averaged, swa.num_averaged, swa.schedule.now.batches, swa.step()) == (0, 0, 0, True)
    assert same_bits({f"model {name}": value for name, value in state["model"].items()}, expected, list(expected)[-3:])
    assert torch.equal(state["model"]["one_row"], expected["model one_row"])


def test_without_averaging_state_inside_of_a_swap_nothing_is_loaded(tmp_path: Path) -> None:
    model = build()
    swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
    swa.step()
    checkpoint.save({"epoch": torch.tensor(3)}, tmp_path / "epoch only")
    state: dict[str, Any] = {"epoch": torch.tensor(0), "swa": swa}
    with swa.swapped_in(), pytest.raises(RuntimeError, match="load needs the model to carry its trained weights"):
        checkpoint.load(state, tmp_path / "epoch only")
    assert (int(state["epoch"]), swa.num_averaged) == (0, 1)


def test_a_missing_shard_never_starts_anew(tmp_path: Path) -> None:
    run_on_ranks(save_two, 2, tmp_path)
    (tmp_path / "one/__1_0.distcp").unlink()
    training = Training(models=0)
    with pytest.raises(checkpoint.CheckpointError, match=r"one/__1_0\.distcp: it is missing"):
        checkpoint.load(training.state(), tmp_path / "one")  # a warning would be an error, too
    for name in ("nothing", "one/__0_0.distcp"):
        with pytest.raises((checkpoint.CheckpointError, NotADirectoryError), match=name):
            checkpoint.load(training.state(), tmp_path / name)


def wide() -> Net:
    model = build()
    model.one_row = nn.Parameter(torch.zeros(2, 5))
    return model


def deep() -> Net:
    model = build()
    model.more = nn.Parameter(torch.zeros(2, 5))
    return model


MISFITS: list[tuple[Rule, Callable[[], Net], Rule, Callable[[], Net], str]] = [
    (Equal(), build, EMA(decay=0.9), build, r"Missing key in checkpoint state_dict: swa.rule.EMA"),
    (Equal(), build, Equal(), deep, r"Missing key in checkpoint state_dict: swa.slots.0.more"),
    (Equal(), build, Equal(), wide, r"Size mismatch .*swa.slots.0.one_row"),
    (Equal(), deep, Equal(), build, r"was averaged with, got slots.0.more"),
    (Window(2), build, Window(3), build, r"Missing key in checkpoint state_dict: swa.slots.2"),
    (Window(3), build, Window(2), build, r"was averaged with, got slots.2.*"),
]


def misfits(folder: Path) -> None:
    for i, (saved_rule, saved_model, rule, model, message) in enumerate(MISFITS):
        saved = Training("fsdp2", saved_rule, build=saved_model)
        checkpoint.save({"swa": saved.average, "a": torch.ones(4)}, folder / f"{i}")
        loading = Training("fsdp2", rule, build=model, models=1)
        before, live = loading.values(), torch.zeros(4)
        with pytest.raises(ValueError, match=message) as raised:
            checkpoint.load({"swa": loading.average, "a": live}, folder / f"{i}")
        assert str(folder / f"{i}") in str(raised.value)
        assert same_bits(loading.values(), before)
        assert not live.any()
    newer = saved.average.state_dict()
    newer["format_version"] += 1
    checkpoint.save({"swa": newer, "a": torch.ones(4)}, folder / "newer")
    with pytest.raises(ValueError, match=r"needs format_version <= 1, got format_version=2; update dist_swa"):
        checkpoint.load({"swa": loading.average, "a": live}, folder / "newer")
    assert same_bits(loading.values(), before)
    assert not live.any()


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    run_on_ranks(misfits, 2, tmp_path)


# --- States that could not be loaded again


def save_what_no_load_takes(folder: Path) -> None:
    rank = dist.get_rank()
    inner = ShardedAverage(nn.Linear(1, 1))
    for value, key in (
        ({"v": np.ones(3)}, "v=ndarray"),
        ({"v": {"w": np.float64(0.5)}}, "v.w=float64"),
        ({"v": [torch.ones(2), {"w": Path("x")}]}, "v.1.w=PosixPath"),
        ({"v": (1, Path("x"))}, "v=tuple"),
        ({"v": datetime.datetime(2000, 1, 1)}, "v=datetime"),
        ({"v": argparse.Namespace(a=1)}, "v=Namespace"),
        ({"v": lambda: None}, "v=function"),
        ({"v": {"inner": inner}}, "v.inner=ShardedAverage"),
        ({"v": Path("x") if rank == 1 else 1}, "v=PosixPath"),  # on one rank only
    ):
        for save in (checkpoint.save, save_async):
            with pytest.raises(TypeError, match=rf"save needs tensors and values .*weights_only=True, got {key}; "):
                save({"x": torch.ones(2), **value}, folder / "a")
    for function in (checkpoint.save, save_async, checkpoint.load):
        for state in (None, [1], torch.ones(1)):
            message = f"a checkpoint needs a state dict, got state={type(state).__name__}; pass a dict"
            with pytest.raises(TypeError, match=message):
                function(state, folder / "a")  # type: ignore[arg-type]
    assert list(folder.iterdir()) == []


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    run_on_ranks(save_what_no_load_takes, 2, tmp_path)


def test_plain_values_come_back(tmp_path: Path) -> None:
    values: list[Any] = [None, torch.Size([1]), torch.float32, torch.device("cpu"), 1j, {1, 2}, b"x", [1, (2.0, "x")]]
    values += [[], (OrderedDict(a=1), random.getstate())]
    saved: dict[str, Any] = {"v": {str(i): value for i, value in enumerate(values)}, "empty": {}}
    loaded: dict[str, Any] = {"v": dict.fromkeys(saved["v"], 0), "empty": {}}
    checkpoint.save({**saved, "in a list": [saved["v"], torch.ones(1)]}, tmp_path / "a")
    state = {**copy.deepcopy(loaded), "in a list": [copy.deepcopy(loaded["v"]), torch.zeros(1)]}
    checkpoint.load(state, tmp_path / "a")
    assert state == {**saved, "in a list": [saved["v"], torch.ones(1)]}


# --- Errors on one rank


class Failing:
    """Stateful; fails in one of its methods on the last rank."""

    def __init__(self, fails: str) -> None:
        self.fails = fails if dist.get_rank() == dist.get_world_size() - 1 else ""

    def state_dict(self) -> dict[str, Any]:
        if self.fails == "state_dict":
            raise LookupError("no state here")
        return {"x": torch.ones(2)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fails == "load_state_dict":
            raise LookupError("cannot take it")


@on_ranks(3)
def test_an_error_on_one_rank_is_everybodys(tmp_path: Path) -> None:
    for save in (checkpoint.save, save_async):
        with pytest.raises(LookupError, match="no state here"):
            save({"x": Failing("state_dict")}, tmp_path / "a")
    checkpoint.save({"x": Failing("")}, tmp_path / "b")
    for method, message in (("state_dict", "no state here"), ("load_state_dict", "cannot take it")):
        with pytest.raises(LookupError, match=message):
            checkpoint.load({"x": Failing(method)}, tmp_path / "b")
    with pytest.raises(FileExistsError, match=r"needs a path where nothing is yet, got .*b; choose another"):
        checkpoint.save({"x": Failing("")}, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@on_ranks(3)
def test_a_disk_full_on_one_rank_is_everybodys_error(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the kernel refuses to write on."""
    state = {"x": torch.ones(1 << 18), "mine": {str(dist.get_rank()): torch.ones(1 << 18)}}
    checkpoint.save(state, tmp_path / "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for rank in range(3):
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        for save in (checkpoint.save, save_async):
            with pytest.raises(OSError, match=rf"File too large: .*__{rank}_0.distcp"):
                (save(state, tmp_path / "full") or (lambda: None))()
            dist.barrier()
            assert [path.name for path in tmp_path.iterdir()] == ["before"]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoint.load(state, tmp_path / "before")


def test_leftovers_of_a_killed_save_are_written_over(tmp_path: Path) -> None:
    state = {"x": torch.ones(3)}
    checkpoint.save(state, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / ".a.partial")
    (tmp_path / ".a.partial/__7_0.distcp").touch()
    shutil.rmtree(tmp_path / "a")
    checkpoint.save(state, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".metadata", "SHA256SUMS", "__0_0.distcp", "a"]
