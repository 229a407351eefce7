"""The files beside weights that transformers and PEFT read: configurations, tokenizers, processors, chat templates."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_swa.checkpoint.entries import TRAINER_FOLDER
from dist_swa.checkpoint.safetensors_io import SUFFIX, created
from dist_swa.storage.reader import METADATA

ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", (f"adapter_model{SUFFIX}", "adapter_model.bin")
_DEFAULT_ADAPTER = "default"  # lies in the folder itself; PEFT saves others in folders of their names
_WEIGHTS = (f"model{SUFFIX}", "pytorch_model.bin")  # as from_pretrained names a single file
# The names of transformers 5: utils/__init__.py, tokenization_utils_base.py, and VOCAB_FILES_NAMES of its tokenizers.
# Not adapter_config.json: from_pretrained would then need the weights of an adapter.
_OF_MODEL = ("config.json", "generation_config.json")
_OF_INPUTS = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    "audio_tokenizer_config.json",
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "spm.model", "spm_char.model", "bpe.model", "bpe.codes", "tekken.json", "*.tiktoken"),
    *("source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "entity_vocab.json"),
    *("dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "prophetnet.tokenizer"),
    *("word_shape.json", "word_pronunciation.json"),
    # The code of models on the Hub; from_pretrained runs it with trust_remote_code=True only.
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "*processing_*.py", "feature_extraction_*.py"),
)


def adapter_folders(path: str | Path) -> dict[str, Path]:
    """Return the folders of the adapters that PEFT saved in the checkpoint at `path`, by the names of the adapters."""
    folder = _folder_of(Path(path))
    found = {_DEFAULT_ADAPTER: folder} if (folder / ADAPTER_CONFIG).exists() else {}
    found |= {config.parent.name: config.parent for config in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))}
    return {name: place for name, place in found.items() if any((place / file).exists() for file in ADAPTER_FILES)}


def files_beside(path: str | Path, patterns: Sequence[str] = (*_OF_MODEL, *_OF_INPUTS)) -> dict[str, Path]:
    """Return the files beside the weights at `path` by their names in the folder. Links to files are files.

    `path` is a folder with weights, the folder "dist_swa" in a checkpoint of the Trainer, or a file with a name that
    from_pretrained reads, such as "model.safetensors". Other files, such as "a.safetensors", may be anywhere: what is
    beside them need not be theirs.

    Links may lead to the folder, and to the ``blobs`` of Hugging Face's cache. Others are left out with a warning: in a
    folder from someone else, ``config.json`` may be a link to a private file.
    """
    path = Path(path)
    if not (path.is_dir() or path.name in _WEIGHTS):
        return {}
    folder = _folder_of(path)
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]
    found = {file.relative_to(folder).as_posix(): file for file in files}
    home = folder.resolve()
    allowed = {home, home.parent / "blobs", home.parent.parent / "blobs"}
    outside = [name for name, file in found.items() if allowed.isdisjoint(file.resolve().parents)]
    if outside:
        warnings.warn(
            f"copying needs files of {folder}, got links that lead out of it; not copied: {', '.join(outside)}; replace"
            " the links by files if these belong to the model",
            stacklevel=2,
        )
    return {name: file for name, file in found.items() if name not in outside}


def copy_beside(path: str | Path, folder: Path, dtype: torch.dtype | None, adapter: Path | None) -> None:
    """Copy the files beside the weights at `path` to `folder`; ``config.json`` gets `dtype` if it is given. Local.

    With `adapter`, the folder of an adapter at `path`, they are those of the adapter.
    """
    if adapter is None:
        files = files_beside(path)
    else:
        files = files_beside(adapter, [ADAPTER_CONFIG]) | files_beside(path, _OF_INPUTS)
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with source.open("rb") as file, created(folder / name) as copy:
            if dtype is not None and name == "config.json":
                copy.write(_in_dtype(file.read(), dtype))
            else:
                shutil.copyfileobj(file, copy)


def _folder_of(path: Path) -> Path:
    """Return the folder of the weights at `path`: of the average in a trainer's checkpoint, the folder around it."""
    is_average = path.resolve().name == TRAINER_FOLDER and (path / METADATA).exists()
    return path.parent if is_average or path.is_file() else path


def _in_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """Return a configuration that says `dtype` where it says a dtype of weights; as it is if it is not JSON."""
    try:
        return json.dumps(_replaced(json.loads(config), str(dtype).removeprefix("torch.")), indent=2).encode()
    except (ValueError, RecursionError):
        return config


def _replaced(config: Any, dtype: str) -> Any:
    """Return `config` with another dtype, also in the configurations of its parts, such as "text_config"."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _replaced(value, dtype)
        if key.endswith("config") and key != "quantization_config"
        else value
        for key, value in config.items()
    }
