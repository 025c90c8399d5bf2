"""`fedllm resume`: continue a run."""

from fedllm.cli import execution
from fedllm.cli.options import (
    Overrides,
    RunFolder,
    TakeOver,
    existing_run,
    say,
)
from fedllm.reporting.results.summary import run_summary


def resume(run: RunFolder, set_: Overrides = None, take_over: TakeOver = False) -> None:
    """Continue a run to its end. Execution keys may change, and `rounds` may grow."""
    execution.resume(run, set_ or [], take_over=take_over)
    say(run_summary(existing_run(run)))
