"""Wire a run: configuration, scheduler and, where it runs here, the compute side."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from fedllm.cli.options import configuration, existing_run, say
from fedllm.config.models import Config
from fedllm.errors import LeaseError, UserError
from fedllm.methods.table import check_names
from fedllm.rounds.coordinate import advance_once, coordinate
from fedllm.rounds.opening import open_run, resumed_config
from fedllm.rounds.run import Run
from fedllm.scheduling.inline import Execute
from fedllm.scheduling.seam import Scheduler
from fedllm.scheduling.slurm_coordinator import holder_is_gone
from fedllm.scheduling.table import SCHEDULERS
from fedllm.storage.paths import RunPaths


def default_run_dir(config_file: Path) -> Path:
    """Return `runs/<configuration's name>`: running again resumes."""
    return Path("runs") / config_file.stem


def start(
    config_file: Path, overrides: Sequence[str], run_dir: Path | None, *, take_over: bool = False
) -> Path:
    """Run a configuration to its end, or go on where it stopped; return the run directory."""
    config = configuration(config_file, overrides)
    root = run_dir or default_run_dir(config_file)
    is_new = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    run = opened(root, config, take_over=take_over)
    try:
        coordinate(run)
    except UserError as error:
        if not is_new or isinstance(error, LeaseError) or run.paths.prepared.exists():
            raise
        # nothing fits together yet: leave no run behind, and name no log that went with it
        shutil.rmtree(run.paths.root)
        raise type(error)(str(error).partition("; log ")[0]) from error
    return root


def resume(root: Path, overrides: Sequence[str] = (), *, take_over: bool = False) -> None:
    """Go on with a run to its end."""
    existing_run(root)
    coordinate(opened(root, resumed_config(root, overrides), take_over=take_over))


def advance_run(root: Path) -> bool:
    """Take the steps of a run that are possible now; say whether it is done."""
    existing_run(root)
    return advance_once(opened(root, resumed_config(root, ())))


def opened(root: Path, config: Config, *, take_over: bool = False) -> Run:
    """Open a run for coordination."""
    check_names(config.method.name, config.method.local)
    return open_run(
        root,
        config,
        make_scheduler=make_scheduler,
        say=say,
        holder_is_gone=holder_is_gone,
        take_over=take_over,
    )


def make_scheduler(paths: RunPaths, config: Config) -> Scheduler:
    """Return the configured scheduler."""
    return SCHEDULERS[config.scheduler.kind](config, paths, compute_here())


def compute_here() -> Execute:
    """Return what runs a job's program in this process, with its output in the job's log.

    The compute side loads on first use.
    """
    programs: list[Callable[[str, Sequence[str]], int]] = []

    def execute(program: str, argv: Sequence[str], task: str, log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
            if not programs:
                programs.append(_programs())
            os.environ.update({"FEDLLM_TASK": task, "FEDLLM_LOG": str(log)})
            return programs[0](program, argv)

    return execute


def _programs() -> Callable[[str, Sequence[str]], int]:
    from fedllm.steps.programs import run
    from fedllm.steps.session import Session

    session = Session()
    return lambda program, argv: run(program, argv, session=session)
