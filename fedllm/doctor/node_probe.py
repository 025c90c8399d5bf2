"""A probe of a compute node: one short srun that talks over its pipes and always ends."""

import contextlib
import math
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from pydantic import ValidationError

from fedllm.config.models import SchedulerSection
from fedllm.doctor.trials import FileDelayRecord, NodeRecord, ProbeResult, seconds_until
from fedllm.errors import FedllmError, UserError
from fedllm.scheduling.slurm.command_output import MARK, marked_lines
from fedllm.scheduling.slurm.commands import (
    NODE_NAME_IN_SHELL,
    CommandRefused,
    call,
    srun_environment,
)
from fedllm.scheduling.slurm.sbatch_flags import Flags, words_of
from fedllm.storage.paths import ProbePaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import Record
from fedllm.storage.trust.secret import STATE_VARIABLE, state_folder

# Options for batch jobs only, and the size of a task: a probe is one short process.
_NOT_FOR_PROBES = {
    *("requeue", "no-requeue", "open-mode", "signal", "time", "time-min", "deadline", "hold"),
    *("begin", "kill-on-invalid-dep", "mail-type", "mail-user", "comment", "nice"),
    *(
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "get-user-env",
        "export-file",
        "wait-all-nodes",
        "batch",
        "verbose",
    ),
    "export",
}
# time to start Python, and to load torch from a slow file system
_ANSWER_SECONDS = 300.0
_END_SECONDS = 5.0
_START = "fedllm-probe-starts-on "

_Parsed = TypeVar("_Parsed")
_Answer = TypeVar("_Answer", bound=Record)


class ProbeFailed(FedllmError):
    """A probe that gave no answer; the message says why."""


class ProbeWaits(ProbeFailed):
    """A probe that Slurm gave no node in time."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A probe of the node that tasks of certain options get.

    Args:
        section: the scheduler's configuration.
        flags: the sbatch flags of these tasks.
        folder: a folder for this probe alone, on the storage of runs.
        also: other paths that the node must have, if this host has them.
        node_local: `storage.node_local`.
        visibility_seconds: how long a new file may stay invisible.
        wait_seconds: how long Slurm may take to give the probe a node.
    """

    section: SchedulerSection
    flags: Flags
    folder: Path
    also: tuple[Path, ...]
    node_local: str | None
    visibility_seconds: float
    wait_seconds: float

    def run(self) -> ProbeResult:
        """Run the probe and return its result.

        Raises:
            ProbeWaits: no node in time; the message has Slurm's reason.
            ProbeFailed: no answer; the message says why.
            UserError: srun is not installed.
        """
        name = f"fedllm-doctor-{uuid.uuid4().hex[:8]}"
        words = [*srun_words(self.flags, name, self._answer_seconds), "bash", "-c", self._script()]
        with running_step(words, self.flags, name) as step:
            node = node_of(step, name, self.wait_seconds)
            answer = answer_of(step, node, NodeRecord, self._answer_seconds)
            clock_seconds = answer.clock - time.time()
            if answer.storage_problem:
                return ProbeResult(node=answer, clock_seconds=clock_seconds)
            paths = ProbePaths(root=self.folder)
            seen_here = seconds_until(paths.node_file.exists, max_seconds=self.visibility_seconds)
            publish_bytes(paths.submitter_file, b"{}")
            step.say("look")
            seen_there = answer_of(step, node, FileDelayRecord, self._answer_seconds).seconds
        return ProbeResult(
            node=answer,
            clock_seconds=clock_seconds,
            seen_here=seen_here,
            seen_there=seen_there,
        )

    @property
    def _answer_seconds(self) -> float:
        return _ANSWER_SECONDS + self.visibility_seconds

    def _script(self) -> str:
        words = ["-m", "fedllm.programs.probe", str(self.folder)]
        words += [f"--also={path}" for path in self.also if path.exists()]
        words += [f"--patience={self.visibility_seconds}"]
        words += [f"--node-local={self.node_local}"] if self.node_local else []
        # as in every job, whose home may be another one
        state = f"export {STATE_VARIABLE}={shlex.quote(str(state_folder()))}"
        return script_of(self.section, words, [state])


@contextmanager
def running_step(words: Sequence[str], flags: Flags, name: str) -> Iterator["_Step"]:
    """Start srun with `words`, for a job `name`; end it with the block.

    Raises:
        UserError: srun is not installed.
    """
    try:
        process = subprocess.Popen(
            words,
            env=srun_environment(flags),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise UserError("srun: not found; the probe of a compute node needs it") from error
    step = _Step(process)
    end_seconds = 0.0
    try:
        yield step
        # a probe that has answered everything ends by itself
        end_seconds = _END_SECONDS
    finally:
        step.end(end_seconds)
        # a killed srun may leave its allocation
        with contextlib.suppress(FedllmError, CommandRefused):
            call(["scancel", "--quiet", f"--name={name}", f"--user={os.getuid()}"])


def script_of(section: SchedulerSection, words: Sequence[str], exports: Sequence[str] = ()) -> str:
    """Return the script of a probe: it says its node, and runs Python with `words`."""
    python = section.python or shlex.quote(sys.executable)
    return "\n".join(
        [
            f'echo "{_START}{NODE_NAME_IN_SHELL}"',
            *exports,
            *section.setup,
            # import what a job's program would, not modules of the working directory
            "export PYTHONSAFEPATH=1",
            f"exec {python} -u {shlex.join(words)}",
        ]
    )


def node_of(step: "_Step", name: str, wait_seconds: float) -> str:
    """Wait until the probe starts; return its node.

    Raises:
        ProbeWaits: no node in time.
    """
    try:
        return step.find(_started_on, wait_seconds)
    except TimeoutError as error:
        seconds = f"{wait_seconds:.0f} s"
        raise ProbeWaits(f"no node within {seconds} ({_reason(name)})") from error


def answer_of(step: "_Step", node: str, kind: type[_Answer], seconds: float) -> _Answer:
    """Return the next answer of a kind.

    Raises:
        ProbeFailed: it did not come in time, or the probe ended without it.
    """

    def parse(line: str) -> _Answer | None:
        try:
            return kind.model_validate_json(line)
        except ValidationError:
            return None

    try:
        return step.find(parse, seconds)
    except TimeoutError as error:
        raise ProbeFailed(f"node {node}: no answer within {seconds:.0f} s") from error
    except ProbeFailed as error:
        raise ProbeFailed(f"node {node}: {error}") from error


def srun_words(flags: Flags, name: str, seconds: float, *, alone: bool = True) -> list[str]:
    """Return the srun command with those flags of sbatch that decide about the node.

    Without `alone` it has the size of a task, else it is one process.
    """
    own = {name: flags[name] for name in ("nodes", "ntasks", "ntasks-per-node") if name in flags}
    size = {"nodes": 1, "ntasks": 1} if alone else own
    chosen = {flag: value for flag, value in flags.items() if flag not in _NOT_FOR_PROBES}
    return [
        "srun",
        *words_of(size),
        *(f"--job-name={name}", "--kill-on-bad-exit=1"),
        # the time starts with the probe: the wait for a node has its own limit
        f"--time={math.ceil(seconds / 60)}",
        *words_of(chosen),
    ]


def node_options(flags: Flags) -> tuple[tuple[str, str], ...]:
    """Return the flags that decide which node a probe gets; jobs with equal ones share a probe."""
    return tuple(sorted((f, str(v)) for f, v in flags.items() if f not in _NOT_FOR_PROBES))


def _started_on(line: str) -> str | None:
    return line.removeprefix(_START) if line.startswith(_START) else None


def _reason(name: str) -> str:
    try:
        words = ["squeue", "--noheader", f"--name={name}", f"--user={os.getuid()}"]
        reasons = "; ".join(marked_lines(call([*words, "-o", f"{MARK}%r"])))
    except (FedllmError, CommandRefused):
        reasons = ""
    return f"Slurm's reason: {reasons}" if reasons else "Slurm gives no reason"


class _Step:
    """A running srun: its output line by line, with a time limit, and its input."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._error_lines: list[str] = []
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self._in, self._out, self._err = process.stdin, process.stdout, process.stderr
        self._readers = [
            threading.Thread(target=self._read, args=(self._out,), daemon=True),
            threading.Thread(target=self._error_lines.extend, args=(self._err,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def find(self, parse: Callable[[str], _Parsed | None], seconds: float) -> _Parsed:
        """Return the first line that `parse` accepts; the output of `scheduler.setup` is skipped.

        Raises:
            TimeoutError: no such line came in time.
            ProbeFailed: srun ended without such a line.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(end - time.monotonic(), 0.001))
            except queue.Empty as error:
                raise TimeoutError from error
            if line is None:
                raise ProbeFailed(self._last_words())
            parsed = parse(line)
            if parsed is not None:
                return parsed

    def say(self, word: str) -> None:
        """Write a line to its input."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(f"{word}\n")
            self._in.flush()

    def end(self, seconds: float) -> None:
        """End srun, with or without a node, if it has not ended by itself after `seconds`."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        for reader, stream in zip(self._readers, (self._out, self._err), strict=True):
            reader.join(timeout=_END_SECONDS)
            stream.close()

    def _last_words(self) -> str:
        for reader in self._readers:
            reader.join(timeout=_END_SECONDS)
        lines = [line.strip() for line in self._error_lines if line.strip()]
        own = [line for line in lines if not line.startswith(("srun: ", "slurmstepd"))]
        errors = [line for line in lines if "error: " in line]
        # the message of the node's shell or Python, else that of Slurm
        last = (own or errors or lines)[-1:] or [f"exit status {self._process.wait()}"]
        return last[0].removeprefix("srun: ").removeprefix("error: ")
