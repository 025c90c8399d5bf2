"""A small batch system: arrays queue, run as processes watched by threads, and may be preempted."""

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.scheduling.environment import task_variables
from fedllm.scheduling.log_names import log_of
from fedllm.scheduling.seam import (
    ONE_PROCESS,
    Capacity,
    Ending,
    EndReason,
    Job,
    Limits,
    Option,
    SchedulerFull,
    TaskSize,
    TaskState,
)
from fedllm.storage.paths import shipped


def real_program(job: Job) -> list[str]:
    """Return the command of a job's own program."""
    return [sys.executable, str(shipped(f"jobs/{job.program}.py")), *job.argv]


@dataclass(kw_only=True, eq=False)
class _Task:
    id: str
    job: Job
    state: TaskState = TaskState.WAITING
    process: "subprocess.Popen[bytes] | None" = None
    killed_for: EndReason | None = None
    comes_back: bool = False
    starts: int = 0


@dataclass(kw_only=True)
class ToyBatch:
    """Batch system that runs at most `slots` tasks at once, with at most `max_tasks` not yet ended.

    `command` returns the command of a job. Jobs go on after `close`; `shut_down` ends the system.
    """

    slots: int = 2
    max_tasks: int | None = None
    command: Callable[[Job], Sequence[str]] = real_program
    _tasks: dict[str, _Task] = field(default_factory=dict)
    _queue: deque[_Task] = field(default_factory=deque)
    _ended: dict[str, Ending] = field(default_factory=dict)
    _change: threading.Condition = field(default_factory=threading.Condition)
    _watchers: list[threading.Thread] = field(default_factory=list)
    _is_down: bool = False
    _arrays: int = 0

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        del size
        most, room = self.slots, self.room(options)
        return Capacity(free_slots=most, max_parallel=most, largest_array=100, free_tasks=room)

    def room(self, options: Mapping[str, Option]) -> int | None:
        del options
        with self._change:
            return None if self.max_tasks is None else self.max_tasks - len(self._alive())

    def limits(self, options: Mapping[str, Option]) -> Limits:
        del options
        return Limits(largest_array=100, max_submitted=self.max_tasks)

    def check(self, jobs: Sequence[Job]) -> None:
        del jobs

    def script(self, job: Job) -> str:
        return "\n".join(self.command(job))

    def submit(self, job: Job) -> list[str]:
        with self._change:
            if self.max_tasks is not None and len(self._alive()) + job.tasks > self.max_tasks:
                raise SchedulerFull(f"no more than {self.max_tasks} tasks")
            self._arrays += 1
            tasks = [_Task(id=f"toy{self._arrays}_{n}", job=job) for n in range(job.tasks)]
            self._tasks |= {task.id: task for task in tasks}
            self._queue.extend(tasks)
            while len(self._watchers) < self.slots:
                self._watchers.append(threading.Thread(target=self._serve))
                self._watchers[-1].start()
            self._change.notify_all()
        return [task.id for task in tasks]

    def find(self, name: str) -> list[str] | None:
        with self._change:
            return [task.id for task in self._tasks.values() if task.job.name == name] or None

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        with self._change:
            known = {id_: self._tasks[id_].state for id_ in ids if id_ in self._tasks}
        return {id_: known.get(id_, TaskState.GONE) for id_ in ids}

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        with self._change:
            return {id_: self._ended[id_] for id_ in ids if id_ in self._ended}

    def attribute(self, ids: Sequence[str], user: int) -> None:
        pass

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        states = self.states(ids)
        return {id_: "a free slot" for id_ in ids if states[id_] is TaskState.WAITING}

    def trouble(self) -> str | None:
        return None

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        states = self.states(ids)
        for id_ in ids:
            if not only_waiting or states[id_] is TaskState.WAITING:
                self.end(id_, EndReason.CANCELLED)

    def wait(self, seconds: float) -> None:
        with self._change:
            self._change.wait(seconds)

    def close(self) -> None:
        """Do nothing: jobs go on."""

    # --- events of a batch system

    def end(self, id_: str, why: EndReason, *, comes_back: bool = False) -> None:
        """Kill a task; if it comes back, it waits again at the end of the queue."""
        with self._change:
            task = self._tasks.get(id_)
            if task is None or task.state is TaskState.GONE:
                return
            if task.process is not None:
                task.killed_for, task.comes_back = why, comes_back
                task.process.kill()
            elif not comes_back:
                self._queue.remove(task)
                self._over(task, why)

    def starts(self, id_: str) -> int:
        """Return how often a task was started."""
        with self._change:
            return self._tasks[id_].starts

    def shut_down(self) -> None:
        """End the system and every task of it."""
        with self._change:
            self._is_down = True
            self._change.notify_all()
        self.cancel(list(self._tasks))
        for watcher in self._watchers:
            watcher.join()

    def _alive(self) -> list[_Task]:
        return [task for task in self._tasks.values() if task.state is not TaskState.GONE]

    def _serve(self) -> None:
        for task in iter(self._next, None):
            assert task.process is not None
            code = task.process.wait()
            with self._change:
                why = task.killed_for or EndReason.FAILED if code else None
                back = bool(why) and task.comes_back and not self._is_down
                task.process, task.killed_for, task.comes_back = None, None, False
                if back:
                    task.state = TaskState.WAITING
                    self._queue.append(task)
                    self._change.notify_all()
                else:
                    self._over(task, why, exit_code=str(code) if code > 0 else "")

    def _next(self) -> _Task | None:
        """Start the first task that waits, once there is one; None: the system is down."""
        with self._change:
            while not self._queue and not self._is_down:
                self._change.wait()
            if self._is_down:
                return None
            task = self._queue.popleft()
            log = log_of(task.job.log_folder, task.id)
            log.parent.mkdir(parents=True, exist_ok=True)
            told = os.environ | task_variables(task.id, str(log))
            with log.open("ab") as out:
                task.process = subprocess.Popen(
                    self.command(task.job), stdout=out, stderr=out, env=told
                )
            task.state, task.starts = TaskState.RUNNING, task.starts + 1
            return task

    def _over(self, task: _Task, why: EndReason | None, *, exit_code: str = "") -> None:
        task.state = TaskState.GONE
        if why:
            log = str(log_of(task.job.log_folder, task.id))
            self._ended[task.id] = Ending(state=why.value, exit_code=exit_code, log=log)
        self._change.notify_all()
