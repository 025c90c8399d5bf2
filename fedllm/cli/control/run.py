"""`fedllm run`: run a configuration to its end."""

from fedllm.cli import execution
from fedllm.cli.options import (
    ConfigFile,
    Overrides,
    RunDir,
    TakeOver,
    Unattended,
    say,
    summary_of,
)


def run(
    config: ConfigFile,
    run_dir: RunDir = None,
    set_: Overrides = None,
    take_over: TakeOver = False,
    unattended: Unattended = False,
) -> None:
    """Run a configuration to its end. Run it again to continue where it stopped."""
    root = execution.start(config, set_ or [], run_dir, take_over=take_over, unattended=unattended)
    say(summary_of(root))
