"""The statistics are those of all samples on all ranks, all else stays as it was, and no rank is left waiting."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dist_swa import SWA, ShardedAverage, recalibrate_batch_norm
from ranks import on_ranks, run_on_ranks

WRAPPERS = ("plain", "ddp", "fsdp2")
ULP = 2**-23  # of float32, relative
HANG_S = 20.0


def build() -> nn.Sequential:
    """Return a model with BatchNorm first and deeper, the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp2":
        for child in model.children():
            if isinstance(child, nn.Linear):
                fully_shard(child)
        fully_shard(model)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def norms(model: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in unwrapped(model).named_modules() if isinstance(part, _BatchNorm)}


def statistics(model: nn.Module) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in unwrapped(model).named_buffers()}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> list[list[float]]:
    return [local(parameter.detach()).tolist() for parameter in model.parameters()]


def scale(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).mul_(factor)
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches_of(num_batches: int, seed: int = 0) -> list[Tensor]:
    """Return batches of different sizes, means and scales."""
    return [random(4 + 3 * i % 7, 3, seed=seed + i) * (1 + i % 3) + i for i in range(num_batches)]


def dealt(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return this rank's batches."""
    return batches[dist.get_rank() :: dist.get_world_size()]


# The oracle


def rows(batches: Iterable[Tensor]) -> Tensor:
    """Return samples and positions as float64 rows of channels."""
    return torch.cat([batch.double().movedim(1, -1).flatten(0, -2) for batch in batches])


def two_pass(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance in float64."""
    samples = rows(batches)
    mean = samples.mean(0)
    return mean, (samples - mean).square().sum(0) / (len(samples) - 1)


def is_exact(mean: Tensor, variance: Tensor, batches: Sequence[Tensor]) -> bool:
    """Whether statistics are right up to what rounding the moments of every batch to float32 allows."""
    true_mean, true_variance = two_pass(batches)
    largest = rows(batches).abs().amax(0)
    allowed = ULP * (true_variance + true_variance.sqrt() * largest) + (ULP * largest).square()
    return bool(
        ((mean - true_mean).abs() <= ULP * largest).all()
        and ((variance - true_variance).abs() <= allowed).all()
        and (variance >= 0).all()
    )


def has_statistics_of(layer: Any, batches: Sequence[Tensor]) -> bool:
    return is_exact(layer.running_mean, layer.running_var, batches)


def assert_all_statistics(model: nn.Module, like: nn.Module, batches: Iterable[Tensor]) -> None:
    """Every layer has the statistics of a float64 pass through `like`: BatchNorm trains, all else evaluates."""
    given: dict[str, list[Tensor]] = {name: [] for name in norms(like)}
    like = copy.deepcopy(like).double().eval()
    for name, layer in norms(like).items():
        layer.train().register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            like(batch.double())
    for name, inputs in given.items():
        layer = norms(model)[name]
        for found, true in zip((layer.running_mean, layer.running_var), two_pass(inputs), strict=True):
            torch.testing.assert_close(found, true.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.num_batches_tracked, torch.tensor(len(inputs))), name


# Statistics of all samples


def cases(num_ranks: int) -> dict[str, list[list[Tensor]]]:
    """Return the batches of every rank; their shape says which BatchNorm they are for."""

    def deal(batch: Callable[[int, int], Tensor], count: Callable[[int], int] = lambda rank: 3) -> list[list[Tensor]]:
        return [[batch(rank, i) for i in range(count(rank))] for rank in range(num_ranks)]

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    generator, last = torch.Generator().manual_seed(0), num_ranks - 1
    return {
        "means 2, 12, 22": deal(lambda rank, i: x(8, 3) + 2 + 10 * rank),
        "scales": deal(lambda rank, i: x(8, 3) * 10.0**rank),
        "batch sizes": deal(lambda rank, i: x(2 + 5 * i + rank, 3) + 5 * i - rank),
        "batch counts": deal(lambda rank, i: x(6, 3) - 3 * rank, lambda rank: 1 + 2 * rank),
        "none on the first": deal(lambda rank, i: x(6, 3) + 4 * i, lambda rank: 4 if rank or not last else 0),
        "all on the last": deal(lambda rank, i: x(6, 3) + 4 * i, lambda rank: 4 if rank == last else 0),
        "N(100, 1e-3)": deal(lambda rank, i: x(40, 3) * 1e-3 + 100),
        "N(-1e4, 1)": deal(lambda rank, i: x(40, 3) - 1e4),
        "constant": deal(lambda rank, i: torch.full((5, 3), 1234.567)),
        "1d": deal(lambda rank, i: x(2, 3, 5 + i) + rank * i),
        "2d": deal(lambda rank, i: x(2, 3, 4, 2 + i) + rank * i),
        "2d, one image": deal(lambda rank, i: x(1, 3, 4, 4) + rank),
        "2d, channels last": deal(lambda rank, i: x(2, 3, 4, 5).to(memory_format=torch.channels_last) + 7 * rank),
        "3d": deal(lambda rank, i: x(2, 3, 2, 3, 2 + i) + rank * i),
    }


@on_ranks(1, 2, 3, 4, timeout_s=HANG_S)
def test_statistics_are_those_of_all_samples_on_all_ranks() -> None:
    for wrapper in WRAPPERS:
        for case, batches in cases(dist.get_world_size()).items():
            if wrapper == "fsdp2" and len({len(mine) for mine in batches}) > 1:
                continue
            everywhere = [batch for mine in batches for batch in mine]
            layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[everywhere[0].ndim](3)
            recalibrate_batch_norm(wrap(nn.Sequential(layer), wrapper), batches[dist.get_rank()])
            assert has_statistics_of(layer, everywhere), (wrapper, case, layer.running_mean, layer.running_var)
            assert layer.num_batches_tracked == len(everywhere), (wrapper, case)


def test_the_oracle_rejects_wrong_formulas() -> None:
    for num_ranks in (2, 3, 4):
        for case, batches in cases(num_ranks).items():
            everywhere = [batch for mine in batches for batch in mine]
            mean, variance = two_pass(everywhere)
            assert is_exact(mean.float(), variance.float(), everywhere), case
            wrong = [rows(everywhere).var(0, correction=0)] if "d" in case[:2] else []
            if case in ("means 2, 12, 22", "batch counts", "scales"):
                wrong.append(torch.stack([two_pass(mine)[1] for mine in batches]).mean(0))
            if case in ("means 2, 12, 22", "batch sizes", "2d"):
                wrong.append(torch.stack([two_pass([batch])[1] for batch in everywhere]).mean(0))
            if case in ("N(100, 1e-3)", "N(-1e4, 1)"):
                samples = rows(everywhere).float()
                wrong.append(samples.square().mean(0) - samples.mean(0).square())
            for other in wrong:
                assert not is_exact(mean, other, everywhere), (num_ranks, case)
            if case == "batch sizes":
                assert not is_exact(torch.stack([batch.mean(0) for batch in everywhere]).mean(0), variance, everywhere)


def buffers_on_rank() -> dict[str, dict[str, Tensor]]:
    models = {wrapper: wrap(build(), wrapper) for wrapper in WRAPPERS}
    for model in models.values():
        recalibrate_batch_norm(model, dealt(batches_of(12)))
    return {wrapper: dict(unwrapped(model).named_buffers()) for wrapper, model in models.items()}


def test_statistics_do_not_depend_on_the_ranks() -> None:
    alone = run_on_ranks(buffers_on_rank, 1)[0]["plain"]
    for num_ranks in (1, 2, 3, 4):
        first, *others = run_on_ranks(buffers_on_rank, num_ranks)
        for wrapper, buffers in first.items():
            assert buffers.keys() == alone.keys()
            for name, found in buffers.items():
                assert all(torch.equal(found, other[wrapper][name]) for other in others), (num_ranks, wrapper, name)
                # Not bits: float64 sums come in another order, and products before a deeper layer may round otherwise.
                rtol, atol = (ULP, 0.0) if name.startswith("0.") else (1e-6, 1e-6)
                torch.testing.assert_close(found, alone[name], rtol=rtol, atol=atol)


class Variety(nn.Module):
    """A layer of every kind, after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.dropout = nn.Dropout(0.5)
        self.not_affine = nn.BatchNorm1d(4, affine=False)
        self.shared = nn.BatchNorm1d(4)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)
        self.untracked: nn.Module = nn.BatchNorm1d(4, track_running_stats=False)
        self.unreached = nn.BatchNorm1d(4)

    def forward(self, given: Tensor) -> Any:
        hidden = self.not_affine(self.dropout(self.linear(given)))
        hidden = self.shared(hidden) + self.shared(3 * hidden + given.mean())
        return self.untracked(self.cumulative(hidden + given.sum(1, keepdim=True)))


@on_ranks(1, 2, 3)
def test_every_layer_of_a_deep_model() -> None:
    batches = batches_of(6)
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        recalibrate_batch_norm(model, dealt(batches))
        assert_all_statistics(model, build(), batches)

        torch.manual_seed(0)
        layers = Variety()
        for buffer in layers.unreached.buffers():
            buffer.fill_(7)
        like, before = copy.deepcopy(layers), statistics(layers.unreached)
        like.untracked, like.unreached = nn.Identity(), None  # type: ignore[assignment]
        with pytest.warns(UserWarning, match="no batch reached keep their statistics: unreached$") as warned:
            recalibrate_batch_norm(wrap(layers, wrapper), dealt(batches))
        assert [warning.filename for warning in warned] == [__file__]
        assert_all_statistics(layers, like, batches)
        assert layers.shared.num_batches_tracked == 12
        assert statistics(layers.unreached) == before
        assert list(layers.untracked.buffers()) == []
        assert layers.cumulative.momentum is None


def test_statistics_that_are_not_finite_are_replaced() -> None:
    model, batches = build(), batches_of(3)
    for buffer in model.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else 9)
    recalibrate_batch_norm(model, batches)
    assert_all_statistics(model, build(), batches)


def test_an_empty_batch_adds_nothing() -> None:
    full, empty = random(8, 3), torch.empty(0, 3)
    for batches in ([full, empty], [empty, full], [full, empty, full + 5]):
        layer = nn.BatchNorm1d(3)
        recalibrate_batch_norm(nn.Sequential(layer), batches)
        assert has_statistics_of(layer, batches), [len(batch) for batch in batches]


def test_frozen_layers_stay_unless_the_whole_model_evaluates() -> None:
    model, batches = build(), batches_of(3)
    model[0].eval()
    before = statistics(model[0])
    recalibrate_batch_norm(model, batches)
    assert statistics(model[0]) == before
    assert model[2].num_batches_tracked == 3
    recalibrate_batch_norm(model.eval(), batches)
    assert_all_statistics(model, build(), batches)
    assert not any(part.training for part in model.modules())


class StaysInTraining(nn.Dropout):
    def train(self, mode: bool = True) -> "StaysInTraining":
        return self


def test_dropout_draws_nothing() -> None:
    for dropout in (nn.Dropout(0.5), StaysInTraining(0.5)):
        for is_training in (True, False):
            model = nn.Sequential(dropout, nn.BatchNorm1d(3)).train(is_training)
            modes = [part.training for part in model.modules()]
            recalibrate_batch_norm(model, batches_of(3))
            assert has_statistics_of(model[1], batches_of(3)), dropout
            assert [part.training for part in model.modules()] == modes


# All else stays, and no rank waits


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
        "gradients": [(id(p.grad), p.grad is not None and local(p.grad).tolist()) for p in module.parameters()],
        "buffers": [(name, id(buffer), buffer.data_ptr()) for name, buffer in module.named_buffers()],
        "frozen statistics": statistics(module.get_submodule("5")),
        "gradient mode": torch.is_grad_enabled(),
    }


class LoaderError(Exception):
    pass


class ForwardError(Exception):
    pass


def drawing(batches: Iterable[Tensor], fail_at: int | None = None) -> Iterator[Tensor]:
    """Yield batches with random draws, as a shuffling loader does; raise instead of batch `fail_at`."""
    for i, batch in enumerate(batches):
        torch.rand(3)
        if i == fail_at:
            raise LoaderError
        yield batch


def forward_but_pairs(module: nn.Module, batch: Tensor) -> None:
    torch.rand(3)
    module(batch)
    if len(batch) == 2:
        raise ForwardError


Exit = tuple[Any, dict[str, Any], type[Exception] | None, type[Exception] | None]


def exits(wrapper: str) -> dict[str, Exit]:
    """Return, per way out of a pass: batches, options, what the last rank raises, and what the others raise."""
    last = dist.get_rank() == dist.get_world_size() - 1
    good = [random(6, 3, seed=dist.get_rank() + i) for i in range(3)]
    pair, single = [good[0], good[1][:2], good[2]], [good[0], good[1][:1], good[2]]
    forward = {"forward": forward_but_pairs}
    found: dict[str, Exit] = {
        "success": (drawing(good), forward, None, None),
        "max_batches": (drawing(good, fail_at=2), {"max_batches": 2}, None, None),
        "no batches": ([], {}, ValueError, ValueError),
        "another kind": (["text"], {}, TypeError, TypeError),
        "not iterable": (7, {}, TypeError, TypeError),
        "not iterable on one": (7 if last else good, {}, TypeError, RuntimeError),
        "forward": (pair, forward, ForwardError, ForwardError),
        "BatchNorm": (single, {}, ValueError, ValueError),  # between FSDP2's gathers
    }
    for i in range(3):
        found[f"loader at {i}"] = (drawing(good, fail_at=i), {}, LoaderError, LoaderError)
        found[f"loader at {i} on one"] = (drawing(good, fail_at=i if last else None), {}, LoaderError, RuntimeError)
    if wrapper != "fsdp2":
        found["forward on one"] = (pair if last else good, forward, ForwardError, RuntimeError)
        found["another kind on one"] = ([*good, "text"] if last else good, {}, TypeError, RuntimeError)
        long = drawing(good * 3, fail_at=7)
        found["loader, long after the others"] = (long if last else good[:1], {}, LoaderError, RuntimeError)
    elif dist.get_world_size() > 1:
        found["another number"] = (good[: 2 if last else 3], {}, ValueError, ValueError)
        found["none on one"] = ([] if last else good, {}, ValueError, ValueError)
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
            assert [key for key in before if after[key] != before[key]] == [], case
            assert (statistics(model) == statistics_before) == (expected is not None), case
            dist.barrier()  # no collective is left over


def error_of_another_kind() -> str:
    model = wrap(build(), "fsdp2")
    with pytest.raises((TypeError, RuntimeError)) as error:
        recalibrate_batch_norm(model, ["text"] if dist.get_rank() else batches_of(3))
    return error.type.__name__


def test_another_kind_of_batch_on_one_rank_of_a_sharded_model_raises_on_all() -> None:
    assert run_on_ranks(error_of_another_kind, 2, timeout_s=8.0) == ["RuntimeError", "TypeError"]


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
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate_batch_norm(model, drawing([*batches_of(2), random(1, 3)]))
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


# Batches


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, given: Tensor, *, shift: float = 0.0) -> Any:
        return self.norm(input=given + shift)


def test_kinds_of_batches() -> None:
    given = batches_of(3)
    kinds: dict[str, tuple[list[Any], Any, float]] = {
        "tensor": (list(given), None, 0.0),
        "tuple": ([(batch, torch.zeros(4)) for batch in given], None, 0.0),
        "list": ([[batch, "label"] for batch in given], None, 0.0),
        "dict": ([{"given": batch, "shift": 5.0} for batch in given], None, 5.0),
        "mixed": ([given[0], (given[1], "label"), {"given": given[2]}], None, 0.0),
        "forward=": ([("label", batch) for batch in given], lambda module, batch: module(batch[1], shift=5.0), 5.0),
    }
    for kind, (batches, forward, shift) in kinds.items():
        for loader in (batches, iter(batches)):
            model = Named()
            recalibrate_batch_norm(model, loader, forward=forward)
            assert has_statistics_of(model.norm, [batch + shift for batch in given]), kind


@pytest.mark.parametrize("batch", ["text", 7, None, (), ("text", torch.ones(2, 3)), [[torch.ones(2, 3)]]])
def test_another_kind_of_batch_is_a_type_error(batch: Any) -> None:
    with pytest.raises(TypeError, match=f"got batch={type(batch).__name__}; pass forward="):
        recalibrate_batch_norm(build(), [batch])


@on_ranks(2, 3)
def test_max_batches_is_per_rank_and_draws_no_more() -> None:
    for wrapper in WRAPPERS:
        model = wrap(nn.Sequential(nn.BatchNorm1d(3)), wrapper)
        loader = iter(batches_of(2 + dist.get_rank(), seed=10 * dist.get_rank()))
        recalibrate_batch_norm(model, loader, max_batches=2)
        everywhere = [batch for rank in range(dist.get_world_size()) for batch in batches_of(2, seed=10 * rank)]
        assert has_statistics_of(norms(model)["0"], everywhere), wrapper
        assert len(list(loader)) == dist.get_rank()
        with pytest.raises(ValueError, match="got max_batches=0;"):
            recalibrate_batch_norm(model, everywhere, max_batches=0)


# Models and groups


def unread() -> Iterator[Tensor]:
    pytest.fail("the loader was read")
    yield


def test_a_model_without_batch_norm_leaves_the_loader_alone() -> None:
    recalibrate_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), unread())
    recalibrate_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval()), unread())


def test_sync_batch_norm_is_not_implemented() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)))
    before = statistics(model)
    for is_training in (True, False):
        with pytest.raises(NotImplementedError, match=r"got SyncBatchNorm at '1\.1'; use BatchNorm"):
            recalibrate_batch_norm(model.train(is_training), unread())
    assert statistics(model) == before
    model.train()
    norms(model)["1.1"].eval()
    recalibrate_batch_norm(model, batches_of(2))
    assert has_statistics_of(model[0], batches_of(2))


def test_what_is_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="got model=str"):
        recalibrate_batch_norm("model", batches_of(1))  # type: ignore[arg-type]


@on_ranks(4, timeout_s=HANG_S)
def test_a_process_group_merges_its_own_ranks_only() -> None:
    rank = dist.get_rank()
    group = [dist.new_group(members) for members in ([0, 2], [1, 3])][rank % 2]
    batches = [batches_of(1 + r, seed=10 * r) for r in range(4)]
    for name, model, options in (
        ("plain", build(), {"process_group": group}),
        ("DDP's own", DistributedDataParallel(build(), process_group=group), {}),
        ("DDP over all", DistributedDataParallel(build()), {"process_group": group}),
    ):
        recalibrate_batch_norm(model, batches[rank], **options)
        assert has_statistics_of(norms(model)["0"], batches[rank % 2] + batches[rank % 2 + 2]), name
    if rank % 2 == 0:  # the others need not even call
        model = build()
        recalibrate_batch_norm(model, batches[rank], process_group=group)
        assert has_statistics_of(model[0], batches[0] + batches[2])


# The average: of `build()` and three times its weights, so twice its weights


@on_ranks(1, 2, 3)
def test_inside_swapped_in_statistics_stay_with_the_average() -> None:
    batches = batches_of(6)
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        average = ShardedAverage(model)
        average.update()
        scale(model, 3.0)
        average.update()
        scale(model, 7.0)
        recalibrate_batch_norm(model, dealt(batches_of(6, seed=99)))
        own = statistics(model), weights(model)
        with average.swapped_in():
            recalibrate_batch_norm(model, dealt(batches))
            assert_all_statistics(model, scale(build(), 2.0), batches)
            inside, shown_inside = statistics(model), average.full_state_dict()
        assert (statistics(model), weights(model)) == own, wrapper
        shown = average.full_state_dict()
        assert bool(shown) == bool(shown_inside) == (wrapper == "plain" or dist.get_rank() == 0)
        if shown:
            assert inside == {k: shown[k].tolist() for k in inside} == {k: shown_inside[k].tolist() for k in inside}

        with pytest.raises(LoaderError), average.swapped_in():
            recalibrate_batch_norm(model, drawing(dealt(batches_of(6)), fail_at=1))
        assert (statistics(model), weights(model)) == own, wrapper
        with average.swapped_in():
            assert statistics(model) == inside, wrapper


@on_ranks(1, 2, 3)
def test_finalize_leaves_averaged_weights_and_their_statistics() -> None:
    batches = batches_of(6)
    for wrapper in WRAPPERS:
        model = wrap(build(), wrapper)
        swa = SWA(model, swa_start="1ba", swa_end=None, update_interval="1ba")
        assert swa.step()
        scale(model, 3.0)
        assert swa.step()
        scale(model, 7.0)
        before = statistics(model), weights(model)
        with pytest.raises(ValueError, match="needs batches for a model with BatchNorm, got batches=None"):
            swa.finalize()
        assert (statistics(model), weights(model), swa.completed) == (*before, False)

        swa.finalize(dealt(batches * 2), max_batches=len(dealt(batches)))
        assert swa.completed
        assert weights(model) == weights(scale(wrap(build(), wrapper), 2.0)), wrapper
        assert_all_statistics(model, scale(build(), 2.0), batches)


# Communication


def all_reduce_sizes(model: nn.Module, batches: Iterable[Tensor]) -> list[int]:
    """Return the number of elements of every all-reduce of a pass."""
    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        for name in ("all_gather", "all_gather_object", "broadcast", "gather", "reduce", "send"):
            patch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("another collective"))
        recalibrate_batch_norm(model, batches)
    return sizes


@on_ranks(1, 2, 4)
def test_the_number_of_all_reduces_is_fixed() -> None:
    for wrapper in WRAPPERS:
        for num_layers in (1, 4):
            for num_batches in (1, 5):
                model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(num_layers)))
                sizes = all_reduce_sizes(wrap(model, wrapper), [random(4, 3)] * num_batches)
                *agreements, counts_and_means, deviations = sizes
                assert (counts_and_means, deviations) == (5 * num_layers, 3 * num_layers)
                assert len(agreements) == (1 + num_batches if wrapper == "fsdp2" else 1), wrapper
                assert max(agreements) <= 4, "a few integers"
