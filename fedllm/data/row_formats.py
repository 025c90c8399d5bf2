"""Formats of rows: which columns hold prompt and answer, and which format a file has.

`data.columns` names the columns of `alpaca`. The other formats have fixed column names; for them
`data.columns` names only client and category.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.models import ColumnsSection, RowFormat
from fedllm.errors import DataError

AUTO = "auto"
ALPACA = "alpaca"

# columns of the formats that are not `alpaca`
_COLUMNS: dict[str, dict[str, str | None]] = {
    "messages": {"instruction": None, "input": None, "output": "messages"},
    "sharegpt": {"instruction": None, "input": None, "output": "conversations"},
    "completion": {"instruction": "prompt", "input": None, "output": "completion"},
}
_CONVERSATIONS = {"messages", "sharegpt"}
SYSTEM = "system"


@dataclass(frozen=True, kw_only=True)
class RowColumns:
    """Columns from which rows of one format are read.

    `names` are the columns' names in this format, `configured` is `data.columns`. If rows are
    conversations, `names.output` is the list of messages, and a column `system` may hold system
    prompts.
    """

    format: str
    configured: ColumnsSection
    names: ColumnsSection
    conversations: bool = False

    @property
    def required(self) -> dict[str, str]:
        """Required columns, by their keys."""
        names: dict[str, str | None] = self.names.model_dump()
        return {key: name for key, name in names.items() if name is not None}

    @property
    def readable(self) -> set[str]:
        """All columns that are read, the optional ones included."""
        return {*self.required.values(), *([SYSTEM] if self.conversations else [])}

    def other_formats(self, found: Mapping[str, bool]) -> list[str]:
        """Return the formats that columns match, apart from this one; see `detect_format`."""
        return [
            format_
            for format_ in _matching_formats(found, self.configured)
            if format_ != self.format
        ]

    def check(self, found: Sequence[str], where: str) -> None:
        """Raise an error if a required column is missing or a column that is read occurs twice.

        Raises:
            DataError: names all missing columns, their keys and the columns of the data.
        """
        twice = [name for name in sorted(self.readable) if found.count(name) > 1]
        if twice:
            raise DataError(f"data.path: {where} has two columns `{twice[0]}`; rename one")
        missing = [
            self._missing_line(key, name)
            for key, name in self.required.items()
            if name not in found
        ]
        if missing:
            own = self.required.keys() - _COLUMNS.get(self.format, {}).keys()
            wrong = [key for key, name in self.required.items() if name not in found and key in own]
            example = f", for example --set data.columns.{wrong[0]}=NAME" if wrong else ""
            raise DataError(
                f"{'; '.join(missing)}; {where} has {shorten_names(found)}: name the right "
                f"one{example}"
            )

    def check_part(self, found: Sequence[str], where: str) -> None:
        """Raise an error if a part of a split lacks a column that an answer needs.

        Raises:
            DataError: all rows of the part would count as rows without an answer.
        """
        keys = {"output", *_COLUMNS.get(self.format, {})}
        missing = [n for key, n in self.required.items() if key in keys and n not in found]
        if missing:
            raise DataError(
                f"data.path: {where} has no column `{missing[0]}`, which other files of its split "
                f"have (it has {shorten_names(found)}); give all of them the same columns"
            )

    def _missing_line(self, key: str, name: str) -> str:
        if key in _COLUMNS.get(self.format, {}):
            return f"data.format: {self.format} needs a column `{name}`"
        optional = key in {"category", "instruction", "input"}
        remedy = f" (null if there is none: data.columns.{key}=null)" if optional else ""
        return f"data.columns.{key}: no column `{name}`{remedy}"


def row_columns(format_: str, columns: ColumnsSection) -> RowColumns:
    """Return the columns of a format; `columns` names client and category, or all for `alpaca`."""
    changes = _COLUMNS.get(format_, {})
    return RowColumns(
        format=format_,
        configured=columns,
        names=columns.model_copy(update=changes),
        conversations=format_ in _CONVERSATIONS,
    )


def detect_format(
    configured: RowFormat, found: Mapping[str, bool], columns: ColumnsSection, where: str
) -> str:
    """Return the format of rows: the configured one, else the one that their columns match.

    Args:
        configured: `data.format`.
        found: the names of the columns, and whether they hold lists or records.
        columns: `data.columns`; a column that it names belongs to `alpaca`.
        where: the file, for the error.

    Raises:
        DataError: the columns match two formats.
    """
    if configured != AUTO:
        return configured
    matches = _matching_formats(found, columns)
    if len(matches) > 1:
        own = {columns.instruction, columns.input, columns.output} - {None}
        likely = ALPACA if own <= found.keys() else matches[0]
        raise DataError(
            f"data.format: {where} has columns of {' and '.join(matches)} "
            f"({shorten_names(list(found))}); say which, for example data.format={likely}"
        )
    return matches[0] if matches else ALPACA


def _matching_formats(found: Mapping[str, bool], columns: ColumnsSection) -> list[str]:
    own = {columns.instruction, columns.input, columns.output}
    matches = [
        format_
        for format_ in ("messages", "sharegpt")
        if found.get(str(_COLUMNS[format_]["output"])) and _COLUMNS[format_]["output"] not in own
    ]
    if {"prompt", "completion"} <= found.keys() - own:
        matches.append("completion")
    if columns.output in found:
        matches.append(ALPACA)
    return matches


def shorten_names(names: Sequence[str]) -> str:
    """Return the names of the first twenty columns as text."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
