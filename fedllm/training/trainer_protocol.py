"""The protocol of what trains clients: all that a worker knows of the engine of its run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedllm.lora.factors import Adapter
from fedllm.packing.batches import TokenRow
from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings, TrainResult
from fedllm.training.progress import Progress
from fedllm.training.step_plan import Draws

Snapshots = Callable[[], list[Progress]]
StepHook = Callable[[int, Snapshots], None]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One client of a group: what it received, its rows, its identity, where it goes on.

    `received` returns the adapter: once it is copied into the model, nobody need hold it.
    """

    received: Callable[[], Adapter]
    rows: Sequence[TokenRow]
    draws: Draws
    progress: Progress | None = None


def no_hook(step: int, snapshots: Snapshots) -> None:
    """Do nothing before a step."""


class Trainer(Protocol):
    """Trains the clients of a run on the base model that a worker has loaded.

    What a client's training comes to follows from its group, the settings and the environment:
    nothing that was trained before it in this process counts, nor how often it was interrupted.
    """

    @property
    def num_processes(self) -> int:
        """How many processes of a worker train a group together, each by a trainer of its own."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What must be equal for updates to be bit-identical."""

    def train(
        self,
        members: Sequence[Member],
        *,
        micro_batch_size: int | None = None,
        before_step: StepHook = no_hook,
    ) -> list[TrainResult]:
        """Train copies of what the members of a group received; return one result for each.

        Where a trainer has several processes, all of them call this with the same arguments.

        Args:
            members: at most as many as the run's engine trains at once, each at the same step of
                the group or at its own end.
            micro_batch_size: rows in memory at once; None: as configured.
            before_step: called with the step's number, from 0, and a function that returns the
                progress of every member; what it raises ends the training.
        """

    def remedies(self, num_clients: int, micro_batch_size: int) -> Sequence[str]:
        """Return what to change in the configuration where a group takes too much memory."""

    def let_go(self) -> None:
        """Free what a training that failed has left in memory."""


class OpenTrainer(Protocol):
    """Makes a trainer."""

    def __call__(self, *, slots: AdapterSlots, settings: LocalSettings) -> Trainer:
        """Return a trainer on a base model, for clients that all train by `settings`."""
