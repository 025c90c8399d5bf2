"""The programs that a scheduler starts, by name; resident workers and inline runs call them too."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from fedllm.config.models import StorageSection
from fedllm.errors import BadUpdate, FedllmError, ProcessLost, Stopped, UserError
from fedllm.model.memory import give_back_freed
from fedllm.process.log import say
from fedllm.process.meter import Meter
from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.scheduling.patience import Patience
from fedllm.storage.paths import (
    AttemptPaths,
    JobPaths,
    PackedJobPaths,
    RoundPaths,
    RunPaths,
    run_of_scored,
)
from fedllm.storage.publishing.publish import as_error
from fedllm.storage.records import ErrorRecord


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The call of a program: its arguments, and the state of its process."""

    arguments: argparse.Namespace
    session: Session
    signals: StopSignals | None
    began: float


# a program in a process of its own: its name and its arguments follow
_PROGRAM = (
    sys.executable,
    "-c",
    "import sys; from fedllm.process.session import Session; "
    "from fedllm.programs.entry_points import run; "
    "sys.exit(run(sys.argv[1], sys.argv[2:], session=Session()))",
)

_Step = Callable[[_Call], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise UserError with one line, as for all errors."""
        raise UserError(f"{self.prog}: {message}; see --help")


def run(
    program: str,
    argv: Sequence[str],
    *,
    session: Session,
    signals: StopSignals | None = None,
    began: float | None = None,
) -> int:
    """Run `prepare`, `client`, `aggregate` or `evaluate` and return its exit code.

    An error leaves an `ErrorRecord` where the coordinator looks for it, and one line on stderr
    (for an unexpected error, its traceback).

    Args:
        program: its name.
        argv: its arguments.
        session: the loaded base model and data.
        signals: the caller's record of signals; None: the program notes them itself.
        began: when the time of this process began to count, of `time.monotonic`; None: now.
    """
    began = time.monotonic() if began is None else began
    arguments: argparse.Namespace | None = None
    try:
        arguments = _parse(program, argv)
        TaskEnvironment().require_planned_processes()
        call = _Call(arguments=arguments, session=session, signals=signals, began=began)
        return _outlasting_file_servers(program, call)
    except Stopped:
        raise  # it runs in the coordinator's process, whose end it is
    except FedllmError as error:
        say(f"error: {error}")
        _record(program, arguments, error, error.exit_code)
        return error.exit_code
    except Exception as error:
        known = as_error(error) if isinstance(error, OSError) else None
        say(f"error: {known}" if known else traceback.format_exc().rstrip())
        exit_code = (known or FedllmError).exit_code
        _record(program, arguments, known or error, exit_code)
        return exit_code
    finally:
        give_back_freed()  # the next program of this process needs memory of other sizes


def _outlasting_file_servers(program: str, call: _Call) -> int:
    """Run a program; begin again, as a requeued task does, once a file server answers again.

    A task of several processes ends instead: the others wait for this one. So does a preparation:
    what it may not read is the user's to change.
    """
    step = partial(_STEPS[program], call)
    if program == "prepare" or TaskEnvironment().identity.num_processes > 1:
        return step()
    return Patience(seconds=StorageSection().visibility_seconds, say=say).retry(step)


def _parse(program: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=f"jobs/{program}.py", description=_DESCRIPTIONS[program])
    parser.add_argument("target", type=Path, metavar=_TARGETS[program])
    if program == "client":
        parser.add_argument("--class", dest="worker_class", help="take bundles of this class only")
        parser.add_argument("--client", help="train this client alone and compare its losses")
        parser.add_argument("--scratch", type=Path, help="folder for the update of --client")
    else:
        parser.add_argument("--job", type=Path, help="folder in which an error is recorded")
    arguments = parser.parse_args(argv)
    if program == "client" and (arguments.client is None) != (arguments.scratch is None):
        parser.error("--client and --scratch go together")
    arguments.target = arguments.target.resolve()
    return arguments


def _prepare(call: _Call) -> int:
    from fedllm.programs.prepare import prepare_run

    paths = RunPaths(root=call.arguments.target)
    _share(paths, call.session)
    prepare_run(paths, _meter(call).count)
    return 0


def _client(call: _Call) -> int:
    from fedllm.worker.worker import work

    arguments, session = call.arguments, call.session
    attempt = AttemptPaths(root=arguments.target, number=_attempt_number(arguments.target))
    _share(attempt.run, session)
    if arguments.client is None:
        return work(
            attempt,
            arguments.worker_class,
            TaskEnvironment().identity,
            session,
            signals=call.signals,
            began=call.began,
            # an error is looked for where the task works
            on_attempt=lambda later: setattr(arguments, "target", later.root),
        )
    return _replay(call, attempt)


def _replay(call: _Call, attempt: AttemptPaths) -> int:
    """Train a client again in as many processes as it takes, which start here if they did not."""
    from fedllm.programs.companions import companions
    from fedllm.worker.following import follow
    from fedllm.worker.process_group import connected
    from fedllm.worker.replay import processes_of, replay
    from fedllm.worker.task import WorkerTask

    client, scratch = call.arguments.client, call.arguments.scratch
    arguments = [str(attempt.root), "--client", client, "--scratch", str(scratch)]
    count = processes_of(attempt, client, call.session)
    wait_minutes = call.session.config(attempt.run).scheduler.hung_minutes
    with (
        nullcontext(call.signals) if call.signals else StopSignals() as signals,
        companions(count, [*_PROGRAM, "client", *arguments]) as identity,
        connected(identity, wait_minutes=wait_minutes) as processes,
    ):
        task = WorkerTask(
            identity=identity,
            attempt=attempt,
            worker_class=None,
            session=call.session,
            signals=signals,
            processes=processes,
        )
        if not identity.is_first:
            return follow(task, saves=False)
        replayed = replay(task, attempt, client, scratch)
        processes.dismiss(0)
    sys.stdout.write("\n".join(replayed.lines()) + "\n")
    return 0 if replayed.agrees else 1


def _aggregate(call: _Call) -> int:
    from fedllm.server.aggregate import aggregate_round

    paths = RoundPaths(root=call.arguments.target)
    _share(paths.run, call.session)
    aggregate_round(paths, _meter(call).count)
    return 0


def _evaluate(call: _Call) -> int:
    from fedllm.programs.evaluate_pieces import evaluate_pieces

    target = call.arguments.target
    _share(run_of_scored(target), call.session)
    job = PackedJobPaths(root=call.arguments.job.resolve()) if call.arguments.job else None
    identity = TaskEnvironment().identity
    meter = Meter(job.progress_of(identity.task) if job and identity.is_first else None)
    evaluate_pieces(target, call.session, identity, meter.count, job)
    return 0


def _meter(call: _Call) -> Meter:
    """Return the meter of a job of one task."""
    job = call.arguments.job
    return Meter(JobPaths(root=job.resolve()).progress if job is not None else None)


def _share(run: RunPaths, session: Session) -> None:
    """Set the umask of a shared project: the group may write files, others may not read them."""
    if session.config(run).storage.group is not None:
        os.umask(0o007)


_STEPS: Mapping[str, _Step] = {
    "prepare": _prepare,
    "client": _client,
    "aggregate": _aggregate,
    "evaluate": _evaluate,
}
_TARGETS = {"prepare": "RUN", "client": "ATTEMPT", "aggregate": "ROUND", "evaluate": "ROUND"}
_DESCRIPTIONS = {
    "prepare": "Fetch, fingerprint and tokenise what a run needs.",
    "client": "Work on an attempt: claim bundle after bundle and train their clients.",
    "aggregate": "Aggregate a round's collected updates into its server state.",
    "evaluate": "Score pieces of an evaluation, until none is left.",
}


def _attempt_number(attempt: Path) -> int:
    if not attempt.name.isdecimal():
        raise UserError(f"{attempt}: not an attempt; need RUN/rounds/NNNN/attempts/NN")
    return int(attempt.name)


def _record(
    program: str, arguments: argparse.Namespace | None, error: Exception, exit_code: int
) -> None:
    if arguments is None:
        return
    identity = TaskEnvironment().identity
    log = identity.log
    if isinstance(error, ProcessLost):
        log = error.log or log
    record = ErrorRecord.of(
        error,
        exit_code=exit_code,
        log=log,
        bad_places=error.places if isinstance(error, BadUpdate) else {},
    )
    path = _error_path(program, arguments, identity.task)
    try:
        if path is None:
            return
        if isinstance(error, ProcessLost):
            # the lost process may have recorded the reason already
            record.publish_once(path)
        else:
            record.publish(path)
    except (FedllmError, OSError) as second:
        # a full disk takes no record: then the exit code and this line are all that is left
        say(f"error: {path}: the error could not be recorded ({second})")


def _error_path(program: str, arguments: argparse.Namespace, task: str) -> Path | None:
    if program == "client":
        if arguments.client is not None or not arguments.target.is_dir():
            return None
        return AttemptPaths(root=arguments.target, number=0).task_error(task)
    return JobPaths(root=arguments.job.resolve()).error if arguments.job else None
