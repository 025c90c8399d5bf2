"""Arguments, options and output that several commands share."""

import contextlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.completion import (
    complete_configs,
    complete_configs_and_runs,
    complete_keys,
    complete_runs,
)
from fedllm.config.loading import load_config, read_config
from fedllm.config.models import Config, is_own
from fedllm.errors import ConfigError, RunDirectoryError, UserError
from fedllm.reporting.results.summary import run_summary
from fedllm.reporting.tables import terminal_columns
from fedllm.rounds.retention import best_round
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.storage.own_code import folders_of, read_own_code
from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.records import RunRecord
from fedllm.storage.trust.printable import printable

RUNS = Path("runs")

ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="A configuration file.", autocompletion=complete_configs),
]
ConfigOrSweep = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG|SWEEP.yaml",
        help="A configuration, or a sweep file.",
        autocompletion=complete_configs,
    ),
]
AnyStart = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG|RUN|SWEEP",
        help="A configuration, a sweep file, or the directory of a run or sweep to continue.",
        autocompletion=complete_configs_and_runs,
    ),
]
ConfigOrRun = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG|RUN",
        help="A configuration, or a run directory to continue.",
        autocompletion=complete_configs_and_runs,
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run directory.", autocompletion=complete_runs),
]
RunOrSweep = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|SWEEP",
        help="The directory of a run or of a sweep.",
        autocompletion=complete_runs,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key, such as --set rounds=5.",
        autocompletion=complete_keys,
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="DIR", help="Run directory. Default: runs/<name of CONFIG>."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", help="Take the run over; its old coordinator must have ended."),
]
Unattended = Annotated[bool, typer.Option("--unattended", hidden=True)]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Run the commands (scheduler.setup, scheduler.python) that another member of the "
        "group set.",
    ),
]
RoundNumber = Annotated[
    str | None,
    typer.Option(
        "--round",
        metavar="N|best",
        help="Round of the state, or the best one for dev clients. Default: the newest.",
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")]


def say(line: str) -> None:
    """Print lines at once; letters that the terminal cannot show are escaped.

    On a terminal, text that is too wide folds between words; tables fit already.

    Raises:
        Exit: nobody reads any more, as behind `| head`; the command ends with code 0.
    """
    with _ending_unread():
        _write(folded(line, terminal_columns()))


def say_with_paths(text: str) -> None:
    """Print lines as `say` does, with the paths below the working directory relative to it."""
    say(relative_paths(text))


def say_of_run(line: str) -> None:
    """Print lines of a run as `say` does; the run goes on when nobody reads them any more."""
    with contextlib.suppress(BrokenPipeError):
        _write(folded(line, terminal_columns()))


@contextlib.contextmanager
def _ending_unread() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # not left to typer, whose exit code is 1
        raise typer.Exit from None


def _write(text: str) -> None:
    sys.stdout.write(f"{_shown(text)}\n")
    sys.stdout.flush()


def _shown(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def relative_paths(text: str) -> str:
    """Return a text for people with its paths relative to where they stand.

    A job's log keeps them whole: who reads it stands elsewhere.
    """
    if TaskEnvironment().job:
        return text
    # a path may contain another: /data/ in /mnt/data/
    return re.sub(rf"(?<![\w./~-]){re.escape(str(Path.cwd()))}{os.sep}", "", text)


def folded(text: str, width: int) -> str:
    """Return lines of at most `width` columns, folded between words; longer words stay whole."""
    lines = text.split("\n")
    fold = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join("\n".join(fold.wrap(line)) if len(line) > width else line for line in lines)


def say_json(value: Any) -> None:
    """Print a value as JSON; its errors are those of `say`."""
    with _ending_unread():
        _write(json.dumps(value, indent=1, ensure_ascii=False))


def configuration(path: Path, overrides: Sequence[str]) -> Config:
    """Read a configuration; one shipped with fedllm is found from any directory.

    A method of the user's own can be imported from then on.

    Raises:
        ConfigError: one line per problem.
    """
    path = configuration_file(path)
    config = load_config(path, overrides)
    if is_own(config.method.name):
        read_own_code(config.method.name, [*_recorded_folders(path.parent), *folders_of(path)])
    return config


def configuration_file(path: Path) -> Path:
    """Return a configuration's file: one shipped with fedllm is found from any directory."""
    run = RunPaths(root=path)
    if run.run.is_file():
        raise ConfigError(
            f"{path}: a run directory, but this command needs a configuration; that of the run is "
            f"{run.config}; to go on with the run: fedllm resume {path}"
        )
    if not path.exists() and not path.is_absolute():
        # `configs/quickstart.yaml`, if fedllm was installed from a wheel
        with contextlib.suppress(UserError):
            return shipped(str(path))
    return path


def _recorded_folders(root: Path) -> list[str]:
    """Return where a run finds its method, if its own `config.yaml` was named."""
    record = RunRecord.find(RunPaths(root=root).run)
    return record.own_code.folders if record and record.own_code else []


def default_run_dir(config_file: Path) -> Path:
    """Return `runs/<name of the configuration>`, so that the same command resumes the run."""
    return RUNS / config_file.stem


def existing_run(root: Path) -> RunPaths:
    """Return the paths of a run.

    Raises:
        RunDirectoryError: there is no run.
    """
    paths = RunPaths(root=root.resolve())
    is_config = root.suffix in {".yaml", ".yml"} and not root.is_dir()
    if is_config or root.is_file():
        kind = "configuration" if is_config else "file"
        run = default_run_dir(root)
        found = "its run is" if run.exists() else "`fedllm run` starts its run, in"
        raise RunDirectoryError(
            f"{root}: a {kind}, but this command needs a run directory; {found} {run}"
        )
    if not paths.run.exists():
        raise RunDirectoryError(
            f"{root}: no run here (no run.json); `fedllm run CONFIG --run-dir {root}` starts one"
        )
    return paths


def chosen_round(paths: RunPaths, given: str | None) -> int | None:
    """Return the round that `--round` names; None: the newest.

    Raises:
        ConfigError: it is no round, or there are no dev clients to choose the best one by.
    """
    if given is None or given.isdecimal():
        return None if given is None else int(given)
    if given != "best":
        raise ConfigError(f"--round: got {given}, need a number or best")
    config = read_config(paths.config)
    if not config.clients.dev:
        raise ConfigError("--round best: dev clients choose it, clients.dev is 0; give a number")
    best = best_round(paths, config)
    if not best:
        raise ConfigError("--round best: no round is evaluated yet; give a number, or resume")
    return min(best)


def summary_of(root: Path) -> str:
    """Return what a run prints at its end."""
    paths = existing_run(root)
    config = read_config(paths.config)
    return run_summary(paths, best_round(paths, config) if config.clients.dev else ())


def fresh_folder(folder: Path) -> Path:
    """Return the `--out` folder if it is new or empty.

    Raises:
        RunDirectoryError: it is not empty, is a file, or lies among the records of a run.
    """
    for parent in folder.resolve().parents:
        run = RunPaths(root=parent)
        inner = (run.rounds, run.leases, run.all_logs)
        if run.run.is_file() and any(folder.resolve().is_relative_to(each) for each in inner):
            raise RunDirectoryError(
                f"--out {folder}: lies among the records of the run {parent}; choose a folder "
                "outside of them"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirectoryError(f"--out {folder}: exists and is not empty; choose a new folder")
    return folder
