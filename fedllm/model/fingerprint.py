"""Fingerprints of a base model and of its tokenizer, by content."""

from pathlib import Path

from fedllm.errors import ModelError
from fedllm.model.weight_files import weight_files
from fedllm.storage.fingerprints import fingerprint_files

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
_ADAPTER = "adapter_config.json"
_GGUF = ".gguf"


def fingerprint_model(folder: Path) -> str:
    """Return the SHA-256 over `config.json` and the weights that transformers loads.

    Raises:
        ModelError: the directory holds no model.
    """
    check_model_folder(folder)
    return fingerprint_files([folder / "config.json", *weight_files(folder)], folder)


def fingerprint_tokenizer(folder: Path) -> str:
    """Return the SHA-256 over the tokenizer's files of a model directory.

    Raises:
        ModelError: the directory holds no tokenizer.
    """
    files = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    if not files:
        raise ModelError(
            f"model.path: {folder} holds no tokenizer ({_shown(folder)}); save the model's "
            "tokenizer there (tokenizer.save_pretrained)"
        )
    return fingerprint_files(files, folder)


def check_model_folder(folder: Path) -> None:
    """Raise ModelError if a folder is no model directory.

    Raises:
        ModelError: says what was found and what to give instead.
    """
    if folder.suffix == _GGUF or (folder.is_dir() and _has_gguf_alone(folder)):
        raise ModelError(
            f"model.path: {folder} is GGUF, a quantised format of other programs; give the "
            "directory of the model that it was made of"
        )
    if not folder.is_dir():
        raise ModelError(
            f"model.path: {folder}: no such directory; give a model directory, a hub name that "
            "`fedllm prepare` can fetch, or `embedded`"
        )
    if (folder / _ADAPTER).is_file():
        raise ModelError(
            f"model.path: {folder} holds a PEFT adapter, not a model; give the directory of the "
            "base that its adapter_config.json names"
        )
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += [] if weight_files(folder) else ["weights (*.safetensors)"]
    if missing:
        raise ModelError(
            f"model.path: {folder} holds {_shown(folder)} but no {' and no '.join(missing)}; give "
            "a directory as save_pretrained writes it"
        )


def _has_gguf_alone(folder: Path) -> bool:
    return any(folder.glob(f"*{_GGUF}")) and not any(folder.glob("*.safetensors"))


def _shown(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
