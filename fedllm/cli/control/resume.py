"""`fedllm resume`: continue a run."""

from fedllm.cli import execution
from fedllm.cli.control.sweep import finish
from fedllm.cli.options import (
    AcceptChanges,
    Overrides,
    RunOrSweep,
    TakeOver,
    Unattended,
    say,
    summary_of,
)
from fedllm.cli.sweeps import existing_sweep
from fedllm.errors import ConfigError


def resume(
    run: RunOrSweep,
    set_: Overrides = None,
    take_over: TakeOver = False,
    accept_changes: AcceptChanges = False,
    unattended: Unattended = False,
) -> None:
    """Continue a run or a sweep to its end.

    With --set, keys that do not decide the result may change, and `rounds` may grow.
    """
    if sweep := existing_sweep(run):
        if set_:
            raise ConfigError(
                "--set: a sweep has many configurations; change its file, then: fedllm sweep FILE "
                f"--out {run}"
            )
        finish(sweep, take_over=take_over, accept_changes=accept_changes, unattended=unattended)
        return
    execution.resume(
        run, set_ or [], take_over=take_over, accept_changes=accept_changes, unattended=unattended
    )
    say(summary_of(run))
