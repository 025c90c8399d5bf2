"""What is kept of a run, and the removal of everything else."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.models import Config
from fedllm.scheduling.log_names import task_of
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.publishing.publish import storage_errors
from fedllm.storage.records import EvaluationRecord

_SET_ASIDE = re.compile(r"\.(damaged|replaced|refused)-\d+$")
# another one removes the same, or a late worker still writes there: the next call sees to it
_BUSY = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY}


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A file or folder that is not kept, and the bytes of its files."""

    path: Path
    num_bytes: int


def prune(paths: RunPaths, config: Config) -> list[Removal]:
    """Remove what retention does not keep; safe beside a coordinator that does the same."""
    removals = removable(paths, config)
    for removal in removals:
        with storage_errors(removal.path):
            _remove(removal.path)
    return removals


def removable(paths: RunPaths, config: Config) -> list[Removal]:
    """Return what retention does not keep, of complete rounds alone.

    Updates and checkpoints stay until the next round is aggregated. States of the last
    `storage.keep_states` rounds, of every `storage.keep_every`-th, and of the best evaluated one
    stay; logs, claims and progress records of the last `storage.keep_logs` rounds do. What was set
    aside and what writers left unfinished goes.
    """
    rounds = [paths.round(number) for number in range(config.rounds + 1)]
    complete = [r for r in rounds if r.record.exists() and r.aggregate_record.exists()]
    found: dict[Path, None] = {}
    for path in (
        *_states(paths, config, complete),
        *_updates(paths, complete),
        *_accounts(paths, rounds, complete[: -config.storage.keep_logs]),
        *_leftovers(paths, complete),
    ):
        if not any(parent in found for parent in path.parents):
            found[path] = None
    return [Removal(path=path, num_bytes=_files_bytes(path)) for path in found]


def _states(paths: RunPaths, config: Config, complete: Sequence[RoundPaths]) -> Iterator[Path]:
    kept = {each.number for each in complete[-config.storage.keep_states :]}
    kept |= {each.number for each in complete if each.number % config.storage.keep_every == 0}
    gone = [each for each in complete if each.number not in kept and each.global_state.exists()]
    # evaluations are long: they are read only where a state hangs on it
    best = best_round(paths, config) if gone else set()
    for each in gone:
        if each.number not in best and _is_superseded(paths, each):
            yield each.global_state


def _updates(paths: RunPaths, complete: Sequence[RoundPaths]) -> Iterator[Path]:
    for each in complete:
        if _is_superseded(paths, each):
            yield from _existing(each.updates, each.checkpoints)


def _is_superseded(paths: RunPaths, each: RoundPaths) -> bool:
    """Say whether the next round has its state: until then a damaged one may be made anew."""
    return paths.round(each.number + 1).aggregate_record.exists()


def _accounts(
    paths: RunPaths, rounds: Sequence[RoundPaths], old: Sequence[RoundPaths]
) -> Iterator[Path]:
    """Yield claims, progress records and logs of old rounds."""
    for each in old:
        for attempt in _attempts(each):
            yield from _existing(attempt.claims, attempt.tasks)
    folders = _existing(*(paths.logs(each.number) for each in old))
    if not folders:
        return
    # a worker that lingers writes on in the log of the round that started it
    newer = [each for each in rounds if each not in old]
    at_work = {
        path.stem for each in newer for attempt in _attempts(each) for path in attempt.task_files()
    }
    for folder in folders:
        kept, gone = _split(_files(folder), lambda path: task_of(path) in at_work)
        yield from gone if kept else [folder]


def _split(paths: Iterable[Path], belongs: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Return what belongs and what does not."""
    groups: tuple[list[Path], list[Path]] = ([], [])
    for path in paths:
        groups[0 if belongs(path) else 1].append(path)
    return groups


def _attempts(each: RoundPaths) -> list[AttemptPaths]:
    numbers = sorted(int(path.name) for path in each.attempts.glob("*") if path.name.isdigit())
    return [each.attempt(number) for number in numbers]


def _leftovers(paths: RunPaths, complete: Sequence[RoundPaths]) -> Iterator[Path]:
    """Yield what writers left unfinished and what was set aside."""
    numbers = {each.root.name for each in complete}
    yield from (path for path in _set_aside(paths.rounds) if path.name.split(".")[0] in numbers)
    for each in complete:
        for folder, folders, files in os.walk(each.root):
            for name in sorted([*folders, *files]):
                if _SET_ASIDE.search(name) or (name.startswith(".") and name.endswith(".part")):
                    yield Path(folder) / name


def _set_aside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if _SET_ASIDE.search(path.name))


def _existing(*paths: Path) -> list[Path]:
    return [path for path in paths if path.exists()]


def _files(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted; folders that another removes meanwhile have none."""
    return sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)


def _files_bytes(path: Path) -> int:
    total = 0
    for each in _files(path) if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            total += each.stat().st_size
    return total


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is gone already is passed over."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            for each in list(path.iterdir()):
                _remove(each)
        try:
            path.rmdir()
        except OSError as error:
            if error.errno not in _BUSY:
                raise
    else:
        path.unlink(missing_ok=True)


def best_round(paths: RunPaths, config: Config) -> set[int]:
    """Return the evaluated round of the lowest mean loss on dev clients, else on all scored.

    Only evaluations of the same clients and rows compare: the ones that most rounds have.
    """
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
