"""Jobs run in local processes that stay for the whole run and load the base model once."""

import contextlib
import itertools
import json
import os
import selectors
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedllm.scheduling.heap import with_heap_settings
from fedllm.scheduling.seam import Capacity, Ending, Job, Limits, Option, TaskState
from fedllm.storage.publish import storage_errors

SERVE = (sys.executable, "-m", "fedllm.steps.serve")


@dataclass(frozen=True, kw_only=True)
class _Task:
    id: str
    job: Job


@dataclass(kw_only=True, eq=False)
class _Worker:
    process: "subprocess.Popen[bytes]"
    inbox: IO[bytes]
    outbox: IO[bytes]
    log: Path
    task: _Task | None = None
    buffer: bytes = b""

    @property
    def task_log(self) -> Path:
        """Where its present task writes; what it says before and after is in `log`."""
        return self.task.job.log_folder / self.log.name if self.task else self.log


@dataclass(kw_only=True)
class LocalScheduler:
    """Gives tasks to `workers` resident processes, first come, first served.

    Attributes:
        workers: how many there are.
        log_folder: for what they say before and after their tasks.
        serve: starts one, which reads a task per line and answers with its id and exit code.
        grace_seconds: for workers that are told to end: one stops between two steps, and publishes
            what it has finished.
        end_seconds: for one that closed its pipes: it is at its end, or will never answer.
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

    def capacity(self, options: Mapping[str, Option]) -> Capacity:  # noqa: ARG002
        """As many slots as there are workers."""
        slots = self.workers
        return Capacity(
            free_slots=slots, most_parallel=slots, largest_array=sys.maxsize, resident=True
        )

    def check(self, jobs: Sequence[Job]) -> None:
        """There is nothing to refuse."""

    def room(self, options: Mapping[str, Option]) -> int | None:  # noqa: ARG002
        """Nothing limits the queue."""
        return None

    def limits(self, options: Mapping[str, Option]) -> Limits:  # noqa: ARG002
        """Nothing is limited where nothing is queued."""
        return Limits(problem="scheduler.kind local has no queue")

    def script(self, job: Job) -> None:
        """Jobs are started from here: no batch system reads anything."""

    def submit(self, job: Job) -> list[str]:
        """Queue the tasks; free workers take them at once."""
        numbers = itertools.islice(self._numbers, job.tasks)
        tasks = [_Task(id=f"local-{self._run}-{number}", job=job) for number in numbers]
        self._queue.extend(tasks)
        # a worker that died idle must not be given a task
        self._hear(0.0)
        return [task.id for task in tasks]

    def find(self, name: str) -> list[str] | None:  # noqa: ARG002
        """Workers end with the process that started them, so nothing is left to find."""
        return None

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the states of tasks of this process; all others are gone."""
        self._hear(0.0)
        running = {worker.task.id for worker in self._pool if worker.task}
        waiting = {task.id for task in self._queue}
        return {id_: _state(id_, running, waiting) for id_ in ids}

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended that did not exit 0."""
        return {id_: self._ended[id_] for id_ in ids if id_ in self._ended}

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Tasks wait for a free worker, and for nothing else."""
        waiting = {task.id for task in self._queue}
        return {id_: "a free worker" for id_ in ids if id_ in waiting}

    def trouble(self) -> str | None:
        """Whoever runs the jobs here answers."""
        return None

    def cancel(self, ids: Sequence[str]) -> None:
        """Forget waiting tasks and end the workers of running ones."""
        named = set(ids)
        self._queue = deque(task for task in self._queue if task.id not in named)
        for worker in [w for w in self._pool if w.task and w.task.id in named]:
            worker.process.kill()
            self._bury(worker)
        self._dispatch()

    def wait(self, seconds: float) -> None:
        """Return as soon as a task ended, at the latest after `seconds`."""
        if self._pool or self._queue:
            self._hear(seconds)
        else:
            time.sleep(seconds)

    def close(self) -> None:
        """End the workers; those at work may publish what they have finished."""
        for worker in self._pool:
            worker.process.terminate()
            # a line that the worker never read is lost with it
            with contextlib.suppress(BrokenPipeError):
                worker.inbox.close()
        deadline = time.monotonic() + self.grace_seconds
        for worker in list(self._pool):
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
            self._bury(worker)

    def _dispatch(self) -> None:
        while self._queue:
            free = next((w for w in self._pool if w.task is None), None)
            if free is None and len(self._pool) < self.workers:
                free = self._start()
            if free is None:
                return
            self._give(free, self._queue.popleft())

    def _give(self, worker: _Worker, task: _Task) -> None:
        worker.task = task
        message = {
            "id": task.id,
            "program": task.job.program,
            "argv": list(task.job.argv),
            "log": str(worker.task_log),
        }
        try:
            worker.inbox.write(json.dumps(message).encode() + b"\n")
            worker.inbox.flush()
        except BrokenPipeError:
            self._bury(worker)

    def _start(self) -> _Worker:
        taken = {worker.log.stem for worker in self._pool}
        name = next(f"worker-{n}" for n in itertools.count(1) if f"worker-{n}" not in taken)
        log = self.log_folder / f"{name}.log"
        with storage_errors(log):
            self.log_folder.mkdir(parents=True, exist_ok=True)
            stderr = log.open("ab")
        with stderr:
            process = subprocess.Popen(
                self.serve,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=with_heap_settings(os.environ),
                # Ctrl-C is for the coordinator: it ends its workers itself
                start_new_session=True,
            )
        assert process.stdin and process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        worker = _Worker(process=process, inbox=process.stdin, outbox=process.stdout, log=log)
        self._selector.register(worker.outbox, selectors.EVENT_READ, worker)
        self._pool.append(worker)
        return worker

    def _hear(self, seconds: float) -> None:
        """Listen to the workers until a task ended, at most `seconds`; then give out tasks."""
        deadline = time.monotonic() + seconds
        heard = False
        while not heard:
            left = deadline - time.monotonic()
            events = self._selector.select(max(0.0, left))
            for key, _ in events:
                heard |= self._read(key.data)
            if not events:
                heard |= self._bury_the_dead()
                if left <= 0:
                    break
        self._dispatch()

    def _read(self, worker: _Worker) -> bool:
        chunk = worker.outbox.read()
        if chunk == b"":
            self._bury(worker)
            return True
        worker.buffer += chunk or b""
        *lines, worker.buffer = worker.buffer.split(b"\n")
        answers = [json.loads(line) for line in lines if line]
        ended = [a for a in answers if "exit" in a]
        for answer in ended:
            self._end(worker, f"exit {answer['exit']}" if answer["exit"] else "")
        return bool(ended)

    def _bury_the_dead(self) -> bool:
        """Bury workers whose end nobody heard: a child of theirs may keep the pipe open."""
        dead = [worker for worker in self._pool if worker.process.poll() is not None]
        for worker in dead:
            self._bury(worker)
        return bool(dead)

    def _bury(self, worker: _Worker) -> None:
        try:
            code = worker.process.wait(self.end_seconds)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            code = worker.process.wait()
        self._end(worker, f"killed by signal {-code}" if code < 0 else f"exit {code}")
        self._selector.unregister(worker.outbox)
        worker.outbox.close()
        with contextlib.suppress(BrokenPipeError):
            worker.inbox.close()
        self._pool.remove(worker)

    def _end(self, worker: _Worker, how: str) -> None:
        if worker.task is None:
            return
        # one that died before it opened its task's log said why in its own
        log = worker.task_log if worker.task_log.exists() else worker.log
        if how:
            self._ended[worker.task.id] = Ending(state=how, log=str(log))
        worker.task = None


def _state(id_: str, running: set[str], waiting: set[str]) -> TaskState:
    if id_ in running:
        return TaskState.RUNNING
    return TaskState.WAITING if id_ in waiting else TaskState.GONE
