"""Averaged adapters of PEFT: an export of a trainer's checkpoint is a folder that `PeftModel.from_pretrained` opens."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from dist_swa import EMA, SWA, Equal, checkpoint
from dist_swa.__main__ import main
from models import same_bits

ATTENTION, EMBEDDING = ["c_attn"], ["c_attn", "wte"]
KINDS: dict[str, Callable[[], Any]] = {
    "linear": lambda: LoraConfig(target_modules=ATTENTION, fan_in_fan_out=True),
    "embedding": lambda: LoraConfig(target_modules=EMBEDDING, fan_in_fan_out=True),
    "all biases": lambda: LoraConfig(target_modules=ATTENTION, fan_in_fan_out=True, bias="all"),
    "modules_to_save": lambda: LoraConfig(
        target_modules=ATTENTION, fan_in_fan_out=True, modules_to_save=["ln_f", "lm_head"]
    ),
    "tokens": lambda: LoraConfig(target_modules=ATTENTION, fan_in_fan_out=True, trainable_token_indices=[1, 3]),
    "dora": lambda: LoraConfig(target_modules=ATTENTION, fan_in_fan_out=True, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True),
    "vera": lambda: VeraConfig(target_modules=ATTENTION, fan_in_fan_out=True, r=2),  # has frozen matrices
}

PROMPTS: dict[str, Any] = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig, "p-tuning": PromptEncoderConfig}


@pytest.fixture(autouse=True)
def _pefts_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in (
            "Setting `save_emb",
            "Model has `tie_word_emb",
            "Could not find a config",
            "`is_gradient_check",
        ):
            warnings.filterwarnings("ignore", message)
        yield


def base() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def train(model: PeftModel, **options: Any) -> SWA:
    """Average three models, then change the trained weights further."""
    swa = SWA(model, swa_start="0ba", **({"rule": EMA(decay=0.5)} | options))
    torch.manual_seed(2)
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if step < 3:
            swa.step()
    return swa


def save(model: PeftModel, swa: SWA, folder: Path) -> Path:
    """Write what the Trainer of transformers and `add_swa` write."""
    model.save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    torch.save({"step": 3}, folder / "optimizer.pt")
    checkpoint.save({"swa": swa}, folder / "dist_swa")
    return folder


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(torch.arange(8)[None]).logits
    return result


def check(model: PeftModel, swa: SWA, out: Path) -> None:
    """Check that the folder `out` is the averaged adapter, under the names of PEFT."""
    with swa.swapped_in():
        expected = outputs(model)
    assert not torch.equal(outputs(model), expected)
    opened = PeftModel.from_pretrained(base(), out)
    assert torch.equal(outputs(opened), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_the_averaged_adapter(tmp_path: Path, kind: str) -> None:
    model = get_peft_model(base(), KINDS[kind]())
    swa = train(model)
    folder = save(model, swa, tmp_path / "checkpoint-3")
    assert main(["export", str(folder), str(tmp_path / "out"), "--only", "averaged", "--quiet"]) == 0
    check(model, swa, tmp_path / "out")
    written, trained = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", folder))
    assert {name: value.shape for name, value in written.items()} == {n: value.shape for n, value in trained.items()}
    assert (tmp_path / "out/adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/model.safetensors").exists()
    assert not (tmp_path / "out/optimizer.pt").exists()


@pytest.mark.parametrize("trained", ["default", "other"])
def test_of_two_adapters_the_trained_one_is_written(tmp_path: Path, trained: str) -> None:
    model = get_peft_model(base(), KINDS["linear"]())
    model.add_adapter("other", KINDS["linear"]())
    model.set_adapter(trained)
    swa = train(model)
    folder = save(model, swa, tmp_path / "checkpoint-3")
    assert (folder / "other/adapter_model.safetensors").exists()
    checkpoint.export(folder, tmp_path / "out", only="averaged")
    check(model, swa, tmp_path / "out")


def test_an_adapter_of_another_name_alone(tmp_path: Path) -> None:
    model = get_peft_model(base(), KINDS["modules_to_save"](), adapter_name="mine")
    swa = train(model)
    folder = save(model, swa, tmp_path / "checkpoint-3")
    assert not (folder / "adapter_config.json").exists()
    checkpoint.export(folder, tmp_path / "out", only="averaged")
    check(model, swa, tmp_path / "out")


def test_statistics_in_modules_to_save_are_those_of_the_average(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model: Any = get_peft_model(network(), LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    swa = train(model)
    model(torch.randn(8, 4))
    with swa.swapped_in():
        model.train()
        model(torch.randn(8, 4))
        model.eval()
        expected = model(torch.ones(2, 4)).detach()
    folder = save(model, swa, tmp_path / "checkpoint-3")
    checkpoint.export(folder, tmp_path / "out", only="averaged")
    opened: Any = PeftModel.from_pretrained(network(), tmp_path / "out").eval()
    assert torch.equal(opened(torch.ones(2, 4)).detach(), expected)


@pytest.mark.parametrize("kind", ["bin", "folder of the average", "bfloat16", "named average"])
def test_sources_and_options(tmp_path: Path, kind: str) -> None:
    model = get_peft_model(base(), KINDS["dora"]())
    is_named = kind == "named average"
    swa = train(model, rule={"mean": Equal(), "ema": EMA(decay=0.5)}, transfer="ema") if is_named else train(model)
    folder, options = save(model, swa, tmp_path / "checkpoint-3"), dict[str, Any]()
    if kind == "bin":
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    elif kind == "bfloat16":
        options["dtype"] = torch.bfloat16
    elif is_named:
        options["key"] = "swa.ema"
    source = folder / "dist_swa" if kind == "folder of the average" else folder
    checkpoint.export(source, tmp_path / "out", only="averaged", **options)
    if kind == "bfloat16":
        assert {value.dtype for value in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {
            torch.bfloat16
        }
    else:
        check(model, swa, tmp_path / "out")


# Adapters that PEFT or an export saved


def mean_adapter(model: PeftModel, folders: Sequence[Path]) -> Tensor:
    """Return the outputs of the mean of the tensors in adapter folders, which PEFT opens."""
    states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    mean = {name: torch.stack([state[name] for state in states]).double().mean(0).float() for name in states[0]}
    set_peft_model_state_dict(model, mean)
    return outputs(model)


@pytest.mark.parametrize("kind", ["exports", "checkpoints", "files", "bin", "export of a checkpoint"])
def test_merged_adapters_are_an_adapter(tmp_path: Path, kind: str) -> None:
    model = get_peft_model(base(), KINDS["modules_to_save"]())
    folders = [save(model, train(model), tmp_path / f"checkpoint-{i}") for i in (1, 2)]
    if kind == "exports":
        exports = [tmp_path / "a", tmp_path / "b"]
        for folder, out in zip(folders, exports, strict=True):
            checkpoint.export(folder, out, only="averaged")
        folders = exports
    expected = mean_adapter(model, folders[: 1 if kind == "export of a checkpoint" else 2])
    for folder in folders if kind == "bin" else ():
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    out, has_key = tmp_path / "out", kind not in ("exports", "files")
    if kind == "export of a checkpoint":
        checkpoint.export(folders[0], out, key="model")
    else:
        paths = [folder / "adapter_model.safetensors" if kind == "files" else folder for folder in folders]
        checkpoint.merge(paths, out, key="model" if has_key else None)
    assert torch.equal(outputs(PeftModel.from_pretrained(base(), out)), expected)
    assert (out / "adapter_config.json").read_bytes() == (folders[0] / "adapter_config.json").read_bytes()
    assert not (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").exists() == (kind != "files")


# What is not an adapter folder


def test_a_file_has_the_names_of_the_model(tmp_path: Path) -> None:
    model = get_peft_model(base(), KINDS["linear"]())
    swa = train(model)
    folder = save(model, swa, tmp_path / "checkpoint-3")
    checkpoint.export(folder, tmp_path / "out.safetensors", only="averaged")
    assert same_bits(load_file(tmp_path / "out.safetensors"), swa.average.full_state_dict(only="averaged"))


def test_without_a_configuration_the_names_are_those_of_the_model(tmp_path: Path) -> None:
    model = get_peft_model(base(), KINDS["linear"]())
    swa = train(model)
    folder = save(model, swa, tmp_path / "checkpoint-3")
    (folder / "adapter_config.json").unlink()
    checkpoint.export(folder, tmp_path / "out", only="averaged")
    assert same_bits(load_file(tmp_path / "out/model.safetensors"), swa.average.full_state_dict(only="averaged"))


@pytest.mark.parametrize("source", ["checkpoint-3", "checkpoint-3/dist_swa"])
@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("command", ["export", "merge"])
def test_an_export_of_the_whole_model_names_the_option(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, source: str, command: str
) -> None:
    model = get_peft_model(base(), KINDS["linear"](), adapter_name=name)
    save(model, train(model), tmp_path / "checkpoint-3")
    capfd.readouterr()
    assert main([command, str(tmp_path / source), *["--out"] * (command == "merge"), str(tmp_path / "out")]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(
        "; export with only='averaged' (--only averaged), which writes the averaged adapter (for a merge: export each,"
        " then merge the exports)"
    )
    assert not (tmp_path / "out").exists()


def test_several_averaged_adapters_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(base(), KINDS["linear"]())
    model.add_adapter("other", KINDS["linear"]())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in parameter_name)
    folder = save(model, train(model), tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"one averaged adapter, got default, other in .*; .* ends in \.safetensors"):
        checkpoint.export(folder, tmp_path / "out", only="averaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [*PROMPTS, "trained besides", "another shape"])
def test_what_peft_has_no_place_for_is_refused(tmp_path: Path, kind: str) -> None:
    if kind in PROMPTS:
        model = get_peft_model(base(), PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=2))
    else:
        model = get_peft_model(base(), KINDS["linear"]())
    if kind == "trained besides":
        model.get_parameter("base_model.model.transformer.ln_f.weight").requires_grad_()
    folder = save(model, train(model), tmp_path / "checkpoint-3")
    if kind == "another shape":
        shutil.rmtree(folder / "dist_swa")
        smaller = get_peft_model(base(), LoraConfig(r=4, target_modules=ATTENTION, fan_in_fan_out=True))
        checkpoint.save({"swa": train(smaller)}, folder / "dist_swa")
    with pytest.raises(ValueError, match=r"needs each averaged parameter in the file of PEFT, got none of .*; .* ends"):
        checkpoint.export(folder, tmp_path / "out", only="averaged")
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    model = get_peft_model(base(), KINDS["linear"]())
    folder = save(model, train(model), tmp_path / "checkpoint-3")
    (folder / "adapter_config.json").rename(tmp_path / "private.json")
    (folder / "adapter_config.json").symlink_to(tmp_path / "private.json")
    with pytest.warns(UserWarning, match=r"got links that lead out of it; not copied: adapter_config.json"):
        checkpoint.export(folder, tmp_path / "out", only="averaged")
    assert json.loads((tmp_path / "private.json").read_text())["peft_type"] == "LORA"
    assert not (tmp_path / "out/adapter_config.json").exists()
