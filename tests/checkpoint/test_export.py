"""An export loads strictly, has the bits of the average, and needs memory for little more than a rank's shard."""

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
from ranks import on_ranks, run_on_ranks

WRAPPERS = ("plain", "group", "ddp", "fsdp1", "fsdp1 flat", "fsdp2", "hsdp", "tp", "fsdp2+tp")


class Odd(Net):
    """Adds a 0-dim, a complex and a strided parameter, a tied buffer of booleans and a bfloat16 buffer."""

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
    """Return an average of three models."""
    average = ShardedAverage(model, process_group=group_of(wrapper), **options)
    for values in trajectory(3, build_odd()):
        write(model, values)
        average.update()
    return average


def load_strictly(path: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    state = load_file(path)
    (model or Odd()).load_state_dict(state, strict=True)
    return state


def build_for(wrapper: str) -> Net:
    return build() if "fsdp" in wrapper or wrapper == "hsdp" else build_odd()  # FSDP refuses such parameters


def saved(average: ShardedAverage, model: nn.Module, is_live: bool, path: Path) -> ShardedAverage | Path:
    """Return what to export: the average itself, or a checkpoint of it."""
    if is_live:
        return average
    checkpoint.save({"model": get_model_state_dict(model), "swa": average}, path)
    return path


LIVE_OR_STORED = pytest.mark.parametrize("is_live", [True, False], ids=["live", "stored"])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@on_ranks(1, 2, 3, 4)
def test_every_wrapper_is_exported_to_the_bit(tmp_path: Path, wrapper: str) -> None:
    model = wrap(build_for(wrapper), wrapper)
    average = averaged(model, wrapper)
    expected = average.full_state_dict()
    checkpoint.export(average, tmp_path / "live")
    checkpoint.export(saved(average, model, False, tmp_path / "saved"), tmp_path / "stored")
    for out in (tmp_path / "live", tmp_path / "stored") if expected else ():  # on the first rank
        assert [path.name for path in out.iterdir()] == ["model.safetensors"]
        assert same_bits(load_strictly(out / "model.safetensors", build_for(wrapper)), expected)


def save_all(folder: Path) -> None:
    for wrapper in WRAPPERS:
        model = wrap(build_for(wrapper), wrapper)
        average = averaged(model, wrapper)
        checkpoint.export(average, folder / f"{wrapper}.safetensors")
        saved(average, model, False, folder / wrapper)


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint and a live export of every wrapper."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(save_all, 4, folder)
    return folder


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_process_without_a_group_writes_the_same_bytes(of_four_ranks: Path, tmp_path: Path, wrapper: str) -> None:
    checkpoint.export(of_four_ranks / wrapper, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (of_four_ranks / f"{wrapper}.safetensors").read_bytes()


@LIVE_OR_STORED
@pytest.mark.parametrize("rule", [Equal(), EMA(decay=0.9), Window(2), Window(5)])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_slots_and_buffers(tmp_path: Path, rule: Any, buffers: str, is_live: bool) -> None:
    model = build_odd()
    average = ShardedAverage(model, rule, buffers=buffers)
    for i, values in enumerate(trajectory(4, model)):
        write(model, values)
        model.get_buffer("norm.running_mean").fill_(i)
        model.short.fill_(1 + i / 100)
        average.update()
    model.get_buffer("norm.running_mean").fill_(9)
    checkpoint.export(saved(average, model, is_live, tmp_path / "saved"), tmp_path / "out.safetensors")
    assert same_bits(load_strictly(tmp_path / "out.safetensors"), average.full_state_dict())


def several(model: nn.Module) -> SWA:
    rules = {"short": EMA(decay=0.1), "long": EMA(decay=0.9)}
    swa = SWA(model, rule=rules, transfer="long", swa_start="1ba", swa_end=None, update_interval="1ba")
    for values in trajectory(3, build()):
        write(model, values)
        swa.step()
    return swa


@pytest.mark.parametrize("name", ["short", "long"])
@LIVE_OR_STORED
def test_key_selects_one_of_several_averages(tmp_path: Path, name: str, is_live: bool) -> None:
    model = build()
    swa = several(model)
    checkpoint.save({"model": model.state_dict(), "swa": swa, "epoch": 3}, tmp_path / "saved")
    source, key = (swa, name) if is_live else (tmp_path / "saved", f"swa.{name}")
    checkpoint.export(source, tmp_path / "out.safetensors", key=key)
    assert same_bits(load_strictly(tmp_path / "out.safetensors", build()), swa.average.full_state_dict(name))


def test_key_selects_the_model(tmp_path: Path) -> None:
    model = build()
    checkpoint.save({"model": model.state_dict(), "swa": several(model)}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors", key="model")
    assert same_bits(load_strictly(tmp_path / "out.safetensors", build()), model.state_dict())


@pytest.mark.parametrize("key", [None, "swa", "epoch"])
def test_an_ambiguous_key_lists_the_keys(tmp_path: Path, key: str | None) -> None:
    model = build()
    swa = several(model)
    checkpoint.save({"model": model.state_dict(), "swa": swa, "epoch": 3}, tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"got key={key!r} for .*; pass one of swa.short, swa.long, model"):
        checkpoint.export(tmp_path / "saved", tmp_path / "none", key=key)
    with pytest.raises(ValueError, match=r"needs the name of an average, got name=None; pass one of short, long"):
        checkpoint.export(swa, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_prefix_of_a_ddp_state_dict_is_removed(tmp_path: Path) -> None:
    average = averaged(build_odd())
    wrapped = {f"module.{name}": value for name, value in build_odd().state_dict().items()}
    checkpoint.save({"model": wrapped, "swa": average}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors")
    assert same_bits(load_strictly(tmp_path / "out.safetensors"), average.full_state_dict())


def entry_of_model(kind: str) -> dict[str, Any]:
    state = build().state_dict()
    if kind == "missing":
        return {}
    if kind == "other names":
        return {"model": {f"my.{name}": value for name, value in state.items()}}
    return {"model": {name: value for name, value in state.items() if kind == "complete" or name != "one_row"}}


@pytest.mark.parametrize(("kind", "found"), [("missing", 0), ("other names", 0), ("partial", 6)])
def test_parameters_that_are_not_averaged_are_required(tmp_path: Path, kind: str, found: int) -> None:
    checkpoint.save({**entry_of_model(kind), "swa": averaged(build(), parameters="up.*")}, tmp_path / "saved")
    message = rf"needs the 7 parameters that are not averaged .*, got {found} of them .*'model'"
    with pytest.raises(ValueError, match=message):
        checkpoint.export(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_not_averaged_come_from_the_model(tmp_path: Path) -> None:
    average = averaged(build(), parameters="up.*")
    checkpoint.save({**entry_of_model("complete"), "swa": average}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors")
    expected = average.full_state_dict()
    found = load_strictly(tmp_path / "out.safetensors", build())
    averaged_names = [name for name in expected if name.startswith("up.")]
    assert same_bits(found, expected, averaged_names)
    assert same_bits(found, build().state_dict(), [name for name in expected if name not in averaged_names])


def test_an_average_of_all_parameters_needs_no_model(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model)
    average.update()
    checkpoint.save({"swa": average}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors")
    load_strictly(tmp_path / "out.safetensors", model)


@LIVE_OR_STORED
def test_dtype_converts_all_floating_tensors(tmp_path: Path, is_live: bool) -> None:
    model = build_odd()
    average = averaged(model)
    full = average.full_state_dict()
    expected = {name: value.bfloat16() if value.is_floating_point() else value for name, value in full.items()}
    assert {value.dtype for value in expected.values()} == {torch.bfloat16, torch.complex64, torch.int64, torch.bool}
    source = saved(average, model, is_live, tmp_path / "saved")
    checkpoint.export(source, tmp_path / "out.safetensors", dtype=torch.bfloat16)
    assert same_bits(load_strictly(tmp_path / "out.safetensors"), expected)


def test_a_value_that_overflows_the_dtype_raises(tmp_path: Path) -> None:
    model = build_odd()
    average = averaged(model)
    model.get_buffer("norm.running_var").fill_(1e6)
    average.update()
    with pytest.raises(ValueError, match=r"can hold, got 1e\+06 in norm.running_var; choose torch.bfloat16"):
        checkpoint.export(average, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("dtype", [torch.int8, "float16"])
def test_a_dtype_that_is_not_floating_is_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"export needs a floating torch.dtype, got dtype="):
        checkpoint.export(averaged(build()), tmp_path / "half", dtype=dtype)
    assert not (tmp_path / "half").exists()


DTYPES_OF_8_BITS = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)


def linear_average(second: float) -> ShardedAverage:
    model = nn.Linear(2, 1, bias=False)
    write(model, {"weight": torch.tensor([[0.3, second]])})
    average = ShardedAverage(model)
    average.update()
    return average


@DTYPES_OF_8_BITS
@LIVE_OR_STORED
def test_dtypes_of_8_bits_are_written_and_read(tmp_path: Path, dtype: torch.dtype, is_live: bool) -> None:
    narrow, wide = tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors"
    average = linear_average(400.0)
    checkpoint.export(saved(average, nn.Linear(2, 1, bias=False), is_live, tmp_path / "saved"), narrow, dtype=dtype)
    checkpoint.export(narrow, wide, dtype=torch.float32)
    expected = torch.tensor([[0.3, 400.0]]).to(dtype).float()
    assert load_file(narrow)["weight"].dtype == dtype
    assert torch.equal(load_file(narrow)["weight"].float(), expected)
    assert torch.equal(load_file(wide)["weight"], expected)


@DTYPES_OF_8_BITS
def test_a_value_that_overflows_8_bits_raises(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"{dtype} can hold, got 1e\+06 in weight; choose torch.bfloat16"):
        checkpoint.export(linear_average(-1e6), tmp_path / "none", dtype=dtype)
    assert not (tmp_path / "none").exists()


def many_files(folder: Path) -> dict[str, Tensor]:
    safetensors_io._MAX_FILE_BYTES = 200
    model = wrap(build(), "fsdp2")
    average = averaged(model)
    for is_live, name in ((True, "live"), (False, "stored")):
        checkpoint.export(saved(average, model, is_live, folder / "saved"), folder / name)
    return average.full_state_dict()


def test_several_files_have_an_index(tmp_path: Path) -> None:
    expected, _ = run_on_ranks(many_files, 2, tmp_path)
    for folder in (tmp_path / "live", tmp_path / "stored"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        assert len(files) > 3
        assert all(sum(value.nbytes for value in tensors.values()) <= 200 for tensors in files.values())
        assert index["weight_map"] == {key: file for file, tensors in files.items() for key in tensors}
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
        assert same_bits({key: value for tensors in files.values() for key, value in tensors.items()}, expected)
        assert len(list(folder.iterdir())) == len(files) + 1


@pytest.mark.parametrize(("max_file_bytes", "min_files"), [(10**9, 1), (2000, 4)])
def test_transformers_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_file_bytes: int, min_files: int
) -> None:
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
    monkeypatch.setattr(safetensors_io, "_MAX_FILE_BYTES", max_file_bytes)
    checkpoint.export(average, tmp_path / "out")
    config.save_pretrained(tmp_path / "out")
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert same_bits(loaded.state_dict(), average.full_state_dict())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= min_files


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
    """Return the peaks of memory, in units of this rank's shard of the model."""
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
        assert one_file < 3.5  # the full model is 4
        assert eight_files < 1
    assert len(list((tmp_path / "eight files").glob("*.safetensors"))) == 8


def errors_everywhere(folder: Path) -> None:
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


def test_an_error_of_one_rank_raises_on_all(tmp_path: Path) -> None:
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


@LIVE_OR_STORED
@pytest.mark.parametrize(("width", "left_out"), [(2, True), (3, False)], ids=["text", "tensor"])
def test_extra_state_is_left_out_unless_it_is_a_tensor(
    tmp_path: Path, width: int, left_out: bool, is_live: bool
) -> None:
    model = nn.Sequential(Extra(2, width))
    average = ShardedAverage(model)
    average.update()
    source: Any = average
    if not is_live:
        source = tmp_path / "saved"
        checkpoint.save({"model": model.state_dict(), "swa": average}, source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.export(source, tmp_path / "out.safetensors")
    messages = [str(warning.message) for warning in caught]
    assert messages == ["safetensors store tensors only; not written: 0._extra_state"] * left_out
    state = load_file(tmp_path / "out.safetensors")
    assert ("0._extra_state" in state) == (not left_out)
    model.load_state_dict(state, strict=not left_out)


def test_a_source_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"export needs an SWA, a ShardedAverage or a path, got source=Linear"):
        checkpoint.export(nn.Linear(2, 2), tmp_path / "out")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere", FileNotFoundError, r"a checkpoint or safetensors are needed, got nothing at .*nowhere"),
        ("run", ValueError, r"got .*run; choose one of step-000000003 in it"),
        ("run/step-000000003", ValueError, r"needs an average of models, got num_averaged=0 of swa in"),
    ],
)
def test_a_path_without_an_average_is_refused(tmp_path: Path, path: str, error: type[Exception], message: str) -> None:
    checkpoint.CheckpointFolder(tmp_path / "run").save(3, {"swa": ShardedAverage(build())})
    with pytest.raises(error, match=message):
        checkpoint.export(tmp_path / path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_safetensors_lack_is_refused(tmp_path: Path) -> None:
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
        ({"num_averaged": torch.tensor(0.5)}, r"as it was written, got an invalid swa.num_averaged in"),
        ({"num_averaged": torch.empty(0, dtype=torch.int64)}, r"got an invalid swa.num_averaged in"),
        ({"slots": {"0": {}}}, r"got an invalid swa.slots in"),
        ({"rule": {}}, r"got an invalid swa.rule in"),
        ({"rule": {"Equal": torch.tensor([300])}}, r"got an invalid swa.rule.Equal in"),
        ({"ties": {"tied.weight": torch.tensor([91], dtype=torch.uint8)}}, r"got an invalid swa.ties.tied.weight in"),
        ({"ties": {"tied.weight": torch.tensor(list(b"[3]"))}}, r"got an invalid swa.ties.tied.weight in"),
    ],
)
def test_damaged_state_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint.save(state_of(averaged(build()), **changes), tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        checkpoint.export(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("name", ["saved", "x.safetensors"])
@pytest.mark.parametrize(
    "read", [checkpoint.export, lambda path, out: checkpoint.merge([path], out)], ids=["export", "merge"]
)
def test_reading_a_file_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[Path, Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(state_of(averaged(build())), tmp_path / "saved")
    (tmp_path / "saved" / "SHA256SUMS").unlink()
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Evil()))
    torch.save({"up.weight": Evil()}, tmp_path / "x.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=name):
        read(tmp_path / name, tmp_path / "out")
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


def saved_with_nan(path: Path) -> ShardedAverage:
    """Save an average that has a NaN in two of its tensors."""
    model = build()
    average = ShardedAverage(model)
    with torch.no_grad():
        for name in ("up.weight", "down.bias"):
            model.get_parameter(name).flatten()[-1] = torch.nan
    average.update()
    checkpoint.save({"swa": average, "model": build().state_dict()}, path)
    return average


NAN = "an export needs finite weights, got NaN in 2 tensors, such as down.bias; export an average from before"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("is_live", [True, False], ids=["live", "stored"])
def test_an_average_with_nan_warns(tmp_path: Path, is_live: bool, dtype: torch.dtype | None) -> None:
    average = saved_with_nan(tmp_path / "saved")
    with pytest.warns(UserWarning, match=f"^{NAN}") as caught:
        checkpoint.export(average if is_live else tmp_path / "saved", tmp_path / "out.safetensors", dtype=dtype)
    (warning,) = caught
    assert warning.filename == __file__
    assert load_file(tmp_path / "out.safetensors")["up.weight"].float().isnan().sum() == 1


@on_ranks(2)
def test_an_average_with_nan_warns_on_every_rank(tmp_path: Path) -> None:
    average = saved_with_nan(tmp_path / "saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "_MAX_FILE_BYTES", 100)
        for name, source in (("live", average), ("stored", tmp_path / "saved")):
            with pytest.warns(UserWarning, match=f"^{NAN}"):
                checkpoint.export(source, tmp_path / name)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"], ids=["metadata", "surrogate"])
@pytest.mark.parametrize("kind", ["live", "export", "merge"])
def test_a_name_that_safetensors_lack_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    average = ShardedAverage(nn.ParameterDict({"w": nn.Parameter(torch.ones(1)), name: nn.Parameter(torch.ones(1))}))
    average.update()
    torch.save({"w": torch.ones(1), name: torch.ones(1)}, tmp_path / "a.pt")
    write: dict[str, Callable[[Path], None]] = {
        "live": partial(checkpoint.export, average),
        "export": partial(checkpoint.export, tmp_path / "a.pt"),
        "merge": partial(checkpoint.merge, [tmp_path / "a.pt"]),
    }
    with pytest.raises(
        ValueError, match=rf"need names of UTF-8 other than __metadata__, got {re.escape(repr(name))}; ren"
    ):
        write[kind](tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("build_model", [build_odd, build, partial(nn.Linear, 2, 2)], ids=["odd", "net", "linear"])
def test_tensors_are_aligned(tmp_path: Path, build_model: Callable[[], nn.Module]) -> None:
    average = ShardedAverage(build_model())
    average.update()
    path = tmp_path / "out.safetensors"
    checkpoint.export(average, path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    sizes = {"F32": 4, "I64": 8, "C64": 8, "BOOL": 1, "BF16": 2}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for n, entry in header.items() if n[0] != "_")
