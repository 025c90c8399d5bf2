"""An evaluation that `fedllm evaluate` asks for: its tasks score any round, beside the run.

It needs no lease: tasks claim pieces, and what is scored twice is the same.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import FedllmError, RunFailed
from fedllm.planning.evaluation_targets import choose_targets, pieces_to_score
from fedllm.planning.federation import Federation
from fedllm.rounds.aggregating import shares_of_evaluation
from fedllm.rounds.dispatch.submissions import (
    active_tasks,
    array_name,
    error_of,
    is_of_run,
    job_of,
    server_array,
    task_ids,
)
from fedllm.scheduling.seam import Scheduler
from fedllm.scheduling.traits import traits_of
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.kept_records import Count, ProgressRecord, RequestRecord
from fedllm.storage.paths import EvaluationPaths, PackedJobPaths, RunPaths, attempts_of
from fedllm.storage.records import (
    ErrorRecord,
    EvaluationRecord,
    JobsRecord,
    RunRecord,
    SubmissionRecord,
)


@dataclass(frozen=True, kw_only=True)
class AskedEvaluation:
    """An evaluation that the tasks of a scheduler share, and this process waits for.

    `count` is told how many rows are scored, and of how many.
    """

    run: RunPaths
    place: EvaluationPaths
    request: RequestRecord
    federation: Federation
    scheduler: Scheduler
    count: Count

    def record(self) -> EvaluationRecord:
        """Return the record, once the tasks have scored all pieces.

        Tasks that an earlier call submitted are waited for; what they have scored stays.

        Raises:
            FedllmError: the tasks cannot go on; what they say, or how they ended.
        """
        if record := EvaluationRecord.find(self.place.record):
            return record
        self.request.publish(self.place.request)
        logs = self.run.logs(self.request.round)
        job = self._at_work() or self._submit(logs)
        gone_since: float | None = None
        while True:
            if record := EvaluationRecord.find(self.place.record):
                return record
            now = time.monotonic()
            # a file server may show the record late
            if gone_since is not None and now - gone_since >= self._visibility_seconds:
                raise self._error(job, logs)
            self._show(job)
            if gone_since is None and not active_tasks(
                self.scheduler, task_ids(job, self.scheduler)
            ):
                gone_since = now
                continue
            self.scheduler.wait(self.federation.config.scheduler.poll_seconds)

    @property
    def _visibility_seconds(self) -> float:
        return traits_of(self.federation.config).visibility_seconds

    def _at_work(self) -> PackedJobPaths | None:
        """Return the last attempt, if its tasks still wait or run."""
        run_id = RunRecord.read(self.run.run).run_id
        for job in attempts_of(self.place.job)[-1:]:
            is_own = is_of_run(SubmissionRecord.read(job.submission), run_id)
            if is_own and active_tasks(self.scheduler, task_ids(job, self.scheduler)):
                return job
        return None

    def _submit(self, logs: Path) -> PackedJobPaths:
        number = len(attempts_of(self.place.job)) + 1
        job = self.place.job(number)
        run_id = RunRecord.read(self.run.run).run_id
        token = array_name(run_id, self.request.round, "score", f"a{number:02d}")
        config = self.federation.config
        pieces = pieces_to_score(
            self.federation,
            state_round=self.request.round,
            targets_round=config.rounds,
            rank=self.request.rank,
        )
        shares = shares_of_evaluation(self.scheduler, self.federation, self.place, pieces)
        array = server_array(config, "evaluate", token, tasks=shares.tasks)
        plan = SubmissionRecord(
            token=token,
            lease=0,
            kind="evaluate",
            command=[str(self.place.root), "--job", str(job.root)],
            arrays=[array],
            bundles=list(shares.bundles),
        )
        plan.publish(job.submission)
        tasks = self.scheduler.submit(job_of(plan, array, logs))
        JobsRecord(ids={array.name: tasks}, users={array.name: os.geteuid()}).publish(job.jobs)
        return job

    def _show(self, job: PackedJobPaths) -> None:
        found = [ProgressRecord.glance(path) for path in job.progress_files()]
        records = [record for record in found if record]
        if records:
            done = sum(record.done for record in records)
            self.count(records[0].what, done, records[0].total)

    def _error(self, job: PackedJobPaths, logs: Path) -> FedllmError:
        error = ErrorRecord.find(job.error)
        if error:
            return error_of(error)
        endings = self.scheduler.endings(task_ids(job, self.scheduler))
        how = "; ".join(f"{task}: {ending}" for task, ending in endings.items())
        return RunFailed(
            f"{self.place.root}: its tasks ended early ({how or 'they left no record'}); see "
            f"{logs}; what they scored stays: run the same command again"
        )


def asked_place(
    run: RunPaths, request: RequestRecord, federation: Federation, state_sha256: str
) -> EvaluationPaths:
    """Return where an evaluation is kept: one place for a state, a rank, and what is scored."""
    config = federation.config
    targets = choose_targets(config, federation.prepared, config.rounds)
    scored = [(target.client, target.rows) for target in targets]
    rank = "" if request.rank is None else f"-rank-{request.rank}"
    content = fingerprint_values(state_sha256, scored)[:8]
    return run.requested(f"round-{request.round:04d}{rank}-{content}")
