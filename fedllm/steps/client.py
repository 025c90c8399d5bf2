"""What the clients of a round share, and the training of one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedllm.config.loading import result_fingerprint
from fedllm.config.models import Config
from fedllm.errors import DataError, OutOfMemory, RunDirectoryError, UserError
from fedllm.lora.factors import Adapter
from fedllm.methods.protocol import Method
from fedllm.methods.table import local_rule
from fedllm.model.batches import TokenRow
from fedllm.model.slots import AdapterSlots
from fedllm.steps.adapters import adapter_of
from fedllm.steps.aggregate import method_of
from fedllm.steps.checkpoints import Resumable, UnusableCheckpointError
from fedllm.steps.identity import TaskIdentity
from fedllm.steps.log import say
from fedllm.steps.patience import patience_seconds, patiently
from fedllm.steps.session import Session
from fedllm.steps.state import read_state
from fedllm.storage.checkpoints import CheckpointIdentity
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord, RunRecord, UpdateRecord
from fedllm.storage.tensors import TensorFile, sha256_of
from fedllm.training.environment import environment
from fedllm.training.loop import LocalSettings, Snapshot, TrainResult, train_client
from fedllm.training.memory import let_go, micro_batch_size, micro_batch_sizes, ran_out
from fedllm.training.plan import Draws

Save = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A client's record and, unless it failed, its factors."""

    record: UpdateRecord
    adapter: Adapter


@dataclass(frozen=True, kw_only=True)
class ClientRound:
    """A round as a worker sees it: what was drawn, what clients start from, how they train."""

    paths: RoundPaths
    run_id: str
    config: Config
    prepared: PreparedRecord
    result_fingerprint: str
    cohort: CohortRecord
    state: TensorFile
    method: Method
    settings: LocalSettings
    session: Session
    tiers: Mapping[str, str]
    _adapters: dict[str, Adapter] = field(default_factory=dict)

    @classmethod
    def open(cls, attempt: AttemptPaths, session: Session) -> "ClientRound":
        """Read what an attempt's round trains from.

        Raises:
            RunDirectoryError: a record or the server state is missing or damaged.
        """
        paths = RoundPaths(root=attempt.root.parent.parent)
        run = RunPaths(root=paths.root.parent.parent)
        config = session.config(run.config)
        # files of another node may become visible late
        patience = patience_seconds(config)
        prepared = patiently(lambda: session.prepared(run.prepared), patience)
        cohort = patiently(lambda: CohortRecord.read(paths.cohort), patience)
        return cls(
            paths=paths,
            run_id=patiently(lambda: RunRecord.read(run.run), patience).run_id,
            config=config,
            result_fingerprint=result_fingerprint(config),
            prepared=prepared,
            cohort=cohort,
            state=patiently(lambda: _state(run, cohort), patience),
            method=method_of(config),
            settings=LocalSettings(
                training=config.training,
                rule=local_rule(config.method.local),
                loss_on=config.data.loss_on,
                # a run that was prepared before there were ways keeps its bits
                by_length=prepared.way is not None,
            ),
            session=session,
            tiers={client.id: client.tier for client in cohort.clients},
        )

    @property
    def slots(self) -> AdapterSlots:
        """The base model with its adapter slots, loaded on first use."""
        return self.session.slots(self.config, self.prepared)

    def received(self, client: str) -> Adapter:
        """Return what a client starts from: its tier's adapter, built once per round."""
        tier = self.tiers.get(client)
        if tier is None:
            raise UserError(f"{self.paths.cohort}: client {client} is not in this round's cohort")
        if tier not in self._adapters:
            ranks = self.cohort.ranks[tier]
            self._adapters[tier] = adapter_of(self.method, self.state, ranks)
        return self._adapters[tier]

    def train(
        self,
        client: str,
        *,
        attempt: int,
        bundle: int,
        identity: TaskIdentity,
        before_step: Callable[[int, Save], None] = lambda _step, _save: None,
        resume: bool = True,
    ) -> Trained:
        """Train one client, from its checkpoint where there is one of the same training.

        The losses and factors depend on round and client alone, wherever and however often the
        training was interrupted. Where memory runs out and `training.smaller_micro_batch` allows
        it, the client is trained again from its start with half the micro-batch, which changes
        their rounding and is recorded; the next client begins with the configured one.

        Args:
            client: one of the round's cohort.
            attempt: the attempt that the client is trained in.
            bundle: its bundle there.
            identity: the task that trains.
            before_step: called with the number of the optimizer step, from 0, and `save`, which
                writes the client's state as it is before that step to its checkpoint; nothing is
                written where no step was taken since the training began or was resumed. What it
                raises ends the training.
            resume: False trains from the start, whatever checkpoint there is.

        Raises:
            DataError: the client has no training rows.
            OutOfMemory: there is not enough memory.
        """
        received = self.received(client)
        rows = self.session.data(self.prepared.data_path).rows(client, "train")
        if not rows:
            raise DataError(f"{self.prepared.data_path}: client {client} has no training rows")
        sizes = list(micro_batch_sizes(self.config.training, len(rows)))
        training = self._begin(client, sizes, received if resume else None)
        while True:
            try:
                result = self._train(training, received, rows, before_step)
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
            # only now, without the error's traceback, can the tensors of that attempt go
            let_go(self.slots)
            training = self._smaller(training, sizes)
        record = self._record(training, result, attempt=attempt, bundle=bundle, identity=identity)
        return Trained(record=record, adapter=result.adapter)

    def discard_checkpoint(self, client: str) -> None:
        """Remove what was saved of a client that is published."""
        self.paths.checkpoint(client).unlink(missing_ok=True)

    def _begin(self, client: str, sizes: Sequence[int], received: Adapter | None) -> Resumable:
        """Return a client's training, with the checkpoint that `received` was trained to."""
        path = self.paths.checkpoint(client)
        training = Resumable(
            path=path,
            identity=CheckpointIdentity(
                run_id=self.run_id,
                result_fingerprint=self.result_fingerprint,
                round=self.cohort.round,
                client=client,
                base_fingerprint=self.cohort.base_fingerprint,
                data_fingerprint=self.cohort.data_fingerprint,
                state_sha256=self.cohort.state_sha256,
            ),
            micro_batch_size=sizes[0],
            environment=environment(self.config.training, str(self.slots.device)),
        )
        if received is None:
            return training
        try:
            resumed = training.resumed(sizes, received)
        except UnusableCheckpointError as error:
            say(f"client {client}: trains from its start: {path}: {error}")
            return training
        if resumed is not training:
            say(f"client {client}: goes on after {resumed.begun_at} steps, from {path}")
        return resumed

    def _train(
        self,
        training: Resumable,
        received: Adapter,
        rows: Sequence[TokenRow],
        before_step: Callable[[int, Save], None],
    ) -> TrainResult:
        def hook(step: int, snapshot: Snapshot) -> None:
            before_step(step, lambda: training.save(snapshot()))

        section = self.settings.training
        # as configured, unless memory ran out: the bits are those of a run that asks for it
        if training.micro_batch_size != micro_batch_size(section):
            section = section.model_copy(update={"micro_batch_size": training.micro_batch_size})
        return train_client(
            self.slots,
            received,
            rows,
            settings=replace(self.settings, training=section),
            draws=Draws(
                seed=self.config.seed, round=self.cohort.round, client=training.identity.client
            ),
            progress=training.progress,
            before_step=hook,
        )

    def _smaller(self, training: Resumable, sizes: Sequence[int]) -> Resumable:
        """Return the training to try after one that found too little memory.

        Raises:
            OutOfMemory: there is none.
        """
        client, size = training.identity.client, training.micro_batch_size
        told = f"client {client}: memory ran out with micro-batches of {size} rows"
        smaller = next((other for other in sizes if other < size), None)
        if smaller is not None:
            say(f"{told}; it is trained again from its start with {smaller}")
            return training.anew(smaller)
        remedy = (
            "training.gradient_checkpointing: true or a smaller data.cutoff_tokens"
            if size == 1
            else "a smaller training.micro_batch_size or training.smaller_micro_batch: true"
        )
        raise OutOfMemory(
            f"{told}; give the task more memory and resume, or begin a new run with {remedy}"
        )

    def _record(
        self,
        training: Resumable,
        result: TrainResult,
        *,
        attempt: int,
        bundle: int,
        identity: TaskIdentity,
    ) -> UpdateRecord:
        size = training.micro_batch_size
        return UpdateRecord(
            run_id=self.run_id,
            round=self.cohort.round,
            client=training.identity.client,
            attempt=attempt,
            bundle=bundle,
            status="failed" if result.reason else "ok",
            reason=result.reason,
            base_fingerprint=self.cohort.base_fingerprint,
            rows=result.rows,
            steps=result.steps,
            tokens=result.tokens,
            loss_tokens=result.loss_tokens,
            losses=result.losses,
            seconds=result.seconds,
            step_seconds=result.step_seconds,
            peak_memory_bytes=result.peak_memory_bytes,
            norms=result.norms,
            scales=result.scales,
            micro_batch_size=None if size == micro_batch_size(self.config.training) else size,
            resumed_at=training.resumed_at,
            earlier_environments=training.earlier_environments,
            environment=training.environment,
            node=identity.node,
            task=identity.task,
            log=identity.log,
        )


def _state(run: RunPaths, cohort: CohortRecord) -> TensorFile:
    before = run.round(cohort.round - 1)
    path = before.global_state
    if path.exists() and sha256_of(path) == cohort.state_sha256:
        return TensorFile(path)
    # says what is wrong, where the state is not the one of its own record
    read_state(before)
    raise RunDirectoryError(
        f"{path}: not the state that round {cohort.round} was drawn from; restore it"
    )
