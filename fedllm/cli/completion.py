"""Completion in the shell: run directories, configurations, keys after `--set`, names of methods.

The shell calls `fedllm` for every press of the key: nothing here loads torch, and what a function
needs is imported inside it.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from textwrap import shorten

import typer

_RECORDS = ("run.json", "sweep.json")
_SUFFIXES = (".yaml", ".yml")
# of a meaning, beside its key
_WIDTH = 60


def complete_runs(incomplete: str) -> Iterator[str]:
    """Yield the directories of runs and sweeps: those in `runs`, and where the word leads."""
    yield from sorted(
        {
            str(folder)
            for folder in (*Path().glob("runs/*"), *_below(incomplete))
            if any((folder / record).exists() for record in _RECORDS)
        }
    )


def complete_configs(incomplete: str) -> Iterator[str]:
    """Yield the configuration files where the word leads."""
    yield from sorted(str(file) for file in _below(incomplete) if file.suffix in _SUFFIXES)


def complete_configs_and_runs(incomplete: str) -> Iterator[str]:
    """Yield configuration files and run directories."""
    yield from complete_configs(incomplete)
    yield from complete_runs(incomplete)


def complete_methods(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the methods, each with what it does."""
    from fedllm.methods.catalog import METHODS

    yield from (
        (name, entry.summary) for name, entry in METHODS.items() if name.startswith(incomplete)
    )


def complete_keys(context: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield `KEY=DEFAULT` with the key's meaning; once a key is written, all its values."""
    from fedllm.config.reference import REQUIRED, key_entries, plain
    from fedllm.methods.catalog import KEY_CHOICES

    # the option still lacks its value, so its command's arguments are not parsed yet
    tiers = list(chain.from_iterable(map(_tiers, context.args)))
    separator = "=" in incomplete
    for entry in key_entries():
        values = entry.values or KEY_CHOICES.get(entry.name, ())
        default = "" if entry.default == REQUIRED else entry.default
        for name in _names(entry.name, tiers):
            for value in values if separator and values else (default,):
                if (word := f"{name}={value}").startswith(incomplete):
                    yield word, shorten(plain(entry.meaning), _WIDTH)


def _names(key: str, tiers: Sequence[str]) -> Sequence[str]:
    """Return the key, or one for each tier of the configuration on the command line."""
    return [key.replace("NAME", tier) for tier in tiers] if ".NAME" in key else [key]


def _tiers(word: str) -> Sequence[str]:
    """Return the tiers of a configuration; none if the word is no such file."""
    from fedllm.config.yaml_text import read_yaml
    from fedllm.errors import FedllmError

    try:
        clients = read_yaml(Path(word)).get("clients")
    except (FedllmError, OSError):
        return ()  # `plan` tells what is wrong with it
    tiers = clients.get("tiers") if isinstance(clients, dict) else None
    return [str(tier) for tier in tiers] if isinstance(tiers, dict) else ()


def _below(incomplete: str) -> Iterator[Path]:
    """Yield files and folders that begin with a word, and what is in those folders."""
    head, _, tail = incomplete.rpartition("/")
    start = Path(f"{head}/" if head or incomplete.startswith("/") else ".")
    if not start.is_dir():
        return
    for path in start.iterdir():
        if path.name.startswith(tail) and not path.name.startswith("."):
            yield path
            if path.is_dir():
                yield from path.iterdir()
