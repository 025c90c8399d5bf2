"""A scheduler that several runs share: the same workers, the same queries, one throttle."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.config.models import Config
from fedllm.scheduling.seam import (
    ONE_PROCESS,
    Capacity,
    Ending,
    Job,
    Limits,
    Option,
    Scheduler,
    SchedulerFull,
    TaskSize,
    TaskState,
)


@dataclass(kw_only=True)
class SchedulerPool:
    """Schedulers of the runs of a sweep: runs of equal scheduler keys share one.

    Attributes:
        make: returns the scheduler of a configuration.
        max_parallel: the number of tasks of all runs that may be queued at once; None: any.
    """

    make: Callable[[Config], Scheduler]
    max_parallel: int | None = None
    _shared: dict[str, Scheduler] = field(default_factory=dict)
    _alive: dict[str, Scheduler] = field(default_factory=dict)

    def scheduler(self, config: Config) -> "SharedScheduler":
        """Return the view of a run on the scheduler that it shares."""
        key = config.scheduler.model_dump_json()
        if key not in self._shared:
            self._shared[key] = self.make(config)
        return SharedScheduler(inner=self._shared[key], pool=self)

    def room(self) -> int | None:
        """Return how many more tasks of all runs may be queued; None: any number."""
        if self.max_parallel is None:
            return None
        for inner in self._shared.values():
            ids = [id_ for id_, owner in self._alive.items() if owner is inner]
            states = inner.states(ids) if ids else {}
            for id_ in ids:
                if states.get(id_) is TaskState.GONE:
                    del self._alive[id_]
        return max(0, self.max_parallel - len(self._alive))

    def note(self, inner: Scheduler, states: Mapping[str, TaskState]) -> None:
        """Count tasks that wait or run, whichever process submitted them."""
        for id_, state in states.items():
            if state is TaskState.GONE:
                self._alive.pop(id_, None)
            else:
                self._alive[id_] = inner

    def close(self) -> None:
        """End the processes that were started for all runs; jobs of a cluster go on."""
        while self._shared:
            self._shared.popitem()[1].close()


@dataclass(frozen=True, kw_only=True)
class SharedScheduler:
    """The view of one run on a scheduler that other runs use too; closing it ends nothing."""

    inner: Scheduler
    pool: SchedulerPool

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        """Return the capacity within the common throttle."""
        capacity, room = self.inner.capacity(options, size), self.pool.room()
        limit = self.pool.max_parallel
        if room is None or limit is None:
            return capacity
        return dataclasses.replace(
            capacity,
            free_slots=min(capacity.free_slots, room),
            max_parallel=min(capacity.max_parallel, limit),
        )

    def room(self, options: Mapping[str, Option]) -> int | None:
        """Return how many tasks may be submitted now, within the common throttle."""
        rooms = [room for room in (self.inner.room(options), self.pool.room()) if room is not None]
        return min(rooms, default=None)

    def limits(self, options: Mapping[str, Option]) -> Limits:
        """Return the limits on what may be submitted."""
        return self.inner.limits(options)

    def check(self, jobs: Sequence[Job]) -> None:
        """Check that jobs could be submitted as they are."""
        self.inner.check(jobs)

    def submit(self, job: Job) -> list[str]:
        """Submit an array unless the throttle leaves no room; one alone may be larger than it.

        Raises:
            SchedulerFull: the tasks of all runs leave no room now.
        """
        room = self.pool.room()
        limit = self.pool.max_parallel
        if room is not None and limit is not None and job.tasks > room and room < limit:
            raise SchedulerFull(
                f"{limit - room} of max_parallel {limit} tasks of the sweep are queued"
            )
        ids = self.inner.submit(job)
        self.pool.note(self.inner, dict.fromkeys(ids, TaskState.WAITING))
        return ids

    def script(self, job: Job) -> str | None:
        """Return the script that `submit` would give to the batch system."""
        return self.inner.script(job)

    def find(self, name: str) -> list[str] | None:
        """Return the task ids of an array submitted under `name`."""
        return self.inner.find(name)

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the state of every task."""
        states = self.inner.states(ids)
        self.pool.note(self.inner, states)
        return states

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended, for those that failed."""
        return self.inner.endings(ids)

    def attribute(self, ids: Sequence[str], user: int) -> None:
        """Remember the user who submitted tasks."""
        self.inner.attribute(ids, user)

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the reasons why tasks wait."""
        return self.inner.waiting_for(ids)

    def trouble(self) -> str | None:
        """Return why states are unknown now; None: they are known."""
        return self.inner.trouble()

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        """End tasks, or only those that still wait."""
        self.inner.cancel(ids, only_waiting=only_waiting)

    def wait(self, seconds: float) -> None:
        """Wait until something may have happened."""
        self.inner.wait(seconds)

    def close(self) -> None:
        """End nothing: other runs use the same processes."""
