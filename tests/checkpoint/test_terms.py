"""A merge shows and records the step and weight of each source, and warns of an order that cannot be meant."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dist_swa
from dist_swa import SWA, DecayShaped, Equal, PowerEMA, ShardedAverage, checkpoint
from dist_swa.__main__ import main
from dist_swa.averaging.rules import Rule
from dist_swa.storage.writer import CheckpointWriter
from ranks import on_ranks

MINUS_SQRT = DecayShaped("minus_sqrt", total=3)


def write(folder: Path, names: list[str]) -> list[str]:
    """Write models whose weight is the index of the name; a name without a suffix is a folder."""
    for i, name in enumerate(names):
        path = folder / name if name.endswith(".safetensors") else folder / name / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.tensor([float(i)])}, path)
    return [f"{folder}/{name}" for name in names]


# Names in a wrong order, and the steps in them.
WRONG: dict[str, tuple[list[str], str]] = {
    "Trainer": (["checkpoint-1000", "checkpoint-1500", "checkpoint-500"], "1000, 1500, 500"),
    "CheckpointFolder": (["step-000000560", "step-000000280", "step-000000840"], "560, 280, 840"),
    "Lightning": (["epoch=3-step=120.ckpt", "epoch=10-step=400.ckpt", "epoch=4-step=160-v1.ckpt"], "120, 400, 160"),
    "Composer": (["ep1-ba20-rank0", "ep10-ba200-rank0", "ep2-ba40-rank0"], "20, 200, 40"),
    "Megatron": (["iter_0000500", "iter_0001500", "iter_0001000"], "500, 1500, 1000"),
    "files": (["model_500.safetensors", "model_1000.safetensors", "model_900.safetensors"], "500, 1000, 900"),
    "a slash": (["checkpoint-1000/", "checkpoint-1500/", "checkpoint-500/"], "1000, 1500, 500"),
    "in folders": ([f"checkpoint-{n}/model.safetensors" for n in (1000, 1500, 500)], "1000, 1500, 500"),
    "best of a run": (["checkpoint-1000", "checkpoint-500", "final"], "1000, 500"),
    "epochs": (
        ["epoch=10-val_loss=0.20.ckpt", "epoch=11-val_loss=0.21.ckpt", "epoch=9-val_loss=0.25.ckpt"],
        "10, 11, 9",
    ),
    "best epochs": (["epoch10_best", "epoch11_best", "epoch9_best"], "10, 11, 9"),
    "epochs and versions": (["ckpt_epoch_10_v1", "ckpt_epoch_11", "ckpt_epoch_9_v2"], "10, 11, 9"),
    "Composer's epochs": (["ep10-rank0", "ep11-rank0", "ep9-rank0"], "10, 11, 9"),
    "capitals": (["Epoch_10", "Epoch_11", "Epoch_9"], "10, 11, 9"),
    "epochs of folders": ([f"epoch_{n}/model.safetensors" for n in (10, 11, 9)], "10, 11, 9"),
    "a point": (["model.1000", "model.1500", "model.500"], "1000, 1500, 500"),
    "a step and an epoch": (["epoch=1-step=200", "epoch=0-step=100", "epoch=7"], "200, 100"),
    "twice": (["checkpoint-500", "checkpoint-500", "checkpoint-1000"], "500, 500, 1000"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_steps_that_do_not_rise_warn_and_nothing_is_sorted(tmp_path: Path, kind: str) -> None:
    names, steps = WRONG[kind]
    paths = write(tmp_path, names)
    message = f"merge needs its sources oldest first, got the steps {steps}; sort them by number"
    with pytest.warns(UserWarning, match=f"^{message} ") as caught:
        checkpoint.merge(paths, tmp_path / "out", rule=MINUS_SQRT)
    (warning,) = caught
    assert warning.filename == __file__
    values = [load_file(Path(path) if path.endswith("s") else Path(path, "model.safetensors"))["w"] for path in paths]
    merged = sum(c * value for c, value in zip(MINUS_SQRT.coefficients(3), values, strict=True))
    assert torch.allclose(load_file(tmp_path / "out/model.safetensors")["w"], torch.as_tensor(merged))


@pytest.mark.parametrize(
    ("names", "rule"),
    [
        (["checkpoint-500", "checkpoint-1000", "checkpoint-1500"], MINUS_SQRT),
        (["epoch=9-loss=0.25.ckpt", "epoch=10-loss=0.24.ckpt", "epoch=11-loss=0.23.ckpt"], MINUS_SQRT),
        (["base", "other", "third"], MINUS_SQRT),
        (["base", "checkpoint-7", "other"], MINUS_SQRT),
        (["last.ckpt", "last-v2.ckpt", "last-v1.ckpt"], MINUS_SQRT),
        (["val_loss=0.30", "val_loss=0.25", "val_loss=.2"], MINUS_SQRT),
        (["ckpt_epoch_9_v2", "ckpt_epoch_10_v1", "ckpt_epoch_11"], MINUS_SQRT),
        (["epoch=9-step=90", "epoch=10-step=100", "epoch=1"], MINUS_SQRT),
        (["run2/final", "run1/final", "run0/final"], MINUS_SQRT),
        (["checkpoint-1000", "checkpoint-1500", "checkpoint-500"], Equal()),  # the order does not matter
    ],
)
def test_an_order_that_may_be_meant_does_not_warn(tmp_path: Path, names: list[str], rule: Rule) -> None:
    checkpoint.merge(write(tmp_path, names), tmp_path / "out", rule=rule)


@pytest.mark.parametrize("name", ["last-v2.ckpt", "ckpt_epoch_9_v2"])
def test_a_version_is_no_step(tmp_path: Path, name: str) -> None:
    checkpoint.merge(write(tmp_path, [name]), tmp_path / "out")
    (source,) = record_in(tmp_path / "out")["sources"]
    assert source["step"] == (9 if "epoch" in name else None)


@pytest.mark.parametrize("has_average", [False, True], ids=["", "average"])
def test_the_step_in_a_checkpoint_of_lightning_is_taken(tmp_path: Path, has_average: bool) -> None:
    model = nn.Linear(1, 1)
    for i in (1, 2):
        state: dict[str, Any] = {"state_dict": model.state_dict(), "global_step": 10 * i, "epoch": 7}
        if has_average:
            swa = SWA(model, max_duration="100ba", swa_start="0ba")
            for _ in range(10 * i):
                swa.step()
            state["dist_swa"] = swa.state_dict()
        torch.save(state, tmp_path / f"epoch={9 - i}.ckpt")
    paths = [tmp_path / "epoch=8.ckpt", tmp_path / "epoch=7.ckpt"]
    checkpoint.merge(paths, tmp_path / "out", rule=DecayShaped("minus_sqrt", total=2))
    assert [source["step"] for source in record_in(tmp_path / "out")["sources"]] == [10, 20]
    with pytest.warns(UserWarning, match="got the steps 20, 10; sort"):
        checkpoint.merge(paths[::-1], tmp_path / "reversed", rule=DecayShaped("minus_sqrt", total=2))


@pytest.mark.parametrize("step", ["7", torch.tensor(7), True, [7]], ids=str)
def test_what_is_no_step_is_not_taken_for_one(tmp_path: Path, step: Any) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "global_step": step}, tmp_path / "epoch=3.ckpt")
    checkpoint.merge([tmp_path / "epoch=3.ckpt"], tmp_path / "out", key="state_dict")
    assert record_in(tmp_path / "out")["sources"][0]["step"] == 3


def save_run(folder: Path, names: list[str], rule: Rule = Equal()) -> list[str]:
    """Save a run after each of its first steps, under these names; return the paths."""
    model = nn.Linear(1, 1)
    swa = SWA(model, max_duration="10ba", swa_start="0ba", rule=rule)
    for name in names:
        swa.step()
        checkpoint.save({"model": model.state_dict(), "swa": swa}, folder / name)
    return [f"{folder}/{name}" for name in names]


@pytest.mark.parametrize("key", [None, "model"])
def test_steps_in_checkpoints_win_over_numbers_in_names(tmp_path: Path, key: str | None) -> None:
    paths = save_run(tmp_path, ["old-3", "old-2", "old-1"])
    checkpoint.merge(paths, tmp_path / "out", key=key, rule=MINUS_SQRT)
    with pytest.warns(UserWarning, match="got the steps 3, 2, 1; sort"):
        checkpoint.merge(paths[::-1], tmp_path / "reversed", key=key, rule=MINUS_SQRT)


def test_numbers_in_names_are_taken_where_a_checkpoint_has_no_step(tmp_path: Path) -> None:
    first, second = save_run(tmp_path, ["old-30", "old-20"])
    checkpoint.save({"model": nn.Linear(1, 1).state_dict()}, tmp_path / "old-10")
    with pytest.warns(UserWarning, match="got the steps 30, 20, 10; sort"):
        checkpoint.merge([first, second, tmp_path / "old-10"], tmp_path / "out", key="model", rule=MINUS_SQRT)


def test_the_command_prints_each_source_with_its_step_and_weight(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["checkpoint-1000", "checkpoint-1500", "checkpoint-500/", "odd\n"]
    write(tmp_path, names)
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *names, "--weights", "1,2,3,4", "--out", "out"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "step  weight  source",
        "1000  0.1     checkpoint-1000",
        "1500  0.2     checkpoint-1500",
        " 500  0.3     checkpoint-500/",
        "   -  0.4     odd\\n",
    ]
    (warning,) = [line for line in err.splitlines() if "warning" in line]
    assert warning.startswith("dist-swa: warning: merge needs its sources oldest first, got the steps 1000, 1500, 500;")


def test_quiet_prints_nothing_but_the_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, WRONG["Trainer"][0])
    assert main(["merge", *paths, "--rule", "minus_sqrt", "--out", f"{tmp_path}/out", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "got the steps 1000, 1500, 500;" in err


def test_only_the_first_rank_prints_the_sources(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["merge", *write(tmp_path, ["a"]), "--out", f"{tmp_path}/out"]) == 0
    assert capfd.readouterr() == ("", "")


def test_a_merge_that_fails_prints_no_sources(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, ["a", "b"])
    save_file({"other": torch.ones(1)}, tmp_path / "b/model.safetensors")
    assert main(["merge", *paths, "--out", f"{tmp_path}/out"]) == 1
    assert capfd.readouterr().out == ""


# --- The record of what was done


def record_in(out: Path) -> dict[str, Any]:
    if out.is_file():
        with safe_open(out, framework="pt") as file:
            text = file.metadata()["dist_swa"]
    else:
        text = (out / "dist_swa.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("name", ["out", "out.safetensors", "checkpoint"])
def test_a_merge_records_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path(), ["checkpoint-500"])
    save_run(Path(), ["last"])
    sources: list[str | Path] = ["checkpoint-500/", Path("last")]
    keys, steps = [None, "model"], [500, None]
    if name != "checkpoint":
        sources, keys, steps = sources[::-1], keys[::-1], steps[::-1]
    state = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    save_file(state, "checkpoint-500/model.safetensors")
    checkpoint.merge(sources, name, key="model", weights=[3, 1])
    assert record_in(Path(name)) == {
        "dist_swa": dist_swa.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": "merge",
        "rule": None,
        "dtype": None,
        "sources": [
            {"path": str(path) if isinstance(path, Path) else path, "key": key, "step": step, "weight": weight}
            for path, key, step, weight in zip(sources, keys, steps, [0.75, 0.25], strict=True)
        ],
    }
    rule = DecayShaped("linear", total=2)
    checkpoint.merge(sources, "second.safetensors", key="model", rule=rule, dtype=torch.bfloat16)
    found = record_in(Path("second.safetensors"))
    assert (found["rule"], found["dtype"]) == (repr(rule), "torch.bfloat16")


def test_the_record_in_a_checkpoint_is_covered_by_its_checksums(tmp_path: Path) -> None:
    paths = save_run(tmp_path, ["1", "2"])
    checkpoint.merge(paths, tmp_path / "out")
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    lines = subprocess.check_output(command, cwd=tmp_path / "out", text=True).splitlines()
    assert "dist_swa.json: OK" in lines
    assert {line.partition(":")[0] for line in lines} | {"SHA256SUMS"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    state = {"model": nn.Linear(1, 1).state_dict()}
    checkpoint.load(state, tmp_path / "out")
    (tmp_path / "out/dist_swa.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match=r"dist_swa\.json: its content is not what its checksum"):
        checkpoint.load(state, tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_synthesize_records_what_it_did(tmp_path: Path, name: str) -> None:
    model = nn.Linear(1, 1)
    average = ShardedAverage(model, {"narrow": PowerEMA(0.05), "wide": PowerEMA(0.10)})
    for i in range(1, 9):
        average.update()
        if i % 4 == 0:
            checkpoint.save({"swa": average}, tmp_path / f"step-{i}")
    error = checkpoint.synthesize([tmp_path / "step-8", tmp_path / "step-4"], tmp_path / name, sigma_rel=0.08)
    found = record_in(tmp_path / name)
    assert (found["command"], found["rule"]) == ("synthesize", "PowerEMA(sigma_rel=0.08)")
    assert found["relative_error"] == error
    rows = [(source["path"], source["key"], source["step"]) for source in found["sources"]]
    assert sorted(rows) == [(f"{tmp_path}/step-{n}", f"swa.{key}", n) for n in (4, 8) for key in ("narrow", "wide")]
    assert sum(source["weight"] for source in found["sources"]) == pytest.approx(1)


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("format", ["safetensors", "checkpoint"])
@on_ranks(2)
def test_a_record_that_cannot_be_written_raises_on_every_rank(tmp_path: Path, format: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if format == "checkpoint":
            source = tmp_path / "checkpoint-1"
            checkpoint.save({"model": {"w": torch.ones(1)}}, source)
            patch.setattr(CheckpointWriter, "_write", fail)
        else:
            source = tmp_path / f"rank{torch.distributed.get_rank()}.safetensors"
            save_file({"w": torch.ones(1)}, source)
            patch.setitem(checkpoint.merge.__globals__, "copy_beside", fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.merge([source], tmp_path / "out")
    torch.distributed.barrier()
    assert not (tmp_path / "out").exists()
