"""An average in a checkpoint of one file: saved by the first rank, for any number of ranks and any wrapper."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_swa import SWA, Window
from dist_swa.integrations.full_state_dict import full_state_dict, load_full_state_dict
from models import WRAPPERS, build, group_of, same_bits, trajectory, wrap, write
from ranks import run_on_ranks


def build_swa(wrapper: str) -> tuple[Any, SWA]:
    model = wrap(build(), wrapper)
    options: dict[str, Any] = {"swa_start": "0ba", "swa_end": None, "update_interval": "1ba"}
    return model, SWA(model, rule=Window(2), process_group=group_of(wrapper), **options)


def save(wrapper: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model, swa = build_swa(wrapper)
    for values in trajectory(3, build()):
        write(model, values)
        swa.step()
    return full_state_dict(swa), swa.average.full_state_dict()


def load(wrapper: str, saved: dict[str, Any]) -> dict[str, Tensor]:
    _, swa = build_swa(wrapper)
    load_full_state_dict(swa, saved)
    return swa.average.full_state_dict()


def save_all(wrappers: list[str]) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    return [save(wrapper) for wrapper in wrappers]


def load_all(wrappers: list[str], saved: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [load(*one) for one in zip(wrappers, saved, strict=True)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_wrapper_takes_what_another_has_saved(ranks: int) -> None:
    saving = [name for name in WRAPPERS if name != "plain"]
    loading = [*saving[1:], saving[0]]
    first, *others = run_on_ranks(save_all, 4, saving)
    assert all(state == {} for rank in others for state, _ in rank)
    (averages, *_) = run_on_ranks(load_all, ranks, loading, [state for state, _ in first])
    for wrapper, (_, before), after in zip(saving, first, averages, strict=True):
        assert before.keys() == after.keys()
        assert same_bits(before, after), wrapper


def test_the_state_is_a_copy() -> None:
    model = build()
    swa = SWA(model, swa_start="0ba", swa_end=None, update_interval="1ba")
    swa.step()
    before = swa.average.full_state_dict()
    saved = full_state_dict(swa)
    with torch.no_grad():
        for tensor in (one for one in model.parameters() if one.requires_grad):
            tensor.add_(1)
    swa.step()
    assert not same_bits(swa.average.full_state_dict(), before)
    load_full_state_dict(swa, saved)
    assert same_bits(swa.average.full_state_dict(), before)
