"""The trainer of one client at a time: a plain loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings, Loop, TrainResult
from fedllm.training.out_of_memory import let_go, micro_batch_size
from fedllm.training.provenance import environment
from fedllm.training.trainer_protocol import Member, StepHook, no_hook


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Trains one client at a time in one process.

    Attributes:
        slots: the base model.
        settings: how clients train.
    """

    slots: AdapterSlots
    settings: LocalSettings

    @property
    def num_processes(self) -> int:
        """One."""
        return 1

    @property
    def environment(self) -> Mapping[str, str]:
        """Versions, processor, threads, precision and device."""
        base = self.slots.base
        return environment(self.settings.training, str(self.slots.device), base.quantisation)

    def train(
        self,
        members: Sequence[Member],
        *,
        micro_batch_size: int | None = None,
        before_step: StepHook = no_hook,
    ) -> list[TrainResult]:
        """Train the only member; see `Trainer`."""
        (member,) = members
        settings = with_micro_batches(self.settings, micro_batch_size)
        installed = self.slots.install(member.received(), settings.task)
        loop = Loop(self.slots, installed, member.rows, settings, member.draws)
        result = loop.run(
            member.progress, lambda step, snapshot: before_step(step, lambda: [snapshot()])
        )
        return [result]

    def remedies(self, num_clients: int, micro_batch_size: int) -> Sequence[str]:  # noqa: ARG002
        """Name the keys that make a step smaller."""
        if micro_batch_size == 1:
            return ["training.gradient_checkpointing: true or a smaller data.cutoff_tokens"]
        return ["a smaller training.micro_batch_size or training.smaller_micro_batch: true"]

    def let_go(self) -> None:
        """Free what a training that failed has left in memory."""
        let_go(self.slots)


def with_micro_batches(settings: LocalSettings, size: int | None) -> LocalSettings:
    """Return the settings with micro-batches of `size` rows; None: as they are.

    The bits are those of a run that asks for it.
    """
    training = settings.training
    if size is None or size == micro_batch_size(training):
        return settings
    return replace(settings, training=training.model_copy(update={"micro_batch_size": size}))
