"""Formats of rows: which columns hold prompt and answer, and which format a file has.

`data.columns` names the columns of `alpaca`; in the other formats they have the names that
everybody gives them, and only client and category are looked up there.
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
    """The columns that rows of one format are read from.

    `given` is `data.columns`, `columns` what it is for this format. Where rows are conversations,
    `columns.output` is the list of messages, and a column `system` may hold their system prompts.
    """

    format: str
    given: ColumnsSection
    columns: ColumnsSection
    conversations: bool = False

    @property
    def named(self) -> dict[str, str]:
        """The columns to read, by their keys."""
        given: dict[str, str | None] = self.columns.model_dump()
        return {key: name for key, name in given.items() if name is not None}

    @property
    def wanted(self) -> set[str]:
        """Every column to read, with those that may be missing."""
        return {*self.named.values(), *([SYSTEM] if self.conversations else [])}

    def others(self, found: Mapping[str, bool]) -> list[str]:
        """Return the other formats that columns are of; see `find_format`."""
        return [format_ for format_ in _marks(found, self.given) if format_ != self.format]

    def check(self, found: Sequence[str], where: str) -> None:
        """Refuse data without a column that is named, or with two of one that is read.

        Raises:
            DataError: it names all that are missing, their keys and the columns there are.
        """
        twice = [name for name in sorted(self.wanted) if found.count(name) > 1]
        if twice:
            raise DataError(f"data.path: {where} has two columns `{twice[0]}`; rename one")
        missing = [
            self._missing(key, name) for key, name in self.named.items() if name not in found
        ]
        if missing:
            raise DataError(
                f"{'; '.join(missing)}; {where} has {shown_names(found)}: name the right one, for "
                "example --set data.columns.client=NAME"
            )

    def check_part(self, found: Sequence[str], where: str) -> None:
        """Refuse one part of a split without a column that an answer needs.

        Raises:
            DataError: without it all rows of the part would count as rows without an answer.
        """
        keys = {"output", *_COLUMNS.get(self.format, {})}
        missing = [n for key, n in self.named.items() if key in keys and n not in found]
        if missing:
            raise DataError(
                f"data.path: {where} has no column `{missing[0]}`, which other files of its split "
                f"have (it has {shown_names(found)}); give all of them the same columns"
            )

    def _missing(self, key: str, name: str) -> str:
        if key in _COLUMNS.get(self.format, {}):
            return f"data.format: {self.format} needs a column `{name}`"
        optional = key in {"category", "instruction", "input"}
        remedy = f" (null if there is none: data.columns.{key}=null)" if optional else ""
        return f"data.columns.{key}: no column `{name}`{remedy}"


def row_columns(format_: str, columns: ColumnsSection) -> RowColumns:
    """Return the columns of a format; `columns` gives client and category, and all of `alpaca`."""
    changes = _COLUMNS.get(format_, {})
    return RowColumns(
        format=format_,
        given=columns,
        columns=columns.model_copy(update=changes),
        conversations=format_ in _CONVERSATIONS,
    )


def find_format(
    asked: RowFormat, found: Mapping[str, bool], columns: ColumnsSection, where: str
) -> str:
    """Return the format of rows: the one that is asked for, else what the columns tell.

    Args:
        asked: `data.format`.
        found: the names of the columns, and whether they hold lists or records.
        columns: `data.columns`; a column that it names is of `alpaca`.
        where: the file, for the error.

    Raises:
        DataError: they hold two formats.
    """
    if asked != AUTO:
        return asked
    marks = _marks(found, columns)
    if len(marks) > 1:
        mine = {columns.instruction, columns.input, columns.output} - {None}
        likely = ALPACA if mine <= found.keys() else marks[0]
        raise DataError(
            f"data.format: {where} has columns of {' and '.join(marks)} "
            f"({shown_names(list(found))}); say which, for example data.format={likely}"
        )
    return marks[0] if marks else ALPACA


def _marks(found: Mapping[str, bool], columns: ColumnsSection) -> list[str]:
    mine = {columns.instruction, columns.input, columns.output}
    marks = [
        format_
        for format_ in ("messages", "sharegpt")
        if found.get(str(_COLUMNS[format_]["output"])) and _COLUMNS[format_]["output"] not in mine
    ]
    if {"prompt", "completion"} <= found.keys() - mine:
        marks.append("completion")
    if columns.output in found:
        marks.append(ALPACA)
    return marks


def shown_names(names: Sequence[str]) -> str:
    """Return names of columns, the first twenty of them."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
