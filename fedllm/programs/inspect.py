"""Inspection of a client's row, from the raw text to the tokens that carry loss."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fedllm.config.models import Config
from fedllm.data.cache import unknown_client
from fedllm.data.columns import rows_by_client
from fedllm.data.readers import open_source
from fedllm.data.tokenize import EncodedRow
from fedllm.data.turns import Turn
from fedllm.data.writer import text_rows
from fedllm.errors import DataError, counted
from fedllm.model.base import load_tokenizer, locate_base
from fedllm.packing.batches import LossOn, target_places
from fedllm.process.log import say
from fedllm.programs.prepare import Report, row_encoder
from fedllm.storage.paths import CachePaths

_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token, and whether its prediction counts in the loss."""

    id: int
    text: str
    loss: bool


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An inspected row: as its owner wrote it, as the model reads it, and as it is trained.

    `tokens` is empty if the row has no answer: training drops such a row.
    """

    client: str
    split: str
    row: int
    rows: int
    category: str
    instruction: str
    input: str
    references: list[str]
    turns: list[Turn]
    prompt: str
    prompt_cut: bool
    answer_cut: bool
    tokens: list[Token]

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return dataclasses.asdict(self)


def inspect_client(
    config: Config, cache: CachePaths, client: str, row: int = 0, report: Report = say
) -> Inspection:
    """Inspect training row `row` of a client, or a test row if it has no training rows.

    Raises:
        DataError: there is no such client or row.
    """
    tokenizer = load_tokenizer(locate_base(config.model, cache, report))
    tables = open_source(config.data, cache, config.clients.split_seed).read()
    split, table = _rows_of(tables, client)
    if not 0 <= row < table.num_rows:
        raise DataError(
            f"--row: got {row}, client {client} has the {split} rows 0 to {table.num_rows - 1}"
        )
    chosen = table.slice(row, 1)
    text = text_rows(chosen)[0]
    encoder = row_encoder(config.data, tokenizer)
    encoded = encoder.encode([text])[0]
    return Inspection(
        client=client,
        split=split,
        row=row,
        rows=table.num_rows,
        category=chosen["category"][0].as_py(),
        instruction=text.instruction,
        input=text.input,
        references=list(text.references),
        turns=list(text.turns),
        prompt=encoder.prompt(text),
        prompt_cut=encoded.prompt_cut,
        answer_cut=encoded.answer_cut,
        tokens=_tokens(encoded, tokenizer, config.data.loss_on),
    )


def describe(inspected: Inspection) -> str:
    """Return an inspection as text; tokens with loss are in brackets."""
    marks = [f"[{t.text}]" if t.loss else t.text for t in inspected.tokens]
    with_loss = sum(token.loss for token in inspected.tokens)
    cuts = [name for name in ("prompt", "answer") if getattr(inspected, f"{name}_cut")]
    lines = [
        f"client {inspected.client}, {inspected.split} row {inspected.row} of {inspected.rows}",
        f"category     {inspected.category}",
        *_raw_lines(inspected),
        "",
        "prompt, before anything is cut:",
        *(f"  {line}" for line in inspected.prompt.splitlines()),
        "",
        f"{counted(len(inspected.tokens), 'token')}, {with_loss} with loss (in brackets); "
        f"cut: {' and '.join(cuts) or 'nothing'}",
        "  " + "·".join(marks) if marks else "  dropped: the row has no answer",
    ]
    return "\n".join(lines)


def _raw_lines(inspected: Inspection) -> list[str]:
    """Return the raw text of a row: the turns of a conversation, or the columns."""
    if inspected.turns:
        return [f"{turn.role:<12} {_shorten(turn.content)}" for turn in inspected.turns]
    return [
        f"instruction  {_shorten(inspected.instruction)}",
        f"input        {_shorten(inspected.input)}",
        f"output       {_shorten(' | '.join(inspected.references))}",
    ]


def _rows_of(tables: dict[str, pa.Table], client: str) -> tuple[str, pa.Table]:
    known: dict[str, None] = {}
    for split, table in tables.items():
        for rows in rows_by_client(table):
            if rows.client == client:
                return split, table.take(pa.array(rows.indices))
            known[rows.client] = None
    raise DataError(unknown_client(client, list(known)))


def _tokens(encoded: EncodedRow, tokenizer: Any, loss_on: LossOn) -> list[Token]:
    ids = [*encoded.prompt_ids, *encoded.answer_ids]
    with_loss = set(target_places(encoded, loss_on))
    return [
        Token(id=id_, text=tokenizer.decode([id_]), loss=place in with_loss)
        for place, id_ in enumerate(ids)
    ]


def _shorten(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= _WIDTH else f"{line[:_WIDTH]}... ({len(text):,} characters)"
