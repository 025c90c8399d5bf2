"""A Slurm cluster in memory: answers the command lines that fedllm issues, in virtual time.

It stands where `fedllm.scheduling.slurm.commands.Commands` is: arrays with `%N`, MaxArraySize,
MaxSubmitJobs, time limits, a scheduler that is not at once. A command, option or format that it
does not know fails loudly, so that it cannot answer what Slurm would not.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.simulated import answers
from benchmarks.simulated.timeline import Timeline
from fedllm.scheduling.slurm.command_output import MARK
from fedllm.scheduling.slurm.commands import CommandRefused

# Slurm's default between a submission or an ending and the pass that starts tasks
# (`batch_sched_delay`), and how many a pass looks at (`default_queue_depth`)
SCHEDULING_SECONDS = 3.0
STARTS_PER_PASS = 100
# how long ended tasks are listed: Slurm's default
MIN_JOB_AGE_SECONDS = 300.0
CPUS_PER_NODE = 8

_ALIVE = ("PENDING", "RUNNING")


@dataclass(kw_only=True, eq=False)
class Task:
    """One task of an array; `memory` is what it left for its next start."""

    array: "Array"
    index: int
    state: str = "PENDING"
    node: str = ""
    starts: int = 0
    started: float = 0.0
    ended: float = 0.0
    memory: object = None

    @property
    def id(self) -> str:
        """`7_3`."""
        return f"{self.array.id}_{self.index}"

    @property
    def ends_at(self) -> float:
        """When its time limit is over."""
        return self.started + 60.0 * self.array.minutes


@dataclass(kw_only=True, eq=False)
class Array:
    """What one sbatch submitted."""

    id: int
    name: str
    command: list[str]
    minutes: float
    parallel: int
    cpus: int
    log: str
    submitted: float
    tasks: list[Task] = field(default_factory=list)


# yields the seconds until it goes on; its value says whether the task is to be requeued
Running = Generator[float, None, bool]
Program = Callable[[Task], Running]


@dataclass(kw_only=True)
class SimulatedSlurm:
    """`Commands` for a cluster with `slots` CPUs whose tasks are played by `program`.

    `issued` has the moment and the name of every command.
    """

    timeline: Timeline
    slots: int
    program: Program
    max_array_size: int = 1001
    max_submit_jobs: int | None = None
    issued: list[tuple[float, str]] = field(default_factory=list)
    arrays: dict[int, Array] = field(default_factory=dict)
    ended_arrays: list[Array] = field(default_factory=list)
    _free: Counter[str] = field(default_factory=Counter)
    _waiting: list[Task] = field(default_factory=list)
    _pass_due: bool = False
    _entered: float | None = None
    _outside_seconds: float = 0.0

    def __post_init__(self) -> None:
        for first in range(0, self.slots, CPUS_PER_NODE):
            name = f"node{first // CPUS_PER_NODE:03d}"
            self._free[name] = min(CPUS_PER_NODE, self.slots - first)
        self._cpus = dict(self._free)

    # --- what stands for the commands and their clock

    def call(self, words: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
        """Answer a command."""
        del environment
        with self._outside():
            self.issued.append((self.timeline.now, words[0]))
            answered_by = {
                "sbatch": self._sbatch,
                "squeue": self._squeue,
                "sacct": self._sacct,
                "scancel": self._scancel,
                "scontrol": self._scontrol,
                "sacctmgr": self._sacctmgr,
                "sinfo": self._sinfo,
            }
            return answered_by[words[0]](list(words[1:]))

    def monotonic(self) -> float:
        """Return virtual time."""
        return self.timeline.now

    def sleep(self, seconds: float) -> None:
        """Let everybody else go on for so long."""
        with self._outside():
            self.timeline.pass_seconds(seconds)

    def coordinator_seconds(self) -> float:
        """Return this process's CPU time without what passed in here."""
        until = time.process_time() if self._entered is None else self._entered
        return until - self._outside_seconds

    @contextmanager
    def _outside(self) -> Iterator[None]:
        self._entered = time.process_time()
        try:
            yield
        finally:
            self._outside_seconds += time.process_time() - self._entered
            self._entered = None

    # --- submissions

    def _sbatch(self, words: list[str]) -> str:
        if words[0] == "--test-only":
            return ""
        (file,) = words
        text = Path(file).read_text(encoding="utf-8")
        options = answers.directives(text)
        numbers, _, parallel = options["array"].partition("%")
        first, _, last = numbers.partition("-")
        assert first == "0", numbers
        self._require_room(int(last) + 1)
        array = Array(
            id=1 + len(self.arrays) + len(self.ended_arrays),
            name=options["job-name"],
            command=answers.started_by(text),
            minutes=float(options["time"]),
            parallel=int(parallel or int(last) + 1),
            cpus=int(options.get("cpus-per-task", 1)),
            log=options["output"],
            submitted=self.timeline.now,
        )
        array.tasks += (Task(array=array, index=index) for index in range(int(last) + 1))
        self.arrays[array.id] = array
        self._waiting += array.tasks
        self._wake()
        return f"Submitted batch job {array.id}\n"

    def _require_room(self, tasks: int) -> None:
        if tasks > self.max_array_size:
            raise CommandRefused("Batch job submission failed: Invalid job array specification")
        queued = sum(task.state in _ALIVE for task in self._listed())
        if self.max_submit_jobs is not None and queued + tasks > self.max_submit_jobs:
            raise CommandRefused(
                "AssocMaxSubmitJobLimit; Batch job submission failed: Job violates accounting/QOS "
                "policy (job submit limit, user's size and/or time limits)"
            )

    def _scancel(self, words: list[str]) -> str:
        ids = {id_ for word in words if not word.startswith("-") for id_ in answers.tasks_of(word)}
        for task in self._listed():
            if task.id in ids and task.state in _ALIVE:
                self._end(task, "CANCELLED")
        return ""

    # --- scheduling

    def _wake(self) -> None:
        if not self._pass_due:
            self._pass_due = True
            self.timeline.after(SCHEDULING_SECONDS, self._schedule)

    def _schedule(self) -> None:
        self._pass_due = False
        running = Counter(t.array.id for a in self.arrays.values() for t in a.tasks if t.node)
        left: list[Task] = []
        starts = 0
        for task in self._waiting:
            array = task.array
            node = None
            if starts < STARTS_PER_PASS and running[array.id] < array.parallel:
                node = next((n for n, free in self._free.items() if free >= array.cpus), None)
            if node is None:
                left.append(task)
                continue
            starts += 1
            running[array.id] += 1
            self._start(task, node)
        self._waiting = left
        if starts == STARTS_PER_PASS and left:
            self._wake()

    def _start(self, task: Task, node: str) -> None:
        self._free[node] -= task.array.cpus
        task.node, task.state, task.started = node, "RUNNING", self.timeline.now
        task.starts += 1
        log = task.array.log.replace("%A", str(task.array.id)).replace("%a", str(task.index))
        Path(log).touch()
        self._go_on(task, self.program(task), task.starts)

    def _go_on(self, task: Task, running: Running, start: int) -> None:
        if task.state != "RUNNING" or task.starts != start:
            return
        try:
            seconds = next(running)
        except StopIteration as over:
            self._end(task, "PENDING" if over.value else "COMPLETED")
            return
        if self.timeline.now + seconds > task.ends_at:
            self.timeline.after(
                max(0.0, task.ends_at - self.timeline.now), lambda: self._time_out(task, start)
            )
            return
        self.timeline.after(seconds, lambda: self._go_on(task, running, start))

    def _time_out(self, task: Task, start: int) -> None:
        if task.state == "RUNNING" and task.starts == start:
            self._end(task, "TIMEOUT")

    def _end(self, task: Task, state: str) -> None:
        if task.node:
            self._free[task.node] += task.array.cpus
        else:
            self._waiting.remove(task)
        task.node, task.state, task.ended = "", state, self.timeline.now
        if state == "PENDING":
            self._waiting.append(task)
        self._wake()
        if all(task.state not in _ALIVE for task in task.array.tasks):
            self.timeline.after(MIN_JOB_AGE_SECONDS, lambda: self._forget(task.array))

    def _forget(self, array: Array) -> None:
        if self.arrays.pop(array.id, None):
            self.ended_arrays.append(array)

    # --- questions

    def _listed(self) -> Iterator[Task]:
        for array in self.arrays.values():
            yield from array.tasks

    def _squeue(self, words: list[str]) -> str:
        options = answers.parsed(words, with_value=("-o", "-t", "-O"))
        tasks = list(self._listed())
        if options.get("-t") != "all":
            tasks = [task for task in tasks if task.state in _ALIVE]
        if "--jobs" in options:
            wanted = {int(id_.partition("_")[0]) for id_ in options["--jobs"].split(",")}
            tasks = [task for task in tasks if task.array.id in wanted]
        if "-O" in options:
            names = [part.removesuffix(":|") for part in options["-O"].split(",")]
            return "".join("".join(f"{f}|" for f in _fields(t, names)) + "\n" for t in tasks)
        form = options["-o"].removeprefix(MARK)
        mark = MARK if form != options["-o"] else ""
        names = [part.removeprefix("%") for part in form.split("|")]
        return "".join(mark + "|".join(_fields(task, names)) + "\n" for task in tasks)

    def _sacct(self, words: list[str]) -> str:
        options = answers.parsed(words, with_value=("--starttime", "-o"))
        arrays = [*self.ended_arrays, *self.arrays.values()]
        if "--name" in options:
            arrays = [array for array in arrays if array.name == options["--name"]]
        if "--jobs" in options:
            wanted = {int(id_.partition("_")[0]) for id_ in options["--jobs"].split(",")}
            arrays = [array for array in arrays if array.id in wanted]
        names = options["-o"].split(",")
        tasks = (task for array in arrays for task in array.tasks)
        return "".join("|".join(_fields(task, names)) + "\n" for task in tasks)

    def _scontrol(self, words: list[str]) -> str:
        if words == ["show", "config"]:
            return answers.configuration(max_array_size=self.max_array_size)
        if words[:3] == ["--oneliner", "show", "job"]:
            if int(words[3]) not in self.arrays:
                raise CommandRefused("slurm_load_jobs error: Invalid job id specified")
            return f"JobId={words[3]}\n"
        assert words == ["--all", "--oneliner", "show", "partition"], words
        return answers.partition()

    def _sacctmgr(self, words: list[str]) -> str:
        return answers.accounting_table(words, max_submit_jobs=self.max_submit_jobs)

    def _sinfo(self, words: list[str]) -> str:
        assert words[:2] == ["--noheader", "--Node"], words
        assert words[-2] == "-O", words
        return "".join(answers.node_lines(words[-1], cpus=self._cpus, free=self._free))


def _fields(task: Task, names: Sequence[str]) -> list[str]:
    known = {
        **dict.fromkeys(("i", "JobArrayID", "JobID"), task.id),
        **dict.fromkeys(("T", "State"), task.state),
        **dict.fromkeys(("j", "JobName"), task.array.name),
        **dict.fromkeys(("User", "UserName"), "user"),
        **{"a": answers.ACCOUNT, "q": answers.QOS, "P": answers.PARTITION},
        **{"r": "Priority" if task.state == "PENDING" else "None"},
        **{"exit_code": "0", "ExitCode": "0:0", "NodeList": task.node},
    }
    return [known[name] for name in names]
