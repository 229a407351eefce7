"""Frozen quantised weights: what their module saves goes out as it is, and only the adapter is averaged."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_swa import SWA, ShardedAverage, checkpoint
from ranks import on_ranks


class Packed(Tensor):
    """A weight as a quantised one: it has no data pointer, and refuses views, copies and `to`."""

    packed: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor) -> None:
        self.packed = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed"], None

    def data_ptr(self) -> int:
        raise RuntimeError("no storage")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return Packed(args[0].packed)
        if function is torch.ops.aten.t.default:
            return args[0].packed.float().t()
        if function is torch.ops.aten.addmm.default:
            return torch.addmm(*(one.packed.float() if isinstance(one, Packed) else one for one in args))
        raise NotImplementedError(f"Packed does not implement {function}")


class PackedLinear(nn.Linear):
    """A layer whose state dict has more than its tensors, as those of bitsandbytes."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach() - 1
        destination[f"{prefix}weight.scale"] = torch.full((2,), 3.0)


def subclass(base: nn.Linear) -> nn.Linear:
    base.weight = nn.Parameter(Packed((100 * base.weight.detach()).char()), requires_grad=False)
    return base


def module(base: nn.Linear) -> nn.Linear:
    return PackedLinear(64, 64, bias=False)


def nf4(base: nn.Linear) -> nn.Linear:
    from torchao.quantization import to_nf4

    base.weight = nn.Parameter(to_nf4(base.weight.detach(), block_size=32, scaler_block_size=32), requires_grad=False)
    return base


def int8(base: nn.Linear) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(base, Int8WeightOnlyConfig())
    return base


def four_bits(base: nn.Linear) -> nn.Linear:
    layers: Any = importlib.import_module("bitsandbytes.nn")
    quantized = layers.Linear4bit(64, 64, bias=False)
    quantized.weight = layers.Params4bit(base.weight.detach(), requires_grad=False)
    quantized.to("cpu")
    quantized(torch.ones(1, 64))
    return quantized  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[nn.Linear], nn.Linear]] = {
    one.__name__: one for one in (subclass, module, nf4, int8, four_bits)
}
NO_SAFETENSORS = {"subclass": "Packed", "nf4": "NF4Tensor", "int8": "Int8Tensor"}
DDP_REFUSES = ("subclass", "int8")  # it views every parameter that it does not ignore
PACKAGES = {"nf4": "torchao", "int8": "torchao", "four_bits": "bitsandbytes"}
KIND = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.skipif(
                kind in PACKAGES and importlib.util.find_spec(PACKAGES[kind]) is None,
                reason=f"needs {PACKAGES.get(kind)}",
            ),
        )
        for kind in KINDS
    ],
)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = KINDS[kind](nn.Linear(64, 64, bias=False)).requires_grad_(False)
        self.lora = nn.Linear(64, 2)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.lora(self.base(given))
        return out


def averaged(kind: str, is_ddp: bool = False) -> tuple[Net, SWA]:
    """Return a model whose adapter is averaged over the values 1 and 2, and then trained to 5."""
    net = Net(kind)
    if kind in DDP_REFUSES:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["base.weight"])
    swa = SWA(DistributedDataParallel(net) if is_ddp else net, swa_start="1ba")
    for value in (1.0, 2.0, 5.0):
        nn.init.constant_(net.lora.weight, value)
        if value < 5:
            swa.step()
    return net, swa


def same(one: Any, other: Any) -> bool:
    """Whether two values of a state dict are equal, without a call that a subclass may refuse."""
    if type(one) is not type(other):
        return False
    if type(one) is not Tensor:
        names, _ = one.__tensor_flatten__()
        return all(same(getattr(one, name), getattr(other, name)) for name in names if getattr(one, name) is not None)
    return torch.equal(one, other)


@KIND
@pytest.mark.parametrize("is_ddp", [False, True])
@on_ranks(2)
def test_what_is_not_averaged_is_as_in_the_state_dict_of_its_module(kind: str, is_ddp: bool) -> None:
    net, swa = averaged(kind, is_ddp)
    with swa.swapped_in():
        net(torch.ones(1, 64))
    full, expected = swa.average.full_state_dict(), dict(net.state_dict())
    if is_ddp and torch.distributed.get_rank() > 0:
        assert full == {}
        return
    assert full.keys() == expected.keys()
    assert full.pop("lora.weight").eq(1.5).all()
    assert expected.pop("lora.weight").eq(5).all()
    assert all(same(full[name], expected[name]) for name in full)


@KIND
@pytest.mark.parametrize("is_ddp", [False, True])
@on_ranks(2)
def test_an_export_has_what_the_module_saves_or_raises_one_line(kind: str, is_ddp: bool, tmp_path: Path) -> None:
    net, swa = averaged(kind, is_ddp)
    out = tmp_path / "out.safetensors"
    if kind in NO_SAFETENSORS:
        with pytest.raises(ValueError, match=f"plain tensors, got base.weight={NO_SAFETENSORS[kind]}; pass only='aver"):
            checkpoint.export(swa, out)
        assert list(tmp_path.iterdir()) == []
        return
    checkpoint.export(swa, out)
    written, expected = load_file(out), dict(net.state_dict())
    assert written.keys() == expected.keys()
    assert written.pop("lora.weight").eq(1.5).all()
    assert all(torch.equal(value, expected[name]) for name, value in written.items())


@KIND
@pytest.mark.parametrize("is_ddp", [False, True])
@on_ranks(2)
def test_only_averaged_parameters_are_exported(kind: str, is_ddp: bool, tmp_path: Path) -> None:
    _, swa = averaged(kind, is_ddp)
    checkpoint.export(swa, tmp_path / "live.safetensors", only="averaged")
    checkpoint.save({"swa": swa}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "stored.safetensors", only="averaged")
    for file in ("live.safetensors", "stored.safetensors"):
        written = load_file(tmp_path / file)
        assert sorted(written) == ["lora.bias", "lora.weight"]
        assert written["lora.weight"].eq(1.5).all()
    full = swa.average.full_state_dict(only="averaged")
    assert sorted(full) == ([] if is_ddp and torch.distributed.get_rank() else ["lora.bias", "lora.weight"])


@KIND
@on_ranks(2)
def test_quantised_weights_that_differ_between_ranks_raise_in_an_export(kind: str, tmp_path: Path) -> None:
    net = Net(kind)
    torch.manual_seed(torch.distributed.get_rank())
    net.base = KINDS[kind](nn.Linear(64, 64, bias=False)).requires_grad_(False)
    average = ShardedAverage(net)
    average.update()
    with pytest.raises(ValueError, match=r"same values on every rank, got other ones of parameter='base.weight'"):
        checkpoint.export(average, tmp_path / "out")


@KIND
def test_a_quantised_model_resumes(kind: str, tmp_path: Path) -> None:
    net, swa = averaged(kind)
    checkpoint.save({"swa": swa}, tmp_path / "saved")
    again = SWA(net, swa_start="1ba")
    checkpoint.load({"swa": again}, tmp_path / "saved")
    again.step()
    with again.swapped_in():
        torch.testing.assert_close(net.lora.weight[0, 0].item(), (1 + 2 + 5) / 3)
    again.finalize()
    assert net.lora.weight.lt(3).all()


@KIND
def test_save_refuses_what_load_would_refuse(kind: str, tmp_path: Path) -> None:
    net, swa = averaged(kind)
    state = net.state_dict()
    if kind in NO_SAFETENSORS:
        message = rf"plain tensors, got model.base.weight={NO_SAFETENSORS[kind]}; leave it out"
        with pytest.raises(TypeError, match=message):
            checkpoint.save({"swa": swa, "model": state}, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []
    else:
        checkpoint.save({"swa": swa, "model": state}, tmp_path / "saved")
        reader = checkpoint.open_checkpoint(tmp_path / "saved")
        assert len(state) > 3
        assert all(torch.equal(reader.read(f"model.{name}"), value) for name, value in state.items())


@on_ranks(2)
def test_a_sharded_quantised_weight_is_as_in_the_state_dict_of_its_module(tmp_path: Path) -> None:
    net = Net("nf4")
    fully_shard(net)
    swa = SWA(net, swa_start="1ba")
    swa.step()
    full, expected = swa.average.full_state_dict(), net.state_dict()["base.weight"]
    assert sorted(full) == (["base.weight", "lora.bias", "lora.weight"] if torch.distributed.get_rank() == 0 else [])
    if full:
        assert same(full["base.weight"].to_local(), expected.to_local())
    with pytest.raises(ValueError, match=r"plain tensors, got base.weight=NF4Tensor"):
        checkpoint.export(swa, tmp_path / "out")
    checkpoint.save({"swa": swa}, tmp_path / "saved")
    checkpoint.export(tmp_path / "saved", tmp_path / "out.safetensors", only="averaged")
    assert sorted(load_file(tmp_path / "out.safetensors")) == ["lora.bias", "lora.weight"]


def test_a_frozen_weight_may_change_its_shape() -> None:
    """A layer of bitsandbytes repacks its weight in the first forward of an evaluation on a CPU."""
    net = nn.ModuleDict({"base": nn.Linear(4, 4).requires_grad_(False), "lora": nn.Linear(4, 2)})
    swa = SWA(net, swa_start="1ba")
    swa.step()
    with swa.swapped_in():
        net["base"].weight = nn.Parameter(torch.zeros(2, 8), requires_grad=False)
    assert swa.step()
    swa.finalize()
    assert swa.average.full_state_dict()["base.weight"].shape == (2, 8)
