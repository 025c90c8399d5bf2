"""What becomes of clients whose change is far larger than the others', by their recorded norms."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedllm.planning.outlier_norms import Outlier, UpdateSizes, find_outliers, size_bound
from fedllm.rounds.run import Run
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import CollectedUpdate, UpdateRecord
from fedllm.storage.updates import read_update

_NAMED = 5  # clients in the log: the collection lists all


@dataclass(frozen=True, kw_only=True)
class CheckedUpdates:
    """The updates that a round uses, and why it uses others not."""

    updates: list[CollectedUpdate]
    rejected: Mapping[str, str]


class UnreadableUpdateError(Exception):
    """A file that was scanned cannot be read any more: `file` below the folder of updates."""

    def __init__(self, file: str, problem: str) -> None:
        """Keep the file's name to look at it again."""
        super().__init__(f"{file}: {problem}")
        self.file = file


def check_outliers(run: Run, paths: RoundPaths, updates: list[CollectedUpdate]) -> CheckedUpdates:
    """Clip or reject clients by `aggregation.outliers`, or keep all as they are.

    A function of the updates alone: their order and files do not matter.

    Raises:
        UnreadableUpdateError: a file is not what was scanned.
    """
    section = run.config.aggregation
    if section.outliers == "keep":
        return CheckedUpdates(updates=updates, rejected={})
    found = find_outliers(_sizes(paths, updates), factor=section.outlier_factor)
    if section.outliers == "reject":
        rejected = {client: _reason(outliers) for client, outliers in found.items()}
        kept = [update for update in updates if update.client not in rejected]
        return CheckedUpdates(updates=kept, rejected=rejected)
    for client, outliers in list(found.items())[:_NAMED]:
        run.say(f"round {paths.number}: {client} is scaled down: {_reason(outliers)}")
    if len(found) > _NAMED:
        run.say(
            f"round {paths.number}: {len(found) - _NAMED} other clients are scaled down; "
            f"{paths.collection.name} lists them"
        )
    return CheckedUpdates(
        updates=[clipped(u, _factors(found.get(u.client, []))) for u in updates], rejected={}
    )


def clipped(update: CollectedUpdate, factors: Mapping[str, float]) -> CollectedUpdate:
    """Return an update whose change of some modules is scaled down."""
    return update.model_copy(update={"clipped": dict(factors)}) if factors else update


def _factors(outliers: Sequence[Outlier]) -> dict[str, float]:
    return {outlier.module: outlier.clip for outlier in sorted(outliers, key=lambda o: o.module)}


def _reason(outliers: Sequence[Outlier]) -> str:
    worst, others = outliers[0], len(outliers) - 1
    return f"{worst}{f', and {others} other modules' if others else ''}"


def _sizes(paths: RoundPaths, updates: Sequence[CollectedUpdate]) -> Iterator[UpdateSizes]:
    """Read the norms again: a coordinator does not hold them, they grow with the modules."""
    files = {update.file: update.sha256 for update in updates}
    wanted = {update.client for update in updates}
    for file, sha256 in files.items():
        try:
            found = read_update(paths.updates / file)
        except (DamagedUpdateError, OSError) as error:
            raise UnreadableUpdateError(file, str(error)) from error
        if any(update.sha256 != sha256 for update in found):
            raise UnreadableUpdateError(file, "not the file that was scanned")
        yield from (_size(update.record) for update in found if update.record.client in wanted)


def _size(record: UpdateRecord) -> UpdateSizes:
    modules = tuple(record.norms)
    bounds = [size_bound(scale=record.scales[m], norms=record.norms[m]) for m in modules]
    return UpdateSizes(client=record.client, modules=modules, values=bounds)
