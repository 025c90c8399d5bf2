"""The Slurm scheduler: arrays of our own programs, with sbatch files that submitit writes.

fedllm uses nothing else of submitit: no pickles, no files per task, neither its reading of sbatch's
answer nor its view of what is finished. A task gets a path and writes records of what is complete.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from fedllm.config.models import SchedulerSection
from fedllm.errors import ConfigError
from fedllm.scheduling.log_names import log_of, script_of
from fedllm.scheduling.seam import (
    ONE_PROCESS,
    Capacity,
    Ending,
    Job,
    Limits,
    Option,
    SchedulerFull,
    SubmissionUnknown,
    TaskSize,
    TaskState,
)
from fedllm.scheduling.slurm.check import job_problems
from fedllm.scheduling.slurm.command_output import submitted_job
from fedllm.scheduling.slurm.commands import (
    CommandRefused,
    Commands,
    InstalledCommands,
    QueryPace,
    clean_environment,
    unknown_submission,
)
from fedllm.scheduling.slurm.free_capacity import Surveyor, room_for_workers
from fedllm.scheduling.slurm.sbatch_flags import (
    WRITTEN_BY_SUBMITIT,
    Flags,
    refusal,
    reserved_problems,
    says_no_room,
    sbatch_flags,
    task_defaults,
)
from fedllm.scheduling.slurm.script import (
    exports,
    interface_lines,
    log_pattern,
    python_words,
    size_flags,
    step_words,
)
from fedllm.scheduling.slurm.squeue import Queue
from fedllm.storage.paths import shipped
from fedllm.storage.publishing.publish import publish_bytes, storage_errors

# the log of a process, by its rank; the batch script writes to that of rank 0
_LOG = log_of(Path(), "%A_%a", process="%t").name
# calls of sbatch within `scheduler.query_seconds`
_MAX_SUBMISSIONS = 10


class ArrayExecutor(SlurmExecutor):
    """submitit's executor for one array, which runs a command line and writes one file.

    Args:
        job: the array; a single task is an array too, so that all ids have the same form.
        parameters: submitit's parameters.
        environment: the environment of sbatch.
        without: flags that submitit always writes and that the options remove.
        commands: Slurm's commands.
    """

    def __init__(
        self,
        job: Job,
        *,
        parameters: Mapping[str, Any],
        environment: Mapping[str, str],
        without: Sequence[str],
        commands: Commands,
    ) -> None:
        super().__init__(job.log_folder)
        self.update_parameters(**parameters)
        # our own command line has srun
        self.parameters |= {"map_count": job.tasks, "use_srun": False}
        self._file = script_of(self.folder, job.name)
        self._environment = environment
        self._commands = commands
        self._without = tuple(f"#SBATCH --{flag}=" for flag in without)

    @classmethod
    def affinity(cls) -> int:
        """Say that it is available, even without Slurm: a plan writes sbatch files on a laptop."""
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        lines = super()._make_submission_file_text(command, uid).splitlines()
        return "\n".join(line for line in lines if not line.startswith(self._without)) + "\n"

    def text(self, command: str) -> str:
        """Return the sbatch file."""
        return self._make_submission_file_text(command, "")

    def send(self, command: str) -> str:
        """Submit the array and return sbatch's output.

        submitit's own method makes symbolic links. It also takes the first number after `job` in
        the output as the id, even if a site's banner printed it.
        """
        publish_bytes(self._file, self.text(command).encode())
        words = self._make_submission_command(self._file)
        return self._commands.call(words, environment=self._environment)


@dataclass(frozen=True, kw_only=True)
class SlurmScheduler:
    """Scheduler that submits every job as an array of tasks and queries Slurm rarely.

    Args:
        section: the scheduler's configuration.
        jobs_folder: the folder of `client.py` and the other programs.
        commands: Slurm's commands; tests give others.
    """

    section: SchedulerSection
    jobs_folder: Path = field(default_factory=lambda: shipped("jobs"))
    commands: Commands = field(default_factory=InstalledCommands)
    _queue: Queue = field(init=False)
    _surveyor: Surveyor = field(init=False)
    _pace: QueryPace = field(init=False)

    def __post_init__(self) -> None:
        seconds, commands = self.section.query_seconds, self.commands
        pace = QueryPace(max_calls=_MAX_SUBMISSIONS, seconds=seconds, commands=commands)
        object.__setattr__(self, "_queue", Queue(query_seconds=seconds, commands=commands))
        object.__setattr__(self, "_surveyor", Surveyor(query_seconds=seconds, commands=commands))
        object.__setattr__(self, "_pace", pace)

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        """Return how many tasks the cluster's limits and idle resources can take.

        Where Slurm reports no limit, `scheduler.max_parallel` is the only one. The idle resources
        are those of this moment; jobs of others that already wait may get them first.
        """
        flags = sbatch_flags(options, sbatch=self.section.sbatch, program="client", defaults={})
        flags = {**flags, **size_flags(size)}
        limit = self.section.max_parallel
        return self._surveyor.capacity(flags, queued=self._queue.queued(), max_parallel=limit)

    def room(self, options: Mapping[str, Option]) -> int | None:
        """Return how many more tasks MaxSubmitJobs and similar limits allow in the queue."""
        flags = sbatch_flags(options, sbatch=self.section.sbatch, program="client", defaults={})
        return room_for_workers(self._surveyor.room(flags, queued=self._queue.queued()))

    def limits(self, options: Mapping[str, Option]) -> Limits:
        """Return the size of the largest array, and how many jobs this user may have queued."""
        flags = sbatch_flags(options, sbatch=self.section.sbatch, program="client", defaults={})
        survey = self._surveyor.survey(flags)
        if survey.configuration is None:
            return Limits(problem="Slurm does not answer here; planned as if there were none")
        return Limits(
            largest_array=survey.configuration.max_array_size,
            max_submitted=min((bound.max_tasks for bound in survey.allowed.queued), default=None),
        )

    def check(self, jobs: Sequence[Job]) -> None:
        """Check jobs with `sbatch --test-only`, and find options with which they would never start.

        Raises:
            ConfigError: one line per problem, each names its key.
            SchedulerUnreachable: slurmctld does not answer.
        """
        refused: dict[tuple[str, ...], CommandRefused | None] = {}

        def test(words: Sequence[str], flags: Flags) -> None:
            # jobs with equal options differ only in their comment
            key = tuple(word for word in words if not word.startswith("--comment="))
            if key not in refused:
                refused[key] = self._refused(words, flags)
            if error := refused[key]:
                raise error

        lines = reserved_problems(self.section.sbatch)
        lines += [problem for job in jobs for problem in self._problems(job, test)]
        if lines:
            raise ConfigError("\n".join(dict.fromkeys(lines)))

    def _problems(self, job: Job, test: Callable[[Sequence[str], Flags], None]) -> list[str]:
        try:
            flags = self._flags(job)
        except ConfigError as error:
            return [str(error)]
        survey = self._surveyor.survey(flags)
        section, program = self.section, job.program
        return list(job_problems(flags, section=section, program=program, survey=survey, test=test))

    def _refused(self, words: Sequence[str], flags: Flags) -> CommandRefused | None:
        self._pace.wait()
        try:
            self.commands.call(words, environment=clean_environment(configured=flags))
        except CommandRefused as error:
            return error
        return None

    def submit(self, job: Job) -> list[str]:
        """Submit the array and return its task ids, `1234_0` first.

        Raises:
            ConfigError: sbatch refuses an option; the message names its key.
            RunDirectoryError: Slurm cannot write logs to this path.
            SchedulerFull: limits on submitted jobs leave no room now.
            SchedulerUnreachable: slurmctld does not answer; it may have taken the array.
            SubmissionUnknown: neither sbatch's answer nor the queue shows the array.
        """
        flags = self._flags(job)
        executor = self._executor(job, flags)
        with storage_errors(job.log_folder):
            job.log_folder.mkdir(parents=True, exist_ok=True)
        self._pace.wait()
        try:
            output = executor.send(self._command(job, flags))
        except CommandRefused as error:
            has_room = not says_no_room(str(error))
            # a plugin or wrapper may fail after Slurm took the array
            if has_room and (taken := self._queue.find(job.name)):
                return taken
            if not has_room or self._is_full(str(error), job):
                raise SchedulerFull(f"sbatch: {error}") from error
            sbatch = self.section.sbatch
            raise refusal(str(error), flags, sbatch=sbatch, program=job.program) from error
        answer = submitted_job(output)
        if answer is None or answer.cluster:
            # a job on another cluster would be invisible here
            return self._find_submitted(job.name, output)
        ids = [f"{answer.job}_{number}" for number in range(job.tasks)]
        self._queue.expect(ids)
        return ids

    def _find_submitted(self, name: str, output: str) -> list[str]:
        """Return the tasks of an array that was just submitted, by its name in the queue."""
        ids = self._queue.find(name)
        if ids is None:
            raise SubmissionUnknown(unknown_submission(name, output))
        return ids

    def _is_full(self, message: str, job: Job) -> bool:
        """Say whether sbatch's refusal means that there is no room now."""
        answer = says_no_room(message)
        if answer is not None:
            return answer
        room = self._surveyor.room(self._flags(job), queued=self._queue.queued(fresh=True))
        return room is not None and room < job.tasks

    def script(self, job: Job) -> str:
        """Return the sbatch file that `submit` would write; works without Slurm."""
        flags = self._flags(job)
        return self._executor(job, flags).text(self._command(job, flags))

    def find(self, name: str) -> list[str] | None:
        """Return the tasks of the arrays submitted under `name`, or None if Slurm knows of none.

        Raises:
            SchedulerUnreachable: slurmctld does not answer.
        """
        return self._queue.find(name)

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the state of every task, from an answer at most `query_seconds` old."""
        return self._queue.states(ids)

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return state, exit code and node of tasks that failed, where Slurm still knows them."""
        return self._queue.endings(ids)

    def attribute(self, ids: Sequence[str], user: int) -> None:
        """Remember the user who submitted tasks: Slurm may hide those of others."""
        self._queue.attribute(ids, user)

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Return Slurm's reasons for tasks that wait, from its last answer about states."""
        return self._queue.waiting_for(ids)

    def trouble(self) -> str | None:
        """Return why states are unknown now: Slurm did not answer the last query."""
        return self._queue.trouble()

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        """End tasks, or only those that still wait; tasks that are gone are ignored.

        Raises:
            SchedulerUnreachable: slurmctld does not answer.
        """
        self._queue.cancel(ids, only_waiting=only_waiting)

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`; the caller then looks for records."""
        self.commands.sleep(seconds)

    def close(self) -> None:
        """Do nothing: jobs of a cluster go on without a coordinator."""

    def _flags(self, job: Job) -> Flags:
        defaults = {**task_defaults(job.options), "comment": f"fedllm {job.program}: {job.name}"}
        sbatch = self.section.sbatch
        flags = sbatch_flags(job.options, sbatch=sbatch, program=job.program, defaults=defaults)
        size = TaskSize(processes=job.processes_per_task, nodes=job.nodes_per_task)
        return {**flags, **size_flags(size)}

    def _command(self, job: Job, flags: Flags) -> str:
        program = self.jobs_folder / f"{job.program}.py"
        words = shlex.join([str(program), *job.argv])
        step = step_words(flags, log_pattern(job.log_folder, _LOG))
        return f"{shlex.join(step)} {python_words(self.section)} -u {words}"

    def _executor(self, job: Job, flags: Flags) -> ArrayExecutor:
        parameters = {
            "job_name": job.name,
            "wckey": None,
            "stderr_to_stdout": True,
            "array_parallelism": job.parallel or self.section.max_parallel,
            "setup": [
                *exports(job, flags),
                *(interface_lines(self.section) if job.processes_per_task > 1 else ()),
                *self.section.setup,
            ],
            "additional_parameters": {
                **flags,
                "output": log_pattern(job.log_folder, _LOG.replace("%t", "0")),
            },
        }
        return ArrayExecutor(
            job,
            parameters=parameters,
            environment=clean_environment(configured=flags),
            without=[flag for flag in WRITTEN_BY_SUBMITIT if flag not in flags],
            commands=self.commands,
        )
