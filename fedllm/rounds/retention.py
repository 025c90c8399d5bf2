"""Retention: which files of a run are kept, and the removal of all others."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.models import Config
from fedllm.scheduling.log_names import task_of
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths, attempts_of
from fedllm.storage.publishing.publish import storage_errors
from fedllm.storage.records import EvaluationRecord, StopRecord

_SET_ASIDE = re.compile(r"\.(damaged|replaced|refused)-\d+$")
# another process removes the same, or a late worker still writes there: the next call retries
_BUSY = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY}


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A file or folder to remove, and the bytes of its files."""

    path: Path
    num_bytes: int


def prune(paths: RunPaths, config: Config) -> list[Removal]:
    """Remove what retention does not keep; several processes may do so at once."""
    removals = removable(paths, config)
    for removal in removals:
        with storage_errors(removal.path):
            _remove(removal.path)
    return removals


def removable(paths: RunPaths, config: Config) -> list[Removal]:
    """Return the files and folders that retention does not keep, of complete rounds only.

    Kept are the updates and checkpoints of a round until the next round is aggregated; the parts of
    an evaluation until its round is complete; the states
    of the last `storage.keep_states` rounds, of every `storage.keep_every`-th round and of the best
    evaluated round; the logs, claims and task records of the last `storage.keep_logs` rounds; of
    every client what it had kept at each round whose state is kept, and later.
    Files that were set aside or left unfinished are removed.
    """
    rounds = [paths.round(number) for number in range(config.rounds + 1)]
    complete = [r for r in rounds if r.record.exists() and r.aggregate_record.exists()]
    removals: dict[Path, None] = {}
    states = list(_states(paths, config, complete))
    for path in (
        *states,
        *_updates(paths, complete),
        *(path for r in complete for path in _existing(r.evaluation.parts)),
        *_task_files(paths, rounds, complete[: -config.storage.keep_logs]),
        *_client_stores(paths, complete, states),
        *_leftovers(paths, complete),
    ):
        if not any(parent in removals for parent in path.parents):
            removals[path] = None
    return [Removal(path=path, num_bytes=_files_bytes(path)) for path in removals]


def _states(paths: RunPaths, config: Config, complete: Sequence[RoundPaths]) -> Iterator[Path]:
    kept = {r.number for r in complete[-config.storage.keep_states :]}
    kept |= {r.number for r in complete if r.number % config.storage.keep_every == 0}
    surplus = [r for r in complete if r.number not in kept and r.global_state.exists()]
    # evaluations are long, so they are read only if a state may be removed
    best = best_round(paths, config) if surplus else set()
    for round_paths in surplus:
        if round_paths.number not in best and _is_superseded(paths, round_paths):
            yield round_paths.global_state
            yield from _existing(round_paths.earlier_states)


def _updates(paths: RunPaths, complete: Sequence[RoundPaths]) -> Iterator[Path]:
    for round_paths in complete:
        if _is_superseded(paths, round_paths):
            yield from _existing(round_paths.updates, round_paths.checkpoints)


def _is_superseded(paths: RunPaths, round_paths: RoundPaths) -> bool:
    """Return whether the next round has its state; before, this round's may have to be redone."""
    return paths.round(round_paths.number + 1).aggregate_record.exists()


def _task_files(
    paths: RunPaths, rounds: Sequence[RoundPaths], old: Sequence[RoundPaths]
) -> Iterator[Path]:
    """Yield the claims, task records and logs of old rounds."""
    for round_paths in old:
        for attempt in _attempts(round_paths):
            yield from _existing(attempt.claims, attempt.tasks)
        for job in attempts_of(round_paths.evaluation_job):
            yield from _existing(job.claims, job.progress_folder)
    folders = _existing(*(paths.logs(r.number) for r in old))
    if not folders:
        return
    # a worker that was taken over goes on in the log of the round that started it
    newer = [r for r in rounds if r not in old]
    newer_tasks = {
        path.stem for r in newer for attempt in _attempts(r) for path in attempt.task_files()
    }
    for folder in folders:
        kept, surplus = _split(_files(folder), lambda path: task_of(path) in newer_tasks)
        yield from surplus if kept else [folder]


def _client_stores(
    paths: RunPaths, complete: Sequence[RoundPaths], removed: Sequence[Path]
) -> Iterator[Path]:
    """Yield what clients kept that no kept state and no later round needs."""
    if not complete:
        return
    last = max(r.number for r in complete)
    left = [r for r in complete if r.global_state not in removed]
    states = [r.number for r in left if r.global_state.exists()]
    for files in paths.client_store_files().values():
        needed = {number for number in files if number > last}
        for state in {*states, last}:
            needed |= {max((number for number in files if number <= state), default=-1)}
        yield from (path for number, path in files.items() if number not in needed)


def _split(paths: Iterable[Path], is_kept: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Return the paths that are kept, and the others."""
    groups: tuple[list[Path], list[Path]] = ([], [])
    for path in paths:
        groups[0 if is_kept(path) else 1].append(path)
    return groups


def _attempts(paths: RoundPaths) -> list[AttemptPaths]:
    numbers = sorted(int(path.name) for path in paths.attempts.glob("*") if path.name.isdecimal())
    return [paths.attempt(number) for number in numbers]


def _leftovers(paths: RunPaths, complete: Sequence[RoundPaths]) -> Iterator[Path]:
    """Yield files that writers left unfinished and files that were set aside."""
    numbers = {r.root.name for r in complete}
    yield from (path for path in _set_aside(paths.rounds) if path.name.split(".")[0] in numbers)
    for round_paths in complete:
        for folder, folders, files in os.walk(round_paths.root):
            for name in sorted([*folders, *files]):
                if _SET_ASIDE.search(name) or (name.startswith(".") and name.endswith(".part")):
                    yield Path(folder) / name


def _set_aside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if _SET_ASIDE.search(path.name))


def _existing(*paths: Path) -> list[Path]:
    return [path for path in paths if path.exists()]


def _files(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted; none of a folder that is removed meanwhile."""
    return sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)


def _files_bytes(path: Path) -> int:
    total = 0
    for file in _files(path) if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its content; ignore paths that are gone already."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            for child in list(path.iterdir()):
                _remove(child)
        try:
            path.rmdir()
        except OSError as error:
            if error.errno not in _BUSY:
                raise
    else:
        path.unlink(missing_ok=True)


def best_round(paths: RunPaths, config: Config) -> set[int]:
    """Return the evaluated round of the lowest mean loss on dev clients, or on all without dev.

    Only evaluations of the same clients and rows are compared: those of the set that most rounds
    scored. Without an evaluation the result is empty. A run that was stopped early has recorded its
    best round.
    """
    stop = StopRecord.find(paths.stop)
    if stop and stop.round == config.rounds:
        return {stop.best_round}
    losses: dict[tuple[tuple[str, int], ...], dict[int, float]] = {}
    for number in range(config.rounds + 1):
        record = EvaluationRecord.find(paths.round(number).evaluation_record)
        if record and record.clients:
            dev = [c for c in record.clients if c.group == "dev"] or record.clients
            scored = tuple((c.client, c.as_deployed.rows) for c in dev)
            mean = sum(c.as_deployed.loss for c in dev) / len(dev)
            losses.setdefault(scored, {})[number] = mean
    if not losses:
        return set()
    usual = max(losses.values(), key=len)
    return {min(usual, key=lambda number: usual[number])}
