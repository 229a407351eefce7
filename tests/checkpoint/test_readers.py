"""What lies under a path is read as what it is: models, averages beside them, and files that are none of these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_swa import checkpoint
from models import same_bits

STATE = {"encoder.w": torch.ones(2), "head": torch.zeros(3)}


def save_shards(state: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    for i, (name, value) in enumerate(state.items(), start=1):
        save_file({name: value}, folder / f"model-{i:05}-of-{len(state):05}.safetensors")


MODELS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "x.safetensors": save_file,
    "x.pt": torch.save,
    "folder": save_shards,
}


def exported(path: Path, out: Path, key: str | None = None) -> dict[str, Tensor]:
    checkpoint.export(path, out, key=key)
    return load_file(out)


# One model


@pytest.mark.parametrize("key", ["swa", "nonsense", "optimizer", "model.swa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_key_that_one_model_does_not_have_is_refused(tmp_path: Path, name: str, key: str) -> None:
    MODELS[name](STATE, tmp_path / name)
    message = rf'the key of an entry, got key={key!r} for .*{name}; pass one of ""$'
    with pytest.raises(ValueError, match=message):
        checkpoint.export(tmp_path / name, tmp_path / "out", key=key)
    with pytest.raises(ValueError, match=message):
        checkpoint.merge([tmp_path / name], tmp_path / "out", key=key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", [None, "", "model", "state_dict"])
@pytest.mark.parametrize("name", MODELS)
def test_the_keys_of_a_model_mean_the_whole_of_one_model(tmp_path: Path, name: str, key: str | None) -> None:
    MODELS[name](STATE, tmp_path / name)
    assert same_bits(exported(tmp_path / name, tmp_path / "out.safetensors", key), STATE)


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_of_the_names_of_one_model_is_a_key(tmp_path: Path, name: str) -> None:
    MODELS[name](STATE, tmp_path / name)
    assert same_bits(exported(tmp_path / name, tmp_path / "out.safetensors", "encoder"), {"w": torch.ones(2)})
