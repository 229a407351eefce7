"""What is exported loads strictly, is the average to the bit, and takes memory near a rank's shard."""

import json
import os
import pickle
import re
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

from dist_swa import EMA, SWA, Equal, ShardedAverage, Window, checkpoint
from dist_swa.checkpoint import safetensors_io
from dist_swa.checkpoint.export import _ShardWriter
from models import Net, build, group_of, same_bits, trajectory, wrap, write
from ranks import run_on_ranks

WRAPPERS = ("plain", "group", "ddp", "fsdp1", "fsdp1 flat", "fsdp2", "hsdp", "tp", "fsdp2+tp")


class Odd(Net):
    """Also a parameter without dimensions, a complex and a strided one, a tied buffer, and one of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.wave = nn.Parameter(torch.full((3, 2), 1 + 2j))
        self.strided = nn.Parameter(torch.zeros(4, 3).t())
        self.mask = nn.Buffer(torch.tensor([True, False, True]))
        self.same_mask = self.mask
        self.short = nn.Buffer(torch.ones(3, dtype=torch.bfloat16))  # an average of it is kept in float32


def build_odd() -> Odd:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd()


def averaged(model: nn.Module, wrapper: str = "plain", **options: Any) -> ShardedAverage:
    """Return an average of three models whose buffers differ from rank to rank, and from what the model is then."""
    average = ShardedAverage(model, process_group=group_of(wrapper), **options)
    for values in trajectory(3, build_odd()):
        write(model, values)
        average.update()
    return average


def load_strictly(path: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    state = load_file(path)
    (model or Odd()).load_state_dict(state, strict=True)
    return state


def export_all(folder: Path) -> None:
    """Every wrapper, straight from the run and through a checkpoint, gives the full state dict of the average."""
    for wrapper in WRAPPERS:
        build_one = build if "fsdp" in wrapper or wrapper == "hsdp" else build_odd  # FSDP takes no odd ones
        model = wrap(build_one(), wrapper)
        average = averaged(model, wrapper)
        expected = average.full_state_dict()
        checkpoint.export(average, folder / wrapper / "live")
        checkpoint.save({"model": get_model_state_dict(model), "swa": average}, folder / wrapper / "saved")
        checkpoint.export(folder / wrapper / "saved", folder / wrapper / "stored")
        if expected:  # the first rank
            for name in ("live", "stored"):
                found = load_strictly(folder / wrapper / name / "model.safetensors", build_one())
                assert same_bits(found, expected), (wrapper, name)
                assert [path.name for path in (folder / wrapper / name).iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_wrapper_is_exported_to_the_bit(tmp_path: Path, ranks: int) -> None:
    run_on_ranks(export_all, ranks, tmp_path)
    for wrapper in WRAPPERS:  # and by one process without a group
        checkpoint.export(tmp_path / wrapper / "saved", tmp_path / wrapper / "here.safetensors")
        same = (tmp_path / wrapper / name for name in ("here.safetensors", "live/model.safetensors"))
        here, live = (path.read_bytes() for path in same)
        assert here == live


@pytest.mark.parametrize("rule", [Equal(), EMA(decay=0.9), Window(2), Window(5)])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_slots_and_buffers(tmp_path: Path, rule: Any, buffers: str) -> None:
    model = build_odd()
    average = ShardedAverage(model, rule, buffers=buffers)
    for i, values in enumerate(trajectory(4, model)):
        write(model, values)
        model.get_buffer("norm.running_mean").fill_(i)
        model.short.fill_(1 + i / 100)
        average.update()
    model.get_buffer("norm.running_mean").fill_(9)
    checkpoint.save({"model": model.state_dict(), "swa": average}, tmp_path / "saved")
    for source in (average, tmp_path / "saved"):
        out = tmp_path / f"{type(source).__name__}.safetensors"
        checkpoint.export(source, out)
        assert same_bits(load_strictly(out), average.full_state_dict())


def several(model: nn.Module) -> SWA:
    rules = {"short": EMA(decay=0.1), "long": EMA(decay=0.9)}
    swa = SWA(model, rule=rules, transfer="long", swa_start="1ba", swa_end=None, update_interval="1ba")
    for values in trajectory(3, build()):
        write(model, values)
        swa.step()
    return swa


def test_key_names_one_of_several(tmp_path: Path) -> None:
    model = build()
    swa = several(model)
    checkpoint.save({"model": model.state_dict(), "swa": swa, "epoch": 3}, tmp_path / "saved")
    for name in ("short", "long"):
        checkpoint.export(swa, tmp_path / f"live {name}", key=name)
        checkpoint.export(tmp_path / "saved", tmp_path / f"stored {name}", key=f"swa.{name}")
        for kind in ("live", "stored"):
            found = load_strictly(tmp_path / f"{kind} {name}" / "model.safetensors", build())
            assert same_bits(found, swa.average.full_state_dict(name))
    checkpoint.export(tmp_path / "saved", tmp_path / "model", key="model")
    assert same_bits(load_strictly(tmp_path / "model" / "model.safetensors", build()), model.state_dict())
    with pytest.raises(ValueError, match=r"needs the name of an average, got name=None; pass one of short, long"):
        checkpoint.export(swa, tmp_path / "none")
    for key in (None, "swa", "epoch"):
        with pytest.raises(ValueError, match=rf"got key={key!r} for .*; pass one of swa.short, swa.long, model"):
            checkpoint.export(tmp_path / "saved", tmp_path / "none", key=key)
    assert not (tmp_path / "none").exists()


def test_ddps_own_state_dict_is_a_model(tmp_path: Path) -> None:
    average = averaged(build_odd())
    wrapped = {f"module.{name}": value for name, value in build_odd().state_dict().items()}
    checkpoint.save({"model": wrapped, "swa": average}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors")
    assert same_bits(load_strictly(tmp_path / "out.safetensors"), average.full_state_dict())


def test_parameters_that_are_not_averaged_have_to_come_from_somewhere(tmp_path: Path) -> None:
    model = build()
    average = averaged(model, parameters="up.*")
    checkpoint.save({"swa": average}, tmp_path / "alone")
    checkpoint.save({"model": {f"my.{n}": v for n, v in model.state_dict().items()}, "swa": average}, tmp_path / "odd")
    for name in ("alone", "odd"):
        with pytest.raises(
            ValueError, match=r"needs the 7 parameters that are not averaged .*, got 0 of them .*'model'"
        ):
            checkpoint.export(tmp_path / name, tmp_path / "out")
    some = {name: value for name, value in model.state_dict().items() if name != "one_row"}
    checkpoint.save({"model": some, "swa": average}, tmp_path / "partial")
    with pytest.raises(ValueError, match=r"needs the 7 parameters that are not averaged .*, got 6 of them"):
        checkpoint.export(tmp_path / "partial", tmp_path / "out")
    checkpoint.save({"model": model.state_dict(), "swa": average}, tmp_path / "whole")
    checkpoint.export(tmp_path / "whole", tmp_path / "out.safetensors")
    assert same_bits(load_strictly(tmp_path / "out.safetensors", build()), average.full_state_dict())
    plain = nn.Linear(2, 2)
    everything = ShardedAverage(plain)
    everything.update()
    checkpoint.save({"swa": everything}, tmp_path / "everything")  # no model is needed
    checkpoint.export(tmp_path / "everything", tmp_path / "everything.safetensors")
    load_strictly(tmp_path / "everything.safetensors", plain)


def test_dtype_is_of_all_that_is_floating(tmp_path: Path) -> None:
    model = build_odd()
    average = averaged(model)
    checkpoint.save({"model": model.state_dict(), "swa": average}, tmp_path / "saved")
    whole = average.full_state_dict()
    expected = {name: value.bfloat16() if value.is_floating_point() else value for name, value in whole.items()}
    assert {value.dtype for value in expected.values()} == {torch.bfloat16, torch.complex64, torch.int64, torch.bool}
    for source in (average, tmp_path / "saved"):
        out = tmp_path / f"{type(source).__name__}.safetensors"
        checkpoint.export(source, out, dtype=torch.bfloat16)
        assert same_bits(load_strictly(out), expected)
    model.get_buffer("norm.running_var").fill_(1e6)
    average.update()
    with pytest.raises(ValueError, match=r"can hold, got 1e\+06 in norm.running_var; choose torch.bfloat16"):
        checkpoint.export(average, tmp_path / "half", dtype=torch.float16)
    for dtype in (torch.int8, "float16"):
        with pytest.raises(ValueError, match=r"export needs a floating torch.dtype, got dtype="):
            checkpoint.export(average, tmp_path / "half", dtype=dtype)  # type: ignore[arg-type]
    assert not (tmp_path / "half").exists()


def test_dtypes_of_8_bits(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        write(model, {"weight": torch.tensor([[0.3, 400.0]])})
        average = ShardedAverage(model)
        average.update()
        checkpoint.save({"swa": average}, tmp_path / f"{dtype}")
        for source in (average, tmp_path / f"{dtype}"):
            out = tmp_path / f"{type(source).__name__} {dtype}.safetensors"
            checkpoint.export(source, out, dtype=dtype)
            expected = torch.tensor([[0.3, 400.0]]).to(dtype)
            assert torch.equal(load_file(out)["weight"].float(), expected.float())
            checkpoint.export(out, tmp_path / f"wide {out.name}", dtype=torch.float32)
            assert torch.equal(load_file(tmp_path / f"wide {out.name}")["weight"], expected.float())
        write(model, {"weight": torch.tensor([[0.3, -1e6]])})
        average = ShardedAverage(model)
        average.update()
        with pytest.raises(ValueError, match=rf"{dtype} can hold, got 1e\+06 in weight; choose torch.bfloat16"):
            checkpoint.export(average, tmp_path / "none", dtype=dtype)
    assert not (tmp_path / "none").exists()


def many_files(folder: Path) -> None:
    safetensors_io._MAX_FILE_BYTES = 200
    model = wrap(build(), "fsdp2")
    average = averaged(model)
    checkpoint.export(average, folder / "live")
    checkpoint.save({"model": get_model_state_dict(model), "swa": average}, folder / "saved")
    checkpoint.export(folder / "saved", folder / "stored")
    if expected := average.full_state_dict():
        for name in ("live", "stored"):
            index = json.loads((folder / name / "model.safetensors.index.json").read_text())
            files = {path.name: load_file(path) for path in (folder / name).glob("*.safetensors")}
            assert len(files) > 3
            assert all(sum(value.nbytes for value in tensors.values()) <= 200 for tensors in files.values())
            assert index["weight_map"] == {key: file for file, tensors in files.items() for key in tensors}
            assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
            whole = {key: value for tensors in files.values() for key, value in tensors.items()}
            assert same_bits(whole, expected)
            assert len(list((folder / name).iterdir())) == len(files) + 1


def test_many_files_have_an_index(tmp_path: Path) -> None:
    run_on_ranks(many_files, 2, tmp_path)


def test_transformers_opens_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    with torch.random.fork_rng():
        model = transformers.GPT2LMHeadModel(config)
    average = ShardedAverage(model)  # its head is tied to its embedding
    average.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update()
    for limit in (10**9, 2000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(safetensors_io, "_MAX_FILE_BYTES", limit)
            checkpoint.export(average, tmp_path / str(limit))
        config.save_pretrained(tmp_path / str(limit))
        loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / str(limit), output_loading_info=True)
        assert not any(info.values()), info
        expected = average.full_state_dict()
        assert same_bits(loaded.state_dict(), expected)
    assert len(list((tmp_path / "2000").glob("*.safetensors"))) > 3


def peak_of(call: Callable[[], None]) -> int:
    """Return by how many bytes the call raised the resident memory of this process, at its peak."""

    def status(field: str) -> int:
        return 1024 * int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


NUM_LAYERS, LAYER_BYTES = 64, 1 << 20


def export_large(folder: Path) -> list[float]:
    """Return the peaks, in parts of what a rank holds of the model."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(NUM_LAYERS)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    average = ShardedAverage(model)
    average.update()
    shard_bytes = NUM_LAYERS * LAYER_BYTES / dist.get_world_size()
    peaks = []
    for name, limit in (("warm", 1 << 20), ("one file", 1 << 40), ("eight files", 8 << 20)):
        safetensors_io._MAX_FILE_BYTES = limit
        peaks.append(peak_of(partial(checkpoint.export, average, folder / name)) / shard_bytes)
    return peaks[1:]


def test_memory_per_rank_stays_near_its_shard(tmp_path: Path) -> None:
    for one_file, eight_files in run_on_ranks(export_large, 4, tmp_path):
        assert one_file < 3.5  # the model is 4, its file thrice 12
        assert eight_files < 1
    assert len(list((tmp_path / "eight files").glob("*.safetensors"))) == 8


def errors_everywhere(folder: Path) -> None:
    """What fails on one rank raises on all of them, and nothing appears."""
    average = ShardedAverage(wrap(build(), "fsdp2"))
    with pytest.raises(RuntimeError, match=r"needs an average, got num_averaged=0; call update first"):
        checkpoint.export(average, folder / "early")
    average.update()
    (folder / "there").mkdir(exist_ok=True)
    with pytest.raises(FileExistsError, match=r"needs a path where nothing is yet, got .*there; choose"):
        checkpoint.export(average, folder / "there")
    write_data = _ShardWriter.write_data
    if dist.get_rank() == 1:
        _ShardWriter.write_data = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        checkpoint.export(average, folder / "failed")
    _ShardWriter.write_data = write_data  # type: ignore[method-assign]
    if dist.get_rank() == 0:
        (folder / ".again.partial" / "sharded").mkdir(parents=True)  # a killed export left it
        save_file({"up.weight": torch.ones(1)}, folder / ".again.partial" / "sharded" / "old.safetensors")
    checkpoint.export(average, folder / "again")


def test_errors_are_everybodys(tmp_path: Path) -> None:
    run_on_ranks(errors_everywhere, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "there"]
    load_strictly(tmp_path / "again" / "model.safetensors", build())


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    average = averaged(build_odd())
    checkpoint.save({"model": build_odd().state_dict(), "swa": average}, tmp_path / "saved")
    with limited_files(100), pytest.raises(OSError, match=r"File too large: .*model.safetensors"):
        checkpoint.export(tmp_path / "saved", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.tensor(self.bias.ndim) if self.out_features == 3 else "text"

    def set_extra_state(self, state: Any) -> None: ...


@pytest.mark.parametrize(("width", "left_out"), [(2, True), (3, False)])
def test_extra_state_is_exported_where_it_is_a_tensor(tmp_path: Path, width: int, left_out: bool) -> None:
    model = nn.Sequential(Extra(2, width))
    average = ShardedAverage(model)
    average.update()
    checkpoint.save({"model": model.state_dict(), "swa": average}, tmp_path / "saved")
    for source in (average, tmp_path / "saved"):
        out = tmp_path / f"{type(source).__name__}.safetensors"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.export(source, out)
        messages = [str(warning.message) for warning in caught]
        assert messages == ["safetensors hold tensors only: left out 0._extra_state"] * left_out
        assert ("0._extra_state" in load_file(out)) == (not left_out)
        model.load_state_dict(load_file(out), strict=not left_out)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"export needs an SWA, a ShardedAverage or a path, got source=Linear"):
        checkpoint.export(nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"a checkpoint or safetensors are needed, got nothing at .*nowhere"):
        checkpoint.export(tmp_path / "nowhere", tmp_path / "out")
    folder = checkpoint.CheckpointFolder(tmp_path / "run")
    folder.save(3, {"swa": ShardedAverage(build())})
    with pytest.raises(ValueError, match=r"got .*run; choose one of step-000000003 in it"):
        checkpoint.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match=r"needs an average of models, got num_averaged=0 of swa in"):
        checkpoint.export(tmp_path / "run" / "step-000000003", tmp_path / "out")
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex128))
    average = ShardedAverage(model, dtype=torch.float64)
    average.update()
    with pytest.raises(ValueError, match=r"safetensors need F64, .*, got weight=complex128\[2, 2\]"):
        checkpoint.export(average, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def state_of(average: ShardedAverage, **changes: Any) -> dict[str, Any]:
    return {"swa": average.state_dict() | changes, "model": build().state_dict()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": torch.tensor(2)},
            r"needs format_version <= 1, got swa.format_version=2 in .*; update dist",
        ),
        ({"num_averaged": torch.tensor(0.5)}, r"as it was written, got an odd swa.num_averaged in"),
        ({"num_averaged": torch.empty(0, dtype=torch.int64)}, r"got an odd swa.num_averaged in"),
        ({"slots": {"0": {}}}, r"got an odd swa.slots in"),
        ({"rule": {}}, r"got an odd swa.rule in"),
        ({"rule": {"Equal": torch.tensor([300])}}, r"got an odd swa.rule.Equal in"),
        ({"ties": {"tied.weight": torch.tensor([91], dtype=torch.uint8)}}, r"got an odd swa.ties.tied.weight in"),
        ({"ties": {"tied.weight": torch.tensor(list(b"[3]"))}}, r"got an odd swa.ties.tied.weight in"),
    ],
)
def test_odd_state_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint.save(state_of(averaged(build()), **changes), tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        checkpoint.export(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_nothing_on_disk_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(state_of(averaged(build())), tmp_path / "saved")
    (tmp_path / "saved" / "SHA256SUMS").unlink()
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Evil()))
    torch.save({"up.weight": Evil()}, tmp_path / "x.safetensors")
    for path in (tmp_path / "saved", tmp_path / "x.safetensors"):
        for read in (checkpoint.export, lambda path, out: checkpoint.merge([path], out)):
            with pytest.raises(checkpoint.CheckpointError, match=path.name):
                read(path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "x.safetensors"]


def test_damage_is_found_and_nothing_appears(tmp_path: Path) -> None:
    checkpoint.save(state_of(averaged(build())), tmp_path / "saved")
    data = tmp_path / "saved" / "__0_0.distcp"
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    with pytest.raises(checkpoint.CheckpointError, match=r"__0_0.distcp: its content is not what its checksum"):
        checkpoint.export(tmp_path / "saved", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_files_are_as_safetensors_wants_them(tmp_path: Path) -> None:
    for i, model in enumerate((build_odd(), build(), nn.Linear(2, 2))):
        average = ShardedAverage(model)
        average.update()
        path = tmp_path / f"{i}.safetensors"
        checkpoint.export(average, path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        assert header_bytes % 8 == 0
        header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
        sizes = {"F32": 4, "I64": 8, "C64": 8, "BOOL": 1, "BF16": 2}
        assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for n, entry in header.items() if n[0] != "_")
