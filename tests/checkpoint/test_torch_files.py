"""Files of torch.save are read as sources, without running their code, one tensor at a time."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_swa import ShardedAverage, checkpoint
from dist_swa.__main__ import main
from models import build, same_bits, trajectory, write

SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".odd", ""])
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])


class Odd(nn.Module):
    """Has tied, strided, 0-dim, bfloat16, complex and frozen parameters, views of one storage, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(12.0)
        self.first, self.second = nn.Parameter(whole[:6].view(2, 3)), nn.Parameter(whole[6:])
        self.tied = self.first
        self.strided = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.expanded = nn.Buffer(torch.ones(1).expand(4))
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
        self.wave = nn.Parameter(torch.tensor([1 + 2j]).conj())
        self.empty = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.count, self.mask = nn.Buffer(torch.tensor(3)), nn.Buffer(torch.tensor([True, False]))


def exported(path: Path, out: Path, key: str | None = None) -> dict[str, Tensor]:
    checkpoint.export(path, out, key=key)
    return load_file(out)


def saved(value: Any, path: Path, is_zip: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


@SUFFIXES
@FORMATS
def test_a_state_dict_is_a_source(tmp_path: Path, suffix: str, is_zip: bool) -> None:
    model = Odd()
    path = saved(
        dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers()),
        tmp_path / f"m{suffix}",
        is_zip,
    )
    found = exported(path, tmp_path / "out.safetensors")
    assert same_bits(found, {name: value.resolve_conj() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "nested.net"])
def test_the_weights_beside_an_optimizer_are_the_default(tmp_path: Path, key: str) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    weights = {"net": model.state_dict()} if "." in key else model.state_dict()
    state = {key.partition(".")[0]: weights, "optimizer_state_dict": optimizer.state_dict(), "epoch": 3, "loss": 0.1}
    path = saved(state, tmp_path / "run.pt")
    assert same_bits(exported(path, tmp_path / "out.safetensors"), model.state_dict())
    assert same_bits(exported(path, tmp_path / "same.safetensors", key), model.state_dict())
    with pytest.raises(ValueError, match=rf"which is the state of an optimizer; pass one of {key}$"):
        checkpoint.export(path, tmp_path / "none", key="optimizer_state_dict")


def averaged() -> tuple[nn.Module, ShardedAverage]:
    model = build()
    average = ShardedAverage(model, parameters="up.*")
    for values in trajectory(3, model):
        write(model, values)
        average.update()
    return model, average


@pytest.mark.parametrize("entry", ["swa", "dist_swa"])
def test_an_average_in_a_file_is_the_default(tmp_path: Path, entry: str) -> None:
    model, average = averaged()
    path = saved({"state_dict": model.state_dict(), entry: average.state_dict(), "global_step": 3}, tmp_path / "a.ckpt")
    found = exported(path, tmp_path / "out.safetensors")
    assert same_bits(found, average.full_state_dict())
    assert not same_bits(found, model.state_dict())
    assert same_bits(exported(path, tmp_path / "trained.safetensors", "state_dict"), model.state_dict())


def test_an_average_that_is_the_whole_file(tmp_path: Path) -> None:
    average = ShardedAverage(nn.Linear(2, 2))
    average.update()
    path = saved(average.state_dict(), tmp_path / "swa.pt")
    assert same_bits(exported(path, tmp_path / "out.safetensors"), average.full_state_dict())


@pytest.mark.parametrize("kind", ["one file", "shards", "shards without an index"])
def test_a_folder_of_transformers_is_a_source(tmp_path: Path, kind: str) -> None:
    state = build().state_dict()
    names = list(state)
    parts = [names] if kind == "one file" else [names[::2], names[1::2]]
    files = [f"pytorch_model{f'-{i:05}-of-{len(parts):05}' * (len(parts) > 1)}.bin" for i in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        saved({name: state[name] for name in part}, tmp_path / file)
    if kind == "shards":
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    saved({"lr": torch.ones(1)}, tmp_path / "training_args.bin")
    saved({"lr": torch.ones(1)}, tmp_path / "optimizer.pt")
    assert same_bits(exported(tmp_path, tmp_path / "out.safetensors"), state)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("has_index", [True, False], ids=["index", "no index"])
def test_a_missing_shard_is_named(tmp_path: Path, suffix: str, has_index: bool) -> None:
    stem = "pytorch_model" if suffix == "bin" else "model"
    first, second = (f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2))
    (saved if suffix == "bin" else save_file)({"a": torch.ones(1)}, tmp_path / first)
    if has_index:
        index = {"weight_map": {"a": first, "b": second}}
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"need all files of the folder, got .*{second}.*; restore it"
    ):
        checkpoint.export(tmp_path, tmp_path / "out")


def test_sources_of_all_formats_are_merged(tmp_path: Path) -> None:
    states = [{"a.w": torch.full((3,), float(i)), "b": torch.tensor(float(i))} for i in range(4)]
    saved(states[0], tmp_path / "d.pt")
    saved({"model": states[1]}, tmp_path / "c.pth", is_zip=False)
    save_file(states[2], tmp_path / "b.safetensors")
    checkpoint.save({"model": states[3]}, tmp_path / "a")
    paths = [tmp_path / name for name in ("a", "b.safetensors", "c.pth", "d.pt")]
    checkpoint.merge(paths, tmp_path / "out", weights=[1, 2, 4, 8], normalize=False)
    assert same_bits(
        load_file(tmp_path / "out" / "model.safetensors"),
        {"a.w": torch.full((3,), 11.0), "b": torch.tensor(11.0)},
    )
    checkpoint.merge(paths, tmp_path / "same", key="model", weights=[1, 2, 4, 8], normalize=False)
    assert load_file(tmp_path / "same" / "model.safetensors")["b"] == 11


def test_inspect_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, average = averaged()
    path = saved({"state_dict": model.state_dict(), "dist_swa": average.state_dict(), "epoch": 3}, tmp_path / "a.ckpt")
    assert main(["inspect", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"{path}: torch.save, without checksums"
    assert lines[2].startswith("dist_swa Equal() 3 - ")
    assert lines[3].startswith("state_dict - - - 15 150 ")
    assert len(lines) == 4


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def numpy_scalar() -> Any:
    return pytest.importorskip("numpy").float64(3)


NEED_CODE: dict[str, tuple[Callable[[], Any], str]] = {
    "evil": (Evil, "posix.mkdir"),
    "arguments": (lambda: argparse.Namespace(lr=1), "argparse.Namespace"),
    "path": (lambda: Path("x"), r"pathlib.*Path"),
    "numpy": (numpy_scalar, "numpy._core.multiarray.scalar"),
    "module": (lambda: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("kind", NEED_CODE)
@FORMATS
def test_what_needs_code_is_refused_with_the_line_that_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str, is_zip: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    value, what = NEED_CODE[kind]
    state = build().state_dict()
    saved({"state_dict": state, "arguments": value()}, Path("run.ckpt"), is_zip)
    assert main(["export", "run.ckpt", "out"]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "restore" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.ckpt"]
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"got run.ckpt, which runs {what}; if you trust it"
    ) as raised:
        checkpoint.export("run.ckpt", "out")
    if kind != "evil":  # the line does what it says
        exec(str(raised.value).partition("dict: ")[2], {"torch": torch})
        checkpoint.export("weights.pt", "out.safetensors")
        assert same_bits(load_file("out.safetensors"), state)


def trained(model: nn.Module) -> dict[str, Any]:
    """Return the state of an optimizer after a step."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer.state_dict()


CONVERTED: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "flat": lambda model: {**model.state_dict()},
    "model beside a number of numpy": lambda model: {"model": model.state_dict(), "best": numpy_scalar()},
    "nested": lambda model: {"app": {"net": model.state_dict(), "args": argparse.Namespace()}},
    "beside an optimizer": lambda model: {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": trained(model),
        "args": argparse.Namespace(),
    },
    "Lightning": lambda model: {
        "epoch": 3,
        "global_step": 30,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"Mine": {"best": torch.ones(2), "path": Path("x")}},
        "optimizer_states": [trained(model)],
        "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace()},
    },
}


@pytest.mark.parametrize("has_average", [False, True], ids=["", "average"])
@pytest.mark.parametrize("kind", CONVERTED)
def test_the_line_that_converts_a_file_keeps_its_averages_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, has_average: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build().requires_grad_(True)
    average = ShardedAverage(model)
    average.update()
    write(model, next(iter(trajectory(1, model))))
    state = CONVERTED[kind](model)
    if kind == "flat":
        state["args"] = {"args": argparse.Namespace()}
    if has_average:
        state = {"model": model.state_dict(), "args": numpy_scalar()} if kind == "module" else state
        state["dist_swa"] = average.state_dict()
    saved(state, Path("run.ckpt"))
    with pytest.raises(checkpoint.CheckpointError, match=r"got run.ckpt, which runs .*; if you trust it") as raised:
        checkpoint.export("run.ckpt", "out.safetensors")
    exec(str(raised.value).partition("dict: ")[2], {"torch": torch})
    found = exported(Path("weights.pt"), Path("out.safetensors"))
    assert same_bits(found, average.full_state_dict() if has_average else model.state_dict())
    if has_average and kind == "Lightning":
        assert same_bits(exported(Path("weights.pt"), Path("t.safetensors"), "state_dict"), model.state_dict())
        assert torch.load("weights.pt")["global_step"] == 30


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_line_that_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    torch.jit.script(model).save("script.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"got script.pt, which runs TorchScript; if") as raised:
        checkpoint.export("script.pt", "out")
    exec(str(raised.value).partition("dict: ")[2], {"torch": torch})
    assert same_bits(exported(Path("weights.pt"), Path("out.safetensors")), model.state_dict())


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut at the end": lambda whole: whole[:-20],
    "empty": lambda whole: b"",
    "begins with text": lambda whole: b"version https://git-lfs.github.com/spec/v1",
    "only the beginning": lambda whole: whole[:4],
}


@pytest.mark.parametrize("kind", DAMAGE)
@FORMATS
def test_a_damaged_file_is_named(tmp_path: Path, kind: str, is_zip: bool) -> None:
    path = saved(build().state_dict(), tmp_path / "whole.pt", is_zip)
    (tmp_path / "damaged.pt").write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(checkpoint.CheckpointError, match=r"as torch.save wrote it, got .*damaged.pt: .*; restore it$"):
        checkpoint.merge([path, tmp_path / "damaged.pt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.zip"])
def test_a_zip_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as file:
        file.writestr("text/readme.txt", "nothing")
    with pytest.raises(checkpoint.CheckpointError, match=rf"as torch.save wrote it, got .*{name}: "):
        checkpoint.export(tmp_path / name, tmp_path / "out")


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(checkpoint.CheckpointError, match=r"as torch.save wrote it, got .*x.pt: "):
        checkpoint.export(tmp_path / "x.pt", tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "kind"), [(torch.ones(2), "Tensor"), ([torch.ones(2)], "list"), (3, "int")], ids=["tensor", "list", "int"]
)
def test_what_is_no_dict_is_refused(tmp_path: Path, value: Any, kind: str) -> None:
    path = saved(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"weights need a dict of tensors, got a {kind} in .*x.pt; save a state dict"):
        checkpoint.export(path, tmp_path / "out")


@pytest.mark.parametrize("value", [{}, {"epoch": 3}], ids=str)
def test_a_file_without_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    path = saved(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"got key=None for .*x.pt; pass another path$"):
        checkpoint.export(path, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantized"])
def test_tensors_that_are_not_dense_are_refused(tmp_path: Path, kind: str) -> None:
    values: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }
    path = saved({"a": torch.ones(2), "b": values[kind]()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"needs? .*, got .*b.*; ") as raised:
        checkpoint.export(path, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("depth", [40, 2000])
def test_a_file_of_lists_in_lists_does_not_hang(tmp_path: Path, depth: int) -> None:
    value: Any = torch.ones(1)
    for _ in range(depth):
        value = [value, value] if depth == 40 else [value]
    sys.setrecursionlimit(100_000)
    try:
        path = saved({"a": value}, tmp_path / "x.pt")
    finally:
        sys.setrecursionlimit(1000)
    if depth == 40:
        with pytest.raises(checkpoint.CheckpointError, match=r"x.pt: it has more than 1000000 dicts and lists"):
            checkpoint.export(path, tmp_path / "out")
    else:
        assert [value.item() for value in exported(path, tmp_path / "out.safetensors").values()] == [1]


def in_itself() -> Any:
    value: dict[str, Any] = {}
    value["d"] = value
    return value


def wide(bottom: Any) -> Any:
    for _ in range(8):
        bottom = [bottom] * 10
    return {"a": bottom}


@pytest.mark.parametrize(
    "build_value",
    [in_itself, lambda: wide([torch.ones(1)]), lambda: wide({}), lambda: wide(list(range(1000)))],
    ids=["dict in itself", "tensors", "dicts", "numbers"],
)
def test_a_file_of_dicts_in_one_another_does_not_hang(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], build_value: Callable[[], Any]
) -> None:
    path = saved(build_value(), tmp_path / "x.pt")
    started = time.monotonic()
    assert main(["inspect", str(path)]) == 1
    assert time.monotonic() - started < 30  # seconds; a few without other load
    assert "x.pt: it has more than 1000000 dicts and lists, or too many inside" in capfd.readouterr().err


@pytest.mark.parametrize(
    "value",
    [list(range(10**6)), {f"{i}": i for i in range(10**5)}, [{"a": i, "b": (i,)} for i in range(10**4)]],
    ids=["list", "dict", "list of dicts"],
)
def test_many_numbers_beside_the_weights_are_no_damage(tmp_path: Path, value: Any) -> None:
    path = saved({"model": {"w": torch.ones(1)}, "more": {"of": {"a": {"sampler": value}}}}, tmp_path / "x.pt")
    assert exported(path, tmp_path / "out.safetensors") == {"w": torch.ones(1)}


def test_safetensors_of_another_name_are_read(tmp_path: Path) -> None:
    state = build().state_dict()
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "x.bin")
    assert same_bits(exported(tmp_path / "x.bin", tmp_path / "out.safetensors"), state)


@pytest.mark.parametrize("kind", ["safetensors", "torch.save"])
def test_the_prefix_of_a_ddp_module_is_removed_where_ddp_may_have_saved(tmp_path: Path, kind: str) -> None:
    state = {"module.weight": torch.ones(2), "module.bias": torch.zeros(2)}
    if kind == "safetensors":
        save_file(state, tmp_path / "x")
    else:
        saved(state, tmp_path / "x")
    found = exported(tmp_path / "x", tmp_path / "out.safetensors")
    assert sorted(found) == (sorted(state) if kind == "safetensors" else ["bias", "weight"])


NUM_TENSORS, TENSOR_BYTES = 24, 4 << 20
MEASURE = """
import re, sys
from pathlib import Path
from dist_swa import checkpoint

def status(field):
    return 1024 * int(re.findall(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[0])

small, out, *sources = sys.argv[1:]
checkpoint.merge([small], out + "-small")  # imports what is imported late
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
checkpoint.merge(sources, out)
print(status("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    for i in range(3):
        saved({f"{n}": torch.full((TENSOR_BYTES // 4,), float(i)) for n in range(NUM_TENSORS)}, tmp_path / f"{i}.pt")
    small = saved({"x": torch.ones(1)}, tmp_path / "small.pt")
    paths = [str(tmp_path / f"{i}.pt") for i in range(3)]
    command = [sys.executable, "-c", MEASURE, str(small), str(tmp_path / "out"), *paths]
    root = Path(checkpoint.__file__).parents[2]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # else malloc keeps what was freed
    peak_bytes = int(subprocess.check_output(command, text=True, cwd=root, env=environment))
    assert all((value == 1).all() for value in load_file(tmp_path / "out" / "model.safetensors").values())
    # The tensors of a merge, and for each source what was read before a mapping is closed; all tensors are 72.
    assert TENSOR_BYTES < peak_bytes < (6 + 3 * 5) * TENSOR_BYTES
