"""Links of the chained coordinator: a link takes possible steps and leaves a waiting successor.

A link first submits its successor, to start when the link ends. So the chain goes on whenever a
link is killed. Only at its end a link makes the successor wait for the arrays it submitted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fedllm.config.models import Config
from fedllm.errors import LeaseError, RunFailed, Stopped, UserError
from fedllm.planning.backoff import Backoff
from fedllm.rounds.coordinate import (
    LONGEST_WAIT_SECONDS,
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

# links killed in a row, each before it could record why
_MAX_LOST_LINKS = 10

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The chain of a run, seen from one of its links.

    Args:
        paths: paths of the run.
        config: configuration of the run.
        run_id: id of the run.
        job: Slurm job id of this link.
        say: logs one line.
        wait: sleeps for so many seconds.
    """

    paths: RunPaths
    config: Config
    run_id: str
    job: str
    say: Callable[[str], None]
    wait: Callable[[float], None]

    def successor(self) -> str:
        """Return the job that waits to follow this link; submit it if there is none.

        Raises:
            RunFailed: 10 links in a row were killed.
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

    def start_successor_after(self, successor: str, in_flight: InFlight) -> str:
        """Start the successor when there may be more to do; return when, in words."""
        arrays = arrays_of(in_flight.tasks)
        if not arrays:
            self.postpone(successor)
            return "in a few minutes: there is no room for more tasks"
        minutes = in_flight.look_again_minutes
        if minutes is None:
            self.retry(lambda: slurm.start_after(successor, arrays))
            return f"after {' and '.join(arrays)}"
        link = (self.job, minutes)
        self.retry(lambda: slurm.start_after_any(successor, arrays, minutes_after=link))
        return f"after {' or '.join(arrays)}, at the latest {minutes} minutes after this one began"

    def postpone(self, successor: str) -> None:
        """Start the successor after a pause of up to 5 minutes."""
        seconds = min(30 * self.config.scheduler.poll_seconds, LONGEST_WAIT_SECONDS)
        self.retry(lambda: slurm.start_later(successor, seconds))

    def end(self) -> None:
        """Cancel the waiting links, because the run is done or must not go on by itself."""
        for job in self._others():
            self.retry(partial(slurm.cancel_job, job))

    def record_orderly_end(self, successor: str) -> None:
        """Record that this link ended in order, so that it does not count as lost."""
        record = CoordinatorJobRecord(job=successor, mode="chained")
        record.publish(self.paths.coordinator_job)

    def retry(self, call: Callable[[], Answer]) -> Answer:
        """Call Slurm until it answers and has room, with growing pauses; return its answer."""
        pause = self._backoff()
        while True:
            try:
                return call()
            except (SchedulerUnreachable, SchedulerFull) as error:
                self.say(f"{error}; asking again in {pause.seconds:.0f} s")
                self.wait(pause.seconds)
                pause.fail()

    def _others(self) -> list[str]:
        """Return the waiting links, once no other link runs."""
        while True:
            jobs = self.retry(lambda: slurm.coordinator_jobs(self.run_id))
            others = {job: state for job, state in jobs.items() if job != self.job}
            if TaskState.RUNNING not in others.values():
                return list(others)
            self.wait(self.config.scheduler.poll_seconds)

    def _lost_links(self) -> int:
        """Return the number of links lost in a row before this one; with several, pause first."""
        record = CoordinatorJobRecord.find(self.paths.coordinator_job)
        lost = record.lost if record else 0
        if lost >= _MAX_LOST_LINKS:
            raise RunFailed(
                f"{self.paths.root}: {lost} links of the chain in a row were killed before they "
                f"could record why; see {self.paths.all_logs / 'chain.log'}, then: "
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
    """Run one link of the chain; return whether the run is done.

    Raises:
        FedllmError: the run cannot go on, and the chain ends here.
        Stopped: a signal stopped this link; its successor goes on.
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
        in_flight = advance_while_possible(open_run())
        if in_flight is None:
            return True
        chain.say(f"link {successor} goes on {chain.start_successor_after(successor, in_flight)}")
    except (LeaseError, SchedulerUnreachable, SchedulerFull) as error:
        # LeaseError: a person, cron or a link that is just ending advances the run
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
    """Return the chain of the Slurm job in which this process runs.

    Raises:
        UserError: this process is not in a Slurm job.
    """
    job = TaskEnvironment().job
    if job is None:
        raise UserError(
            f"{paths.root}: a link of a chain is a Slurm job; set scheduler.coordinator to chained "
            f"and use: fedllm submit {paths.root}"
        )
    run_id = RunRecord.read(paths.run).run_id
    return Chain(paths=paths, config=config, run_id=run_id, job=job, say=say, wait=wait)
