"""The local scheduler: worker processes that stay for the whole run and load the base once."""

import contextlib
import itertools
import json
import math
import os
import selectors
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedllm.errors import ConfigError
from fedllm.scheduling.environment import process_variables
from fedllm.scheduling.heap import with_heap_settings
from fedllm.scheduling.seam import (
    ONE_PROCESS,
    Capacity,
    Ending,
    Job,
    Limits,
    Option,
    TaskSize,
    TaskState,
)
from fedllm.storage.publishing.publish import storage_errors
from fedllm.storage.trust.regular_files import append_regular

SERVE = (sys.executable, "-m", "fedllm.programs.serve")
# the processes of a task meet on this host
_HOST = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class _Task:
    id: str
    job: Job


@dataclass(kw_only=True, eq=False)
class _Worker:
    """Processes that run a task together; a task of n processes takes the first n.

    `failure` and `log` belong to the process of the present task that failed first. At `deadline`
    the other processes of the task are killed.
    """

    name: str
    processes: "list[_Process]" = field(default_factory=list)
    task: _Task | None = None
    failure: str = ""
    log: Path = Path()
    deadline: float = math.inf


@dataclass(kw_only=True, eq=False)
class _Process:
    worker: _Worker
    popen: "subprocess.Popen[bytes]"
    inbox: IO[bytes]
    outbox: IO[bytes]
    log: Path
    is_busy: bool = False
    buffer: bytes = b""

    @property
    def task_log(self) -> Path:
        """The log of its present task; before and after a task it writes to `log`."""
        task = self.worker.task
        return task.job.log_folder / self.log.name if task else self.log


@dataclass(kw_only=True)
class LocalScheduler:
    """Scheduler that gives tasks to `workers` resident workers, first come, first served.

    A worker has as many processes as the largest task it has been given.

    Attributes:
        workers: the number of workers.
        log_folder: the folder of the logs that workers write before and after their tasks.
        serve: the command of a process; it reads one task per line and answers with the task's
            id and exit code.
        grace_seconds: the time a process has to end after a signal: it stops between two steps
            and publishes what it has finished.
        end_seconds: the time a process has to end once it has closed its pipes.
    """

    workers: int
    log_folder: Path
    serve: tuple[str, ...] = SERVE
    grace_seconds: float = 30.0
    end_seconds: float = 5.0
    _run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _queue: deque[_Task] = field(default_factory=deque)
    _pool: list[_Worker] = field(default_factory=list)
    _ended: dict[str, Ending] = field(default_factory=dict)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def capacity(
        self,
        options: Mapping[str, Option],  # noqa: ARG002
        size: TaskSize = ONE_PROCESS,  # noqa: ARG002
    ) -> Capacity:
        """Return one slot for each worker."""
        slots = self.workers
        return Capacity(
            free_slots=slots, max_parallel=slots, largest_array=sys.maxsize, resident=True
        )

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse tasks of several nodes."""
        for job in jobs:
            if job.nodes_per_task > 1:
                raise ConfigError(
                    f"scheduler.kind: local runs on this node, {job.name} has "
                    f"{job.nodes_per_task} (training.nodes, or nodes of a tier); need slurm, or 1"
                )

    def room(self, options: Mapping[str, Option]) -> int | None:  # noqa: ARG002
        """Return None: nothing limits the queue."""
        return None

    def limits(self, options: Mapping[str, Option]) -> Limits:  # noqa: ARG002
        """Return no limits: there is no batch queue."""
        return Limits(problem="scheduler.kind local has no queue")

    def script(self, job: Job) -> None:
        """Return None: no batch system reads a script."""

    def submit(self, job: Job) -> list[str]:
        """Queue the tasks of a job and return their ids; free workers take them at once."""
        self.check([job])
        numbers = itertools.islice(self._numbers, job.tasks)
        tasks = [_Task(id=f"local-{self._run}-{number}", job=job) for number in numbers]
        self._queue.extend(tasks)
        # an idle worker may have died: it must not get a task
        self._poll(0.0)
        return [task.id for task in tasks]

    def find(self, name: str) -> list[str] | None:  # noqa: ARG002
        """Return None: workers end with the process that started them."""
        return None

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the states of tasks; a task that this process did not submit is GONE."""
        self._poll(0.0)
        running = {worker.task.id for worker in self._pool if worker.task}
        waiting = {task.id for task in self._queue}
        return {id_: _state(id_, running, waiting) for id_ in ids}

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended, for those that failed."""
        return {id_: self._ended[id_] for id_ in ids if id_ in self._ended}

    def attribute(self, ids: Sequence[str], user: int) -> None:
        """Do nothing: it only knows the processes that it started."""

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Return `a free worker` for every task that waits."""
        waiting = {task.id for task in self._queue}
        return {id_: "a free worker" for id_ in ids if id_ in waiting}

    def trouble(self) -> str | None:
        """Return None: the states of tasks are always known."""
        return None

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        """Forget waiting tasks and end the workers of running ones."""
        cancelled = set(ids)
        self._queue = deque(task for task in self._queue if task.id not in cancelled)
        running = [] if only_waiting else [w for w in self._pool if w.task]
        for worker in [w for w in running if w.task and w.task.id in cancelled]:
            self._kill(worker.processes)
        self._dispatch()

    def wait(self, seconds: float) -> None:
        """Wait until a task ends, at most `seconds`."""
        if self._pool or self._queue:
            self._poll(seconds)
        else:
            time.sleep(seconds)

    def close(self) -> None:
        """End the workers; a busy worker may first publish what it has finished.

        An exception while it waits for them, such as that of a second Ctrl-C, kills them.
        """
        try:
            self._end_all(self.grace_seconds)
        except BaseException:
            self._end_all(0.0)
            raise

    def _end_all(self, grace_seconds: float) -> None:
        processes = [process for worker in self._pool for process in worker.processes]
        for process in processes:
            process.popen.terminate()
            # the pipe is broken where the worker has died with a line unread
            with contextlib.suppress(BrokenPipeError):
                process.inbox.close()
        deadline = time.monotonic() + grace_seconds
        for process in processes:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
            self._remove(process)

    def _dispatch(self) -> None:
        while self._queue:
            free = next((w for w in self._pool if w.task is None), None)
            if free is None and len(self._pool) < self.workers:
                free = self._add_worker()
            if free is None:
                return
            self._assign(free, self._queue.popleft())

    def _add_worker(self) -> _Worker:
        taken = {worker.name for worker in self._pool}
        name = next(f"worker-{n}" for n in itertools.count(1) if f"worker-{n}" not in taken)
        worker = _Worker(name=name)
        self._start(worker)
        self._pool.append(worker)
        return worker

    def _assign(self, worker: _Worker, task: _Task) -> None:
        count = task.job.processes_per_task
        while len(worker.processes) < count:
            self._start(worker)
        worker.task, worker.failure, worker.deadline = task, "", math.inf
        processes = worker.processes[:count]
        for process in processes:
            process.is_busy = True
        rendezvous = f"{_HOST}:{_free_port()}" if count > 1 else ""
        for rank, process in enumerate(processes):
            message = {
                "id": task.id,
                "program": task.job.program,
                "argv": list(task.job.argv),
                "log": str(process.task_log),
                "environment": process_variables(rank, count, rendezvous),
            }
            try:
                process.inbox.write(json.dumps(message).encode() + b"\n")
                process.inbox.flush()
            except BrokenPipeError:
                self._remove(process)

    def _start(self, worker: _Worker) -> None:
        """Start another process of a worker."""
        taken = {process.log.stem for process in worker.processes}
        names = itertools.chain([worker.name], (f"{worker.name}.{n}" for n in itertools.count(1)))
        log = self.log_folder / f"{next(name for name in names if name not in taken)}.log"
        with storage_errors(log):
            self.log_folder.mkdir(parents=True, exist_ok=True)
            stderr = append_regular(log)
        with stderr:
            popen = subprocess.Popen(
                self.serve,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=with_heap_settings(os.environ),
                # Ctrl-C goes to the coordinator, which then ends its workers
                start_new_session=True,
            )
        assert popen.stdin and popen.stdout
        os.set_blocking(popen.stdout.fileno(), False)
        process = _Process(
            worker=worker, popen=popen, inbox=popen.stdin, outbox=popen.stdout, log=log
        )
        self._selector.register(process.outbox, selectors.EVENT_READ, process)
        worker.processes.append(process)

    def _poll(self, seconds: float) -> None:
        """Read the workers' answers until a task ends, at most `seconds`; then assign tasks."""
        deadline = time.monotonic() + seconds
        ended = False
        while not ended:
            left = deadline - time.monotonic()
            next_kill = min((worker.deadline for worker in self._pool), default=math.inf)
            timeout = min(left, next_kill - time.monotonic())
            events = self._selector.select(max(0.0, timeout))
            for key, _ in events:
                ended |= self._read(key.data)
            if not events:
                ended |= self._kill_overdue() | self._remove_ended()
                if left <= 0:
                    break
        self._dispatch()

    def _read(self, process: _Process) -> bool:
        chunk = process.outbox.read()
        if chunk == b"":
            self._remove(process)
            return True
        process.buffer += chunk or b""
        *lines, process.buffer = process.buffer.split(b"\n")
        answers = [json.loads(line) for line in lines if line]
        ended = [a for a in answers if "exit" in a]
        for answer in ended:
            self._end(process, f"exit {answer['exit']}" if answer["exit"] else "")
        return bool(ended)

    def _kill_overdue(self) -> bool:
        """Kill processes that still run `grace_seconds` after another one of their task failed."""
        now = time.monotonic()
        overdue = [w for w in self._pool if w.deadline <= now]
        for worker in overdue:
            self._kill([process for process in worker.processes if process.is_busy])
        return bool(overdue)

    def _remove_ended(self) -> bool:
        """Remove processes that ended with their pipe still open: a child may hold it open."""
        processes = [process for worker in self._pool for process in worker.processes]
        ended = [process for process in processes if process.popen.poll() is not None]
        for process in ended:
            self._remove(process)
        return bool(ended)

    def _kill(self, processes: Sequence[_Process]) -> None:
        for process in processes:
            process.popen.kill()
        for process in list(processes):
            self._remove(process)

    def _remove(self, process: _Process) -> None:
        try:
            code = process.popen.wait(self.end_seconds)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            code = process.popen.wait()
        worker = process.worker
        worker.processes.remove(process)
        self._end(process, f"killed by signal {-code}" if code < 0 else f"exit {code}")
        self._selector.unregister(process.outbox)
        process.outbox.close()
        with contextlib.suppress(BrokenPipeError):
            process.inbox.close()
        if not worker.processes:
            self._pool.remove(worker)

    def _end(self, process: _Process, failure: str) -> None:
        """Note that a process ended its part of a task; if it failed, end the others too."""
        worker = process.worker
        if worker.task is None or not process.is_busy:
            return
        process.is_busy = False
        others = [other for other in worker.processes if other.is_busy]
        if failure and not worker.failure:
            # a process that died before it opened its task's log wrote the reason to its own log
            log = process.task_log if process.task_log.exists() else process.log
            worker.failure, worker.log = failure, log
            worker.deadline = time.monotonic() + self.grace_seconds
            for other in others:
                other.popen.terminate()
        if not others:
            if worker.failure:
                self._ended[worker.task.id] = Ending(state=worker.failure, log=str(worker.log))
            worker.task, worker.deadline = None, math.inf


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _state(id_: str, running: set[str], waiting: set[str]) -> TaskState:
    if id_ in running:
        return TaskState.RUNNING
    return TaskState.WAITING if id_ in waiting else TaskState.GONE
