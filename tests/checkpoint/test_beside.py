"""transformers opens what a merge or an export writes: it has the configuration and tokenizer of the last source."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dist_swa import ShardedAverage, checkpoint
from dist_swa.__main__ import main
from dist_swa.checkpoint.beside import files_beside

# What a checkpoint of the Trainer has beside weights; none of it belongs to the merged model.
STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "trainer_state.json")
OTHERS = ("pytorch_model.bin", "README.md", "train.py", "notes.txt", "adapter_config.json", "scaler.pt", "secret.json")
COPIED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def gpt2(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def llama(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, max_position_embeddings=8, **sizes))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefghij?")}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


def save_trainer_checkpoint(folder: Path, model: PreTrainedModel) -> Path:
    """Save what the Trainer saves, and files that belong to nothing."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name in (*STATE, *OTHERS):
        (folder / name).write_text("{}")
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def average_of(*models: PreTrainedModel) -> dict[str, Tensor]:
    states = [model.state_dict() for model in models]
    return {name: (sum(state[name].double() for state in states) / len(states)).float() for name in states[0]}


@pytest.mark.parametrize("build", [gpt2, llama])
def test_transformers_opens_a_merge(tmp_path: Path, build: Callable[[int], PreTrainedModel]) -> None:
    sources = [save_trainer_checkpoint(tmp_path / f"checkpoint-{i}", build(i)) for i in (1, 2)]
    checkpoint.merge(sources, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    average = average_of(build(1), build(2))
    assert opened.state_dict().keys() == average.keys()
    for name, value in opened.state_dict().items():
        assert torch.allclose(value, average[name], rtol=1e-6), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("c a j x")["input_ids"] == [2, 0, 9, 10]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer().chat_template
    assert names_in(tmp_path / "out") == {"model.safetensors", "dist_swa.json", *COPIED}


@pytest.mark.parametrize("file", ["", "model.safetensors"], ids=["folder", "file"])
def test_transformers_opens_an_export(tmp_path: Path, file: str) -> None:
    source = save_trainer_checkpoint(tmp_path / "checkpoint-1", gpt2(1))
    assert main(["export", str(source / file), str(tmp_path / "out"), "--dtype", "bfloat16", "--quiet"]) == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, value in opened.state_dict().items():
        assert torch.equal(value.bfloat16(), gpt2(1).state_dict()[name].bfloat16()), name
    assert names_in(tmp_path / "out") == {"model.safetensors", *COPIED}


def test_the_files_of_the_last_source_are_taken(tmp_path: Path) -> None:
    sources = [save_trainer_checkpoint(tmp_path / f"checkpoint-{i}", gpt2(i)) for i in (1, 2)]
    for i, source in enumerate(sources):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"from": i}))
    (sources[0] / "merges.txt").touch()
    checkpoint.merge(sources, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").to_dict()["from"] == 1
    assert names_in(tmp_path / "out") == {"model.safetensors", "dist_swa.json", *COPIED}


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize(
    ("source", "out"), [("", "out.safetensors"), ("a.safetensors", "out")], ids=["to a file", "from any file"]
)
def test_nothing_is_copied(tmp_path: Path, source: str, out: str, command: str) -> None:
    """What is beside a file of any name need not be its own."""
    folder = save_trainer_checkpoint(tmp_path / "folder", gpt2(1))
    if source:
        (folder / "model.safetensors").rename(folder / source)
    if command == "merge":
        checkpoint.merge([folder / source], tmp_path / out)
    else:
        checkpoint.export(folder / source, tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", out}
    assert out.endswith("s") or names_in(tmp_path / out) - {"dist_swa.json"} == {"model.safetensors"}


def test_links_are_copied_as_files(tmp_path: Path) -> None:
    """The cache of Hugging Face has links to files with other names."""
    save_trainer_checkpoint(tmp_path / "blobs", gpt2(1))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../blobs/{name}")
    (snapshot / "generation_config.json").symlink_to("../missing")
    (snapshot / "vocab.json").mkdir()
    checkpoint.merge([snapshot], tmp_path / "out")
    assert names_in(tmp_path / "out") == {"config.json", "tokenizer.json", "model.safetensors", "dist_swa.json"}
    copy = tmp_path / "out/config.json"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (tmp_path / "blobs/config.json").read_bytes()


SECRET = '{"token": "secret"}'


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize("link", ["absolute", "relative", "same name", "of the folder"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, link: str, command: str) -> None:
    folder = tmp_path / "downloads" / "a"
    save_trainer_checkpoint(folder, gpt2(1))
    templates = folder / "additional_chat_templates"
    names = ["config.json", "merges.txt"]
    for name in ("secret", *names, "x.jinja"):
        (tmp_path / "home" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "home" / name).write_text(SECRET)
    if link == "of the folder":
        templates.symlink_to("../../home")
        names = ["additional_chat_templates/x.jinja"]
    for name in names if link != "of the folder" else ():
        (folder / name).unlink(missing_ok=True)
        to = "home/secret" if link != "same name" else f"home/{name}"
        (folder / name).symlink_to(f"{tmp_path}/{to}" if link == "absolute" else f"../../{to}")
    message = rf"needs files of .*/a, got links that lead out of it; not copied: {', '.join(names)}; replace"
    write = partial(checkpoint.merge, [folder]) if command == "merge" else partial(checkpoint.export, folder)
    with pytest.warns(UserWarning, match=message):
        write(tmp_path / "out")
    assert names_in(tmp_path / "out") - {"dist_swa.json"} == {"model.safetensors", *COPIED} - {*names}
    assert all(SECRET.encode() not in (tmp_path / "out" / name).read_bytes() for name in names_in(tmp_path / "out"))


@pytest.mark.parametrize("blobs", ["", "blobs", "../blobs", "../../blobs"])
def test_links_in_the_folder_and_in_the_cache_are_followed(tmp_path: Path, blobs: str) -> None:
    folder = tmp_path / "models--me--a/snapshots/123"
    save_trainer_checkpoint(folder, gpt2(1))
    content = (folder / "config.json").read_bytes()
    (folder / blobs).resolve().mkdir(exist_ok=True)
    (folder / "config.json").rename(folder / blobs / "0123abc")
    (folder / "config.json").symlink_to(Path(blobs, "0123abc"))
    (tmp_path / "link").symlink_to(folder)
    checkpoint.export(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == content


def save_with_average(folder: Path, model: PreTrainedModel) -> Path:
    """Save a checkpoint of the Trainer with an average of a part of the parameters."""
    save_trainer_checkpoint(folder, model)
    (folder / "pytorch_model.bin").unlink()
    average = ShardedAverage(model, parameters="*.mlp.*")
    average.update()
    checkpoint.save({"swa": average}, folder / "dist_swa")
    return folder


@pytest.mark.parametrize("path", ["", "dist_swa"])
def test_an_export_of_the_averaged_parameters_alone_is_no_model(tmp_path: Path, path: str) -> None:
    """With a config.json, from_pretrained would start all other parameters at random."""
    folder = save_with_average(tmp_path / "checkpoint-1", gpt2(1))
    checkpoint.export(folder / path, tmp_path / "out", only="averaged")
    assert names_in(tmp_path / "out") == {"model.safetensors"}
    assert len(load_file(tmp_path / "out/model.safetensors")) == 4
    assert main(["export", str(folder / path), str(tmp_path / "same"), "--only", "averaged", "--quiet"]) == 0
    assert names_in(tmp_path / "same") == {"model.safetensors"}


@pytest.mark.parametrize("command", ["export", "merge"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_from_pretrained_opens_an_output_in_its_dtype(tmp_path: Path, key: str, command: str) -> None:
    folder = save_trainer_checkpoint(tmp_path / "checkpoint-1", gpt2(1))
    config = json.loads((folder / "config.json").read_text())
    before = {name: value for name, value in config.items() if name != "dtype"} | {
        key: "float32",
        "part_config": {"dtype": "float32", "hidden_size": 8},
        "vision_config": {"dtype": None},
        "quantization_config": {"dtype": "float32"},
        "words": {"dtype": "float32"},
    }
    (folder / "config.json").write_text(json.dumps(before))
    out = ["--out", str(tmp_path / "out")] if command == "merge" else [str(tmp_path / "out")]
    assert main([command, str(folder), *out, "--dtype", "bfloat16", "--quiet"]) == 0
    after = json.loads((tmp_path / "out/config.json").read_text())
    changed = {key: "bfloat16", "part_config": {"dtype": "bfloat16", "hidden_size": 8}}
    assert list(after.items()) == list((before | changed).items())
    del after["quantization_config"]  # transformers would need its method
    (tmp_path / "out/config.json").write_text(json.dumps(after))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_configuration_without_a_dtype_is_copied(tmp_path: Path, content: str) -> None:
    folder = save_trainer_checkpoint(tmp_path / "a", gpt2(1))
    (folder / "config.json").write_text(content)
    checkpoint.export(folder, tmp_path / "out", dtype=torch.bfloat16)
    assert "".join((tmp_path / "out/config.json").read_text().split()) == content


def test_the_average_in_a_checkpoint_of_the_trainer_has_its_files(tmp_path: Path) -> None:
    folder = save_trainer_checkpoint(tmp_path / "checkpoint-64", gpt2(1))
    checkpoint.save({"model": gpt2(2).state_dict()}, folder / "dist_swa")
    checkpoint.export(folder / "dist_swa", tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(opened.state_dict()["lm_head.weight"], gpt2(2).state_dict()["lm_head.weight"])


@pytest.mark.parametrize("name", ["dist_swa", "model"])
def test_a_folder_of_any_name_has_its_own_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    folder = save_trainer_checkpoint(tmp_path / name, gpt2(1))
    assert files_beside(folder)["config.json"] == folder / "config.json"
    assert files_beside(folder).keys() == COPIED


def test_chat_templates_of_several_names_and_code_are_copied(tmp_path: Path) -> None:
    files = ["additional_chat_templates/tool_use.jinja", "modeling_mine.py", "configuration_mine.py", "qwen.tiktoken"]
    for name in files:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(name)
    save_file({"w": torch.ones(1)}, tmp_path / "a/model.safetensors")
    checkpoint.merge([tmp_path / "a"], tmp_path / "out")
    assert names_in(tmp_path / "out") == {"model.safetensors", "dist_swa.json", *files}
    assert all((tmp_path / "out" / name).read_text() == name for name in files)


def test_known_names_of_transformers_are_copied(tmp_path: Path) -> None:
    import transformers.tokenization_utils_base as tokenization
    import transformers.utils as utils_of_transformers

    utils: Any = utils_of_transformers
    names: list[Any] = [utils.CONFIG_NAME, utils.GENERATION_CONFIG_NAME, utils.FEATURE_EXTRACTOR_NAME]
    names += [utils.IMAGE_PROCESSOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.PROCESSOR_NAME, utils.AUDIO_TOKENIZER_NAME]
    names += [utils.CHAT_TEMPLATE_FILE, tokenization.SPECIAL_TOKENS_MAP_FILE, tokenization.ADDED_TOKENS_FILE]
    names += [tokenization.TOKENIZER_CONFIG_FILE, tokenization.FULL_TOKENIZER_FILE]
    for name in names:
        (tmp_path / name).touch()
    assert files_beside(tmp_path).keys() == set(names)


def test_a_merge_of_checkpoints_needs_no_files(tmp_path: Path) -> None:
    checkpoint.save({"model": {"w": torch.ones(2)}}, tmp_path / "a")
    checkpoint.merge([tmp_path / "a"], tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.ones(2))
