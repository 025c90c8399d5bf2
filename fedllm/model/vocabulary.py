"""The vocabulary of a tokenizer and its base: whether each token has a row in the embedding."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from fedllm.errors import ModelError

_ORDINARY = ("bos_token", "eos_token", "pad_token", "unk_token")
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def embedded_tokens(model: nn.Module) -> int:
    """Return the number of tokens of a model: rows of its embedding and of its output head."""
    causal: Any = model
    layers = filter(None, (causal.get_input_embeddings(), causal.get_output_embeddings()))
    rows: int = min(layer.weight.shape[0] for layer in layers)
    return rows


def tokens_beyond(tokenizer: Any, rows: int) -> dict[str, int]:
    """Return the tokens whose ids have no row in an embedding, in the order of ids."""
    beyond = {token: id_ for token, id_ in tokenizer.get_vocab().items() if id_ >= rows}
    return dict(sorted(beyond.items(), key=lambda item: item[1]))


def check_tokens(folder: Path, tokenizer: Any, rows: int, *, begun: bool = False) -> str:
    """Raise ModelError if ordinary text can have a token without a row in the embedding.

    A token for images, for example, is allowed: text-only bases keep it in their tokenizer.

    Args:
        folder: the directory of the base.
        tokenizer: the tokenizer of the base.
        rows: number of rows of the embedding.
        begun: a run has trained so before: the objection is returned, not raised.

    Returns:
        A line for the user if a token has no row; else empty.

    Raises:
        ModelError: names the token and both sizes.
    """
    beyond = [t for t in tokens_beyond(tokenizer, rows) if _is_of_folder(folder, t)]
    occurring = [token for token in beyond if _is_of_text(tokenizer, token)]
    if occurring and not begun:
        raise _without_row(folder, tokenizer, rows, occurring[0])
    if not beyond:
        return ""
    more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
    return (
        f"model.path: the tokenizer knows {beyond[0]}{more}, the embedding ({rows} rows) does not; "
        "no text of the data may hold it"
    )


def check_rows(folder: Path, tokenizer: Any, rows: int, largest_token: int) -> None:
    """Raise ModelError if tokenised data has a token without a row in the embedding.

    Raises:
        ModelError: names the token and both sizes.
    """
    if largest_token >= rows:
        token = tokenizer.convert_ids_to_tokens(largest_token)
        raise _without_row(folder, tokenizer, rows, token)


def _is_of_text(tokenizer: Any, token: str) -> bool:
    """Say whether text, a template or padding can have a token."""
    if token not in tokenizer.all_special_tokens:
        return True
    named = {getattr(tokenizer, name, None) for name in _ORDINARY}
    return token in named or token in str(tokenizer.chat_template or "")


def _is_of_folder(folder: Path, token: str) -> bool:
    """Say whether a tokenizer's files name a token; classes of transformers add some."""
    written = {json.dumps(token), json.dumps(token, ensure_ascii=False)}
    files = (folder / name for name in _FILES)
    return any(
        word in text
        for text in (f.read_text("utf-8", "replace") for f in files if f.is_file())
        for word in written
    )


def _without_row(folder: Path, tokenizer: Any, rows: int, token: str) -> ModelError:
    id_ = tokenizer.convert_tokens_to_ids(token)
    return ModelError(
        f"model.path: {folder}: token {token} has id {id_}, but the embedding has {rows} rows and "
        f"the tokenizer {len(tokenizer)} tokens; save the model with as many rows "
        "(resize_token_embeddings), or the tokenizer that belongs to it"
    )
