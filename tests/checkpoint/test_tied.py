"""A tied tensor that a source stores under one name only is merged with sources that store it under all its names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_swa import ShardedAverage, checkpoint
from dist_swa.checkpoint.safetensors_io import SafetensorsReader
from models import same_bits

KINDS = pytest.mark.parametrize("kind", ["safetensors", "checkpoint", "torch.save"])


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(4, 3, generator=generator).to(dtype) for name in ("middle", "wte", "wpe")}
    values |= {"norm.bias": torch.zeros(3, dtype=dtype), "lm_head.bias": torch.randn(3, generator=generator).to(dtype)}
    return values | {"lm_head": values["wte"].clone(), "count": torch.tensor(seed)}


def without(values: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name not in names}


def saved(values: list[dict[str, Tensor]], folder: Path, kind: str = "safetensors") -> list[Path]:
    paths = [folder / f"{i}{'.safetensors' * (kind == 'safetensors')}" for i in range(len(values))]
    for path, state in zip(paths, values, strict=True):
        if kind == "safetensors":
            save_file(state, path)
        elif kind == "torch.save":
            torch.save(state, path)
        else:
            checkpoint.save({"model": state}, path)
    return paths


def mean(values: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([value[name].double() for value in values]).mean(0).to(values[0][name].dtype)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("lacking", [[0], [1], [0, 2]], ids=str)
@pytest.mark.parametrize("name", ["lm_head", "wte"])
def test_a_tied_tensor_that_is_missing_merges(
    tmp_path: Path, kind: str, dtype: torch.dtype, lacking: list[int], name: str
) -> None:
    values = [state(seed, dtype) for seed in range(3)]
    stored = [without(value, name) if i in lacking else value for i, value in enumerate(values)]
    checkpoint.merge(saved(stored, tmp_path, kind), tmp_path / "out.safetensors")
    (tmp_path / "all").mkdir()
    checkpoint.merge(saved(values, tmp_path / "all", kind), tmp_path / "same.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["lm_head"], found["wte"])
    assert same_bits(found, load_file(tmp_path / "same.safetensors"))
    if dtype != torch.complex64:
        assert torch.allclose(found["lm_head"].double(), mean(values, "wte").double(), rtol=0, atol=1e-6)


def missing(name: str, *changes: tuple[str, Any]) -> list[dict[str, Tensor]]:
    values = [state(seed) for seed in range(2)]
    for changed, value in changes:
        values[1][changed] = value
    return [without(values[0], name), values[1]]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lm_head", [("lm_head", torch.ones(4, 3))]),
        ("lm_head", [("wte", state(1)["wte"] + torch.eye(4, 3) * 1e-6)]),
        ("lm_head", [("wte", torch.full((4, 3), 2.0)), ("lm_head", torch.full((4, 3), 2.0))]),  # may be chance
        ("norm.bias", [("lm_head.bias", torch.zeros(3))]),
        ("count", [("other", torch.tensor(1))]),
        ("middle", []),
    ],
)
def test_a_tensor_that_is_not_tied_is_missing(tmp_path: Path, name: str, changes: list[tuple[str, Any]]) -> None:
    with pytest.raises(ValueError, match=rf"needs sources with the same names, .*, got (other|{name})=missing in"):
        checkpoint.merge(saved(missing(name, *changes), tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_tied_in_one_source_only_is_missing(tmp_path: Path) -> None:
    values = [without(state(0), "lm_head"), state(1), {**state(2), "lm_head": torch.randn(4, 3)}]
    with pytest.raises(ValueError, match=r"got lm_head=missing in .*0.safetensors"):
        checkpoint.merge(saved(values, tmp_path), tmp_path / "out")


def test_an_average_of_tied_parameters_merges_with_a_file_of_one_name(tmp_path: Path) -> None:
    embedding, head = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"wte": embedding, "lm_head": head})
    average = ShardedAverage(model)
    average.update()
    checkpoint.save({"swa": average}, tmp_path / "0")
    save_file({"lm_head.weight": torch.ones(4, 3)}, tmp_path / "1.safetensors")
    checkpoint.merge([tmp_path / "0", tmp_path / "1.safetensors"], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["lm_head.weight"], (embedding.weight + 1) / 2)
    assert torch.equal(found["lm_head.weight"], found["wte.weight"])


@pytest.mark.parametrize("stored", [["wte"], ["lm_head"], ["wte", "lm_head"]], ids=str)
def test_a_frozen_tied_parameter_may_be_stored_under_any_of_its_names(tmp_path: Path, stored: list[str]) -> None:
    embedding, head, other = (nn.Linear(3, 3, bias=False) for _ in range(3))
    head.weight = embedding.weight.requires_grad_(False)
    model = nn.ModuleDict({"wte": embedding, "lm_head": head, "other": other})
    average = ShardedAverage(model)
    average.update()
    names = [f"{name}.weight" for name in (*stored, "other")]
    checkpoint.save({"swa": average, "model": {name: model.state_dict()[name] for name in names}}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert len(found) == 3
    assert same_bits(found, average.full_state_dict())


def test_only_tensors_of_the_same_shape_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [without(state(0), "lm_head"), {**state(1), "large": torch.ones(5, 3)}]
    values[0]["large"] = torch.ones(5, 3)
    read: list[str] = []
    monkeypatch.setattr(SafetensorsReader, "read", _noting(SafetensorsReader.read, read))
    checkpoint.merge(saved(values, tmp_path), tmp_path / "out.safetensors")
    compared = read[: 1 - 2 * len(values[1])]  # "count" is read once
    assert compared
    assert set(compared) <= {"middle", "wte", "wpe", "lm_head"}


def _noting(read: Any, names: list[str]) -> Any:
    def reading(self: Any, key: str) -> Tensor:
        names.append(key)
        value: Tensor = read(self, key)
        return value

    return reading
