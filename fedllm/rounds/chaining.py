"""A link of the chained coordinator: take the steps that are possible, leave a successor waiting.

The successor is submitted first, to start when this link ends: killed at any moment, a link is
followed by one that goes on. Only then it is pointed at what this link submitted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fedllm.config.models import Config
from fedllm.errors import LeaseError, RunFailed, UserError
from fedllm.planning.backoff import Backoff
from fedllm.rounds.coordinate import (
    LONGEST_WAIT_SECONDS,
    Stopped,
    advance_while_possible,
    stopping_on_signals,
)
from fedllm.rounds.dispatch.in_flight import InFlight
from fedllm.rounds.run import Run
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.scheduling.seam import SchedulerFull, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm import coordinator_job as slurm
from fedllm.scheduling.slurm.notation import arrays_of
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CoordinatorJobRecord, RunRecord

# in a row, each before it could say why
_MOST_LOST_LINKS = 10

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The chain of a run, seen from one of its links.

    Args:
        paths: the run.
        config: its configuration.
        run_id: its id.
        job: this link's own job.
        say: tells one line.
        wait: sleeps.
    """

    paths: RunPaths
    config: Config
    run_id: str
    job: str
    say: Callable[[str], None]
    wait: Callable[[float], None]

    def successor(self) -> str:
        """Return the one link that waits behind this one, submitted now if there is none.

        Raises:
            RunFailed: many links in a row were killed.
        """
        lost = self._lost_links()
        waiting = self._others()
        for surplus in waiting[1:]:
            self.retry(partial(slurm.cancel_job, surplus))
        if waiting:
            record = CoordinatorJobRecord(job=waiting[0], mode="chained", lost=lost + 1)
            record.publish(self.paths.coordinator_job)
            return waiting[0]
        return self.retry(
            lambda: slurm.submit_link(
                self.paths, self.config, self.run_id, after=self.job, lost=lost + 1
            )
        )

    def start_successor_after(self, successor: str, work: InFlight) -> str:
        """Have the successor start when something will have changed; say when that is."""
        arrays = arrays_of(work.tasks)
        if not arrays:
            self.postpone(successor)
            return "in a few minutes: there is no room for what it wants to submit"
        minutes = work.look_again_minutes
        if minutes is None:
            self.retry(lambda: slurm.start_after(successor, arrays))
            return f"after {' and '.join(arrays)}"
        link = (self.job, minutes)
        self.retry(lambda: slurm.start_after_any(successor, arrays, minutes_after=link))
        return f"after {' or '.join(arrays)}, at the latest {minutes} minutes after this one began"

    def postpone(self, successor: str) -> None:
        """Have the successor start, but not at once."""
        seconds = min(30 * self.config.scheduler.poll_seconds, LONGEST_WAIT_SECONDS)
        self.retry(lambda: slurm.start_later(successor, seconds))

    def end(self) -> None:
        """Cancel what waits: the run is done, or must not go on by itself."""
        for job in self._others():
            self.retry(partial(slurm.cancel_job, job))

    def record_orderly_end(self, successor: str) -> None:
        """Record that this link was not lost."""
        record = CoordinatorJobRecord(job=successor, mode="chained")
        record.publish(self.paths.coordinator_job)

    def retry(self, ask: Callable[[], Answer]) -> Answer:
        """Ask Slurm until it answers and has room, ever more rarely."""
        pause = self._backoff()
        while True:
            try:
                return ask()
            except (SchedulerUnreachable, SchedulerFull) as error:
                self.say(f"{error}; asking again in {pause.seconds:.0f} s")
                self.wait(pause.seconds)
                pause.fail()

    def _others(self) -> list[str]:
        """Return the links that wait, once none runs beside this one."""
        while True:
            jobs = self.retry(lambda: slurm.coordinator_jobs(self.run_id))
            others = {job: state for job, state in jobs.items() if job != self.job}
            if TaskState.RUNNING not in others.values():
                return list(others)
            self.wait(self.config.scheduler.poll_seconds)

    def _lost_links(self) -> int:
        """Return how many links before this one were lost; after several, wait for better times."""
        record = CoordinatorJobRecord.find(self.paths.coordinator_job)
        lost = record.lost if record else 0
        if lost >= _MOST_LOST_LINKS:
            raise RunFailed(
                f"{self.paths.root}: {lost} links of the chain in a row were killed before they "
                f"could say why; see {self.paths.all_logs / 'chain.log'}, then: "
                f"fedllm submit {self.paths.root}"
            )
        if lost > 1:
            pause = self._backoff()
            pause.failures = lost
            self.wait(pause.seconds)
        return lost

    def _backoff(self) -> Backoff:
        return Backoff(self.config.scheduler.poll_seconds, max_seconds=LONGEST_WAIT_SECONDS)


def take_link(chain: Chain, open_run: Callable[[], Run]) -> bool:
    """Be a link of the chain; say whether the run is done.

    Raises:
        FedllmError: the run cannot go on, and the chain ends here.
        Stopped: this link was told to stop; its successor goes on.
    """
    with stopping_on_signals():
        try:
            done = _take_steps(chain, open_run)
        except Stopped:
            raise
        except BaseException:
            chain.end()
            raise
        if done:
            chain.end()
        return done


def _take_steps(chain: Chain, open_run: Callable[[], Run]) -> bool:
    successor = chain.successor()
    try:
        work = advance_while_possible(open_run())
        if work is None:
            return True
        chain.say(f"link {successor} goes on {chain.start_successor_after(successor, work)}")
    except (LeaseError, SchedulerUnreachable, SchedulerFull) as error:
        # the lease: a person goes on with the run, or cron, or a link that ends just now
        chain.say(f"{error}; link {successor} tries again in a while")
        chain.postpone(successor)
    except Stopped:
        chain.record_orderly_end(successor)
        raise
    chain.record_orderly_end(successor)
    return False


def this_link(
    paths: RunPaths, config: Config, *, say: Callable[[str], None], wait: Callable[[float], None]
) -> Chain:
    """Return the chain as the job sees it in which this process runs.

    Raises:
        UserError: it is no job.
    """
    job = TaskEnvironment().job
    if job is None:
        raise UserError(
            f"{paths.root}: a link of a chain is a Slurm job; set scheduler.coordinator to chained "
            f"and use: fedllm submit {paths.root}"
        )
    run_id = RunRecord.read(paths.run).run_id
    return Chain(paths=paths, config=config, run_id=run_id, job=job, say=say, wait=wait)
