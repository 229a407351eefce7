"""Whatever ends a pass, everything but the statistics is restored, and no rank hangs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from batch_norm_models import (
    HANG_S,
    SHARDED,
    WRAPPERS,
    LoaderError,
    batches_of,
    build,
    drawing,
    in_every_wrapper,
    layers_of,
    local,
    mixed_model,
    random,
    statistics,
    unwrapped,
    weights,
    wrap,
)
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks, run_on_ranks


def has_fsdp1(module: nn.Module) -> bool:
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def preserved_state(model: nn.Module) -> dict[str, Any]:
    """Return everything that a pass must restore."""
    module = unwrapped(model)
    return {
        "modes": [part.training for part in model.modules()],
        "momenta": [layer.momentum for layer in layers_of(model).values()],
        "hooks": [len(hooks) for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)],
        "random state": torch.get_rng_state().tolist(),
        "parameters": [(id(p), type(p), p.requires_grad) for p in module.parameters()],
        "weights": weights(module),
        "gradients": [p.grad if p.grad is None else local(p.grad).tolist() for p in module.parameters()],
        # FSDP1 creates new views of its gradients.
        "gradient objects": [id(p.grad) for p in module.parameters() if not has_fsdp1(module)],
        "buffers": [(name, id(buffer), buffer.data_ptr()) for name, buffer in module.named_buffers()],
        "frozen statistics": [buffer.tolist() for buffer in layers_of(model)["5"].buffers()],
        "gradient mode": torch.is_grad_enabled(),
    }


# The ways out of a pass


class ForwardError(Exception):
    pass


def fail_for_pairs(module: nn.Module, batch: Tensor) -> None:
    torch.rand(3)
    module(batch)
    if len(batch) == 2:
        raise ForwardError


def forward_of_field(module: nn.Module, batch: Any) -> None:
    module(batch.given)


def raising_skip(name: str) -> bool:
    raise LoaderError


class WithoutLength:
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        raise TypeError


class Broken:
    def __iter__(self) -> Iterator[Tensor]:
        raise LoaderError


class Shrinking(WithoutLength):
    """Has one batch less in every pass, like a loader that continues where the last iteration stopped."""

    def __iter__(self) -> Iterator[Tensor]:
        self.batches = self.batches[1:]
        return iter(self.batches)


class Unpicklable:
    def __init__(self, given: Tensor) -> None:
        self.given, self.function = given, lambda: None


class Exit(NamedTuple):
    """The batches of the last rank and of the others, options of each, and the expected errors of each."""

    last: Callable[[], Any]
    options: dict[str, Any]
    error: type[Exception] | None = None
    others: Callable[[], Any] | None = None  # None: as the last rank
    other_options: dict[str, Any] | None = None
    other_error: type[Exception] | None = None

    def of(self, is_last: bool) -> tuple[Any, dict[str, Any], type[Exception] | None]:
        if is_last:
            return self.last(), self.options, self.error
        options = self.options if self.other_options is None else self.other_options
        return (self.others or self.last)(), options, self.other_error


def good() -> list[Tensor]:
    return [random(6, 3, seed=dist.get_rank() + i) for i in range(3)]


def failing(at: int | None) -> Iterator[Tensor]:
    return drawing(good(), fail_at=at)


def everywhere(batches: Callable[[], Any], error: type[Exception] | None, **options: Any) -> Exit:
    return Exit(batches, options, error, other_error=error)


def on_last(
    batches: Callable[[], Any], error: type[Exception], others: Callable[[], Any] = good, **options: Any
) -> Exit:
    return Exit(batches, options, error, others, other_error=RuntimeError)


FAIL_FOR_PAIRS: dict[str, Any] = {"forward": fail_for_pairs}
LAYERWISE: dict[str, Any] = {"layerwise": True}
EXITS = {
    "success": everywhere(lambda: drawing(good()), None, **FAIL_FOR_PAIRS),
    "exact": everywhere(good, None, exact=True),
    "layerwise": everywhere(good, None, **LAYERWISE),
    "max_batches": everywhere(lambda: failing(2), None, max_batches=2),
    "no length": everywhere(lambda: WithoutLength(good()), None),
    "no batches": everywhere(list, ValueError),
    "a wrong batch": everywhere(lambda: ["text"], TypeError),
    "a wrong batch on one rank": on_last(lambda: [*good(), "text"], TypeError),
    "not iterable": everywhere(lambda: 7, TypeError),
    "not iterable on one rank": on_last(lambda: 7, TypeError),
    "forward": everywhere(lambda: [good()[0], good()[1][:2], good()[2]], ForwardError, **FAIL_FOR_PAIRS),
    "BatchNorm, between gathers": everywhere(lambda: [good()[0], random(6, 4), good()[2]], RuntimeError),
    "iter": everywhere(Broken, LoaderError),
    "iter on one rank": on_last(Broken, LoaderError),
    "an argument on one rank": Exit(good, {"max_batches": 0}, ValueError, None, {"max_batches": 3}, RuntimeError),
    "skip on one rank": Exit(good, {"skip": raising_skip}, LoaderError, None, {}, RuntimeError),
    "layerwise, a generator": everywhere(lambda: drawing(good()), TypeError, **LAYERWISE),
    "layerwise, a generator on one rank": on_last(lambda: drawing(good()), TypeError, **LAYERWISE),
    "layerwise, shrinking": everywhere(lambda: Shrinking(good() * 2), ValueError, **LAYERWISE),
    "layerwise, shrinking on one rank": on_last(lambda: Shrinking(good() * 2), ValueError, **LAYERWISE),
    **{f"loader at {i}": everywhere(functools.partial(failing, i), LoaderError) for i in range(3)},
    **{f"loader at {i} on one rank": on_last(functools.partial(failing, i), LoaderError) for i in range(3)},
    "loader, long after the others": on_last(lambda: drawing(good() * 3, fail_at=7), LoaderError, lambda: good()[:1]),
}
EXITS_OF_SEVERAL_RANKS = {
    "fewer batches on one rank": Exit(lambda: good()[:2], {}, others=good),
    "no batches on one rank": Exit(list, {}, others=good),
    "other layers on one rank": Exit(good, {"skip": "2"}, ValueError, None, {}, ValueError),
    "layerwise on one rank": Exit(good, LAYERWISE, ValueError, None, {}, ValueError),
}
FORWARD_ON_ONE_RANK = on_last(lambda: [good()[0], good()[1][:2], good()[2]], ForwardError, **FAIL_FOR_PAIRS)
UNPICKLABLE = Exit(list, {"forward": forward_of_field}, ValueError, lambda: [Unpicklable(good()[0])], None, ValueError)


def check_exit(exit: Exit, wrapper: str) -> None:
    torch.manual_seed(dist.get_rank())
    model = wrap(mixed_model(), wrapper)
    model(random(6, 3)).square().sum().backward()
    batches, options, expected = exit.of(is_last=dist.get_rank() == dist.get_world_size() - 1)
    before, statistics_before, error = preserved_state(model), statistics(model), None
    try:
        recalibrate_batch_norm(model, batches, **options)
    except Exception as raised:
        error = raised
    assert (error and type(error)) is expected, error
    after = preserved_state(model)
    assert {key: (before[key], after[key]) for key in before if after[key] != before[key]} == {}
    assert (statistics(model) == statistics_before) == (expected is not None)
    dist.barrier()  # no collective is pending


@in_every_wrapper
@pytest.mark.parametrize("name", EXITS)
@on_ranks(1, 2, 3, timeout_s=HANG_S)
def test_every_exit_restores_all_but_the_statistics(name: str, wrapper: str) -> None:
    check_exit(EXITS[name], wrapper)


@in_every_wrapper
@pytest.mark.parametrize("name", EXITS_OF_SEVERAL_RANKS)
@on_ranks(2, 3, timeout_s=HANG_S)
def test_exits_of_ranks_with_different_arguments(name: str, wrapper: str) -> None:
    check_exit(EXITS_OF_SEVERAL_RANKS[name], wrapper)


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in SHARDED])
@on_ranks(1, 2, 3, timeout_s=HANG_S)
def test_a_local_forward_that_fails_on_one_rank_raises_on_all(wrapper: str) -> None:
    check_exit(FORWARD_ON_ONE_RANK, wrapper)


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name in SHARDED])
@on_ranks(2, 3, timeout_s=HANG_S)
def test_a_batch_that_cannot_be_sent_raises_on_all_ranks(wrapper: str) -> None:
    check_exit(UNPICKLABLE, wrapper)


def fail_in_forward_on_rank_1() -> None:
    def forward(module: nn.Module, batch: Tensor) -> None:
        if dist.get_rank() == 1:
            raise ForwardError
        module(batch)

    recalibrate_batch_norm(wrap(build(), "fsdp2"), batches_of(2), forward=forward)


def test_a_sharded_forward_that_fails_on_one_rank_raises_there_at_once() -> None:
    """The other ranks wait in a collective of the forward until the failed rank ends the job."""
    with pytest.raises(AssertionError, match=r"^rank 1 of 2 failed:\n(.*\n)+.*ForwardError"):
        run_on_ranks(fail_in_forward_on_rank_1, 2, timeout_s=8.0)
