"""All but the statistics stays as it was, whatever becomes of a pass, and no rank waits for one that does not come."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from batch_norm_oracle import (
    HANG_S,
    SHARDED,
    WRAPPERS,
    LoaderError,
    batches_of,
    build,
    drawing,
    has_statistics_of,
    local,
    norms,
    random,
    statistics,
    unwrapped,
    weights,
    wrap,
)
from dist_swa import recalibrate_batch_norm
from ranks import on_ranks, run_on_ranks


class StaysInEvaluation(nn.Linear):
    def train(self, mode: bool = True) -> "StaysInEvaluation":
        return super().train(False)


def mixed_model() -> nn.Sequential:
    """Return a model in training mode with parts that are not, other momenta, and a hook of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.BatchNorm1d(3, momentum=0.3),
            *(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None), nn.Dropout(0.5)),
            *(StaysInEvaluation(5, 5), nn.BatchNorm1d(5)),
            *(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)),
        )
    model.train()[5].eval()
    model[2].register_forward_hook(lambda *_: None)
    return model


def has_fsdp1(module: nn.Module) -> bool:
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def photograph(model: nn.Module) -> dict[str, Any]:
    """Return what has to stay whatever becomes of the pass."""
    module = unwrapped(model)
    return {
        "modes": [part.training for part in model.modules()],
        "momenta": [layer.momentum for layer in norms(model).values()],
        "hooks": [len(hooks) for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)],
        "random state": torch.get_rng_state().tolist(),
        "parameters": [(id(p), type(p), p.requires_grad) for p in module.parameters()],
        "weights": weights(module),
        # FSDP1 makes its views of gradients anew.
        "gradients": [p.grad if p.grad is None else local(p.grad).tolist() for p in module.parameters()],
        "gradient objects": [id(p.grad) for p in module.parameters() if not has_fsdp1(module)],
        "buffers": [(name, id(buffer), buffer.data_ptr()) for name, buffer in module.named_buffers()],
        "frozen statistics": [buffer.tolist() for buffer in norms(model)["5"].buffers()],
        "gradient mode": torch.is_grad_enabled(),
    }


class ForwardError(Exception):
    pass


def forward_but_pairs(module: nn.Module, batch: Tensor) -> None:
    torch.rand(3)
    module(batch)
    if len(batch) == 2:
        raise ForwardError


def forward_of_field(module: nn.Module, batch: Any) -> None:
    module(batch.given)


def raising_skip(name: str) -> bool:
    raise LoaderError


class Unmeasured:
    """Batches whose number nobody knows, and which are not to be asked for it."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        raise TypeError


class Broken:
    def __iter__(self) -> Iterator[Tensor]:
        raise LoaderError


class Shrinking(Unmeasured):
    """Batches that are fewer in every pass, as where an iteration reads on from where the last one stopped."""

    def __iter__(self) -> Iterator[Tensor]:
        self.batches = self.batches[1:]
        return iter(self.batches)


class Unpicklable:
    def __init__(self, given: Tensor) -> None:
        self.given, self.function = given, lambda: None


Exit = tuple[Any, dict[str, Any], type[Exception] | None, type[Exception] | None]


def exits(wrapper: str) -> dict[str, Exit]:
    """Return, per way out of a pass: batches, options, what the last rank raises, and what the others raise."""
    last = dist.get_rank() == dist.get_world_size() - 1
    good = [random(6, 3, seed=dist.get_rank() + i) for i in range(3)]
    pair, wide = [good[0], good[1][:2], good[2]], [good[0], random(6, 4), good[2]]
    forward = {"forward": forward_but_pairs}
    found: dict[str, Exit] = {
        "success": (drawing(good), forward, None, None),
        "max_batches": (drawing(good, fail_at=2), {"max_batches": 2}, None, None),
        "no batches": ([], {}, ValueError, ValueError),
        "another kind": (["text"], {}, TypeError, TypeError),
        "not iterable": (7, {}, TypeError, TypeError),
        "not iterable on one": (7 if last else good, {}, TypeError, RuntimeError),
        "forward": (pair, forward, ForwardError, ForwardError),
        "BatchNorm": (wide, {}, RuntimeError, RuntimeError),  # between gathers
        "no length": (Unmeasured(good), {}, None, None),
        "iter": (Broken(), {}, LoaderError, LoaderError),
        "iter on one": (Broken() if last else good, {}, LoaderError, RuntimeError),
        "argument on one": (good, {"max_batches": 0 if last else 3}, ValueError, RuntimeError),
        "skip on one": (good, {"skip": raising_skip if last else None}, LoaderError, RuntimeError),
        "another kind on one": ([*good, "text"] if last else good, {}, TypeError, RuntimeError),
        "generator layer by layer": (drawing(good), {"layerwise": True}, TypeError, TypeError),
        "generator layer by layer on one": (
            drawing(good) if last else good,
            {"layerwise": True},
            TypeError,
            RuntimeError,
        ),
        "layer by layer": (good, {"layerwise": True}, None, None),
        "shrinking layer by layer": (Shrinking(good * 2), {"layerwise": True}, ValueError, ValueError),
        "shrinking layer by layer on one": (
            Shrinking(good * 2) if last else good,
            {"layerwise": True},
            ValueError,
            RuntimeError,
        ),
        "exact": (good, {"exact": True}, None, None),
    }
    for i in range(3):
        found[f"loader at {i}"] = (drawing(good, fail_at=i), {}, LoaderError, LoaderError)
        found[f"loader at {i} on one"] = (drawing(good, fail_at=i if last else None), {}, LoaderError, RuntimeError)
    long = drawing(good * 3, fail_at=7)
    found["loader, long after the others"] = (long if last else good[:1], {}, LoaderError, RuntimeError)
    if wrapper not in SHARDED:
        found["forward on one"] = (pair if last else good, forward, ForwardError, RuntimeError)
    elif dist.get_world_size() > 1:
        unsendable = [] if last else [Unpicklable(good[0])]
        found["not to be sent"] = (unsendable, {"forward": forward_of_field}, ValueError, ValueError)
    if dist.get_world_size() > 1:
        other = ValueError, ValueError
        found["another number"] = (good[: 2 if last else 3], {}, None, None)
        found["none on one"] = ([] if last else good, {}, None, None)
        found["other layers"] = (good, {"skip": "2" if last else None}, *other)
        found["layer by layer on one alone"] = (good, {"layerwise": last}, *other)
    return found


@on_ranks(1, 2, 3, timeout_s=HANG_S)
def test_every_exit_gives_back_all_but_the_statistics() -> None:
    is_last = dist.get_rank() == dist.get_world_size() - 1
    for wrapper in WRAPPERS:
        torch.manual_seed(dist.get_rank())
        model = wrap(mixed_model(), wrapper)
        model(random(6, 3)).square().sum().backward()
        for name, (batches, options, on_last, on_others) in exits(wrapper).items():
            case, expected, error = f"{wrapper}: {name}", on_last if is_last else on_others, None
            before, statistics_before = photograph(model), statistics(model)
            try:
                recalibrate_batch_norm(model, batches, **options)
            except Exception as raised:
                error = raised
            assert (error and type(error)) is expected, (case, error)
            after = photograph(model)
            changed = {key: (before[key], after[key]) for key in before if after[key] != before[key]}
            assert not changed, (case, changed)
            assert (statistics(model) == statistics_before) == (expected is not None), case
            dist.barrier()  # no collective is left over


def fail_in_forward_on_rank_1() -> None:
    def forward(module: nn.Module, batch: Tensor) -> None:
        if dist.get_rank() == 1:
            raise ForwardError
        module(batch)

    recalibrate_batch_norm(wrap(build(), "fsdp2"), batches_of(2), forward=forward)


def test_a_sharded_forward_that_fails_on_one_rank_says_so_there_at_once() -> None:
    """The others stand in a gather of the forward, which nobody can leave; the failed rank has to end the job."""
    with pytest.raises(AssertionError, match=r"^rank 1 of 2 failed:\n(.*\n)+.*ForwardError"):
        run_on_ranks(fail_in_forward_on_rank_1, 2, timeout_s=8.0)


def train(wrapper: str, look: Callable[[nn.Module], None]) -> tuple[list[Any], list[float]]:
    """Return weights and losses of a training that looks at the model after every step."""
    torch.manual_seed(0)
    model, losses = wrap(mixed_model(), wrapper), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(random(6, 3, seed=step)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        look(model)
    return weights(model), losses


def recalibrate_and_fail(model: nn.Module) -> None:
    recalibrate_batch_norm(model, drawing(batches_of(2)))
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        recalibrate_batch_norm(model, drawing([*batches_of(2), random(6, 4)]))
    recalibrate_batch_norm(model, batches_of(2), layerwise=True)
    with pytest.raises(LoaderError):
        recalibrate_batch_norm(model, drawing(batches_of(3), fail_at=1))


@on_ranks(1, 2)
def test_training_goes_on_bit_for_bit() -> None:
    for wrapper in WRAPPERS:
        assert train(wrapper, recalibrate_and_fail) == train(wrapper, lambda model: None), wrapper


@on_ranks(1, 2)
def test_weights_written_to_shards_after_an_evaluation_count() -> None:
    """After a forward without a backward FSDP2's root stays unsharded; these weights are stale."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5))
    fully_shard(model)
    shards = list(model.parameters())
    with torch.no_grad():
        model.eval()(random(4, 3))
        for shard in shards:
            local(shard).fill_(0.5)
    recalibrate_batch_norm(model, [random(4, 3)])
    assert torch.allclose(norms(model)["2"].running_mean, torch.tensor(0.5 + 3 * 0.5 * 0.5))


def test_a_shuffling_data_loader_leaves_the_random_state() -> None:
    loader = DataLoader(TensorDataset(random(24, 3)), batch_size=8, shuffle=True)
    model, before = nn.Sequential(nn.BatchNorm1d(3)), torch.get_rng_state()
    recalibrate_batch_norm(model, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert has_statistics_of(model[0], [random(24, 3)])
