"""Verification of a run directory: every record, digest and state, and what would be redone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.loading import read_config
from fedllm.errors import ConfigError, Incomplete, RunDirectoryError, UserError
from fedllm.storage.checked import DamagedUpdateError, read_and_check
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.frozen_config import refuse_edits
from fedllm.storage.kept_records import ClientsRecord, FailureRecord, PartRecord, TasksRecord
from fedllm.storage.paths import AttemptPaths, JobPaths, RoundPaths, RunPaths, attempts_of, names_in
from fedllm.storage.records import (
    AggregateRecord,
    ClaimRecord,
    CohortRecord,
    CollectionRecord,
    ErrorRecord,
    EvaluationRecord,
    JobsRecord,
    LeaseRecord,
    OutcomeRecord,
    PreparedRecord,
    Record,
    RoundRecord,
    RunRecord,
    SubmissionRecord,
    TaskRecord,
)
from fedllm.storage.updates import check_update, update_files

_RESTORE = "restore it from a backup: nothing else has what it says"
_PREPARE = "remove it: the run prepares again, and compares the result with its first round"
_EVALUATE = "remove it: the round is evaluated again"
_FINISH = "remove it: it is written again from the records of the round"
_FOR_PEOPLE = "remove it: only reports show it"
_TRAIN = "nothing: its clients train again, to the same update"


@dataclass(frozen=True, kw_only=True)
class DamagedFile:
    """A file that is not as it was written: its problem, and what to do about it.

    `resumes` tells whether `fedllm resume` goes on without a person.
    """

    path: Path
    problem: str
    remedy: str
    resumes: bool = False


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked, and what was found."""

    files: int
    findings: tuple[DamagedFile, ...]

    @property
    def exit_code(self) -> int:
        """0: all is whole; 3: `fedllm resume` mends what is not; 2: a person has to."""
        if not self.findings:
            return 0
        mended = all(finding.resumes for finding in self.findings)
        return Incomplete.exit_code if mended else UserError.exit_code


@dataclass(frozen=True, kw_only=True)
class _Check:
    """A file, how it is checked (that raises what is wrong), and what to do if it is damaged."""

    path: Path
    check: Callable[[Path], object]
    remedy: str
    resumes: bool = False


def verify_run(paths: RunPaths) -> Verification:
    """Read every file of a run that has a digest or a fixed form; change nothing."""
    files = 0
    findings: list[DamagedFile] = []
    for each in _checks(paths):
        if not each.path.exists():
            continue
        files += 1
        try:
            each.check(each.path)
        except (DamagedUpdateError, ConfigError, RunDirectoryError) as error:
            findings.append(
                DamagedFile(
                    path=each.path,
                    problem=_short(error, each.path),
                    remedy=each.remedy,
                    resumes=each.resumes,
                )
            )
    return Verification(files=files, findings=(*findings, *_missing_states(paths)))


def _short(error: Exception, path: Path) -> str:
    """Return what is wrong, without the file's name and the record's own advice."""
    return (
        str(error).removeprefix(f"{path}: ").partition("; restore it")[0].partition("; `fedllm")[0]
    )


def _checks(paths: RunPaths) -> Iterator[_Check]:
    yield from _run_records(paths)
    yield _Check(
        path=paths.config,
        check=lambda path: _check_config(paths, path),
        remedy="put the named keys back; run.json has the value of every key",
    )
    yield _Check(path=paths.prepared, check=PreparedRecord.read, remedy=_PREPARE)
    for folder in paths.lease_folders():
        for name in names_in(folder):
            kind = FailureRecord if name.endswith(".failed.json") else LeaseRecord
            if name[0].isdigit() and name.endswith(".json"):
                yield _Check(path=folder / name, check=kind.read, remedy=_RESTORE)
    yield from _jobs(attempts_of(paths.prepare_job))
    numbers = sorted(int(name) for name in names_in(paths.rounds) if name.isdigit())
    for number in numbers:
        yield from _round(paths.round(number))
    for files in paths.client_store_files().values():
        for path in files.values():
            yield _Check(path=path, check=_check_tensors, remedy=_RESTORE)


def _run_records(paths: RunPaths) -> Iterator[_Check]:
    """Yield the record of the run and its copy: of either the other is made again."""
    for path, other in ((paths.run, paths.run_copy), (paths.run_copy, paths.run)):
        mends = RunRecord.glance(other) is not None
        remedy = f"nothing: `fedllm resume` makes it again from {other.name}" if mends else _RESTORE
        yield _Check(path=path, check=RunRecord.read, remedy=remedy, resumes=mends)


def _check_config(paths: RunPaths, path: Path) -> None:
    config = read_config(path)
    record = RunRecord.glance(paths.run)
    if record:
        refuse_edits(paths, record, config)


def _round(paths: RoundPaths) -> Iterator[_Check]:
    kinds: tuple[tuple[Path, type[Record], str], ...] = (
        (paths.cohort, CohortRecord, _RESTORE),
        (paths.collection, CollectionRecord, _RESTORE),
        (paths.aggregate_record, AggregateRecord, _RESTORE),
        (paths.evaluation_record, EvaluationRecord, _EVALUATE),
        (paths.record, RoundRecord, _FINISH),
        (paths.clients, ClientsRecord, _FOR_PEOPLE),
        (paths.tasks, TasksRecord, _FOR_PEOPLE),
    )
    for path, kind, remedy in kinds:
        yield _Check(path=path, check=kind.read, remedy=remedy)
    for attempt in attempts_of(paths.attempt):
        yield from _jobs([attempt])
        yield from _progress(attempt)
    yield from _jobs([*attempts_of(paths.aggregate_job), *attempts_of(paths.evaluation_job)])
    for path in paths.evaluation.part_files():
        again = "nothing: its clients are scored again"
        yield _Check(path=path, check=PartRecord.read, remedy=again, resumes=True)
    for path in paths.checkpoint_files():
        again = "nothing: its client begins anew"
        yield _Check(path=path, check=_check_tensors, remedy=again, resumes=True)
    for name in update_files(paths):
        path = paths.updates / name
        yield _Check(path=path, check=check_update, remedy=_TRAIN, resumes=True)
    yield from _state(paths)


def _jobs(jobs: "list[JobPaths] | list[AttemptPaths]") -> Iterator[_Check]:
    for job in jobs:
        yield _Check(path=job.submission, check=SubmissionRecord.read, remedy=_RESTORE)
        yield _Check(path=job.jobs, check=JobsRecord.read, remedy=_RESTORE)
        yield _Check(path=job.outcome, check=OutcomeRecord.read, remedy=_FOR_PEOPLE)
        yield _Check(path=job.error, check=ErrorRecord.read, remedy=_FOR_PEOPLE)


def _progress(attempt: AttemptPaths) -> Iterator[_Check]:
    remedy = "nothing: it only shows the progress of a task"
    for path in attempt.task_files():
        yield _Check(path=path, check=TaskRecord.read, remedy=remedy, resumes=True)
    for path in attempt.claim_files():
        yield _Check(path=path, check=ClaimRecord.read, remedy="remove it: the bundle is free then")


def _state(paths: RoundPaths) -> Iterator[_Check]:
    newest = paths.run.newest_state()
    is_newest = newest is not None and newest.number == paths.number
    can_be_made = not paths.number or paths.updates.exists()
    if is_newest and can_be_made:
        remedy = "nothing: it is aggregated again from the round's updates"
    elif is_newest:
        remedy = "restore it: the updates that it was made of were pruned"
    else:
        remedy = "nothing: later rounds do not need it, but `export --round` and reports do"
    yield _Check(
        path=paths.global_state,
        check=lambda path: _check_state(paths, path),
        remedy=remedy,
        resumes=can_be_made or not is_newest,
    )
    for path in sorted(paths.earlier_states.glob("*.safetensors")):
        yield _Check(
            path=path,
            check=lambda path: _check_earlier_state(paths, path),
            remedy="restore it: the round's state refers to it",
            resumes=not is_newest,
        )


def _missing_states(paths: RunPaths) -> Iterator[DamagedFile]:
    newest = paths.newest_state()
    if newest and not newest.global_state.exists():
        again = not newest.number or newest.updates.exists()
        yield DamagedFile(
            path=newest.global_state,
            problem="missing",
            remedy="nothing: it is aggregated again" if again else "restore it from a backup",
            resumes=again,
        )
    record = _aggregation(newest) if newest else None
    for path in map(newest.earlier_state, record.earlier) if newest and record else ():
        if not path.exists():
            remedy = "restore it from a backup: the state refers to it"
            yield DamagedFile(path=path, problem="missing", remedy=remedy, resumes=False)


def _aggregation(paths: RoundPaths) -> AggregateRecord | None:
    try:
        return AggregateRecord.find(paths.aggregate_record)
    except RunDirectoryError:
        return None  # found by its own check


def _check_state(paths: RoundPaths, path: Path) -> None:
    record = _aggregation(paths)
    if record and record.sha256 != sha256_of(path):
        raise RunDirectoryError(f"not the file that {paths.aggregate_record.name} describes")


def _check_earlier_state(paths: RoundPaths, path: Path) -> None:
    record = _aggregation(paths)
    sha256 = record.earlier.get(int(path.stem)) if record else None
    if sha256 not in (None, sha256_of(path)):
        raise RunDirectoryError(f"not the file that {paths.aggregate_record.name} describes")


def _check_tensors(path: Path) -> None:
    with path.open("rb") as file:
        read_and_check(file)
