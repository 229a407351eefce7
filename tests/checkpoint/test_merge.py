"""Merged weights are the float64 sum in every format and on any number of ranks, and need little memory."""

import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_swa import EMA, DecayShaped, Equal, Polynomial, PowerEMA, ShardedAverage, Window, checkpoint
from dist_swa.__main__ import main
from dist_swa.averaging.rules import Rule
from dist_swa.checkpoint import safetensors_io
from dist_swa.storage.save_load import no_group_is_fine
from models import build, same_bits, trajectory, wrap, write
from ranks import on_ranks, run_on_ranks
from reference import closed_form, weighted_sum


def states(count: int, **extra: Tensor) -> list[dict[str, Tensor]]:
    """Return random tensors of several dtypes and shapes; "count" is the index of the source."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        {
            "a.weight": some(7, 5),
            "b": some(),
            "empty": some(0, 3),
            "double": some(3, dtype=torch.float64),
            "half": some(3, dtype=torch.float16),
            "short": some(3, 2, dtype=torch.bfloat16),
            "wave": torch.complex(some(3), some(3)),
            "count": torch.tensor(i),
            "mask": torch.tensor([i % 2 == 0, True]),
            **extra,
        }
        for i in range(count)
    ]


def saved(folder: Path, values: list[dict[str, Tensor]], kinds: str = "sc") -> list[Path]:
    """Save each state as safetensors ("s"), or as the entry "model" of a checkpoint ("c"), in turn."""
    paths = []
    for i, (state, kind) in enumerate(zip(values, itertools.cycle(kinds), strict=False)):
        paths.append(folder / (f"{i}.safetensors" if kind == "s" else f"{i}"))
        if kind == "s":
            save_file(state, paths[-1])
        else:
            checkpoint.save({"model": state}, paths[-1])
    return paths


def loaded(path: Path) -> dict[str, Tensor]:
    """Return the tensors in the output of a merge."""
    if path.is_file() or not (path / ".metadata").exists():
        return load_file(path if path.is_file() else path / "model.safetensors")
    reader = checkpoint.open_checkpoint(path)
    return {key.removeprefix("model."): reader.read(key) for key in reader.keys}


def expected(coefficients: list[float], values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the rounded float64 sums; tensors that are not floating come from the last state."""
    result = {}
    for name, last in values[-1].items():
        if last.is_floating_point():
            result[name] = weighted_sum(coefficients, [{name: state[name]} for state in values])[name].to(last.dtype)
        elif last.is_complex():
            parts = [weighted_sum(coefficients, [{"x": part(s[name])} for s in values])["x"] for part in PARTS]
            result[name] = torch.complex(*parts).to(last.dtype)
        else:
            result[name] = last
    return result


PARTS: tuple[Callable[[Tensor], Tensor], ...] = (torch.real, torch.imag)
RULES: list[Rule] = [
    Equal(),
    Polynomial(1.5),
    EMA(decay=0.7),
    EMA(decay=0.999, warmup=True),
    *(DecayShaped(shape, total=5) for shape in ("linear", "minus_sqrt", "cosine")),
    PowerEMA(0.1),
    Window(2),
]


def is_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether tensors are equal up to one unit in the last place, or the 1e-12 of `math.lgamma` in closed forms."""
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype
        and value.shape == right[name].shape
        and torch.allclose(value, right[name], rtol=max(torch.finfo(value.dtype).eps, 1e-12), atol=1e-15)
        if value.is_floating_point() or value.is_complex()
        else torch.equal(value, right[name])
        for name, value in left.items()
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_weigh_by_their_closed_form(tmp_path: Path, rule: Rule) -> None:
    values = states(5)
    checkpoint.merge(saved(tmp_path, values, "s"), tmp_path / "out.safetensors", rule=rule)
    assert is_close(loaded(tmp_path / "out.safetensors"), expected(closed_form(rule, 5), values))


@pytest.mark.parametrize(
    ("weights", "normalize", "coefficients"),
    [
        ([0.2, 0.3, 0.5], True, [0.2, 0.3, 0.5]),
        ([2, 3, 5], True, [0.2, 0.3, 0.5]),
        ([2, 3, 5], False, [2, 3, 5]),
        ([0, 0, 4], True, [0, 0, 1]),
    ],
)
def test_weights(tmp_path: Path, weights: list[float], normalize: bool, coefficients: list[float]) -> None:
    values = states(3)
    checkpoint.merge(saved(tmp_path, values, "s"), tmp_path / "out", weights=weights, normalize=normalize)
    assert is_close(loaded(tmp_path / "out"), expected(coefficients, values))


def test_a_source_of_weight_0_has_no_effect_even_if_it_is_infinite(tmp_path: Path) -> None:
    values = [{"x": torch.tensor([number])} for number in (torch.inf, 1.0, 3.0)]
    paths = saved(tmp_path, values, "s")
    checkpoint.merge(paths, tmp_path / "window.safetensors", rule=Window(2))
    checkpoint.merge(paths, tmp_path / "weights.safetensors", weights=[0, 1, 1])
    assert all(loaded(tmp_path / f"{name}.safetensors")["x"] == 2 for name in ("window", "weights"))


@pytest.mark.filterwarnings("ignore:negative weights")
def test_large_weights_of_a_small_sum_are_accepted(tmp_path: Path) -> None:
    values = [{"x": torch.tensor([number], dtype=torch.float64)} for number in (1.0, 3.0)]
    paths = saved(tmp_path, values, "s")
    checkpoint.merge(paths, tmp_path / "divided.safetensors", weights=[1e9, 1 - 1e9])
    checkpoint.merge(paths, tmp_path / "as given.safetensors", weights=[1e20, -1e20], normalize=False)
    assert loaded(tmp_path / "divided.safetensors")["x"] == 3 - 2e9
    assert loaded(tmp_path / "as given.safetensors")["x"] == -2e20


NARROW = pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)


@NARROW
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_sum_that_overflows_its_dtype_raises(tmp_path: Path, dtype: torch.dtype, out: str) -> None:
    largest = torch.finfo(dtype).max
    paths = saved(tmp_path, [{"x": torch.tensor([1.0, largest]).to(dtype)}] * 2)
    message = rf"{dtype} can hold, got {2 * largest:g} in x; choose smaller".replace("+", r"\+")
    with pytest.raises(ValueError, match=message):
        checkpoint.merge(paths, tmp_path / out, key="model", weights=[1, 1], normalize=False)
    assert not (tmp_path / out).exists()


@NARROW
def test_an_average_of_the_largest_value_does_not_overflow(tmp_path: Path, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    paths = saved(tmp_path, [{"x": torch.tensor([1.0, largest]).to(dtype)}] * 3)
    checkpoint.merge(paths, tmp_path / "out.safetensors", key="model")
    assert loaded(tmp_path / "out.safetensors")["x"].float()[1] == largest


@pytest.mark.parametrize(
    ("dtype", "special"),
    [
        (torch.float16, torch.inf),
        *((dtype, torch.nan) for dtype in (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)),
    ],
    ids=str,
)
def test_infinity_and_nan_of_a_source_are_kept(tmp_path: Path, dtype: torch.dtype, special: float) -> None:
    values = [{"x": torch.tensor([1.0, number]).to(dtype)} for number in (torch.finfo(dtype).max, special)]
    checkpoint.merge(saved(tmp_path, values), tmp_path / "out.safetensors", key="model")
    found = loaded(tmp_path / "out.safetensors")["x"].float()
    assert torch.allclose(found, torch.tensor([1.0, special]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:negative weights")
def test_weights_that_cancel_up_to_rounding_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs weights whose sum is not 0, got weights=\[0.1, 0.2, -0.3\]; pass"):
        checkpoint.merge(saved(tmp_path, states(3), "s"), tmp_path / "out", weights=[0.1, 0.2, -0.3])


def test_negative_weights_warn(tmp_path: Path) -> None:
    values = states(2)
    with pytest.warns(UserWarning, match=r"negative weights move away from a source: weights=\[-0.5, 1.5\]"):
        checkpoint.merge(saved(tmp_path, values, "s"), tmp_path / "out", weights=[-0.5, 1.5])
    assert is_close(loaded(tmp_path / "out"), expected([-0.5, 1.5], values))


@pytest.mark.parametrize("kinds", ["s", "c", "sc", "cs"])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_reads_and_writes_both(tmp_path: Path, kinds: str, out: str) -> None:
    values = states(4)
    paths = saved(tmp_path, values, kinds)
    checkpoint.merge(paths, tmp_path / out, key="model")
    is_checkpoint = (tmp_path / out / ".metadata").exists()
    assert is_checkpoint == (out == "out" and kinds[-1] == "c")
    assert is_close(loaded(tmp_path / out), expected([0.25] * 4, values))
    checkpoint.merge(paths, tmp_path / "one.safetensors", key="model")
    assert same_bits(loaded(tmp_path / out), loaded(tmp_path / "one.safetensors"))
    if is_checkpoint:  # and it loads
        state = {"model": {name: torch.zeros_like(value) for name, value in values[0].items()}}
        checkpoint.load(state, tmp_path / out)
        assert same_bits(state["model"], loaded(tmp_path / out))


PREFIXES = ("0", "model")


def flat_states() -> list[dict[str, Tensor]]:
    """Return two states with dots in their names; one name starts with "model"."""
    return [
        {"w": torch.ones(1), "seen": torch.tensor(i)} | {f"{part}.w": torch.full((2,), float(i)) for part in PREFIXES}
        for i in range(2)
    ]


def save_flat(folder: Path, kind: str) -> list[Path]:
    """Save `flat_states` without an entry, as plain dcp.save does for "dcp" and "ddp", or beside other entries."""
    paths = [folder / f"{kind}{i}" for i in range(2)]
    for path, state in zip(paths, flat_states(), strict=True):
        if kind == "beside":
            checkpoint.save({"net": {"w": torch.zeros(1)}, "epoch": 3, **state}, path)
            continue
        with no_group_is_fine():
            dcp_save({f"{'module.' * (kind == 'ddp')}{name}": v for name, v in state.items()}, checkpoint_id=path)
    return paths


@pytest.mark.filterwarnings("ignore:.* tensors only; not written. epoch")
@pytest.mark.parametrize(("kind", "key"), [("dcp", None), ("dcp", ""), ("ddp", None), ("beside", "")])
def test_a_checkpoint_without_entries_is_a_model(tmp_path: Path, kind: str, key: str | None) -> None:
    last = flat_states()[1]
    paths = save_flat(tmp_path, kind)
    checkpoint.merge(paths, tmp_path / "out", key=key)
    checkpoint.export(paths[1], tmp_path / "last.safetensors", key=key)
    checkpoint.export(tmp_path / "out", tmp_path / "again.safetensors")  # its only entry
    average = last | {f"{part}.w": torch.full((2,), 0.5) for part in PREFIXES}
    assert same_bits(loaded(tmp_path / "out"), average)
    assert same_bits(loaded(tmp_path / "again.safetensors"), average)
    assert same_bits(loaded(tmp_path / "last.safetensors"), last)


def test_a_prefix_of_names_is_a_key(tmp_path: Path) -> None:
    checkpoint.merge(save_flat(tmp_path, "dcp")[:1], tmp_path / "out", key="model")
    assert same_bits(loaded(tmp_path / "out"), {"w": torch.zeros(2)})


@pytest.mark.parametrize(("kind", "key"), [("beside", None), ("dcp", "epoch")])
def test_an_unknown_key_of_a_checkpoint_without_entries_is_refused(tmp_path: Path, kind: str, key: str | None) -> None:
    paths = save_flat(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"the key of an entry, got {key=} for .*; pass one of \"\"(, net)?$"):
        checkpoint.merge(paths[:1], tmp_path / "none", key=key)


@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_one_source_keeps_its_bits(tmp_path: Path, rule: Rule) -> None:
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38])
    (values,) = states(1, special=special, tiny=special.double() / 3)
    (path,) = saved(tmp_path, [values], "s")
    checkpoint.merge([path], tmp_path / "out.safetensors", rule=rule)
    merged = loaded(tmp_path / "out.safetensors")
    assert merged.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), merged[name].reshape(-1).view(torch.uint8)), name


def test_sums_are_exact_where_float32_is_not(tmp_path: Path) -> None:
    values = [{"x": torch.tensor([1.0])}, {"x": torch.tensor([2.0**-30])}, {"x": torch.tensor([-1.0])}]
    checkpoint.merge(saved(tmp_path, values, "s"), tmp_path / "out.safetensors", weights=[1, 1, 1], normalize=False)
    assert loaded(tmp_path / "out.safetensors")["x"].item() == 2.0**-30


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """Return the number of `dtype` that is nearest to a value of normal size, the even one of two."""
    spacing = Fraction(torch.finfo(dtype).eps) * Fraction(2) ** (math.frexp(value)[1] - 1)
    return float(round(value / spacing) * spacing)


SHORT = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT], ids=str)
def test_float64_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """Torch converts float64 to float32 first, which makes a tie of a value beside it."""
    ties = [1.5 + (2 * i + 1) * torch.finfo(dtype).eps / 2 for i in range(-2, 2)]
    offsets = [0.0, *(sign * 2.0**-power for sign in (1, -1) for power in (20, 30, 45, 50))]
    exact = [s * (tie + offset) for s in (1, -1) for tie in ties for offset in offsets]
    values = torch.tensor(exact, dtype=torch.float64)
    checkpoint.merge(saved(tmp_path, [{"x": values}], "s"), tmp_path / "out.safetensors", dtype=dtype)
    checkpoint.export(tmp_path / "0.safetensors", tmp_path / "same.safetensors", dtype=dtype)
    found = loaded(tmp_path / "out.safetensors")["x"]
    assert found.dtype == dtype
    assert found.double().tolist() == [nearest(Fraction(value), dtype) for value in exact]
    assert same_bits({"x": found}, loaded(tmp_path / "same.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, *SHORT], ids=str)
def test_a_sum_of_short_sources_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    values = [{"x": torch.ones(1).to(dtype)}, {"x": torch.tensor([eps]).to(dtype)}]
    weights = [1.0, 0.5 + 2.0**-40 / eps]  # just above the tie between 1 and 1 + eps
    checkpoint.merge(saved(tmp_path, values, "s"), tmp_path / "out.safetensors", weights=weights, normalize=False)
    assert loaded(tmp_path / "out.safetensors")["x"].double().tolist() == [1 + eps]


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_special_values_are_converted_from_float64_as_from_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-300, -1e-300, 1e-9, 1e-5, 0.001, 448.0, torch.nan]
    if dtype != torch.float8_e4m3fn:
        special += [torch.inf, -torch.inf]  # it has no infinity
    (path,) = saved(tmp_path, [{"x": torch.tensor(special, dtype=torch.float64)}], "s")
    checkpoint.merge([path], tmp_path / "out.safetensors", dtype=dtype)
    found = loaded(tmp_path / "out.safetensors")["x"]
    expected = torch.tensor(special, dtype=torch.float64).float().to(dtype)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", ["s", "c"])
def test_dtype_is_that_of_all_floating_tensors(tmp_path: Path, kinds: str, dtype: torch.dtype) -> None:
    values = states(3)
    paths = saved(tmp_path, values, kinds)
    checkpoint.merge(paths, tmp_path / "out", dtype=dtype)
    merged = loaded(tmp_path / "out")
    wider = [{name: t.double() if t.is_floating_point() else t for name, t in state.items()} for state in values]
    exact = expected([1 / 3] * 3, wider)
    assert merged.keys() == exact.keys()
    for name, value in merged.items():
        assert value.dtype == (dtype if values[0][name].is_floating_point() else values[0][name].dtype), name
        assert torch.allclose(value, exact[name].to(value.dtype), rtol=2 * torch.finfo(dtype).eps), name
    assert main(["merge", *map(str, paths), "--out", f"{tmp_path}/cli", "--dtype", str(dtype)[6:], "--quiet"]) == 0
    assert same_bits(loaded(tmp_path / "cli"), merged)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_sum_that_overflows_the_dtype_raises(tmp_path: Path, out: str) -> None:
    paths = saved(tmp_path, [{"a": torch.tensor([1.0, 70000.0]), "b": torch.ones(1)}] * 2, "sc")
    message = r"values that torch.float16 can hold, got 70000 in a; choose smaller weights, or another dtype"
    with pytest.raises(ValueError, match=message):
        checkpoint.merge(paths, tmp_path / out, key="model", dtype=torch.float16)
    assert not (tmp_path / out).exists()
    checkpoint.merge(paths, tmp_path / out, key="model", dtype=torch.bfloat16)
    assert loaded(tmp_path / out)["a"].tolist() == [1.0, 70144.0]


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", torch.complex64, 7])
def test_a_dtype_that_is_not_floating_is_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"merge needs a floating torch.dtype, got dtype=.*; leave it out, or pass"):
        checkpoint.merge(saved(tmp_path, states(1), "s"), tmp_path / "out", dtype=dtype)


OUT = pytest.mark.parametrize("out", ["out", "out.safetensors"])


NAN = complex(torch.nan, torch.nan)


@OUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_source_of_nan_warns(tmp_path: Path, out: str, dtype: torch.dtype) -> None:
    values = [
        {name: torch.full((3,), value).to(dtype) for name in "ab"}
        for value in (1, NAN if dtype.is_complex else torch.nan)
    ]
    values[1] |= {"c": torch.ones(2), "d": torch.zeros(0, 3)}
    values[0] |= {"c": torch.tensor([1.0, torch.nan]), "d": torch.zeros(0, 3)}
    paths = saved(tmp_path, values)
    message = (
        "merging needs finite weights, got nothing but NaN in 2 tensors, such as a; leave out the sources with NaN"
    )
    with pytest.warns(UserWarning, match=f"^{message}$") as caught:
        checkpoint.merge(paths, tmp_path / out, key="model")
    (warning,) = caught
    assert warning.filename == __file__
    checkpoint.merge(paths, tmp_path / "first.safetensors", key="model", weights=[1, 0])


INTEGERS = r"merging needs integer tensors that are equal in all sources, got others in 2, such as a.qweight, which are"


def quantised(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return int8 weights with their scales, as bitsandbytes or GPTQ store them, and integers that are equal."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randint(0, 100, (4, 2), generator=generator).to(dtype) for name in ("a.qweight", "b.qweight")
    }
    return weights | {
        "scale": torch.rand(4, generator=generator),
        "index": torch.arange(9),
        "count": torch.tensor(seed),
    }


@OUT
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint16], ids=str)
def test_integers_that_differ_warn(tmp_path: Path, out: str, dtype: torch.dtype) -> None:
    paths = saved(tmp_path, [quantised(seed, dtype) for seed in (1, 2, 2)], "c" if out == "out" else "s")
    with pytest.warns(UserWarning, match=f"^{INTEGERS} now those of the last source; merge weights") as caught:
        checkpoint.merge(paths, tmp_path / out)
    (warning,) = caught
    assert warning.filename == __file__
    found = loaded(tmp_path / out)
    assert torch.equal(found["a.qweight"], quantised(2, dtype)["a.qweight"])
    checkpoint.merge(paths[1:], tmp_path / "equal.safetensors")
    checkpoint.merge(paths, tmp_path / "without.safetensors", weights=[0, 1, 1])


@pytest.mark.parametrize("kind", ["c", "s"])
@on_ranks(2)
def test_what_a_merge_finds_warns_on_every_rank(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "shared"
    values = [quantised(i, torch.int8) | {"w": torch.full((2,), (torch.nan, 1.0)[i])} for i in (0, 1)]
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    if kind == "c":
        paths = saved(folder, values, kind)
    else:
        paths = [folder / f"{i}.safetensors" for i in (0, 1)]
        if torch.distributed.get_rank() == 0:
            saved(folder, values, kind)
        torch.distributed.barrier()
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(safetensors_io, "_MAX_FILE_BYTES", 10)
        checkpoint.merge(paths, tmp_path / "out")
    first, second = (str(warning.message) for warning in caught)
    assert "got nothing but NaN in 1 tensors, such as w; " in first
    assert "got others in 2, such as a.qweight, " in second


def test_sources_may_be_an_iterator(tmp_path: Path) -> None:
    values = states(3)
    saved(tmp_path, values, "s")
    checkpoint.merge(tmp_path.glob("[012].safetensors"), tmp_path / "out")
    assert is_close(
        loaded(tmp_path / "out"), expected([1 / 3] * 3, values) | {"mask": loaded(tmp_path / "out")["mask"]}
    )


def test_the_order_of_equal_sources_changes_no_bit(tmp_path: Path) -> None:
    values = [{"x": torch.randn(1000, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    paths = saved(tmp_path, values, "s")
    results = set()
    for i, order in enumerate(itertools.permutations(paths)):
        checkpoint.merge(order, tmp_path / f"out{i}.safetensors")
        results.add(loaded(tmp_path / f"out{i}.safetensors")["x"].numpy().tobytes())
    assert len(results) == 1


def test_averages_are_merged_with_buffers_and_tied_and_frozen_parameters(tmp_path: Path) -> None:
    fulls = []
    for i in range(3):
        model = build()
        model.seen.fill_(i)
        model.get_buffer("norm.running_mean").fill_(i)
        average = ShardedAverage(model)
        for values in trajectory(2, model, seed=i):
            write(model, values)
            average.update()
        checkpoint.save({"model": model.state_dict(), "swa": average}, tmp_path / f"{i}")
        fulls.append(average.full_state_dict())
    paths = [tmp_path / f"{i}" for i in range(3)]
    checkpoint.merge(paths, tmp_path / "out", rule=EMA(decay=0.5))
    merged = loaded(tmp_path / "out")
    build().load_state_dict(merged, strict=True)
    assert is_close(merged, expected(closed_form(EMA(decay=0.5), 3), fulls))
    assert merged["seen"] == 2
    assert torch.equal(merged["again.weight"], merged["tied.weight"])


def merge_on_ranks(folder: Path, paths: list[Path]) -> None:
    safetensors_io._MAX_FILE_BYTES = 50
    checkpoint.merge(paths[::-1], folder / "checkpoint", key="model")
    checkpoint.merge(paths, folder / "files", key="model")
    model = wrap(build(), "fsdp2")
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    checkpoint.save(state, folder / "model")
    checkpoint.merge([folder / "model", folder / "model"], folder / "twice", key="model")
    before = {
        name: value.full_tensor().clone() for name, value in state["model"].items() if hasattr(value, "full_tensor")
    }
    for value in state["model"].values():
        value.zero_()
    checkpoint.load(state, folder / "twice")
    assert before
    assert all(torch.equal(state["model"][name].full_tensor(), value) for name, value in before.items())
    with pytest.raises(FileExistsError):
        checkpoint.merge(paths, folder / "files", key="model")
    with pytest.raises(ValueError, match=r"needs a finite weight for each of 4 sources"):
        checkpoint.merge(paths, folder / "none", weights=[1], key="model")


def test_ranks_share_the_work(tmp_path: Path) -> None:
    """The same files, byte for byte, from one process and from three."""
    paths = saved(tmp_path, states(4), "cs")
    run_on_ranks(merge_on_ranks, 3, tmp_path, paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "_MAX_FILE_BYTES", 50)
        checkpoint.merge(paths, tmp_path / "alone", key="model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    assert len(files) > 3
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    checkpoint.merge(paths[::-1], tmp_path / "one checkpoint", key="model")
    assert same_bits(loaded(tmp_path / "checkpoint"), loaded(tmp_path / "one checkpoint"))
    assert not (tmp_path / "none").exists()


def change_name(state: dict[str, Tensor]) -> None:
    state["other"] = state.pop("half")


def add_name(state: dict[str, Tensor]) -> None:
    state["other"] = torch.zeros(1)


def change_shape(state: dict[str, Tensor]) -> None:
    state["a.weight"] = state["a.weight"].t().contiguous()


def change_dtype(state: dict[str, Tensor]) -> None:
    state["a.weight"] = state["a.weight"].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_name, r"got half=float16\[3\] in .*0.safetensors and missing in model in .*1; merge"),
        (add_name, r"got other=missing in .*0.safetensors and float32\[1\] in model in .*1; merge"),
        (change_shape, r"got a.weight=float32\[7, 5\] in .*0.safetensors and float32\[5, 7\] in model in .*1; merge"),
        (change_dtype, r"got a.weight=float32\[7, 5\] in .*0.safetensors and float16\[7, 5\] in model in .*1; merge"),
    ],
)
def test_the_first_difference_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    values = states(3)
    change(values[1])
    with pytest.raises(ValueError, match=r"needs sources with the same names, shapes and dtypes, " + message):
        checkpoint.merge(saved(tmp_path, values, "sc"), tmp_path / "out", key="model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1, 2, 3]}, ValueError, r"finite weight for each of 2 sources, got weights=\[1, 2, 3\]; pass"),
        ({"weights": [1, float("nan")]}, ValueError, r"needs a finite weight for each of 2 sources"),
        ({"weights": [0, 0], "normalize": False}, ValueError, r"needs weights whose sum is not 0"),
        ({"weights": [0, 0]}, ValueError, r"needs weights whose sum is not 0, got weights=\[0, 0\]"),
        (
            {"weights": [1e308, 1e308]},
            ValueError,
            r"finite weight for each of 2 .*; pass as many, of a finite sum",
        ),
        ({"weights": [1, 10**400]}, ValueError, r"needs a finite weight for each of 2 sources"),
        ({"weights": ["1", "2"]}, TypeError, r"needs a list of numbers, got weights=\['1', '2'\]; pass a float"),
        ({"weights": 5}, TypeError, r"needs a list of numbers, got weights=5; pass a float for each source"),
        ({"weights": (weight for weight in (1, 2))}, TypeError, r"needs a list of numbers, got weights=<generator"),
        ({"weights": [1, 1], "rule": EMA(decay=0.5)}, ValueError, r"needs a rule or weights, got rule=EMA"),
        (
            {"rule": EMA(half_life="3ba")},
            ValueError,
            r"needs a rule that counts models, got rule=EMA.*; pass EMA\(decay",
        ),
        ({"rule": "equal"}, TypeError, r"needs a rule, got rule='equal'; pass Equal\(\)"),
        ({"sources": "path"}, TypeError, r"needs a list of paths, got sources='path'; put it into a list"),
        (
            {"sources": Path("path")},
            TypeError,
            r"needs a list of paths, got sources=.*Path\('path'\); put it into a list",
        ),
        ({"sources": 5}, TypeError, r"needs a list of paths, got sources=5; put it into a list"),
        ({"sources": []}, ValueError, r"needs a source or more, got sources=\[\]"),
        ({"sources": iter([])}, ValueError, r"needs a source or more, got sources=\[\]"),
    ],
)
def test_arguments(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    paths = saved(tmp_path, states(2), "s")
    with pytest.raises(error, match=message):
        checkpoint.merge(options.pop("sources", paths), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", lambda whole: whole[:-1]),
        ("header.safetensors", lambda whole: whole[:8] + b"x" + whole[9:]),
        ("empty.safetensors", lambda whole: b""),
        ("long.safetensors", lambda whole: b"\xff" * 8 + whole[8:]),
    ],
)
def test_damaged_safetensors(tmp_path: Path, name: str, content: Callable[[bytes], bytes]) -> None:
    (path,) = saved(tmp_path, states(1), "s")
    (tmp_path / name).write_bytes(content(path.read_bytes()))
    with pytest.raises(checkpoint.CheckpointError, match=rf"needs? a file as it was written, got .*{name}: "):
        checkpoint.merge([path, tmp_path / name], tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "../other/0.safetensors"}, r"index as it was written, got .*: a file outside of the folder"),
        ({"a": "missing.safetensors"}, r"need all files of the folder, got none at .*missing.safetensors"),
        ({"a": "0.safetensors", "z": "0.safetensors"}, r"got none of z"),
        ({"a": "0.safetensors", "b": "1.safetensors"}, r"need each tensor once, got b again in .*0.safetensors"),
        ({"a": ""}, r"index as it was written, got .*: a file outside of the folder"),
        ({"a": "folder"}, r"need a file as it was written, got .*folder: .*; restore it"),
        ({"a": ".."}, r"index as it was written, got .*: a file outside of the folder"),
        ([], r"index as it was written"),
        ("deep", r"index as it was written, got .*index.json: .*recursion"),
    ],
)
def test_damaged_index(tmp_path: Path, index: Any, message: str) -> None:
    folder = tmp_path / "sources"
    (folder / "folder").mkdir(parents=True)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "0.safetensors")
    save_file({"b": torch.ones(1)}, folder / "1.safetensors")
    text = "[" * 100_000 if index == "deep" else json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.merge([folder], tmp_path / "out")


NUM_TENSORS, TENSOR_BYTES = 24, 4 << 20
MEASURE = """
import re, sys
from pathlib import Path
from dist_swa import checkpoint

def status(field):
    return 1024 * int(re.findall(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[0])

small, out, *sources = sys.argv[1:]
checkpoint.merge([small], out + "-small", key="model")  # imports what is imported late
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
checkpoint.merge(sources, out, key="model")
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["s", "c"])
def test_peak_memory_is_a_few_times_the_largest_tensor(tmp_path: Path, kind: str) -> None:
    values = [{f"{i}": torch.randn(TENSOR_BYTES // 4) for i in range(NUM_TENSORS)} for _ in range(3)]
    (tmp_path / "small").mkdir()
    (small,) = saved(tmp_path / "small", [{"x": torch.ones(1)}], kind)
    paths = saved(tmp_path, values, kind)
    command = [sys.executable, "-c", MEASURE, str(small), str(tmp_path / "out"), *map(str, paths)]
    root = Path(checkpoint.__file__).parents[2]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # else malloc keeps what was freed
    peak_bytes = int(subprocess.check_output(command, text=True, cwd=root, env=environment))
    assert is_close(loaded(tmp_path / "out"), expected([1 / 3] * 3, values))
    # Blocks of float64, and what the libraries take for themselves; all tensors are 24, three times.
    assert TENSOR_BYTES < peak_bytes < 5.5 * TENSOR_BYTES + (8 << 20)
