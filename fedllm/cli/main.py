"""The `fedllm` command: it collects the commands and turns errors into one line."""

import os
import sys
from importlib.metadata import version

import typer

from fedllm.cli.adapters.aggregate import aggregate
from fedllm.cli.adapters.evaluate import evaluate
from fedllm.cli.adapters.export import export
from fedllm.cli.control.advance import advance
from fedllm.cli.control.cancel import cancel
from fedllm.cli.control.prepare import prepare
from fedllm.cli.control.prune import prune
from fedllm.cli.control.resume import resume
from fedllm.cli.control.run import run as run_command
from fedllm.cli.control.submit import submit
from fedllm.cli.control.sweep import sweep
from fedllm.cli.options import folded, relative_paths, say
from fedllm.cli.views.compare import compare
from fedllm.cli.views.doctor import doctor
from fedllm.cli.views.inspect import inspect
from fedllm.cli.views.logs import logs
from fedllm.cli.views.methods import methods
from fedllm.cli.views.plan import plan
from fedllm.cli.views.report import report
from fedllm.cli.views.schema import schema
from fedllm.cli.views.status import status
from fedllm.errors import FedllmError
from fedllm.reporting.tables import terminal_columns

app = typer.Typer(
    name="fedllm",
    help=(
        "Fine-tune one language model with clients of different LoRA ranks, round by round, on "
        "this machine or as Slurm job arrays.\n\nStart with: fedllm run configs/quickstart.yaml"
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 the run failed; 2 change something; 3 incomplete: resume.",
)


def _say_version(asked: bool) -> None:
    if asked:
        say(f"fedllm {version('fedllm')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    _version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_say_version, is_eager=True
    ),
) -> None:
    if debug:
        os.environ["FEDLLM_DEBUG"] = "1"


app.command("run")(run_command)
# in the order of `fedllm --help`
for command in (
    *(resume, submit, sweep, prepare, advance, cancel),
    *(status, report, compare, logs, plan, doctor, prune),
    *(methods, schema, inspect, evaluate, aggregate, export),
):
    app.command()(command)


_SIGINT_CODE = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors become one line on stderr."""
    try:
        result = app(arguments or ["--help"], standalone_mode=False, prog_name="fedllm")
    except typer.TyperException as error:
        _print_error(error.format_message())
        return 2
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except FedllmError as error:
        if os.environ.get("FEDLLM_DEBUG"):
            raise
        _print_error(str(error))
        return error.exit_code
    except Exception as error:
        if os.environ.get("FEDLLM_DEBUG"):
            raise
        _print_error(f"{type(error).__name__}: {error} (a bug? `fedllm --debug ...` shows where)")
        return 1
    if result == _SIGINT_CODE:
        return _interrupted()
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    _print_error("interrupted")
    return 3


def _print_error(message: str) -> None:
    for line in relative_paths(message).splitlines() or [""]:
        sys.stderr.write(folded(f"fedllm: {line}", terminal_columns(sys.stderr)) + "\n")
