"""`fedllm init`: a first configuration from three questions."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.options import say
from fedllm.config.models import DataSection
from fedllm.config.starter import EMBEDDED, PLACES, StarterAnswers, starter_text
from fedllm.errors import ConfigError
from fedllm.storage.paths import CachePaths
from fedllm.storage.publishing.publish import publish_bytes

_QUESTIONS = {
    "data": "Which data? A file, a folder, a hub name, or embedded",
    "model": "Which model? A folder, a hub name, or embedded",
    "where": "Where does it run? here, or slurm",
}
_DEFAULTS = {"data": EMBEDDED, "model": EMBEDDED, "where": "here"}


def init(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write.", show_default=True)
    ] = Path("fedllm.yaml"),
    data: Annotated[
        str | None, typer.Option(metavar="D", help="File, folder, hub name or embedded.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Folder, hub name or embedded.")
    ] = None,
    where: Annotated[str | None, typer.Option(metavar="W", help="here or slurm.")] = None,
) -> None:
    """Ask three questions and write a short configuration.

    They are about data, model and where it runs; what an option answers is not asked.
    """
    if file.exists():
        raise ConfigError(f"{file}: exists; name another file: fedllm init FILE")
    given = {"data": data, "model": model, "where": where}
    if (missing := [name for name, value in given.items() if value is None]) and not _asks():
        options = ", ".join(f"--{name}" for name in missing)
        raise ConfigError(f"init: no terminal to ask on; give {options}")
    words = {name: value or _ask(name) for name, value in given.items()}
    if words["where"] not in PLACES:
        raise ConfigError(f"--where: got {words['where']!r}, need {' or '.join(PLACES)}")
    answers = StarterAnswers(
        data=words["data"],
        model=words["model"],
        place=words["where"],
        columns=_columns(words["data"]),
        has_chat_template=_has_chat_template(words["model"]),
    )
    publish_bytes(file, starter_text(answers, str(file)).encode())
    say(f"wrote {file}; next: fedllm plan {file}")


def _asks() -> bool:
    return sys.stdin.isatty()


def _ask(name: str) -> str:
    return str(typer.prompt(_QUESTIONS[name], default=_DEFAULTS[name])).strip()


def _columns(data: str) -> Sequence[str]:
    """Return the columns of data on this machine; those of a hub are not fetched for this."""
    path = Path(data).expanduser()
    if data == EMBEDDED or not path.exists():
        if _looks_like_path(data):
            raise ConfigError(f"--data {data}: no such file or folder; correct the path")
        return ()
    from fedllm.data.readers import columns_of

    return columns_of(DataSection(path=data), CachePaths(root=path.parent))


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or Path(text).suffix != "" or text.count("/") > 1


def _has_chat_template(model: str) -> bool:
    folder = Path(model).expanduser()
    if model != EMBEDDED and not folder.is_dir() and _looks_like_path(model):
        raise ConfigError(f"--model {model}: no such folder; correct the path")
    if (folder / "chat_template.jinja").exists():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.exists() and "chat_template" in json.loads(settings.read_text("utf-8"))
