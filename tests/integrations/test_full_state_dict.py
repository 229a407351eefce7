"""The state of an `SWA` with full tensors: saved on the first rank, loaded by any wrapper on any number of ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_swa import SWA, Window
from dist_swa.integrations.full_state_dict import full_state_dict, load_full_state_dict
from models import WRAPPERS, build, group_of, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks

Saved = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]  # wrapper: full_state_dict, the average
DISTRIBUTED = [name for name in WRAPPERS if name != "plain"]
LOADED_FROM = dict(zip(DISTRIBUTED, DISTRIBUTED[1:] + DISTRIBUTED[:1], strict=True))


def build_swa(wrapper: str) -> tuple[Any, SWA]:
    model = wrap(build(), wrapper)
    return model, SWA(model, rule=Window(2), process_group=group_of(wrapper), swa_start="0ba")


def save_all() -> Saved:
    saved: Saved = {}
    for wrapper in DISTRIBUTED:
        model, swa = build_swa(wrapper)
        for values in trajectory(3, build()):
            write(model, values)
            swa.step()
        saved[wrapper] = full_state_dict(swa), swa.average.full_state_dict()
    return saved


@pytest.fixture(scope="module")
def saved_on_four_ranks() -> Saved:
    first, *others = run_on_ranks(save_all, 4)
    assert all(state == {} for saved in others for state, _ in saved.values())
    return first  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrapper", DISTRIBUTED)
@on_ranks(2, 3)
def test_every_wrapper_loads_what_another_saved(saved_on_four_ranks: Saved, wrapper: str) -> None:
    state, expected = saved_on_four_ranks[LOADED_FROM[wrapper]]
    _, swa = build_swa(wrapper)
    load_full_state_dict(swa, state)
    average = swa.average.full_state_dict()
    assert dist.get_rank() > 0 or same_bits(average, expected)


def test_the_state_is_a_copy() -> None:
    model = build()
    swa = SWA(model, swa_start="0ba")
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
