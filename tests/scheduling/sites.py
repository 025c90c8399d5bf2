"""Schedulers for tests, each with programs that end, fail or keep running as a test says."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.scheduling.inline import InlineScheduler
from fedllm.scheduling.local import LocalScheduler
from fedllm.scheduling.log_names import log_of
from fedllm.scheduling.seam import EndReason, Job, Scheduler
from tests.scheduling.toy_batch import ToyBatch

# prints a line, runs for some seconds, then ends with an exit code
PROGRAM = """
import sys, time
print("begun", flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""
MAX_TASKS = 5
_LONG = 60.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """A scheduler under test, and what it can do.

    Attributes:
        argv: seconds, exit code -> the arguments of a program of this site.
        restart: ends a running task so that it starts again; None: it cannot.
        is_batch: jobs outlive the scheduler, are found by name and have limits.
        is_concurrent: tasks run while the test goes on.
    """

    scheduler: Scheduler
    folder: Path
    argv: Callable[[float, int], tuple[str, ...]]
    restart: Callable[[str], None] | None = None
    is_batch: bool = False
    is_concurrent: bool = True

    def job(self, name: str, *, tasks: int = 1, code: int = 0, stays: bool = False) -> Job:
        """Return a job whose tasks end with `code`, at once or after a minute."""
        return Job(
            name=name,
            program="client",
            argv=self.argv(_LONG if stays else 0.0, code),
            tasks=tasks,
            log_folder=self.folder / "logs",
            options={"mem": 100} if self.is_batch else {},
        )

    def starts(self, task: str) -> int:
        """Return how often a task of a batch system started, from its log."""
        log = log_of(self.folder / "logs", task)
        return log.read_text().count("begun") if log.exists() else 0


@contextmanager
def inline(folder: Path) -> Iterator[Site]:
    """Inline scheduler: tasks run during their submission."""
    scheduler = InlineScheduler(execute=lambda _program, argv, _task, _log: int(argv[0]))
    yield Site(
        scheduler=scheduler,
        folder=folder,
        argv=lambda _seconds, code: (str(code),),
        is_concurrent=False,
    )


@contextmanager
def local(folder: Path) -> Iterator[Site]:
    """Local scheduler of two workers."""
    worker = (sys.executable, str(Path(__file__).with_name("worker.py")))
    scheduler = LocalScheduler(workers=2, log_folder=folder / "logs", serve=worker)
    yield Site(
        scheduler=scheduler,
        folder=folder,
        argv=lambda seconds, code: ("sleep" if seconds else "exit", str(code)),
    )
    scheduler.close()


@contextmanager
def toy(folder: Path) -> Iterator[Site]:
    """Toy batch system of two slots."""
    toy = ToyBatch(
        max_tasks=MAX_TASKS, command=lambda job: [sys.executable, "-c", PROGRAM, *job.argv]
    )
    yield Site(
        scheduler=toy,
        folder=folder,
        argv=lambda seconds, code: (str(seconds), str(code)),
        restart=lambda task: toy.end(task, EndReason.PREEMPTED, comes_back=True),
        is_batch=True,
    )
    toy.shut_down()
