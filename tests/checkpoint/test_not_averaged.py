"""Parameters that are not averaged are those of the averaged model, or an export raises."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accelerate_on_cpu import launched
from dist_swa import ShardedAverage, checkpoint
from dist_swa.__main__ import main
from dist_swa.integrations.accelerate import prepare_swa
from models import same_bits
from ranks import run_on_ranks

ONLY = r"export with only='averaged' \(--only averaged\)$"


def build(seed: int, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3, bias=bias), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    return model


def averaged(model: nn.Module) -> ShardedAverage:
    average = ShardedAverage(model)
    average.update()
    return average


def exported(path: Path, out: Path, key: str | None = None) -> dict[str, Tensor]:
    checkpoint.export(path, out, key=key)
    return load_file(out)


# Several models

SEVERAL: dict[str, tuple[str, str]] = {"accelerate": ("model", "model_1"), "roots": ("model_1", "model_2")}
SEVERAL |= {"model and another": ("model", "model_2"), "state_dict": ("model", "state_dict")}


@pytest.mark.parametrize("names", SEVERAL.values(), ids=SEVERAL)
def test_frozen_parameters_are_never_those_of_another_model_of_one_class(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    models = [build(0), build(1)]
    state: dict[str, Any] = {name: model.state_dict() for name, model in zip(names, models, strict=True)}
    checkpoint.save({**state, "swa_2": averaged(models[1])}, tmp_path / "saved")
    with pytest.raises(
        ValueError,
        match=rf"export of swa_2 needs the 2 parameters .* from one model, got {names[0]} and {names[1]} in .*; export"
        rf".*, or {ONLY}",
    ):
        checkpoint.export(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint.export(tmp_path / "saved", tmp_path / "out", only="averaged")


@pytest.mark.parametrize("kind", ["same values", "another shape", "other names", "not frozen"])
def test_one_of_several_models_is_taken_if_it_is_certain(tmp_path: Path, kind: str) -> None:
    model, other = build(1), build(0)
    state = other.state_dict()
    if kind == "same values":
        state = model.state_dict() | {"2.weight": torch.ones(2, 3)}
    elif kind == "another shape":
        state["2.weight"] = torch.ones(5, 3)
    elif kind == "other names":
        state["3.weight"] = state.pop("2.weight")
    else:
        del state["0.bias"]
    average = averaged(model)
    checkpoint.save({"model": state, "model_2": model.state_dict(), "swa": average}, tmp_path / "saved")
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), average.full_state_dict())


def test_models_that_are_all_averaged_may_have_one_class(tmp_path: Path) -> None:
    model, average = nn.Linear(2, 2), averaged(nn.Linear(2, 2))
    checkpoint.save({"model": model.state_dict(), "model_2": {}, "swa": average}, tmp_path / "saved")
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), average.full_state_dict())


def save_two(folder: Path) -> None:
    with launched():
        accelerator = Accelerator()
        models = [build(0), build(1)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        prepared = [accelerator.prepare(*pair) for pair in zip(models, optimizers, strict=True)]
        swa = prepare_swa(accelerator, *prepared[1], name="ema_b", swa_start="0ba", max_duration="1ba")
        accelerator.backward(prepared[1][0](torch.randn(4, 3)).sum())
        prepared[1][1].step()
        swa.step()
        accelerator.save_state(str(folder))


def test_the_average_of_one_of_two_models_of_accelerate_raises(tmp_path: Path) -> None:
    run_on_ranks(save_two, 1, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"export of ema_b needs .* from one model, got model and model_1 in"):
        checkpoint.export(tmp_path / "saved", tmp_path / "out", key="ema_b")
    assert not (tmp_path / "out").exists()


# As many as are not averaged


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("0.bias", {"epoch": 3}, r"needs the 2 parameters .*, got 1 of them beside it"),
        ("0.bias", {"0._extra_state": torch.ones(1)}, r"needs the 2 parameters .*, got 1 of them beside it"),
        ("0.bias", {"0._extra_state/shard_0_2": torch.ones(1)}, r"got 1 of them beside it"),
        ("0.bias", {"0.weight.absmax": torch.ones(1)}, r"needs the 2 parameters .*, got 1 of them beside it"),
        (None, {"head": torch.ones(1)}, r"needs the 2 parameters .*, got 3 of them \(0.bias, 0.weight, head\) beside"),
        (
            None,
            {f"head.{i}": torch.ones(1) for i in range(9)},
            r"got 11 of them \(0.bias, 0.weight, head.0, head.1, head.2, ...\) beside it",
        ),
    ],
)
def test_a_model_with_more_or_fewer_parameters_is_refused(
    tmp_path: Path, removed: str | None, added: dict[str, Any], message: str
) -> None:
    model = build(1)
    state = {name: value for name, value in model.state_dict().items() if name != removed}
    checkpoint.save({"model": state | added, "swa": averaged(model)}, tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        checkpoint.export(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_state_of_a_quantised_parameter_belongs_to_it(tmp_path: Path) -> None:
    model = build(1)
    state = model.state_dict() | {"0.weight.absmax": torch.ones(2)}
    average = averaged(model)
    checkpoint.save({"model": state, "swa": average}, tmp_path / "saved")
    expected = average.full_state_dict() | {"0.weight.absmax": torch.ones(2)}
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("kind", ["checkpoint", "file of Lightning"])
def test_where_frozen_parameters_are_dropped_the_error_names_the_option(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    model, path = build(1), tmp_path / "saved.ckpt"
    average = averaged(model)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("0.")}
    if kind == "checkpoint":
        checkpoint.save({"model": state, "swa": average}, path)
    else:
        of_lightning = {"state_dict": state, "pytorch-lightning_version": "2.5", "global_step": 1}
        torch.save({**of_lightning, "dist_swa": {"swa": average.state_dict()}}, path)
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    assert re.search(rf"got 0 of them .*, export from the run, or {ONLY}", capfd.readouterr().err.strip())
    assert main(["export", str(path), str(tmp_path / "out"), "--only", "averaged", "--quiet"]) == 0
    assert same_bits(load_file(tmp_path / "out/model.safetensors"), average.full_state_dict(only="averaged"))


@pytest.mark.parametrize("has_average", [False, True])
def test_the_option_needs_an_average(tmp_path: Path, has_average: bool) -> None:
    model = build(1)
    averages = {"swa": averaged(model)} if has_average else {}
    checkpoint.save({"model": model.state_dict(), **averages}, tmp_path / "saved")
    choice = "pass one of swa, or leave it out" if has_average else "leave it out"
    with pytest.raises(ValueError, match=rf"only='averaged' needs an average, got key='model' for .*; {choice}$"):
        checkpoint.export(tmp_path / "saved", tmp_path / "out", key="model", only="averaged")


# The average in the checkpoint of a trainer


@pytest.mark.parametrize("is_relative", [False, True], ids=["absolute", "relative"])
def test_without_the_folder_of_the_model_its_parent_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model, folder = build(1), Path("checkpoint-4") if is_relative else tmp_path / "checkpoint-4"
    average = averaged(model)
    checkpoint.save({"swa": average}, folder / "dist_swa")
    save_file(model.state_dict(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"got 0 of them .*, pass {folder}, where .*, or {ONLY}"):
        checkpoint.export(folder / "dist_swa", tmp_path / "out")
    assert same_bits(exported(folder, tmp_path / "out.safetensors"), average.full_state_dict())
    checkpoint.export(folder / "dist_swa", tmp_path / "averaged", only="averaged")
