"""The commands do what the functions do, and report an error in one line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dist_swa
from dist_swa import EMA, SWA, DecayShaped, Equal, Polynomial, PowerEMA, checkpoint
from dist_swa.__main__ import _EXAMPLES, main
from dist_swa.averaging.rules import Rule
from dist_swa.storage.writer import CheckpointWriter
from markdown_setups import checkpoints
from models import build, same_bits, trajectory, write

ROOT = Path(dist_swa.__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of six steps, with averages of the last four."""
    model = build()
    rules = {"swa": Equal(), "narrow": PowerEMA(0.05), "wide": PowerEMA(0.10)}
    swa = SWA(model, rule=rules, transfer="swa", swa_start="3ba", swa_end=None, update_interval="1ba")
    folder = checkpoint.CheckpointFolder(tmp_path_factory.mktemp("run"), keep=9)
    for step, values in enumerate(trajectory(6, model), start=1):
        write(model, values)
        swa.step()
        folder.save(step, {"model": model.state_dict(), "average": swa, "epoch": 1})
    return folder.path


def step(run: Path, number: int) -> str:
    return str(run / f"step-{number:09}")


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", step(run, 6)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{step(run, 6)}: checkpoint"
    assert lines[1].split() == ["key", "rule", "num_averaged", "step", "tensors", "elements", "dtypes"]
    assert lines[2].split() == ["average.swa", "Equal()", "4", "6", "13", "122", "float32,", "int64"]
    assert lines[4].split()[:4] == ["average.wide", "PowerEMA(sigma_rel=0.1)", "4", "6"]
    assert lines[5].split() == ["model", "-", "-", "-", "15", "150", "float32,", "int64"]


FLAT = {"w": torch.ones(2), "0.weight": torch.ones(3)}


@pytest.mark.parametrize(
    ("state", "rows"),
    [
        (FLAT, ['"" - - - 2 5 float32']),
        ({"model": FLAT, "step": torch.tensor(3)}, ['"" - - - 1 1 int64', "model - - - 2 5 float32"]),
    ],
    ids=["flat", "mixed"],
)
def test_inspect_shows_the_top_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: dict[str, Any], rows: list[str]
) -> None:
    checkpoint.save(state, tmp_path / "saved")
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]] == rows


def test_inspect_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", step(run, 5), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "checkpoint"
    assert facts["has_checksums"] is True
    assert [entry["key"] for entry in facts["entries"]] == ["average.swa", "average.narrow", "average.wide", "model"]
    assert facts["entries"][1] == {
        "key": "average.narrow",
        "rule": "PowerEMA(sigma_rel=0.05)",
        "num_averaged": 3,
        "step": 5,
        "tensors": 13,
        "elements": 122,
        "dtypes": ["float32", "int64"],
    }


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "torch.save"])
def test_inspect_lists_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    state = {"a.weight": torch.ones(2, 3, dtype=torch.bfloat16), "count": torch.tensor(3)}
    path = tmp_path / "saved"
    if kind == "checkpoint":
        checkpoint.save({"model": state, "more": {"x": torch.ones(0)}}, path)
    else:
        save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    assert main(["inspect", str(path), "--tensors"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    title = "model:" if kind == "checkpoint" else ""
    first = lines.index(title)
    assert lines[first + 1 : first + 3] == ["a.weight bfloat16 [2, 3]", "count int64 []"]
    assert ("x float32 [0]" in lines) == (kind == "checkpoint")
    assert main(["inspect", str(path), "--tensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"][0]["specs"] == [
        {"name": "a.weight", "shape": [2, 3], "dtype": "bfloat16"},
        {"name": "count", "shape": [], "dtype": "int64"},
    ]


def test_inspect_of_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.ones(2, 3, dtype=torch.float16)}, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "safetensors"
    (entry,) = facts["entries"]
    assert (entry["tensors"], entry["elements"], entry["dtypes"], entry["rule"]) == (1, 6, ["float16"], None)


def test_export(run: Path, tmp_path: Path) -> None:
    arguments = ["export", step(run, 6), str(tmp_path / "out"), "--key", "average.swa", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    checkpoint.export(step(run, 6), tmp_path / "same", key="average.swa", dtype=torch.bfloat16)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert same_bits(found, load_file(tmp_path / "same" / "model.safetensors"))
    assert found["up.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("equal", Equal()),
        ("polynomial:1", Polynomial(1.0)),
        ("ema:0.9", EMA(decay=0.9)),
        ("linear", DecayShaped("linear", total=3)),
        ("minus_sqrt", DecayShaped("minus_sqrt", total=3)),
        ("cosine", DecayShaped("cosine", total=3)),
    ],
)
def test_merge_by_a_rule(run: Path, tmp_path: Path, text: str, rule: Rule) -> None:
    paths = [step(run, i) for i in (2, 4, 6)]
    out = str(tmp_path / "out.safetensors")
    assert main(["merge", *paths, "--out", out, "--key", "model", "--rule", text]) == 0
    checkpoint.merge(paths, tmp_path / "same.safetensors", key="model", rule=rule)
    assert Path(out).read_bytes() == (tmp_path / "same.safetensors").read_bytes()


@pytest.mark.parametrize("weights", [["--weights=-1,3"], ["--weights", "-1,3"]], ids=" ".join)
def test_merge_by_weights(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], weights: list[str]) -> None:
    paths, out = [step(run, i) for i in (2, 4)], str(tmp_path / "out.safetensors")
    assert main(["merge", *paths, *weights, "--out", out, "--key", "model", "--no-normalize", "--quiet"]) == 0
    err = capfd.readouterr().err
    assert err == "dist-swa: warning: negative weights move away from a source: weights=[-1.0, 3.0]\n"
    with pytest.warns(UserWarning, match="negative"):
        checkpoint.merge(paths, tmp_path / "same.safetensors", key="model", weights=[-1, 3], normalize=False)
    assert Path(out).read_bytes() == (tmp_path / "same.safetensors").read_bytes()


def test_synthesize(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, out = [step(run, i) for i in (4, 6)], str(tmp_path / "out.safetensors")
    assert main(["synthesize", *paths, "--out", out, "--sigma-rel", "0.08"]) == 0
    error = checkpoint.synthesize(paths, tmp_path / "same.safetensors", sigma_rel=0.08)
    assert Path(out).read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    assert capsys.readouterr().out == f"sigma_rel 0.08, relative error of the weights of models {error:.2e}\n"


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["progress", "quiet"])
@pytest.mark.parametrize("command", [["export", "STEP", "OUT"], ["merge", "STEP", "--out", "OUT"]], ids=" ".join)
def test_a_progress_bar_unless_quiet(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str], quiet: list[str]
) -> None:
    places = {"STEP": step(run, 6), "OUT": str(tmp_path / "out")}
    assert main([*(places.get(part, part) for part in command), "--key", "model", *quiet]) == 0
    assert ("15/15" in capfd.readouterr().err) == (not quiet)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "STEP", "OUT"], 1, "needs one average, or the key of an entry, got key=None for"),
        (["export", "nowhere", "OUT"], 1, "a checkpoint or safetensors are needed, got nothing at nowhere"),
        (["inspect", "RUN"], 1, "choose one of step-000000001, step-000000002"),
        (["inspect", "nowhere"], 1, "got nothing at nowhere"),
        (["merge", "STEP", "--out", "RUN", "--key", "model"], 1, "needs a path where nothing is yet"),
        (["merge", "STEP", "--out", "OUT", "--key", "model", "--weights", "1,2"], 1, "a finite weight for each of 1"),
        (["synthesize", "STEP", "--out", "OUT", "--sigma-rel", "0.2"], 1, "can be made within 10%, got sigma_rel=0.2"),
        (["synthesize", "STEP", "--out", "OUT", "--sigma-rel", "7"], 1, "PowerEMA needs sigma_rel in"),
        (["synthesize", "STEP", "--out", "OUT"], 2, "Missing option '--sigma-rel'; see --help"),
        (
            ["merge", "STEP", "--out", "OUT", "--rule", "ema:2"],
            2,
            "got ema:2 (EMA needs decay in [0, 1), got decay=2.0",
        ),
        (
            ["merge", "STEP", "--out", "OUT", "--rule", "median"],
            2,
            "needs one of equal, polynomial:ETA, ema:DECAY, linear",
        ),
        (
            ["merge", "STEP", "--out", "OUT", "--rule", "equal", "--weights", "1"],
            2,
            "merge needs --rule or --weights, got both; ",
        ),
        (
            ["merge", "STEP", "--out", "OUT", "--weights", "a"],
            2,
            "Invalid value for '--weights': could not convert string to float: 'a'",
        ),
        (["merge", "STEP", "--out", "OUT", "--rule", ""], 2, "needs one of equal, polynomial:ETA, ema:DECAY, linear"),
        (["merge", "STEP", "--out", "OUT", "--no-normalize"], 2, "--no-normalize needs --weights, got none; "),
        (["merge", "STEP", "--out", "OUT", "--weights", "--quiet"], 2, "Invalid value for '--weights': "),
        (["export", "STEP", ".", "--key", "model"], 1, "needs a path where nothing is yet, got .; choose another"),
        (["export", "STEP", "", "--key", "model"], 1, "needs a path where nothing is yet, got .; choose another"),
        (["merge", "STEP", "--out", "/", "--key", "model"], 1, "needs a path where nothing is yet, got /; choose"),
        (["export", "STEP", "LINK", "--key", "model"], 1, "needs a path where nothing is yet, got"),
        (["merge", "STEP", "--out", "LINK", "--key", "model"], 1, "needs a path where nothing is yet, got"),
        (["merge", "STEP", "--out", "DANGLING", "--key", "model"], 1, "needs a path where nothing is yet, got"),
        (["inspect", "no\x1b[31m\nwhere"], 1, r"got nothing at no\x1b[31m where"),
        (["merge", "STEP", "--out", "OUT", "--no\x1b"], 2, r"No such option"),
        (["merge", "--out", "OUT"], 2, "Missing argument 'SOURCES...'; see --help"),
        (
            ["export", "STEP", "OUT", "--dtype", "int8"],
            2,
            "'int8' is not one of 'float64', 'float32', 'bfloat16', 'float16'",
        ),
        (["explode"], 2, "No such command 'explode'"),
        ([], 2, "Missing command; see --help"),
    ],
)
def test_errors_are_one_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    places = {"STEP": step(run, 6), "RUN": str(run), "OUT": str(tmp_path / "out")}
    for place, name in (("LINK", "link.safetensors"), ("DANGLING", "link")):
        places[place] = str(tmp_path / name)
        Path(places[place]).symlink_to("nowhere")
    arguments = [places.get(argument, argument) for argument in arguments]
    if code == 2:
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
    else:
        assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("dist-swa")
    assert "error: " in err
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "link.safetensors"]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Set Python's handler of SIGINT: a shell that starts pytest in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("is_masked", [False, True])
def test_an_interrupt_is_130_even_if_torch_masks_it(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_masked: bool
) -> None:
    def interrupted(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("enforce fail") if is_masked else error from None

    monkeypatch.setattr(CheckpointWriter, "write_data", interrupted)
    assert main(["merge", step(run, 6), "--key", "model", "--out", str(tmp_path / "out"), "--quiet"]) == 130
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_names_from_files_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save({"we\x1b[31mird\nkey": {"x": torch.ones(1)}, "größe": {"x": torch.ones(1)}}, tmp_path / "saved")
    assert main(["inspect", str(tmp_path / "saved")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["größe", r"we\x1b[31mird\nkey"]


@pytest.mark.parametrize(
    "command", ["inspect STEP", "inspect STEP --json", "inspect no", "no", "inspect --help", "--version"]
)
def test_only_the_first_rank_prints(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    outputs = []
    for rank in ("0", "1", "10"):
        monkeypatch.setenv("RANK", rank)
        with contextlib.suppress(SystemExit):
            main(command.replace("STEP", step(run, 6)).split())
        outputs.append("".join(capfd.readouterr()))
    assert outputs[0]
    assert outputs[1:] == ["", ""]


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "2", "RANK": "abc"}], ids=str)
def test_an_error_in_the_environment_is_one_line(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["inspect", step(run, 6)]) == 1
    err = capfd.readouterr().err
    assert err.startswith("dist-swa: error: ")
    assert "abc" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", ["--help", "inspect -h", "export -h", "merge -h", "synthesize -h"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "  examples:\n    dist-swa inspect step-840\n" in text
    assert "exit codes: 0 done" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"dist-swa, version {dist_swa.__version__}\n"


def test_the_commands_of_help_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^ *dist-swa (.*)$", _EXAMPLES, re.MULTILINE)
    assert len(commands) == 5
    with checkpoints({}):
        for command in commands:
            assert main(command.split()) == 0, command


def test_as_a_module_and_as_a_script(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_swa"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    listed = subprocess.check_output([*command, "inspect", step(run, 6)], text=True, env=environment, cwd=tmp_path)
    assert "average.narrow" in listed
    failed = subprocess.run([*command, "inspect", "no"], text=True, env=environment, cwd=tmp_path, capture_output=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "dist-swa: error: a checkpoint or safetensors are needed, got nothing at no; see the path\n"
    assert 'dist-swa = "dist_swa.__main__:main"' in (ROOT / "pyproject.toml").read_text()


def test_under_torchrun(run: Path, tmp_path: Path) -> None:
    paths = [step(run, i) for i in (4, 6)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dist_swa"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    merge = ["merge", *paths, "--key", "average.swa", "--out", str(tmp_path / "out")]
    done = subprocess.run([*launch, *merge], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checkpoint.merge(paths, tmp_path / "same", key="average.swa")
    for name in ("out", "same"):
        checkpoint.export(tmp_path / name, tmp_path / f"{name}.safetensors", key="model")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
