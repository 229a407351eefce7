"""No checkpoint runs code or changes the process, and metadata that makes no sense is refused."""

import copyreg
import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from checkpoints import Training, reseal
from dist_swa import checkpoint
from dist_swa.storage import writer
from dist_swa.storage.metadata import _SafeUnpickler
from models import same_bits

HEADER = b"\x80\x04"  # protocol 4, which has dotted names


def resolve(module: str, name: str) -> bytes:
    """Return the opcodes that put the member of a module on the stack."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def replace_metadata(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    reseal(folder)


# --- Code in `.metadata`


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def pickled_touch(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Touch(marker), file)
    return file.getvalue()


def command(marker: Path) -> str:
    return f"touch {marker}"


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')"


# A function that a file may name, and its argument, with which it touches a file.
CALLS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "os system": ("os", command),
    "posix system": ("posix", command),
    "builtins eval": ("builtins", code),
    "builtins exec": ("builtins", code),
    "subprocess getoutput": ("subprocess", command),
    "metadata os.system": ("torch.distributed.checkpoint.metadata", command),
    "filesystem os.system": ("torch.distributed.checkpoint.filesystem", command),
    "storage _load_from_bytes": ("torch.storage", pickled_touch),
    "pathlib PosixPath.touch": ("pathlib", lambda marker: marker),
    "pathlib Path.touch": ("pathlib", lambda marker: marker),
}


@pytest.mark.parametrize("read", [checkpoint.open_checkpoint, lambda path: checkpoint.load({"x": 0}, path)])
@pytest.mark.parametrize("before_metadata", [False, True], ids=["alone", "before metadata"])
@pytest.mark.parametrize("name", CALLS)
def test_metadata_runs_no_code(tmp_path: Path, name: str, before_metadata: bool, read: Callable[[Path], Any]) -> None:
    folder, marker = tmp_path / "checkpoint", tmp_path / "code_ran"
    checkpoint.save({"x": torch.ones(2)}, folder)
    module, make_argument = CALLS[name]
    arguments = pickle.dumps((make_argument(marker),), protocol=2)[2:-1]
    call = HEADER + resolve(module, name.partition(" ")[2]) + arguments + b"R"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pickle.loads(call + b".")
    assert marker.exists()  # pickle itself runs the code
    marker.unlink()
    metadata = (folder / ".metadata").read_bytes()
    replace_metadata(folder, call + (b"0" + metadata[2:] if before_metadata else b"."))
    with pytest.raises(checkpoint.CheckpointError, match=r"\.metadata: it wants to run "):
        read(folder)
    assert not marker.exists()


DCP, PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
ATTRIBUTES, SLOTS = b"}\x8c\x06poisonK\x01sb", b"N}\x8c\x06poisonK\x01s\x86b"  # BUILD with each kind of state
TARGETS = {
    "path class": (resolve("pathlib", "PosixPath"), SLOTS),
    "size class": (resolve("torch", "Size"), SLOTS),
    "dataclass": (resolve(DCP, "ChunkStorageMetadata"), SLOTS),
    "function": (resolve("torch.serialization", "_get_layout"), ATTRIBUTES),
    "enum member": (resolve(DCP, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R", ATTRIBUTES),
    "unknown field": (resolve(DCP, "ChunkStorageMetadata") + b")\x81", ATTRIBUTES),
    "metadata class": (resolve(DCP, "Metadata"), SLOTS),
    "plan class": (resolve(PLANNER, "SavePlan"), SLOTS),
    "plan class as an object": (resolve(PLANNER, "SavePlan"), ATTRIBUTES),
    "class of write types": (resolve(PLANNER, "WriteItemType"), SLOTS),
}


@pytest.mark.parametrize("before_metadata", [False, True], ids=["alone", "before metadata"])
@pytest.mark.parametrize("target", TARGETS)
def test_metadata_changes_no_object_of_the_process(tmp_path: Path, target: str, before_metadata: bool) -> None:
    checkpoint.save({"x": torch.ones(2)}, tmp_path / "a")
    metadata = (tmp_path / "a/.metadata").read_bytes()
    named, change = TARGETS[target]
    found = pickle.loads(HEADER + named + b".")
    before = dict(vars(found))
    replace_metadata(tmp_path / "a", HEADER + named + change + (b"0" + metadata[2:] if before_metadata else b"."))
    with pytest.raises(checkpoint.CheckpointError, match=r"\.metadata: it wants to change a "):
        checkpoint.open_checkpoint(tmp_path / "a")
    assert dict(vars(found)) == before


IGNORED = {
    "plan": resolve(PLANNER, "SavePlan") + b")\x81",
    "plan from arguments": resolve(PLANNER, "SavePlan") + b"]\x85R",
    "write item": resolve(PLANNER, "WriteItem") + b")\x81",
    "write type": resolve(PLANNER, "WriteItemType") + b"K\x01\x85R",
    "write type by name": resolve("builtins", "getattr") + resolve(PLANNER, "WriteItemType") + b"\x8c\x05SHARD\x86R",
}


@pytest.mark.parametrize("change", [ATTRIBUTES, SLOTS], ids=["attributes", "slots"])
@pytest.mark.parametrize("made", IGNORED)
def test_what_is_ignored_changes_nothing(tmp_path: Path, made: str, change: bytes) -> None:
    checkpoint.save({"x": torch.arange(3.0)}, tmp_path / "a")
    before = [dict(vars(cls)) for cls in (SavePlan, WriteItem, WriteItemType, WriteItemType.SHARD)]
    metadata = (tmp_path / "a/.metadata").read_bytes()
    replace_metadata(tmp_path / "a", HEADER + IGNORED[made] + change + b"0" + metadata[2:])
    assert torch.equal(checkpoint.open_checkpoint(tmp_path / "a").read("x"), torch.arange(3.0))
    assert [dict(vars(cls)) for cls in (SavePlan, WriteItem, WriteItemType, WriteItemType.SHARD)] == before
    assert vars(_SafeUnpickler(io.BytesIO(HEADER + IGNORED[made] + change + b".")).load()) == {}


@pytest.mark.parametrize(
    "owner", [("pathlib", "PosixPath"), ("torch", "Size"), (PLANNER, "SavePlan"), (DCP, "Metadata")]
)
@pytest.mark.parametrize("name", ["touch", "__init__", "__subclasses__", "__class__", "__new__"])
def test_getattr_gives_members_of_enums_only(tmp_path: Path, owner: tuple[str, str], name: str) -> None:
    checkpoint.save({"x": torch.ones(2)}, tmp_path / "a")
    attribute = b"\x8c" + bytes([len(name)]) + name.encode() + b"\x86R"
    content = HEADER + resolve("builtins", "getattr") + resolve(*owner) + attribute + b"."
    replace_metadata(tmp_path / "a", content)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"it (wants to run builtins.getattr|contains _Ignored instead)"
    ):
        checkpoint.open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("dotted", ["SavePlan.__init__", "WriteItemType.SHARD", "operator.methodcaller", "SavePlanner"])
def test_only_names_of_the_list_are_known(tmp_path: Path, dotted: str) -> None:
    checkpoint.save({"x": torch.ones(2)}, tmp_path / "a")
    replace_metadata(tmp_path / "a", HEADER + resolve(PLANNER, dotted) + b".")
    with pytest.raises(checkpoint.CheckpointError, match=f"it wants to run {PLANNER}.{dotted}, which"):
        checkpoint.open_checkpoint(tmp_path / "a")


def test_a_registered_extension_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickle takes what another pickle has resolved from a cache."""
    monkeypatch.setitem(copyreg.__dict__["_extension_cache"], 7, os.system)
    monkeypatch.setitem(copyreg.__dict__["_inverted_registry"], 7, ("os", "system"))
    checkpoint.save({"x": torch.ones(2)}, tmp_path / "a")
    replace_metadata(tmp_path / "a", HEADER + b"\x82\x07\x8c\x04true\x85R.")
    with pytest.raises(checkpoint.CheckpointError, match="it wants to run the extension 7 of copyreg"):
        checkpoint.open_checkpoint(tmp_path / "a")


def test_a_file_imports_nothing(tmp_path: Path) -> None:
    checkpoint.save({"x": torch.ones(2)}, tmp_path / "a")
    place = resolve("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo") + b")\x810"
    replace_metadata(tmp_path / "a", HEADER + place + (tmp_path / "a/.metadata").read_bytes()[2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.__import__", None)
        metadata = _SafeUnpickler(io.BytesIO((tmp_path / "a/.metadata").read_bytes())).load()
    assert list(metadata.state_dict_metadata) == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Hashing a deep tuple overflows the C stack.
        (b"})" + b"\x85" * 3_000_000 + b"Ns.", "tuples in tuples"),
        (b"}N" + b"N\x86" * 3_000_000 + b"Ns.", "tuples in tuples"),
        (b"}" + b"(" * 300_000 + b"t" * 300_000 + b"Ns.", "tuples in tuples"),
        (b"b", "no pickle of metadata"),
        (b"", "no pickle of metadata"),
        (b"N.", "it contains NoneType instead of Metadata"),
    ],
    ids=["deep tuple", "deep pair", "deep marks", "empty stack", "no opcode", "None"],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    checkpoint.save({"x": torch.ones(2)}, tmp_path / "a")
    replace_metadata(tmp_path / "a", HEADER + content)
    with pytest.raises(checkpoint.CheckpointError, match=rf"\.metadata: .*{message}"):
        checkpoint.open_checkpoint(tmp_path / "a")


# --- Code in values and tensors

NO_PLAIN_VALUE = r"__0_0\.distcp: it contains other values than tensors and"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkpoint whose entry "evil" touches the file "code_ran" beside it."""
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_copy_of_value", lambda key, value: value)
        checkpoint.save(Training().state() | {"evil": Touch(tmp_path / "code_ran")}, tmp_path / "evil")
    return tmp_path / "evil"


def test_plain_dcp_runs_the_code_of_a_value(evil: Path) -> None:
    """The tests below would notice code that runs."""
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp_load({"evil": 0}, checkpoint_id=evil)
    assert evil.with_name("code_ran").exists()


def test_a_load_runs_no_code_of_a_value_and_changes_nothing(evil: Path) -> None:
    training = Training(models=1)
    before = training.values()
    with pytest.raises(checkpoint.CheckpointError, match=NO_PLAIN_VALUE):
        checkpoint.load(training.state() | {"evil": 0}, evil)
    assert not evil.with_name("code_ran").exists()
    assert same_bits(training.values(), before)


def test_a_read_runs_no_code_of_a_value(evil: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=NO_PLAIN_VALUE):
        checkpoint.open_checkpoint(evil).read("evil")
    assert not evil.with_name("code_ran").exists()


def test_a_read_runs_no_code_in_the_place_of_a_tensor(evil: Path) -> None:
    """`.metadata` may say that a tensor is where the value is."""
    metadata = checkpoint.open_checkpoint(evil).metadata
    index = MetadataIndex("swa.slots.0.up.weight", [0, 0])
    metadata.storage_data[index] = metadata.storage_data[MetadataIndex("evil")]
    replace_metadata(evil, pickle.dumps(metadata))
    with pytest.raises(checkpoint.CheckpointError, match=NO_PLAIN_VALUE):
        checkpoint.open_checkpoint(evil).read("swa.slots.0.up.weight")
    assert not evil.with_name("code_ran").exists()


def test_everything_is_read_with_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, load, modes = Training(), torch.load, []

    def record(*args: Any, **options: Any) -> Any:
        modes.append(options.get("weights_only"))
        return load(*args, **options)

    checkpoint.save(training.state(), tmp_path / "checkpoint")
    monkeypatch.setattr(torch, "load", record)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    checkpoint.load(training.state(), tmp_path / "checkpoint")
    assert len(modes) > 2
    assert set(modes) == {True}


# --- Metadata that makes no sense

ROW = "swa.slots.0.one_row"
PINWHEEL = (((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 0), (1, 1)), ((1, 0), (1, 1)), ((2, 1), (1, 2)), ((1, 1), (1, 1)))
Chunk = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def set_chunks(metadata: Metadata, shape: tuple[int, ...], *chunks: Chunk) -> None:
    """Give the tensor `ROW` another shape, and chunks that are all in its place in the file."""
    entry = metadata.state_dict_metadata[ROW]
    assert isinstance(entry, TensorStorageMetadata)
    place = metadata.storage_data[MetadataIndex(ROW, entry.chunks[0].offsets)]
    entry.size = torch.Size(shape)
    entry.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    metadata.storage_data.update({MetadataIndex(ROW, chunk.offsets): place for chunk in entry.chunks})


def set_place(name: str, value: Any) -> Callable[[Any], object]:
    return lambda metadata: setattr(next(iter(metadata.storage_data.values())), name, value)


def set_row(name: str, value: Any) -> Callable[[Any], object]:
    return lambda metadata: setattr(metadata.state_dict_metadata[ROW], name, value)


def chunks(shape: tuple[int, ...], *boxes: Chunk) -> Callable[[Any], object]:
    return lambda metadata: set_chunks(metadata, shape, *boxes)


NO_PLACE, NO_TENSOR = "instead of the place of an entry", f"does not describe {ROW} as"
CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "file outside": (set_place("relative_path", "../x"), "a file outside of the folder"),
    "file not a string": (set_place("relative_path", 7), NO_PLACE),
    "negative offset": (set_place("offset", -5), NO_PLACE),
    "length not a number": (set_place("length", "7"), NO_PLACE),
    "no place": (lambda m: m.storage_data.popitem(), "it does not say where"),
    "no places": (lambda m: setattr(m, "storage_data", None), "it contains NoneType instead of a dict"),
    "no attribute": (lambda m: delattr(m, "storage_data"), "it contains NoneType instead of a dict"),
    "key not a string": (lambda m: m.state_dict_metadata.update({7: None}), "it contains 7 instead of a key"),
    "modules not a list": (lambda m: setattr(m.storage_meta, "modules", 7), "not iterable"),
    "properties of another type": (set_row("properties", "hello"), NO_TENSOR),
    "dtype of another type": (lambda m: setattr(m.state_dict_metadata[ROW].properties, "dtype", "hello"), NO_TENSOR),
    "no size": (lambda m: delattr(m.state_dict_metadata[ROW], "size"), NO_TENSOR),
    "chunk of another type": (set_row("chunks", ["hello"]), NO_TENSOR),
    "negative chunk": (chunks((2, 2), ((0, 0), (-2, -2))), NO_TENSOR),
    "other size": (set_row("size", torch.Size([2, 5])), "do not make up"),
    "negative size": (chunks((-2, -2), ((0, 0), (2, 2))), "do not make up"),
    "other number of axes": (chunks((4,), ((0, 0), (2, 2))), "do not make up"),
    "chunk twice": (chunks((8,), ((0,), (4,)), ((0,), (4,))), "do not make up"),
    "chunk outside": (chunks((8,), ((0,), (4,)), ((8,), (4,))), "do not make up"),
    "overlap": (chunks((4,), ((0,), (3,)), ((2,), (2,)), ((5,), (0,))), "do not make up"),
    "gap": (chunks((4, 4), *PINWHEEL[:-1], ((1, 2), (2, 1))), "do not make up"),
    "too large": (chunks((2**50,), ((0,), (2**50,))), f"it puts 4503599627370496 bytes of {ROW} into "),
    "0-dim without chunk": (lambda m: m.state_dict_metadata["swa.num_averaged"].chunks.clear(), "do not make up"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, change: str) -> None:
    checkpoint.save(Training().state(), tmp_path / "a")
    metadata = checkpoint.open_checkpoint(tmp_path / "a").metadata
    CHANGES[change][0](metadata)
    replace_metadata(tmp_path / "a", pickle.dumps(metadata))
    with pytest.raises(checkpoint.CheckpointError, match=rf"\.metadata: .*{CHANGES[change][1]}"):
        checkpoint.open_checkpoint(tmp_path / "a")


COVERS: dict[str, tuple[tuple[int, ...], tuple[Chunk, ...]]] = {
    "pinwheel": ((3, 3), PINWHEEL),
    "with an empty chunk": ((3, 3), (*PINWHEEL, ((5, 3), (0, 3)))),  # of a rank without a part
    "empty tensor": ((0, 5), ()),
    "10,000 chunks": ((5000, 2), tuple(((row, column), (1, 1)) for row in range(5000) for column in range(2))),
}


@pytest.mark.parametrize("cover", COVERS)
def test_chunks_of_any_layout_make_up_a_shape(tmp_path: Path, cover: str) -> None:
    shape, boxes = COVERS[cover]
    checkpoint.save(Training().state(), tmp_path / "a")
    metadata = checkpoint.open_checkpoint(tmp_path / "a").metadata
    set_chunks(metadata, shape, *boxes)
    replace_metadata(tmp_path / "a", pickle.dumps(metadata))
    assert checkpoint.open_checkpoint(tmp_path / "a").shape(ROW) == shape
