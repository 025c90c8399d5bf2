"""What a simulated run cost: moments of its rounds, and the figures made of them."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.simulated.cluster import Array, SimulatedSlurm
from benchmarks.simulated.worker import Trained


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """A round: its geometry, its virtual seconds, and CPU seconds of the coordinator.

    The lower bound is max(client seconds / slots, longest client); the makespan begins with the
    round's first sbatch for clients and ends with its last update.
    """

    round: int
    trained: int
    arrays: int
    largest_array: int
    tasks: int
    starts: int
    idle_starts: int
    requeues: int
    bundles: int
    requested_minutes: float
    client_seconds: float
    longest_seconds: float
    lower_bound_seconds: float
    makespan_seconds: float
    utilisation: float
    coordinator_seconds_per_1000_clients: float
    commands: Mapping[str, int]
    commands_per_minute: float
    squeue_per_minute: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A run of so many clients on so many slots."""

    clients: int
    slots: int
    wall_seconds: float
    commands: Mapping[str, int]
    most_files: int
    largest_folders: Mapping[str, int]
    rounds: list[RoundFigures]


@dataclass(kw_only=True)
class Moments:
    """What was read off when a round's updates were all there, by round."""

    slurm: SimulatedSlurm
    root: Path
    cpu_seconds: dict[int, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.process_time)
    most_files: int = 0
    _entries: Counter[str] = field(default_factory=Counter)

    def note(self, round_number: int) -> None:
        """Take the time and look at the folders; a round's aggregation begins."""
        self.cpu_seconds[round_number] = self.slurm.coordinator_seconds() - self.begun
        self.look()

    def look(self) -> None:
        """Count the entries of every folder of the run."""
        files = 0
        for folder, folders, names in os.walk(self.root):
            where = str(Path(folder).relative_to(self.root))
            self._entries[where] = max(self._entries[where], len(folders) + len(names))
            files += len(names)
        self.most_files = max(self.most_files, files)

    def largest_folders(self, count: int) -> dict[str, int]:
        """Return the folders that had most entries."""
        return dict(self._entries.most_common(count))

    def round_seconds(self, round_number: int) -> float:
        """Return the coordinator's CPU seconds from the end of the round before to this one's."""
        return self.cpu_seconds[round_number] - self.cpu_seconds[round_number - 1]

    def arrays(self, round_number: int) -> list[Array]:
        """Return the arrays of a round's workers."""
        arrays = [*self.slurm.ended_arrays, *self.slurm.arrays.values()]
        place = f"/rounds/{round_number:04d}/attempts/"
        return [array for array in arrays if place in array.command[1]]


def round_figures(
    round_number: int, *, slots: int, moments: Moments, trained: Trained
) -> RoundFigures:
    """Return the figures of a round."""
    arrays = moments.arrays(round_number)
    begun = min(array.submitted for array in arrays)
    makespan = trained.last_published - begun
    issued = Counter(
        name for at, name in moments.slurm.issued if begun <= at <= trained.last_published
    )
    total = sum(trained.seconds)
    bound = max(total / slots, max(trained.seconds))
    return RoundFigures(
        round=round_number,
        trained=len(trained.seconds),
        arrays=len(arrays),
        largest_array=max(len(array.tasks) for array in arrays),
        tasks=sum(len(array.tasks) for array in arrays),
        starts=trained.starts,
        idle_starts=trained.idle_starts,
        requeues=trained.requeues,
        bundles=trained.bundles,
        requested_minutes=max(array.minutes for array in arrays),
        client_seconds=total,
        longest_seconds=max(trained.seconds),
        lower_bound_seconds=bound,
        makespan_seconds=makespan,
        utilisation=bound / makespan,
        coordinator_seconds_per_1000_clients=(
            1e3 * moments.round_seconds(round_number) / len(trained.seconds)
        ),
        commands=dict(issued),
        commands_per_minute=60.0 * sum(issued.values()) / makespan,
        squeue_per_minute=60.0 * issued["squeue"] / makespan,
    )
