"""The names in what a wrapped model saved are those of the unwrapped model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_swa import ShardedAverage, checkpoint
from models import same_bits

STATE = {"0.weight": torch.ones(2), "1.bias": torch.zeros(3)}
FORMATS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "safetensors": save_file,
    "torch.save": torch.save,
    "checkpoint": lambda state, path: checkpoint.save({"model": state}, path),
}
COMPILED = ("_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


def wrapped(prefix: str, offset: float = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value + offset for name, value in STATE.items()}


def exported(path: Path, out: Path) -> dict[str, Tensor]:
    checkpoint.export(path, out)
    return load_file(out)


@pytest.mark.parametrize("prefix", COMPILED)
@pytest.mark.parametrize("format", FORMATS)
def test_the_prefix_of_a_compiled_module_is_removed(tmp_path: Path, format: str, prefix: str) -> None:
    FORMATS[format](wrapped(prefix), tmp_path / "saved")
    expected = wrapped("module.") if format == "safetensors" and "module." in prefix else STATE
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_modules_inside_a_model_have_its_names(tmp_path: Path, format: str) -> None:
    state = {"net._orig_mod.0.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    FORMATS[format](state, tmp_path / "saved")
    expected = {"net.0.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), expected)


def test_names_that_would_be_the_same_are_kept(tmp_path: Path) -> None:
    state = {"_orig_mod.w": torch.ones(1), "w": torch.zeros(1)}
    torch.save(state, tmp_path / "saved")
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), state)


def test_frozen_parameters_of_a_compiled_model_are_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    average = ShardedAverage(model)
    average.update()
    compiled = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    checkpoint.save({"model": compiled, "swa": average}, tmp_path / "saved")
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), average.full_state_dict())


@pytest.mark.parametrize("prefix", ["module.", *COMPILED])
@pytest.mark.parametrize("other", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_models_with_and_without_a_wrapper_are_merged(tmp_path: Path, format: str, other: str, prefix: str) -> None:
    FORMATS[format](wrapped(prefix, 2), tmp_path / "wrapped")
    FORMATS[other](STATE, tmp_path / "plain")
    for sources in (["wrapped", "plain"], ["plain", "wrapped"]):
        out = tmp_path / f"{sources[0]}.safetensors"
        checkpoint.merge([tmp_path / name for name in sources], out, key="model")
        assert same_bits(load_file(out), wrapped("", 1))


def test_safetensors_that_all_have_the_names_of_ddp_keep_them(tmp_path: Path) -> None:
    for i in (0, 2):
        save_file(wrapped("module.", i), tmp_path / f"{i}.safetensors")
    checkpoint.merge([tmp_path / "0.safetensors", tmp_path / "2.safetensors"], tmp_path / "out.safetensors")
    assert same_bits(load_file(tmp_path / "out.safetensors"), wrapped("module.", 1))
