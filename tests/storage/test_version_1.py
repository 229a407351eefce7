"""Checkpoints of format version 1, written on 1 rank (plain) and on 2 ranks (FSDP2), load and continue."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dist_swa import EMA, SWA, Equal, checkpoint
from models import build, trajectory, wrap, write
from ranks import on_ranks
from reference import closed_form, weighted_sum

DATA = Path(__file__).parent / "data"
SAVED = sorted(path.name for path in DATA.iterdir())
RULES = {"mean": Equal(), "ema": EMA(decay=0.75)}
NUM_SAVED = 4  # models 2 to 5 of the trajectory were averaged
LOADS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "checkpoint": checkpoint.load,
    "dcp": lambda state, path: dcp_load(state, checkpoint_id=path),
}


def new_run(wrapper: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, SWA]:
    """Build the run that wrote the checkpoints, before its first step."""
    model = wrap(build(), wrapper)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule: dict[str, Any] = {"swa_start": "2ba", "swa_end": None, "update_interval": "1ba"}
    phase: dict[str, Any] = {"schedule_swa_lr": True, "swa_lr": 0.25, "anneal_steps": 4}
    return model, optimizer, SWA(model, optimizer, rule=RULES, transfer="mean", buffers="average", **schedule, **phase)


def check_averages(swa: SWA, num_averaged: int) -> None:
    """Compare both averages with their closed form; buffers have the values that they had in the model."""
    models = trajectory(num_averaged + 1, build())[1:]
    for name, rule in RULES.items():
        expected = weighted_sum(closed_form(rule, num_averaged), models)
        expected |= {name: buffer.double() for name, buffer in build().named_buffers()}
        if full := swa.average.full_state_dict(name):  # {} on the ranks after the first of a sharded model
            averaged = {key: value.double() for key, value in full.items() if key in expected}
            assert expected.keys() - {"cache"} <= averaged.keys()  # "cache" is not persistent
            torch.testing.assert_close(averaged, {key: expected[key] for key in averaged}, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("wrapper", ["plain", "fsdp2", "ddp"])
@pytest.mark.parametrize("saved", SAVED)
@on_ranks(1, 2, 3)
def test_a_version_1_checkpoint_continues_under_any_wrapper(saved: str, wrapper: str, load: str) -> None:
    model, optimizer, swa = new_run(wrapper)
    LOADS[load]({"swa": swa}, DATA / saved)
    assert (swa.num_averaged, swa.schedule.now.batches, swa.completed) == (NUM_SAVED, 5, False)
    assert swa.state_dict()["schedule"]["start_lrs"].tolist() == [0.5]
    check_averages(swa, NUM_SAVED)
    write(model, trajectory(6, build())[5])
    assert swa.step()
    assert (swa.num_averaged, swa.schedule.now.batches) == (NUM_SAVED + 1, 6)
    assert optimizer.param_groups[0]["lr"] == 0.25  # the phase ended after 4 updates
    check_averages(swa, NUM_SAVED + 1)


@pytest.mark.parametrize("saved", SAVED)
def test_a_version_1_checkpoint_is_exported_once_it_has_the_frozen_parameters(tmp_path: Path, saved: str) -> None:
    with pytest.raises(ValueError, match=r"needs the 1 parameters that are not averaged .* got 0 of them"):
        checkpoint.export(DATA / saved, tmp_path / "out", key="swa.mean")
    reader, model = checkpoint.open_checkpoint(DATA / saved), build().state_dict()
    checkpoint.save({"model": model} | {key: reader.read(key) for key in reader.keys}, tmp_path / "with model")
    checkpoint.export(tmp_path / "with model", tmp_path / "mean.safetensors", key="swa.mean")
    exported = load_file(tmp_path / "mean.safetensors")
    assert exported.keys() == model.keys()
    expected = weighted_sum(closed_form(Equal(), NUM_SAVED), trajectory(5, build())[1:])
    for name, value in expected.items():
        torch.testing.assert_close(exported[name].double(), value, rtol=1e-6, atol=1e-6)
    assert torch.equal(exported["frozen"], build().frozen)


@pytest.mark.parametrize("saved", SAVED)
def test_a_version_1_checkpoint_passes_its_checksums(saved: str) -> None:
    reader = checkpoint.open_checkpoint(DATA / saved)
    assert reader.has_checksums
    reader.verify()
