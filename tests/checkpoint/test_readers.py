"""What lies under a path is read as what it is: models, averages beside them, and files that are none of these."""

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_swa import ShardedAverage, checkpoint
from dist_swa.__main__ import main
from dist_swa.storage.save_load import no_group_is_fine
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


# The checkpoints of trainers


def averaged(model: nn.Module, **options: Any) -> ShardedAverage:
    """Return an average that is not the model."""
    average = ShardedAverage(model, **options)
    average.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update()
    return average


def save_trainer(folder: Path, name: str = "dist_swa") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save what a trainer saves. Return the averaged and the trained weights."""
    model = nn.Linear(2, 2)
    average = averaged(model)
    checkpoint.save({"swa": average}, folder / name)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(trained, folder / "model.safetensors")
    if name != "dist_swa":
        (folder / "random_states_0.pkl").touch()
    return average.full_state_dict(), trained


def interrupt(folder: Path, name: str) -> None:
    (folder / name).rename(folder / f".{name}.partial")


def lose_metadata(folder: Path, name: str) -> None:
    (folder / name / ".metadata").unlink()


def damage_metadata(folder: Path, name: str) -> None:
    (folder / name / ".metadata").write_bytes(b"nothing")


def damage_tensors(folder: Path, name: str) -> None:
    (file,) = (folder / name).glob("*.distcp")
    file.write_bytes(file.read_bytes()[::-1])


def replace_by_a_model(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    checkpoint.save({"net": {"w": torch.ones(1)}}, folder / name)


INTERRUPTED = [
    (interrupt, "dist_swa"),
    (interrupt, "ema"),
    (lose_metadata, "dist_swa"),
    (replace_by_a_model, "dist_swa"),
]
DAMAGED = [(damage_metadata, "dist_swa"), (damage_tensors, "dist_swa"), (damage_tensors, "ema")]


@pytest.mark.parametrize(("change", "name"), [*INTERRUPTED, *DAMAGED])
def test_a_damaged_average_is_named_and_the_trained_weights_can_be_taken(
    tmp_path: Path, change: Callable[[Path, str], None], name: str
) -> None:
    _, trained = save_trainer(tmp_path / "saved", name)
    change(tmp_path / "saved", name)
    for key in (None, "swa"):
        with pytest.raises(checkpoint.CheckpointError, match=rf"got .*{name}.*; .*, or pass key='model' for trained"):
            checkpoint.export(tmp_path / "saved", tmp_path / "out", key=key)
    assert main(["inspect", str(tmp_path / "saved")]) == 1
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors", "model"), trained)


def test_an_interrupted_save_beside_a_whole_one_does_not_matter(tmp_path: Path) -> None:
    average, _ = save_trainer(tmp_path / "saved")
    (tmp_path / "saved/.dist_swa.partial").mkdir()
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), average)


def test_a_damaged_model_is_not_hidden_by_a_damaged_average(tmp_path: Path) -> None:
    save_trainer(tmp_path / "saved")
    damage_metadata(tmp_path / "saved", "dist_swa")
    (tmp_path / "saved/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(checkpoint.CheckpointError, match=r"got .*model.safetensors: .*; restore it"):
        checkpoint.export(tmp_path / "saved", tmp_path / "out", key="model")


@pytest.mark.parametrize("kind", ["entries", "flat"])
def test_the_average_in_a_folder_that_is_a_checkpoint_itself_is_taken(tmp_path: Path, kind: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    average = averaged(model)
    weights = model.state_dict()
    state = weights if kind == "flat" else {"model": weights, "optimizer": optimizer.state_dict()}
    with no_group_is_fine():
        dcp_save(state, checkpoint_id=tmp_path / "saved")
    checkpoint.save({"swa": average}, tmp_path / "saved/dist_swa")
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), average.full_state_dict())
    assert same_bits(exported(tmp_path / "saved", tmp_path / "trained.safetensors", "model"), weights)


# The files that from_pretrained reads

FIRST, OTHER = {"w": torch.ones(2)}, {"w": torch.zeros(2), "stray": torch.zeros(1)}


def save_named(state: dict[str, Tensor], path: Path) -> None:
    """Save `state` as the file `path`, or as the only shard of the index `path`."""
    if path.name.endswith(".index.json"):
        shard = path.with_name(path.name.replace(".", "-00001-of-00001.", 1).removesuffix(".index.json"))
        path.write_text(json.dumps({"weight_map": dict.fromkeys(state, shard.name)}))
        path = shard
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "my_model.bin",
)


@pytest.mark.parametrize(("first", "stray"), [*itertools.combinations(ORDER, 2)])
@pytest.mark.parametrize("is_beside_an_average", [False, True], ids=["alone", "beside an average"])
def test_the_weights_are_those_that_from_pretrained_takes(
    tmp_path: Path, first: str, stray: str, is_beside_an_average: bool
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    save_named(OTHER, folder / stray)
    save_named(FIRST, folder / first)
    if is_beside_an_average:
        checkpoint.save({"swa": averaged(nn.Linear(2, 2))}, folder / "dist_swa")
    assert same_bits(exported(folder, tmp_path / "out.safetensors", "model"), FIRST)


def test_safetensors_of_no_known_name_are_one_model(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    save_named(FIRST, tmp_path / "saved/a.safetensors")
    save_named({"v": torch.ones(3)}, tmp_path / "saved/b.safetensors")
    assert same_bits(exported(tmp_path / "saved", tmp_path / "out.safetensors"), FIRST | {"v": torch.ones(3)})


# Files that are no weights

MOMENTS = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
FLATTENED = {"state.w.exp_avg": torch.ones(2), "param_groups.w.lr": torch.ones(())}
AT_TOP = "has the state of an optimizer at its top level"
OPTIMIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "state dict": (MOMENTS, AT_TOP),
    "entry": ({"optim": MOMENTS}, r"has optim \(optimizer\) inside"),
    "nested entries": (
        {"a": {"optim": MOMENTS}, "adam": MOMENTS},
        r"has a.optim \(optimizer\), adam \(optimizer\) inside",
    ),
    "flattened": (FLATTENED, AT_TOP),
    "flattened beside a flat model": ({**STATE, **FLATTENED}, AT_TOP),
}


@pytest.mark.parametrize("key", [None, ""])
@pytest.mark.parametrize("format", ["torch.save", "checkpoint"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_without_weights_is_called_so(tmp_path: Path, kind: str, format: str, key: str | None) -> None:
    state, message = OPTIMIZERS[kind]
    path = tmp_path / "saved.pt"
    with no_group_is_fine():
        torch.save(state, path) if format == "torch.save" else dcp_save(dict(state), checkpoint_id=path)
    with pytest.raises(ValueError, match=rf"got key={key!r} for .*saved.pt, which {message}; pass another path$"):
        checkpoint.export(path, tmp_path / "out", key=key)


NEITHER = "needs safetensors or a file of torch.save, got .*{name}, which is neither; pass weights$"
FILES: dict[str, bytes] = {
    "text.txt": b"some text that is longer than a header",
    "raw.pkl": pickle.dumps({"a": [1, 2, 3]}),
    "config.json": b'{"model_type": "gpt2"}',
    "array.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
    "empty": b"",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_weights_is_called_so(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    with pytest.raises(ValueError, match=NEITHER.format(name=name)):
        checkpoint.export(tmp_path / name, tmp_path / "out")
    assert main(["inspect", str(tmp_path / name)]) == 1
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_for_a_file_of_a_checkpoint_its_folder_is_named(tmp_path: Path, name: str) -> None:
    checkpoint.save({"model": STATE}, tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"the folder of a checkpoint, got its file .*{name}; pass .*/saved$"):
        checkpoint.export(tmp_path / "saved" / name, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused_by_name(tmp_path: Path, layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    torch.save({"a": torch.ones(1), "ragged": nested}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"needs? .*ragged.*x.pt.*; |which runs .*nested") as raised:
        checkpoint.export(tmp_path / "x.pt", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert "Internal" not in str(raised.value)
