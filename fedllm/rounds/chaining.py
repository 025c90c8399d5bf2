"""Links of the chained coordinator: a link takes possible steps and leaves a waiting successor.

A link first submits its successor, to start when the link ends. So the chain goes on whenever a
link is killed. Only at its end a link makes the successor wait for the arrays it submitted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from fedllm.config.models import Config
from fedllm.errors import Incomplete, LeaseError, RunFailed, Stopped, UserError
from fedllm.planning.backoff import Backoff
from fedllm.rounds.coordinate import (
    LONGEST_WAIT_SECONDS,
    advance_while_possible,
    stopping_on_signals,
)
from fedllm.rounds.dispatch.in_flight import InFlight
from fedllm.rounds.failing import ASKED_AGAIN
from fedllm.rounds.run import Run
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.scheduling.seam import CancelRefused, TaskState
from fedllm.scheduling.slurm import coordinator_job as slurm
from fedllm.scheduling.slurm.notation import arrays_of
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import storage_trouble
from fedllm.storage.records import CoordinatorJobRecord, RunRecord

# links killed in a row, each before it could record why
_MAX_LOST_LINKS = 10
# where Slurm does not let a link be pointed at what it waits for, or a link met an error
LEAST_SECONDS_BETWEEN_LINKS = 60

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
            self._cancel(surplus)
        if waiting:
            successor = waiting[0]
            self.retry(
                partial(slurm.record_coordinator, self.paths, successor, "chained", lost=lost + 1)
            )
        else:
            start = slurm.LinkStart(dependency=slurm.after_all([self.job]))
            successor = self.retry(
                lambda: slurm.submit_link(
                    self.paths, self.config, self.run_id, start=start, lost=lost + 1
                )
            )
        self._pause_after(lost)
        return successor

    def start_successor_after(self, successor: str, in_flight: InFlight) -> str:
        """Start the successor when there may be more to do; return the job that does."""
        arrays = arrays_of(in_flight.tasks)
        minutes = in_flight.look_again_minutes
        if not arrays:
            return self.postpone(successor, "there is no room for more tasks")
        if minutes is None:
            when = f"after {' and '.join(arrays)}"
            start = slurm.LinkStart(dependency=slurm.after_all(arrays))
        else:
            any_of = " or ".join(arrays)
            when = f"after {any_of}, at the latest {minutes} minutes after this one began"
            found = slurm.after_any(arrays, minutes_after=(self.job, minutes))
            start = slurm.LinkStart(dependency=found)
        return self._start(successor, start, when)

    def postpone(self, successor: str, why: str, *, seconds: float = 0.0) -> str:
        """Start the successor after `seconds` or the usual pause; return the job that does."""
        usual = min(30 * self.config.scheduler.poll_seconds, LONGEST_WAIT_SECONDS)
        pause = max(1, round(seconds or usual))
        start = slurm.LinkStart(dependency=slurm.after_all([self.job]), seconds=pause)
        return self._start(successor, start, f"in {pause} s: {why}")

    def _start(self, successor: str, start: slurm.LinkStart, when: str) -> str:
        """Change when the successor starts; replace it if Slurm refuses to change it.

        Otherwise it would start at once, and so would every link after it.
        """
        if self.retry(lambda: slurm.start_link(successor, start)):
            self.say(f"link {successor} goes on {when}")
            return successor
        later = replace(start, seconds=max(start.seconds, LEAST_SECONDS_BETWEEN_LINKS))
        # submitted first: at every moment a link waits
        other = self.retry(
            lambda: slurm.submit_link(self.paths, self.config, self.run_id, start=later)
        )
        self._cancel(successor)
        self.say(
            f"link {other} goes on {when}, at least {later.seconds} s from now (--begin): Slurm "
            f"refuses `scontrol update` of link {successor}, which it replaces"
        )
        return other

    def _cancel(self, link: str) -> None:
        try:
            self.retry(lambda: slurm.cancel_job(link))
        except CancelRefused as error:
            self.say(str(error))

    def end(self) -> None:
        """Cancel the waiting links, because the run is done or must not go on by itself."""
        for job in self._others():
            self._cancel(job)

    def record_orderly_end(self, successor: str) -> None:
        """Record that this link ended in order, so that it does not count as lost."""
        slurm.record_coordinator(self.paths, successor, "chained")

    def retry(self, call: Callable[[], Answer]) -> Answer:
        """Call until Slurm and the file server answer, with growing pauses; return the answer.

        The job requeues itself before its time is over, so the chain goes on after any outage.
        """
        pause = self._backoff()
        while True:
            try:
                return call()
            except Exception as error:
                if not (isinstance(error, ASKED_AGAIN) or storage_trouble(error)):
                    raise
                self.say(f"{error}; asking again in {pause.seconds:.0f} s")
                self.wait(pause.seconds)
                pause.fail()

    def _others(self) -> list[str]:
        """Return the waiting links, once no other link runs."""
        while True:
            jobs = self.retry(lambda: slurm.coordinator_jobs(self.run_id))
            others = {job: state for job, state in jobs.items() if job != self.job}
            if set(others.values()) <= {TaskState.WAITING}:
                return list(others)
            self.wait(self.config.scheduler.poll_seconds)

    def _lost_links(self) -> int:
        """Return the number of links lost in a row before this one."""
        record = self.retry(lambda: CoordinatorJobRecord.find(self.paths.coordinator_job))
        lost = record.lost if record else 0
        if lost >= _MAX_LOST_LINKS:
            raise RunFailed(
                f"{self.paths.root}: {lost} links of the chain in a row were killed before they "
                f"could record why; see {self.paths.all_logs / 'chain.log'}, then: "
                f"fedllm submit {self.paths.root}"
            )
        return lost

    def _pause_after(self, lost: int) -> None:
        """Pause if several links in a row were lost."""
        if lost > 1:
            pause = self._backoff()
            pause.failures = lost
            self.wait(pause.seconds)

    def _backoff(self) -> Backoff:
        return Backoff(self.config.scheduler.poll_seconds, max_seconds=LONGEST_WAIT_SECONDS)


def take_link(chain: Chain, open_run: Callable[[], Run]) -> bool:
    """Run one link of the chain; return whether the run is done.

    Raises:
        UserError: a person must change something, and the chain ends here.
        RunFailed: the run cannot go on, and the chain ends here.
        Stopped: a signal stopped this link; its successor goes on.
        Exception: what nobody foresaw; the successor tries again.
    """
    with stopping_on_signals():
        try:
            done = _take_steps(chain, open_run)
        except (UserError, RunFailed):
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
        successor = chain.start_successor_after(successor, in_flight)
    except Stopped:
        chain.record_orderly_end(successor)
        raise
    except (LeaseError, Incomplete) as error:
        # a person, cron or a link that is just ending advances the run; or Slurm, the file server
        # or the disk has to come back
        successor = chain.postpone(successor, str(error))
    except (UserError, RunFailed):
        raise
    except Exception:
        # counted as lost: a chain of links that all meet it ends
        chain.postpone(successor, "this one met an error", seconds=LEAST_SECONDS_BETWEEN_LINKS)
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
