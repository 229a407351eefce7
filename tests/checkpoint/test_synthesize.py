"""A synthesized average equals a `PowerEMA` of that width, up to the error that it returns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_swa import EMA, PowerEMA, ShardedAverage, checkpoint
from dist_swa.checkpoint.synthesize import synthesis
from models import same_bits
from ranks import run_on_ranks
from reference import closed_form

NUM_MODELS = 64
SNAPSHOTS = (16, 32, 48, 64)
RULES = {"narrow": PowerEMA(0.05), "wide": PowerEMA(0.10), "plain": EMA(decay=0.9)}


class Walk(nn.Module):
    """`one_hot` is the i-th unit vector in the i-th model, so its average has the coefficients; `walk` is random."""

    def __init__(self) -> None:
        super().__init__()
        self.one_hot = nn.Parameter(torch.zeros(NUM_MODELS))
        self.walk = nn.Parameter(torch.zeros(5, 3))
        self.seen = nn.Buffer(torch.tensor(0))


def trajectory() -> list[dict[str, Tensor]]:
    steps = torch.randn(NUM_MODELS, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    walks = steps.cumsum(0).float()
    return [{"one_hot": torch.eye(NUM_MODELS)[i], "walk": walks[i]} for i in range(NUM_MODELS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return checkpoints of a run with three averages, two of them by `PowerEMA`."""
    folder = tmp_path_factory.mktemp("run")
    model = Walk()
    averages = ShardedAverage(model, RULES)
    for i, values in enumerate(trajectory(), start=1):
        with torch.no_grad():
            model.one_hot.copy_(values["one_hot"])
            model.walk.copy_(values["walk"])
            model.seen.fill_(i)
        averages.update()
        if i in SNAPSHOTS:
            checkpoint.save({"swa": averages}, folder / f"{i}")
    return [folder / f"{i}" for i in SNAPSHOTS]


def oracle(sigma_rel: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients of a direct average of that width and its `walk`, in float64."""
    coefficients = np.array(closed_form(PowerEMA(sigma_rel), NUM_MODELS))
    walks = np.stack([values["walk"].double().numpy() for values in trajectory()])
    return coefficients, np.tensordot(coefficients, walks, 1)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.05, 0.07, 0.085, 0.10, 0.12, 0.14])
def test_is_the_average_of_that_width_within_its_error(run: list[Path], tmp_path: Path, sigma_rel: float) -> None:
    error = checkpoint.synthesize(run, tmp_path / "out", sigma_rel=sigma_rel)
    checkpoint.export(tmp_path / "out", tmp_path / "out.safetensors", key="model")
    found = load_file(tmp_path / "out.safetensors")
    Walk().load_state_dict(found, strict=True)
    coefficients, walk = oracle(sigma_rel)
    weights = found["one_hot"].double().numpy()
    rounding = 1e-6
    assert weights.sum() == pytest.approx(1, abs=rounding)
    assert np.linalg.norm(weights - coefficients) / np.linalg.norm(coefficients) == pytest.approx(error, abs=rounding)
    walks = np.stack([values["walk"].double().numpy() for values in trajectory()])
    bound = error * np.linalg.norm(coefficients) * np.linalg.norm(walks, axis=0)  # Cauchy-Schwarz
    assert (np.abs(found["walk"].double().numpy() - walk) <= bound + rounding * np.abs(walks).max()).all()
    assert error < (1e-12 if sigma_rel in (0.05, 0.10) else 0.1)
    assert found["seen"] == NUM_MODELS


def test_a_saved_width_is_reproduced(run: list[Path], tmp_path: Path) -> None:
    checkpoint.export(run[-1], tmp_path / "kept.safetensors", key="swa.wide")
    checkpoint.synthesize(run, tmp_path / "made", sigma_rel=0.10)
    checkpoint.export(tmp_path / "made", tmp_path / "made.safetensors", key="model")
    kept, made = (load_file(tmp_path / f"{name}.safetensors") for name in ("kept", "made"))
    assert all(torch.allclose(value, made[name], rtol=1e-6, atol=1e-7) for name, value in kept.items())


def test_no_other_coefficients_that_sum_to_1_are_better() -> None:
    """Compare with numpy's solution of the system with a Lagrange multiplier, for more models than one block."""
    num_models = 70_000
    known = [(n, PowerEMA(s)) for n in (20_000, 50_000, 70_000) for s in (0.05, 0.10)]
    found, error = synthesis(known, num_models, PowerEMA(0.15))

    def column(n: int, sigma_rel: float) -> np.ndarray:
        power = PowerEMA(sigma_rel).gamma + 1
        edges = (np.arange(num_models + 1, dtype=np.longdouble) / n) ** power
        return np.where(np.arange(1, num_models + 1) <= n, np.diff(edges), 0).astype(np.float64)

    matrix = np.stack([column(n, rule.sigma_rel) for n, rule in known], axis=1)
    target = column(num_models, 0.15)
    system = np.block([[matrix.T @ matrix, np.ones((6, 1))], [np.ones((1, 6)), np.zeros((1, 1))]])
    best = np.linalg.solve(system, np.append(matrix.T @ target, 1))[:-1]
    assert found == pytest.approx(best, rel=1e-6)
    assert sum(found) == pytest.approx(1, abs=1e-14)
    assert error == pytest.approx(np.linalg.norm(matrix @ best - target) / np.linalg.norm(target), rel=1e-6)


def test_the_same_snapshot_twice_changes_nothing(run: list[Path], tmp_path: Path) -> None:
    once = checkpoint.synthesize(run, tmp_path / "once", sigma_rel=0.08)
    twice = checkpoint.synthesize([*run, run[1]], tmp_path / "twice", sigma_rel=0.08)
    assert once == pytest.approx(twice, rel=1e-6)


def test_the_order_of_sources_does_not_matter(run: list[Path], tmp_path: Path) -> None:
    for name, paths in (("forth", run), ("back", run[::-1])):
        checkpoint.synthesize(paths, tmp_path / f"{name}.safetensors", sigma_rel=0.08)
    forth, back = (load_file(tmp_path / f"{name}.safetensors") for name in ("forth", "back"))
    assert same_bits(forth, back)
    assert forth["seen"] == NUM_MODELS


def test_sources_may_be_an_iterator(run: list[Path], tmp_path: Path) -> None:
    assert checkpoint.synthesize(iter(run), tmp_path / "one", sigma_rel=0.08) == checkpoint.synthesize(
        run, tmp_path / "same", sigma_rel=0.08
    )


def on_a_rank(run: list[Path], out: Path) -> None:
    checkpoint.synthesize(run, out, sigma_rel=0.08)


def test_ranks_share_the_work(run: list[Path], tmp_path: Path) -> None:
    checkpoint.synthesize(run, tmp_path / "alone.safetensors", sigma_rel=0.08)
    run_on_ranks(on_a_rank, 2, run, tmp_path / "shared.safetensors")
    assert (tmp_path / "alone.safetensors").read_bytes() == (tmp_path / "shared.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("sigma_rel", "count", "key", "message"),
    [
        (
            0.25,
            4,
            None,
            r"can be made within 10%, got sigma_rel=0.25 with an error of \d\d% from 0.05 after 16, 0.1 after",
        ),
        (
            0.15,
            1,
            None,
            r"can be made within 10%, got sigma_rel=0.15 with an error of \d\d% from 0.05 after 16, 0.1 after",
        ),
        (0.01, 4, None, r"can be made within 10%, got sigma_rel=0.01"),
        (0.10, 4, "swa.narrow", r"can be made within 10%, got sigma_rel=0.1 .* from 0.05 after 16, 0.05 after 32"),
        (0.3, 4, None, r"PowerEMA needs sigma_rel in \(0, 0.2886\), got sigma_rel=0.3"),
        (0.0, 4, None, r"PowerEMA needs sigma_rel in \(0, 0.2886\)"),
        (
            0.1,
            4,
            "swa.plain",
            r"needs averages by PowerEMA, got key='swa.plain' and swa.narrow by PowerEMA\(sigma_rel=0.05",
        ),
        (0.1, 0, None, r"merging needs a source or more, got sources=\[\]"),
    ],
)
def test_averages_that_do_not_suffice_are_refused(
    run: list[Path], tmp_path: Path, sigma_rel: float, count: int, key: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.synthesize(run[:count], tmp_path / "out", sigma_rel=sigma_rel, key=key)
    assert not (tmp_path / "out").exists()


def test_safetensors_are_refused(run: list[Path], tmp_path: Path) -> None:
    checkpoint.export(run[0], tmp_path / "x.safetensors", key="swa.wide")
    with pytest.raises(ValueError, match=r"needs averages by PowerEMA, got key=None and no average in .*x.safetensors"):
        checkpoint.synthesize([tmp_path / "x.safetensors"], tmp_path / "out", sigma_rel=0.1)


def test_too_many_models_are_refused(tmp_path: Path) -> None:
    average = ShardedAverage(Walk(), PowerEMA(0.10))
    average.update()
    checkpoint.save({"swa": average.state_dict() | {"num_averaged": torch.tensor(10**13)}}, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"at most 100000000 models, got num_averaged=10000000000000 of swa in"):
        checkpoint.synthesize([tmp_path / "saved"], tmp_path / "out", sigma_rel=0.1)
