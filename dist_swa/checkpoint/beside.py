"""The files beside weights that transformers reads: configurations, tokenizers, processors and chat templates."""

from __future__ import annotations

import shutil
from pathlib import Path

from dist_swa.checkpoint.safetensors_io import SUFFIX, created
from dist_swa.storage.reader import METADATA

_WEIGHTS = (f"model{SUFFIX}", "pytorch_model.bin")  # as from_pretrained names a single file
_AVERAGE = "dist_swa"  # the folder of the average in a checkpoint of the Trainer
# The names of transformers 5: utils/__init__.py, tokenization_utils_base.py, and VOCAB_FILES_NAMES of its tokenizers.
# No adapter_config.json: with it, from_pretrained would look for an adapter's weights.
_PATTERNS = (
    *("config.json", "generation_config.json"),
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


def files_beside(path: str | Path) -> dict[str, Path]:
    """Return the files beside the weights at `path` by their names in the folder. Links to files are files.

    `path` is a folder with weights, the folder "dist_swa" in a checkpoint of the Trainer, or a file with a name that
    from_pretrained reads, such as "model.safetensors". Other files, such as "a.safetensors", may be anywhere: what is
    beside them need not be theirs.
    """
    path = Path(path)
    is_average = path.resolve().name == _AVERAGE and (path / METADATA).exists()
    if not (path.is_dir() or path.name in _WEIGHTS):
        return {}
    folder = path.parent if is_average or path.is_file() else path
    found = [file for pattern in _PATTERNS for file in sorted(folder.glob(pattern)) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in found}


def copy_beside(path: str | Path, folder: Path) -> None:
    """Copy the files beside the weights at `path` to `folder`. Local."""
    for name, source in files_beside(path).items():
        (folder / name).parent.mkdir(exist_ok=True)
        with source.open("rb") as file, created(folder / name) as copy:
            shutil.copyfileobj(file, copy)
