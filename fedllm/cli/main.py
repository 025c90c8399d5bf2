"""The `fedllm` command: it collects the commands and turns errors into one line."""

import contextlib
import os
import sys
from importlib.metadata import version

import typer

from fedllm.cli.adapters.aggregate import aggregate
from fedllm.cli.adapters.evaluate import evaluate
from fedllm.cli.adapters.export import export
from fedllm.cli.control.advance import advance
from fedllm.cli.control.cancel import cancel
from fedllm.cli.control.init import init
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
from fedllm.cli.views.verify import verify
from fedllm.errors import FedllmError
from fedllm.reporting.tables import terminal_columns
from fedllm.storage.publishing.publish import as_error
from fedllm.storage.record_cache import rare_garbage_collection
from fedllm.storage.trust.printable import printable

app = typer.Typer(
    name="fedllm",
    help=(
        "Fine-tune one language model with clients of different LoRA ranks, round by round, on "
        "this machine or as Slurm job arrays.\n\nStart with: fedllm run configs/quickstart.yaml"
    ),
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


app.command()(init)
app.command("run")(run_command)
# in the order of `fedllm --help`
for command in (
    *(resume, submit, sweep, prepare, advance, cancel),
    *(status, verify, report, compare, logs, plan, doctor, prune),
    *(methods, schema, inspect, evaluate, aggregate, export),
):
    app.command()(command)


# a message may quote a file of megabytes
_MOST_LINES, _LONGEST_LINE = 200, 4000
_SIGINT_CODE = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command line and exit with its code."""
    with rare_garbage_collection():
        code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # what a full disk or a closed pipe did not take must not change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; errors become one line on stderr."""
    try:
        result = app(arguments or ["--help"], standalone_mode=False, prog_name="fedllm")
    except typer.TyperException as error:
        _print_error(_set_with_a_blank(arguments) or error.format_message())
        return 2
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except Exception as error:
        if os.environ.get("FEDLLM_DEBUG"):
            raise
        return _failed(error)
    if result == _SIGINT_CODE:
        return _interrupted()
    return result if isinstance(result, int) else 0


def _failed(error: Exception) -> int:
    """Print an error in one line and return its exit code."""
    known = as_error(error) if isinstance(error, OSError) else error
    if isinstance(known, FedllmError):
        _print_error(str(known))
        return known.exit_code
    _print_error(f"{type(error).__name__}: {error} (a bug? `fedllm --debug ...` shows where)")
    return 1


def _set_with_a_blank(arguments: list[str]) -> str:
    """Return what to write instead of `--set KEY VALUE`; empty: it was not written so."""
    for option, key, value in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if option == "--set" and "=" not in key and not value.startswith("-"):
            return f"--set {key} {value}: write it without a blank: --set {key}={value}"
    return ""


def _interrupted() -> int:
    _print_error("interrupted")
    return 3


def _print_error(message: str) -> None:
    lines = [line[:_LONGEST_LINE] for line in relative_paths(message).split("\n")[:_MOST_LINES]]
    encoding = sys.stderr.encoding or "utf-8"
    with contextlib.suppress(OSError):
        for line in lines:
            shown = folded(f"fedllm: {printable(line)}", terminal_columns(sys.stderr))
            sys.stderr.write(shown.encode(encoding, "backslashreplace").decode(encoding) + "\n")
