"""Weights are found in nested checkpoints, and the state of an optimizer is never taken for them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful

from dist_swa import Equal, ShardedAverage, checkpoint
from dist_swa.checkpoint.entries import Contents
from dist_swa.storage.save_load import no_group_is_fine
from models import same_bits


class Trained:
    """A model and an optimizer after a step, and an average of two models."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.model[0].weight.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.average = ShardedAverage(self.model)
        for _ in range(2):
            self.model(torch.ones(2, 3)).square().sum().backward()
            self.optimizer.step()
            self.average.update()

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    @property
    def averaged(self) -> dict[str, Tensor]:
        return self.average.full_state_dict()


class AppState(Stateful):
    """The layout of torch's tutorial on distributed checkpoints."""

    def __init__(self, run: Trained) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.run.model, self.run.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def flattened(run: Trained) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return dict(get_optimizer_state_dict(run.model, run.optimizer, options=options))


STATES: dict[str, Callable[[Trained], dict[str, Any]]] = {
    "tutorial": lambda run: {"app": AppState(run)},
    "step beside": lambda run: {"app": {"step": torch.tensor(2), **AppState(run).state_dict()}},
    "model and optimizer": lambda run: {"net": run.weights, "optimizer": run.optimizer.state_dict()},
    "by its keys": lambda run: {"net": run.weights, "adam": run.optimizer.state_dict()},
    "by its name": lambda run: {"net": run.weights, "optim": {"exp_avg": run.weights}},
    "in a list": lambda run: {"net": run.weights, "states": [run.optimizer.state_dict()]},
    "flattened": lambda run: {"net": run.weights, "adam": flattened(run)},
    "flat model": lambda run: {**run.weights, "optimizer": flattened(run)},
    "nested average": lambda run: {"app": {**AppState(run).state_dict(), "swa": run.average.state_dict()}},
    "average": lambda run: {"app": AppState(run), "swa": run.average},
    "average beside a flat model": lambda run: {**run.weights, "optimizer": flattened(run), "swa": run.average},
    "average in a model": lambda run: {"state_dict": {**run.weights, "dist_swa": run.average.state_dict()}},
}
ENTRIES = {
    "tutorial": ["app.model", "app.optim"],
    "step beside": ["app", "app.model", "app.optim"],
    "model and optimizer": ["net", "optimizer"],
    "by its keys": ["adam", "net"],
    "by its name": ["net", "optim"],
    "in a list": ["net", "states.0"],
    "flattened": ["adam", "net"],
    "flat model": ["", "optimizer"],
    "nested average": ["app.swa", "app.model", "app.optim"],
    "average": ["swa", "app.model", "app.optim"],
    "average beside a flat model": ["swa", "", "optimizer"],
    "average in a model": ["state_dict.dist_swa", "state_dict"],
}


def saved(state: dict[str, Any], path: Path) -> Path:
    with no_group_is_fine():
        dcp_save(state, checkpoint_id=path)
    return path


def without_paths(path: Path, data: Any = None) -> Path:
    """Replace what says which dots are in names, as in a checkpoint of another writer."""
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = data
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def exported(path: Path, out: Path, key: str | None = None) -> dict[str, Tensor]:
    checkpoint.export(path, out, key=key)
    return load_file(out)


def entries_of(path: Path) -> list[str]:
    return list(Contents(checkpoint.open_checkpoint(path)).entries)


@pytest.mark.parametrize("kind", STATES)
def test_the_default_is_the_average_or_the_weights(tmp_path: Path, kind: str) -> None:
    run = Trained()
    path = saved(STATES[kind](run), tmp_path / "saved")
    assert entries_of(path) == ENTRIES[kind]
    expected = run.averaged if "average" in kind else run.weights
    assert same_bits(exported(path, tmp_path / "out.safetensors"), expected)


NEED_PATHS = ("step beside", "flat model", "average beside a flat model", "average in a model")


@pytest.mark.parametrize("kind", [kind for kind in STATES if kind not in NEED_PATHS])
def test_a_checkpoint_without_paths_is_read_by_its_dots(tmp_path: Path, kind: str) -> None:
    run = Trained()
    path = without_paths(saved(STATES[kind](run), tmp_path / "saved"))
    assert entries_of(path) == ENTRIES[kind]
    expected = run.averaged if "average" in kind else run.weights
    assert same_bits(exported(path, tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize(
    ("kind", "key", "inside"),
    [
        (
            "tutorial",
            "app",
            r"got key='app' for .*, which has app.model, app.optim \(optimizer\) inside; .* app.model$",
        ),
        ("tutorial", "", r"got key='' for .*, which has app.model, app.optim \(optimizer\) inside; .* app.model$"),
        ("step beside", "app", r", which has app.model, app.optim \(optimizer\) inside; pass one of app.model$"),
        ("tutorial", "app.optim", r"which is the state of an optimizer; pass one of app.model$"),
        ("tutorial", "app.optim.state", r"got key='app.optim.state' for .*; pass one of app.model$"),
        ("flattened", "adam", r"which is the state of an optimizer; pass one of net$"),
        ("in a list", "states", r"which has states.0 \(optimizer\) inside; pass one of net$"),
        (
            "nested average",
            "app",
            r"which has app.swa, app.model, app.optim \(optimizer\) inside; .* app.swa, app.model$",
        ),
        ("average", "swa.slots", r"got key='swa.slots' for .*; pass one of swa, app.model$"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [checkpoint.export, lambda path, out, key: checkpoint.merge([path], out, key=key)],
    ids=["export", "merge"],
)
def test_an_entry_with_an_optimizer_inside_raises_with_the_list(
    tmp_path: Path, kind: str, key: str, inside: str, read: Callable[..., None]
) -> None:
    path = saved(STATES[kind](Trained()), tmp_path / "saved")
    with pytest.raises(ValueError, match=inside):
        read(path, tmp_path / "out", key=key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", [lambda run: run.optimizer.state_dict(), flattened], ids=["state dict", "flattened"])
@pytest.mark.parametrize("key", [None, ""])
def test_an_optimizer_alone_is_refused(tmp_path: Path, state: Callable[[Trained], Any], key: str | None) -> None:
    path = saved(state(Trained()), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"; pass another path$"):
        checkpoint.export(path, tmp_path / "out", key=key)


@pytest.mark.parametrize(
    ("kind", "key"), [("tutorial", "app.model"), ("nested average", "app.model"), ("average in a model", "state_dict")]
)
def test_a_nested_key_selects_the_trained_weights(tmp_path: Path, kind: str, key: str) -> None:
    run = Trained()
    path = saved(STATES[kind](run), tmp_path / "saved")
    assert same_bits(exported(path, tmp_path / "out.safetensors", key), run.weights)


def test_nested_checkpoints_are_merged(tmp_path: Path) -> None:
    run = Trained()
    first = {name: value.clone() for name, value in run.weights.items()}
    paths = [saved({"app": AppState(run)}, tmp_path / "0")]
    run.model(torch.ones(2, 3)).sum().backward()
    run.optimizer.step()
    paths.append(saved({"app": AppState(run)}, tmp_path / "1"))
    checkpoint.merge(paths, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == first.keys()
    assert torch.allclose(found["2.weight"], (first["2.weight"] + run.weights["2.weight"]) / 2)
    assert not torch.equal(first["2.weight"], run.weights["2.weight"])


FLAT = {"w": torch.ones(2), "layers.0.weight": torch.full((3,), 2.0), "layers.1.weight": torch.full((3,), 3.0)}

OF_OTHERS = {"w": ("w",), "layers.0.weight": ("layers", "a"), "layers.1.weight": ("layers", "b")}


@pytest.mark.parametrize(
    "data", ["as DCP writes it", None, {"w": ["x"], "layers.0.weight": 3}, "another kind", OF_OTHERS], ids=str
)
def test_the_top_level_of_a_flat_checkpoint_has_all_names(tmp_path: Path, data: Any) -> None:
    path = saved(FLAT, tmp_path / "saved")
    if data != "as DCP writes it":
        without_paths(path, data)
    assert same_bits(exported(path, tmp_path / "out.safetensors", ""), FLAT)


def test_the_top_level_has_all_names_of_nested_dicts(tmp_path: Path) -> None:
    layers = {name: value for name, value in FLAT.items() if name != "w"}
    nested = {"layers": {str(i): {"weight": FLAT[f"layers.{i}.weight"]} for i in range(2)}}
    path = saved(nested, tmp_path / "saved")
    assert entries_of(path) == ["layers.0", "layers.1"]
    assert same_bits(exported(path, tmp_path / "out.safetensors", ""), layers)


def test_roots_of_virtual_stages_are_keys_and_the_top_level_takes_them_all(tmp_path: Path) -> None:
    stages = {f"model{i}": {f"layers.{i}.weight": torch.full((2,), float(i))} for i in range(2)}
    path = saved(stages, tmp_path / "saved")
    assert entries_of(path) == ["model0", "model1"]
    assert same_bits(exported(path, tmp_path / "one.safetensors", "model1"), stages["model1"])
    both = {f"{root}.{name}": value for root, state in stages.items() for name, value in state.items()}
    assert same_bits(exported(path, tmp_path / "all.safetensors", ""), both)
    with pytest.raises(ValueError, match=r'got key=None for .*; pass one of model0, model1, ""$'):
        checkpoint.export(path, tmp_path / "none")


@pytest.mark.parametrize("inside", ["optimizer", "swa"])
def test_the_top_level_does_not_take_an_optimizer_or_an_average(tmp_path: Path, inside: str) -> None:
    run = Trained()
    other = {"optimizer": run.optimizer.state_dict()} if inside == "optimizer" else {"swa": run.average}
    path = saved({"model0": {"a": torch.ones(1)}, "model1": {"b": torch.ones(1)}, **other}, tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"got key='' for .*, which has .*{inside}.* inside; pass one of"):
        checkpoint.export(path, tmp_path / "out", key="")


def test_a_prefix_takes_all_dicts_below_it(tmp_path: Path) -> None:
    state = {"app": {"encoder": {"w": torch.ones(1)}, "decoder": {"w": torch.zeros(1)}}, "step": torch.tensor(3)}
    path = saved(state, tmp_path / "saved")
    assert entries_of(path) == ["", "app.decoder", "app.encoder"]
    expected = {"encoder.w": torch.ones(1), "decoder.w": torch.zeros(1)}
    assert same_bits(exported(path, tmp_path / "out.safetensors", "app"), expected)


def test_a_list_of_tensors_in_an_entry_belongs_to_it(tmp_path: Path) -> None:
    path = saved({"m": {"w": torch.ones(1), "more": [torch.zeros(1), torch.ones(2)]}}, tmp_path / "saved")
    expected = {"w": torch.ones(1), "more.0": torch.zeros(1), "more.1": torch.ones(2)}
    assert same_bits(exported(path, tmp_path / "out.safetensors"), expected)


def test_several_averages_that_are_nested_have_keys_of_their_own(tmp_path: Path) -> None:
    run = Trained()
    averages = ShardedAverage(run.model, {"mean": Equal(), "same": Equal()})
    averages.update()
    path = saved({"app": {"model": run.weights, "swa": averages.state_dict()}}, tmp_path / "saved")
    assert entries_of(path) == ["app.swa.mean", "app.swa.same", "app.model"]
    found = exported(path, tmp_path / "out.safetensors", "app.swa.mean")
    assert same_bits(found, averages.full_state_dict("mean"))


def test_an_average_that_is_the_whole_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    average = ShardedAverage(model)
    average.update()
    path = saved(average.state_dict(), tmp_path / "saved")
    assert entries_of(path) == [""]
    assert same_bits(exported(path, tmp_path / "out.safetensors"), average.full_state_dict())


# Where the file does not say where dots come from


@pytest.mark.parametrize("data", [None, "another kind"], ids=str)
def test_names_that_all_begin_alike_may_be_in_an_entry_or_not_so_the_key_is_asked_for(
    tmp_path: Path, data: Any
) -> None:
    inside = {"embed_tokens.weight": torch.ones(2), "layers.0.weight": torch.zeros(3)}
    whole = {f"model.{name}": value for name, value in inside.items()}  # as a Llama with a tied head
    path = without_paths(saved(whole, tmp_path / "saved"), data)
    with pytest.raises(ValueError, match=r'got key=None for .*saved; pass one of model, ""$'):
        checkpoint.export(path, tmp_path / "none")
    assert same_bits(exported(path, tmp_path / "out.safetensors", ""), whole)
    assert same_bits(exported(path, tmp_path / "inside.safetensors", "model"), inside)


PARTS: dict[str, dict[str, Tensor]] = {
    "Megatron": {name: torch.ones(2) for name in ("decoder.0.w", "embedding.w", "output_layer.w")},
    "virtual stages": {"model0.decoder.w": torch.ones(1), "model1.decoder.w": torch.zeros(2)},
    "one root": {"model.w": torch.ones(1)},
}
OTHERS: dict[str, Callable[[Trained], dict[str, Any]]] = {
    "optimizer": lambda run: {"optimizer": run.optimizer.state_dict()},
    "chained optimizers": lambda run: {f"chained_{i}": {"optimizer": run.optimizer.state_dict()} for i in range(2)},
    "average": lambda run: {"swa": run.average},
}


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.filterwarnings("ignore:.* tensors only; not written")
def test_the_top_level_is_all_that_is_not_in_an_optimizer_or_an_average(
    tmp_path: Path, parts: str, others: str
) -> None:
    path = without_paths(saved({**PARTS[parts], **OTHERS[others](Trained())}, tmp_path / "saved"))
    assert same_bits(exported(path, tmp_path / "out.safetensors", ""), PARTS[parts])
    checkpoint.merge([path, path], tmp_path / "merged.safetensors", key="")
    assert same_bits(load_file(tmp_path / "merged.safetensors"), PARTS[parts])


def test_the_top_level_is_named_where_several_entries_are_in_it(tmp_path: Path) -> None:
    state = {**PARTS["Megatron"], **OTHERS["optimizer"](Trained())}
    path = without_paths(saved(state, tmp_path / "saved"))
    with pytest.raises(
        ValueError, match=r'got key=None for .*saved; pass one of decoder, embedding, output_layer, ""$'
    ):
        checkpoint.export(path, tmp_path / "none")
