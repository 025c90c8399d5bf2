"""Status of a run, from its files and, if a scheduler answers, from its queue."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import Incomplete
from fedllm.reporting.results.accounting import TierAccount, stage_seconds, tier_accounts
from fedllm.reporting.results.metrics import Mean, by_group, by_kind
from fedllm.reporting.status.attempt_tasks import AttemptStatus, TaskStatus, attempt_work
from fedllm.reporting.status.failure import Failure, failure_of
from fedllm.reporting.status.history import NO_HISTORY, History, history_of
from fedllm.reporting.status.job_progress import JobProgress, job_progress
from fedllm.reporting.status.pace import Estimate, Pace, estimate, pace_of, recent_paces, written_at
from fedllm.reporting.status.published import UpdateSummaries, UpdateSummary
from fedllm.reporting.status.queue import (
    RUNNING,
    SUSPENDED,
    WAITING,
    AskScheduler,
    QueueStatus,
    SchedulerAnswers,
    queue_status,
)
from fedllm.reporting.status.record_heads import ClientsHead, PreparedHead
from fedllm.reporting.usage import Usage, round_usage
from fedllm.storage.lease import HolderIsGone, current_lease, location_of, process_is_gone
from fedllm.storage.paths import JobPaths, RoundPaths, RunPaths, attempts_of
from fedllm.storage.record_cache import RecordCache
from fedllm.storage.records import (
    ClientScores,
    CohortRecord,
    CoordinatorJobRecord,
    EvaluationRecord,
    JobsRecord,
    LeaseRecord,
    RoundRecord,
    RunRecord,
)
from fedllm.storage.updates import Origin

FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class FailedClient:
    """A client whose training failed, its node and its log."""

    client: str
    reason: str
    node: str
    log: str


@dataclass(frozen=True, kw_only=True)
class RoundStatus:
    """One round that has begun: how many clients are published, claimed by tasks, or waiting."""

    round: int
    step: str
    cohort: int = 0
    enough: int = 0
    published: int = 0
    claimed: int = 0
    waiting: int = 0
    failed: tuple[FailedClient, ...] = ()
    attempts: tuple[AttemptStatus, ...] = ()
    tasks: tuple[TaskStatus, ...] = ()
    pace: Pace | None = None


@dataclass(frozen=True, kw_only=True)
class RoundTraining:
    """How the clients of a round trained, tier by tier; stage -> seconds if it is finished."""

    round: int
    tiers: tuple[TierAccount, ...]
    stages: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Scores of a run's first and last evaluation, as deployed: group of clients -> mean."""

    first_round: int
    last_round: int
    first: Mapping[str, Mean]
    last: Mapping[str, Mean]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The status of a run.

    `state` is done, running, waiting (for its coordinator's job to start), suspended (its
    coordinator's job is), stopped, failed (ended by an error, `failure`) or unknown (its
    coordinator's state cannot be known from here). `jobs` are those that run, `training` is that of
    the newest collected round, `results` are those of a run that is done.
    """

    run_id: str
    state: str
    coordinator: str
    rounds: int
    rounds_done: int
    prepared: bool
    current: RoundStatus | None
    evaluating: tuple[int, ...] = ()
    jobs: tuple[JobProgress, ...] = ()
    history: History = NO_HISTORY
    recent: tuple[Pace, ...] = ()
    training: RoundTraining | None = None
    results: RunResults | None = None
    failure: Failure | None = None
    estimate: Estimate | None = None
    task_hours: float = 0.0
    gpu_hours: float = 0.0
    array_efficiency: float | None = None
    queue: QueueStatus | None = None


class StatusReader:
    """Reader of a run's status; a repeated read opens only the files that changed.

    Args:
        paths: the run.
        gone: says whether the coordinator ended.
        ask: asks the scheduler about tasks; None if there is no scheduler.
        advice: returns what would help against a reason to wait.
        end_with_coordinator: whether the run's tasks end with its coordinator.
        now: returns the time in seconds since the epoch.
    """

    def __init__(
        self,
        paths: RunPaths,
        *,
        gone: HolderIsGone = process_is_gone,
        ask: AskScheduler | None = None,
        advice: Callable[[str], str] = lambda _reason: "",
        end_with_coordinator: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._paths = paths
        self._gone = gone
        self._ask = ask
        self._advice = advice
        self._end_with_coordinator = end_with_coordinator
        self._now = now
        self._records = RecordCache()
        self._config: tuple[float | None, Config] | None = None
        self._summaries: dict[int, UpdateSummaries] = {}

    def read(self) -> RunStatus:
        """Read the present status of the run.

        Raises:
            RunDirectoryError: a record is damaged.
        """
        config, run = self._configuration(), RunRecord.read(self._paths.run)
        rounds = [self._paths.round(number) for number in range(config.rounds + 1)]
        done = [r.number for r in rounds if self._records.find(RoundRecord, r.record)]
        current = _current(self._paths, config.rounds, done)
        prepared = self._paths.prepared.exists()
        jobs = self._jobs(rounds, done)
        lease, holder = current_lease(self._paths)
        answers = self._answers(jobs, holder)
        state, coordinator = self._coordinator(lease, holder, answers)
        round_status = None
        if prepared and current is not None:
            all_gone = state == "stopped" and self._end_with_coordinator
            round_status = self._round(self._paths.round(current), run, answers, all_gone=all_gone)
        stateless = [r for r in rounds[1:] if not r.aggregate_record.exists()]
        recent = recent_paces(self._records, self._paths, config.rounds - len(stateless))
        training = round_status if round_status and round_status.step == "train" else None
        usage = self._usage(rounds, done)
        failure = None
        unfinished = [r for r in rounds if r.number not in done]
        if state == "stopped" and current is not None:
            failure = failure_of(self._paths, config, lease, unfinished)
        if failure and failure.exit_code != Incomplete.exit_code:
            state = FAILED
        return RunStatus(
            run_id=run.run_id,
            state="done" if current is None else state,
            coordinator=coordinator,
            rounds=config.rounds,
            rounds_done=sum(number > 0 for number in done),
            prepared=prepared,
            current=round_status,
            evaluating=tuple(_evaluating(rounds, done)),
            jobs=tuple(job_progress(self._records, self._paths, unfinished)),
            history=history_of(self._records, rounds),
            recent=tuple(recent),
            training=self._training(rounds),
            failure=failure,
            results=self._results(rounds) if current is None else None,
            estimate=estimate(
                recent,
                training.pace if training else None,
                cohort=training.cohort if training else 0,
                rounds_left=len(stateless),
            )
            if stateless
            else None,
            task_hours=usage.allocated_seconds / 3600,
            gpu_hours=usage.gpu_seconds / 3600,
            array_efficiency=usage.efficiency,
            queue=queue_status(jobs, answers, self._advice) if self._ask else None,
        )

    def _configuration(self) -> Config:
        written = written_at(self._paths.config)
        if self._config is None or self._config[0] != written:
            self._config = (written, read_config(self._paths.config))
        return self._config[1]

    def _jobs(self, rounds: Sequence[RoundPaths], done: Sequence[int]) -> dict[str, list[str]]:
        """Return the task ids of all submissions that may be running, by array."""
        ids: dict[str, list[str]] = {}
        for paths in _submissions(self._paths, [r for r in rounds if r.number not in done]):
            jobs = self._records.find(JobsRecord, paths.jobs)
            ids |= jobs.ids if jobs else {}
        return ids

    def _answers(
        self, jobs: Mapping[str, list[str]], holder: LeaseRecord | None
    ) -> SchedulerAnswers:
        if self._ask is None:
            return SchedulerAnswers()
        ids = [id_ for array in jobs.values() for id_ in array]
        ids += [job for job in (holder and holder.slurm_job, self._submitted()) if job]
        return self._ask(ids)

    def _submitted(self) -> str | None:
        """Return the id of the coordinator's job that was submitted last."""
        record = self._records.find(CoordinatorJobRecord, self._paths.coordinator_job)
        return record.job if record else None

    def _coordinator(
        self, number: int, holder: LeaseRecord | None, answers: SchedulerAnswers
    ) -> tuple[str, str]:
        """Return the run's state, and its present or next coordinator."""
        state, where = "stopped", "none"
        holds = holder is not None and not self._paths.released(number).exists()
        if holder is not None and holds:
            state, where = self._holder_state(holder, answers), location_of(holder)
            if state == "stopped":
                where = f"none; the last one ({where}) has ended"
        job = self._submitted()
        # a job that gave its lease back may wait to continue, for example after a preemption
        if job is None or (holder is not None and holds and holder.slurm_job == job):
            return state, where
        if answers.states.get(job) not in {WAITING, RUNNING, SUSPENDED}:
            return state, where
        reason = f" ({answers.reasons[job]})" if job in answers.reasons else ""
        word = f"Slurm job {job} {answers.states[job]}{reason}"
        if state == RUNNING:
            return state, f"{where}; next in its chain: {word}"
        return WAITING, word

    def _holder_state(self, holder: LeaseRecord, answers: SchedulerAnswers) -> str:
        # Slurm has just answered: do not ask again
        listed = answers.states.get(holder.slurm_job or "")
        if listed in {WAITING, RUNNING, SUSPENDED}:
            return listed
        no_answer = holder.slurm_job is not None and bool(answers.problem)
        gone = None if no_answer else self._gone(holder)
        return {True: "stopped", False: RUNNING, None: "unknown"}[gone]

    def _round(
        self, paths: RoundPaths, run: RunRecord, answers: SchedulerAnswers, *, all_gone: bool
    ) -> RoundStatus:
        cohort = self._records.find(CohortRecord, paths.cohort)
        if cohort is None:
            return RoundStatus(round=paths.number, step="cohort" if paths.number else "state")
        if paths.number not in self._summaries:
            self._summaries = {paths.number: UpdateSummaries(paths, Origin.of(run, cohort))}
        sent = self._summaries[paths.number].read()
        work = attempt_work(self._records, paths, sent, answers.states, all_gone=all_gone)
        step = _step(paths)
        return RoundStatus(
            round=paths.number,
            step=step,
            cohort=len(cohort.clients),
            enough=len(cohort.clients) if cohort.enough is None else cohort.enough,
            published=len(sent),
            claimed=work.claimed if step == "train" else 0,
            waiting=len(cohort.clients) - len(sent) - work.claimed if step == "train" else 0,
            failed=_failed(sent),
            attempts=work.attempts,
            tasks=work.tasks if step == "train" else (),
            pace=self._pace(paths, sent),
        )

    def _pace(self, paths: RoundPaths, sent: Mapping[str, UpdateSummary]) -> Pace:
        drawn, collected = written_at(paths.cohort), written_at(paths.collection)
        now = self._now()
        began = now if drawn is None else drawn
        return pace_of(
            round_number=paths.number,
            clients=len(sent),
            tokens=sum(update.tokens for update in sent.values()),
            seconds=max(0.0, now - began),
            training_seconds=max(0.0, (collected or now) - began),
        )

    def _training(self, rounds: Sequence[RoundPaths]) -> RoundTraining | None:
        """Return how the clients of the newest collected round trained."""
        base = self._records.find(PreparedHead, self._paths.prepared)
        for paths in reversed(rounds):
            found = self._records.find(ClientsHead, paths.clients)
            if found and found.clients and base:
                tiers = tuple(tier_accounts(found.clients, base.model_parameters))
                stages = stage_seconds(paths)
                return RoundTraining(round=found.round, tiers=tiers, stages=stages)
        return None

    def _results(self, rounds: Sequence[RoundPaths]) -> RunResults | None:
        """Return the scores of the base and of the newest evaluated round."""
        evaluated = [r for r in rounds if r.evaluation_record.exists()]
        if len(evaluated) < 2:
            return None
        first, last = (
            self._records.read(EvaluationRecord, paths.evaluation_record)
            for paths in (evaluated[0], evaluated[-1])
        )
        return RunResults(
            first_round=first.round,
            last_round=last.round,
            first=self._means(first.clients),
            last=self._means(last.clients),
        )

    def _means(self, clients: Sequence[ClientScores]) -> dict[str, Mean]:
        """Return the means of every group of clients, and of its kinds of tasks below it."""
        prepared = self._records.find(PreparedHead, self._paths.prepared)
        categories = {c.id: c.category for c in prepared.clients} if prepared else {}
        kinds = by_kind(clients, categories)
        means: dict[str, Mean] = {}
        for group, mean in by_group(clients).items():
            means[group] = mean
            means |= {f"{group}, {kind}": of for kind, of in kinds.get(group, {}).items()}
        return means

    def _usage(self, rounds: Sequence[RoundPaths], done: Sequence[int]) -> Usage:
        """Return the recorded usage of finished rounds, plus that of the other tasks so far."""
        total = Usage()
        for paths in rounds:
            record = self._records.find(RoundRecord, paths.record)
            if record:
                total += Usage(
                    tasks=record.tasks,
                    busy_seconds=record.busy_seconds,
                    allocated_seconds=record.allocated_seconds,
                    gpu_seconds=record.gpu_seconds,
                )
            elif paths.number not in done and paths.attempts.exists():
                total += round_usage(paths, self._records)
        return total


def _current(paths: RunPaths, rounds: int, done: Sequence[int]) -> int | None:
    """Return the last round that has begun: it trains while the previous one is evaluated."""
    unfinished = [number for number in range(rounds + 1) if number not in done]
    begun = [number for number in unfinished if paths.round(number).root.exists()]
    return begun[-1] if begun else next(iter(unfinished), None)


def _evaluating(rounds: Sequence[RoundPaths], done: Sequence[int]) -> Iterator[int]:
    for paths in rounds:
        if paths.number not in done and paths.aggregate_record.exists():
            yield paths.number


def _submissions(run: RunPaths, rounds: Sequence[RoundPaths]) -> Iterator[JobPaths]:
    folders = [] if run.prepared.exists() else [run.prepare_job]
    for paths in rounds:
        if paths.root.exists():
            folders += [paths.attempt, paths.aggregate_job, paths.evaluation_job]
    for folder in folders:
        yield from attempts_of(folder)


def _failed(sent: Mapping[str, UpdateSummary]) -> tuple[FailedClient, ...]:
    return tuple(
        FailedClient(client=client, reason=update.reason, node=update.node, log=update.log)
        for client, update in sent.items()
        if update.status == "failed"
    )


def _step(paths: RoundPaths) -> str:
    if paths.aggregate_record.exists():
        return "evaluate"
    return "aggregate" if paths.collection.exists() else "train"


def run_status(paths: RunPaths, gone: HolderIsGone = process_is_gone) -> RunStatus:
    """Read the status of a run once, from its files alone."""
    return StatusReader(paths, gone=gone).read()
