"""Files that a round writes, counted with the same paths that the round will use."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.planning.evaluation_targets import pieces_to_score
from fedllm.planning.federation import Federation
from fedllm.reporting.results.summary import update_bytes
from fedllm.storage.paths import JobPaths, RunPaths
from fedllm.storage.records import CohortClient, ModuleRecord, SubmissionRecord

_FLOAT32_BYTES = 4
# measured on runs: a claim, a progress record, a client's line in plan, cohort and collection
_CLAIM_BYTES, _TASK_BYTES, _CLIENT_BYTES, _RECORDS_BYTES = 250, 500, 1800, 4096
# the header of what a client keeps
_KEPT_BYTES = 2000
# a client's line in a log, and the other lines of its task
_LOG_LINE_BYTES, _LOG_BYTES = 100, 2000
# an update's record, and per module its norms, scales, places and checksums of two tensors
_UPDATE_CLIENT_BYTES, _UPDATE_MODULE_BYTES = 800, 480


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """A folder of a round: its files, the entries of its largest folder, and estimated bytes."""

    folder: str
    files: int
    largest_folder: int
    bytes: int
    note: str = ""


def folders_of_round(
    federation: Federation,
    cohort: Sequence[CohortClient],
    plan: SubmissionRecord,
    logs: Sequence[Path],
) -> tuple[FolderPlan, ...]:
    """Return the files that a round writes, folder by folder.

    Args:
        federation: clients, tiers and ranks.
        cohort: the clients that train.
        plan: the plan with all its arrays.
        logs: the logs that its arrays write.
    """
    modules = federation.prepared.modules
    run = RunPaths(root=Path())
    paths = run.round(1)
    attempt = paths.attempt(1)
    tasks = [
        f"{number}_{task}"
        for number, array in enumerate(plan.arrays, 1)
        for task in range(array.tasks)
    ]
    factors = federation.prepared.sent
    sent = sum(update_bytes(federation.ranks[client.tier], modules, factors) for client in cohort)
    parts = [paths.update(attempt=1, bundle=b.number, part=0) for b in plan.bundles]
    at_once = min(len(cohort), sum(workers.parallel for workers in plan.workers.values()))
    # an adapter and, for AdamW, its two moments
    checkpoint_bytes = 3 * sent // max(1, len(cohort))
    state = [paths.global_state, paths.aggregate_record]
    scoring = paths.evaluation_job(1)
    pieces = pieces_to_score(federation, state_round=1, targets_round=1)
    scores = [paths.evaluation_record, scoring.submission, scoring.jobs]
    scores += [
        path for n in range(len(pieces)) for path in (paths.evaluation.part(n), scoring.claim(n))
    ]
    if federation.config.evaluation.keep_answers:
        scores.append(paths.answers)
    own = [paths.cohort, paths.clients, paths.collection, paths.tasks, paths.record]
    own += [attempt.submission, attempt.jobs]
    state_bytes = _state_bytes(federation.largest_ranks, modules)
    return (
        *_kept_by_clients(federation, run, cohort),
        _folder("claims", [attempt.claim(b.number) for b in plan.bundles], _CLAIM_BYTES),
        _folder("tasks", [attempt.task(name) for name in tasks], _TASK_BYTES),
        _folder(
            "updates",
            parts,
            total=sent + len(cohort) * (_UPDATE_CLIENT_BYTES + _UPDATE_MODULE_BYTES * len(modules)),
            note="a bundle longer than training.checkpoint_every_minutes comes in parts",
        ),
        _folder(
            "checkpoints",
            [paths.checkpoint(f"{n}") for n in range(at_once)],
            checkpoint_bytes,
            note="at most, of clients in training",
        ),
        _folder(
            "logs",
            logs,
            total=len(cohort) * _LOG_LINE_BYTES + len(tasks) * _LOG_BYTES,
        ),
        _folder("aggregate", [*state, *_of_job(paths.aggregate_job(1))], total=state_bytes),
        _folder("evaluation", scores, _RECORDS_BYTES),
        _folder("records", own, total=len(cohort) * _CLIENT_BYTES + _RECORDS_BYTES),
    )


def _of_job(job: JobPaths) -> tuple[Path, ...]:
    return job.submission, job.jobs, job.progress


def _kept_by_clients(
    federation: Federation, run: RunPaths, cohort: Sequence[CohortClient]
) -> Iterator[FolderPlan]:
    """Yield the store of what clients keep, if their method lets them keep anything."""
    kept = federation.prepared.kept_bytes
    if kept:
        yield _folder(
            run.client_stores.name,
            [run.client_store(client.id, 1) for client in cohort],
            total=sum(kept[client.tier] + _KEPT_BYTES for client in cohort),
            note="of each client what a kept state needs stays after the round",
        )


def _folder(
    name: str,
    files: Iterable[Path],
    file_bytes: int = 0,
    *,
    total: int | None = None,
    note: str = "",
) -> FolderPlan:
    all_files = list(files)
    folders = Counter(path.parent for path in all_files)
    # a subfolder is an entry too
    for folder in list(folders):
        if folder.parent in folders:
            folders[folder.parent] += 1
    return FolderPlan(
        folder=name,
        files=len(all_files),
        largest_folder=max(folders.values(), default=0),
        bytes=len(all_files) * file_bytes if total is None else total,
        note=note,
    )


def _state_bytes(ranks: Mapping[str, int], modules: Mapping[str, ModuleRecord]) -> int:
    """Return the bytes of a server state: U, S and V of the largest rank in float32."""
    values = sum(
        rank * (modules[name].out_features + modules[name].in_features + 1)
        for name, rank in ranks.items()
    )
    return _FLOAT32_BYTES * values
