"""Outliers: clip or reject clients whose change is far larger than that of the others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedllm.errors import counted
from fedllm.planning.outlier_norms import Outlier, UpdateSizes, find_outliers, size_bound
from fedllm.rounds.run import Run
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import CollectedUpdate, UpdateRecord
from fedllm.storage.updates import read_update

_MAX_LOGGED = 5  # clients; the collection lists all


@dataclass(frozen=True, kw_only=True)
class CheckedUpdates:
    """The updates that a round uses, and the rejected ones: client -> reason."""

    updates: list[CollectedUpdate]
    rejected: Mapping[str, str]


class UnreadableUpdateError(Exception):
    """An update file cannot be read any more; `file` is its path below the folder of updates."""

    def __init__(self, file: str, problem: str) -> None:
        """Keep the file's name, so that the next scan can read it again."""
        super().__init__(f"{file}: {problem}")
        self.file = file


def check_outliers(run: Run, paths: RoundPaths, updates: list[CollectedUpdate]) -> CheckedUpdates:
    """Clip or reject outliers as `aggregation.outliers` says, or keep all as they are.

    The result depends only on the updates, not on their order or files.

    Raises:
        UnreadableUpdateError: a file changed since the scan.
    """
    section = run.config.aggregation
    if section.outliers == "keep":
        return CheckedUpdates(updates=updates, rejected={})
    outliers_of = find_outliers(_sizes(paths, updates), factor=section.outlier_factor)
    if section.outliers == "reject":
        rejected = {client: _reason(outliers) for client, outliers in outliers_of.items()}
        kept = [update for update in updates if update.client not in rejected]
        return CheckedUpdates(updates=kept, rejected=rejected)
    for client, outliers in list(outliers_of.items())[:_MAX_LOGGED]:
        run.say(f"round {paths.number}: {client} is scaled down: {_reason(outliers)}")
    if len(outliers_of) > _MAX_LOGGED:
        run.say(
            f"round {paths.number}: {len(outliers_of) - _MAX_LOGGED} other clients are scaled "
            f"down; {paths.collection.name} lists them"
        )
    return CheckedUpdates(
        updates=[clipped(u, _factors(outliers_of.get(u.client, []))) for u in updates], rejected={}
    )


def clipped(update: CollectedUpdate, factors: Mapping[str, float]) -> CollectedUpdate:
    """Return the update with its changes scaled down; `factors` are module -> factor below 1."""
    return update.model_copy(update={"clipped": dict(factors)}) if factors else update


def _factors(outliers: Sequence[Outlier]) -> dict[str, float]:
    return {outlier.module: outlier.clip for outlier in sorted(outliers, key=lambda o: o.module)}


def _reason(outliers: Sequence[Outlier]) -> str:
    worst, others = outliers[0], len(outliers) - 1
    return f"{worst}, and {counted(others, 'other module')}" if others else str(worst)


def _sizes(paths: RoundPaths, updates: Sequence[CollectedUpdate]) -> Iterator[UpdateSizes]:
    """Read the norms from the files: with many modules they are too many to keep in memory."""
    files = {update.file: update.sha256 for update in updates}
    clients = {update.client for update in updates}
    for file, sha256 in files.items():
        try:
            published = read_update(paths.updates / file)
        except (DamagedUpdateError, OSError) as error:
            raise UnreadableUpdateError(file, str(error)) from error
        if any(update.sha256 != sha256 for update in published):
            raise UnreadableUpdateError(file, "not the file that was scanned")
        yield from (_size(update.record) for update in published if update.record.client in clients)


def _size(record: UpdateRecord) -> UpdateSizes:
    modules = tuple(record.norms)
    bounds = [size_bound(scale=record.scales[m], norms=record.norms[m]) for m in modules]
    return UpdateSizes(client=record.client, modules=modules, values=bounds)
