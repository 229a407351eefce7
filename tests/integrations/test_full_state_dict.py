"""The state of an `SWA` with full tensors: saved on the first rank, loaded by any wrapper on any number of ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def linear(*buffers: str) -> nn.Module:
    model = nn.Linear(2, 2)
    for name in buffers:
        model.register_buffer(name, torch.full((3,), 5.0))
    return model


@pytest.mark.parametrize(("before", "after"), [((), ("new",)), (("more",), ()), (("more", "kept"), ("kept", "new"))])
@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp2"])
@on_ranks(2)
def test_copied_buffers_may_come_and_go(wrapper: str, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    first, second = (SWA(wrap(linear(*names), wrapper), swa_start="0ba") for names in (before, after))
    first.step()
    state: list[Any] = [full_state_dict(first)]
    dist.broadcast_object_list(state)
    for buffer in second.average._shards.buffers:
        buffer.local_tensor.fill_(9)
    load_full_state_dict(second, state[0])
    found, expected = second.average.full_state_dict(), first.average.full_state_dict()
    assert set(found) == {"weight", "bias", *after} or dist.get_rank() > 0
    for name, value in found.items():
        assert torch.equal(value, expected[name]) if name in expected else value.eq(9).all()


@pytest.mark.parametrize(("before", "after"), [((), ("new",)), (("more",), ())])
def test_averaged_buffers_may_not_come_or_go(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    first, second = (SWA(linear(*names), swa_start="0ba", buffers="average") for names in (before, after))
    first.step()
    with pytest.raises(ValueError, match=f"load_state_dict needs {(before + after)[0]} of shape"):
        load_full_state_dict(second, full_state_dict(first))
    assert second.num_averaged == 0
