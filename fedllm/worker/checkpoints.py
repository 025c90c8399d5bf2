"""Checkpoints of clients: one worker begins the training, another one resumes it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedllm.lora.factors import Adapter
from fedllm.methods.local_task import TrainedFactors
from fedllm.storage.checked import DamagedUpdateError, Sign
from fedllm.storage.checkpoint_header import CheckpointIdentity, CheckpointRecord
from fedllm.storage.records import TrainingStats
from fedllm.storage.tensors import Checkpoint, publish_checkpoint, read_checkpoint
from fedllm.training.progress import Progress

# These change within a run if fedllm is upgraded or the configuration is edited.
_CONFIGURATION_KEYS = {"result_fingerprint", "group"}


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """A client's training that is saved to a checkpoint and resumed from it.

    Attributes:
        path: the checkpoint file.
        identity: which training it is; a checkpoint of another identity is refused.
        micro_batch_size: rows in memory at once.
        environment: the versions and the hardware of this process.
        progress: where the training resumes; None: it begins at its start.
        resumed_at: the optimizer steps after which it was resumed, in order.
        environments: those of the processes that trained it before, the latest last.
        sign: returns the client's signature of a checksum: an update that is trained from another's
            checkpoint would be signed too. None: checkpoints are not signed.
    """

    path: Path
    identity: CheckpointIdentity
    micro_batch_size: int
    environment: dict[str, str]
    progress: Progress | None = None
    resumed_at: list[int] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    sign: Sign | None = None

    @property
    def begun_at(self) -> int:
        """The number of optimizer steps that were taken before this training began."""
        return self.progress.step if self.progress else 0

    @property
    def earlier_environments(self) -> list[dict[str, str]]:
        """The environments that differ from the present one."""
        return [other for other in self.environments if other != self.environment]

    def save(self, progress: Progress) -> None:
        """Publish a checkpoint, if a step was taken since this training began.

        Raises:
            StorageFull: no space or quota is left.
            RunDirectoryError: the folder cannot be written.
        """
        if progress.step == self.begun_at:
            return
        record = CheckpointRecord(
            identity=self.identity,
            micro_batch_size=self.micro_batch_size,
            **dict(progress.stats),
            resumed_at=self.resumed_at,
            environments=[*self.earlier_environments, self.environment],
        )
        checkpoint = Checkpoint(record=record, tensors=progress.tensors)
        publish_checkpoint(self.path, checkpoint, self.sign)

    def resumed(
        self,
        micro_batch_sizes: Collection[int],
        received: Callable[[], Adapter],
        trained: TrainedFactors = "AB",
    ) -> "Resumable":
        """Return the training resumed from its checkpoint; itself if there is no checkpoint.

        Args:
            micro_batch_sizes: the sizes it may be trained with: others round differently.
            received: returns the adapter that the client starts from.
            trained: the factors of it that train.

        Raises:
            UnusableCheckpointError: the checkpoint is damaged, or of another training.
        """
        checkpoint = self._read()
        if checkpoint is None:
            return self
        record = checkpoint.record
        for key, value in self.identity:
            if getattr(record.identity, key) != value:
                why = f"it is of another {key.replace('_', ' ')}"
                if key in _CONFIGURATION_KEYS:
                    why += ": written by another version of fedllm or with another configuration"
                raise self._unusable(why)
        if record.micro_batch_size not in micro_batch_sizes:
            raise self._unusable(f"its micro-batches have {record.micro_batch_size} rows")
        progress = _progress_of(checkpoint)
        if not progress.fits(received(), trained):
            raise self._unusable("its factors have other shapes")
        if self.sign and checkpoint.signature != self.sign(checkpoint.sha256):
            raise self._unusable("it is not signed with the key of this client in this round")
        return replace(
            self,
            micro_batch_size=record.micro_batch_size,
            progress=progress,
            resumed_at=[*record.resumed_at, record.steps],
            environments=record.environments,
        )

    def restarted(self, micro_batch_size: int) -> "Resumable":
        """Return the same training at its start, with another micro-batch size."""
        return Resumable(
            path=self.path,
            identity=self.identity,
            micro_batch_size=micro_batch_size,
            environment=self.environment,
            sign=self.sign,
        )

    def _read(self) -> Checkpoint | None:
        try:
            return read_checkpoint(self.path)
        except FileNotFoundError:
            return None
        except DamagedUpdateError as error:
            raise self._unusable(str(error)) from error
        except OSError as error:
            raise self._unusable(f"cannot be read ({error.strerror})") from error

    def _unusable(self, why: str) -> "UnusableCheckpointError":
        return UnusableCheckpointError(f"{self.path}: {why}")


class UnusableCheckpointError(Exception):
    """A checkpoint cannot be resumed; the message says which file, and why."""


def common_step(trainings: Sequence[Resumable], ends: Sequence[int]) -> int:
    """Return the optimizer step from which a group resumes.

    Args:
        trainings: one for each client of the group, resumed from its checkpoint.
        ends: the number of steps of each client; a client is at the common step or at its end.

    Raises:
        UnusableCheckpointError: the group's checkpoints were not written at the same step.
    """
    step = max(training.begun_at for training in trainings)
    size = trainings[0].micro_batch_size
    for training, end in zip(trainings, ends, strict=True):
        if (training.begun_at, training.micro_batch_size) != (min(step, end), size):
            raise UnusableCheckpointError(f"{training.path}: is of another step than its group's")
    return step


def _progress_of(checkpoint: Checkpoint) -> Progress:
    return Progress(tensors=checkpoint.tensors, stats=TrainingStats.of(checkpoint.record))
