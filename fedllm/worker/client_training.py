"""Training of a round's clients: one by itself, or a group together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedllm.config.loading import result_fingerprint
from fedllm.config.models import Config, TrainingSection
from fedllm.errors import DataError, OutOfMemory, RunDirectoryError, UserError
from fedllm.lora.factors import Adapter, adapter_bytes
from fedllm.methods.catalog import local_rule
from fedllm.methods.local_task import Recipient
from fedllm.methods.protocol import Method, StateNotes
from fedllm.planning.engines import engine_of
from fedllm.process.client_store import ClientStore, Kept
from fedllm.process.late_files import read_late_file
from fedllm.process.log import say
from fedllm.process.run_method import method_of_run
from fedllm.process.server_state import read_state
from fedllm.process.session import Session
from fedllm.process.state_adapters import base_change_of, received_adapter, received_record
from fedllm.scheduling.environment import TaskIdentity
from fedllm.scheduling.traits import traits_of
from fedllm.storage.checkpoint_header import CheckpointIdentity
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import (
    CohortRecord,
    PreparedRecord,
    ReceivedRecord,
    RunRecord,
    UpdateRecord,
)
from fedllm.storage.tensors import TensorFile
from fedllm.storage.trust.secret import user_secret
from fedllm.storage.trust.signatures import RoundKeys
from fedllm.training.loop import LocalSettings, TrainResult
from fedllm.training.out_of_memory import micro_batch_size, micro_batch_sizes, ran_out
from fedllm.training.step_plan import Draws, plan_steps, training_at
from fedllm.training.trainer_protocol import Member, Snapshots, Trainer
from fedllm.worker.checkpoints import Resumable, UnusableCheckpointError, common_step
from fedllm.worker.process_group import OneProcess, Order, Processes

Save = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained client: its record, what it sends, and what it keeps; nothing if it failed."""

    record: UpdateRecord
    adapter: Adapter
    kept: Kept | None = None


@dataclass(frozen=True, kw_only=True)
class ClientRound:
    """A round that a worker trains: the cohort, the state that clients start from, the settings.

    `settings` are those of a tier that trains as `training` says.
    """

    paths: RoundPaths
    run: RunRecord
    config: Config
    prepared: PreparedRecord
    result_fingerprint: str
    cohort: CohortRecord
    state: TensorFile
    method: Method
    settings: LocalSettings
    session: Session
    tiers: Mapping[str, str]
    keys: RoundKeys
    _adapters: dict[str, Adapter] = field(default_factory=dict)
    _groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _received: dict[str, ReceivedRecord] = field(default_factory=dict)
    _kept_notes: dict[str, StateNotes] = field(default_factory=dict)

    @classmethod
    def open(cls, attempt: AttemptPaths, session: Session) -> "ClientRound":
        """Open the round of an attempt: read its records and the server state.

        Raises:
            RunDirectoryError: a record or the server state is missing or damaged.
        """
        paths, run = attempt.round, attempt.run
        config = session.config(run)
        # files of another node may become visible late
        visibility_seconds = traits_of(config).visibility_seconds
        prepared = read_late_file(lambda: session.prepared(run.prepared), visibility_seconds)
        cohort = read_late_file(lambda: CohortRecord.read(paths.cohort), visibility_seconds)
        method = method_of_run(run, config)
        return cls(
            paths=paths,
            run=read_late_file(lambda: RunRecord.read(run.run), visibility_seconds),
            config=config,
            result_fingerprint=result_fingerprint(config),
            prepared=prepared,
            cohort=cohort,
            state=read_late_file(lambda: _open_state(run, cohort), visibility_seconds),
            method=method,
            settings=LocalSettings(
                training=training_at(config.training, cohort.round),
                rule=local_rule(config.method.local, config.method.local_options),
                loss_on=config.data.loss_on,
                # a run that was prepared before layouts were recorded keeps its bits
                by_length=prepared.layout is not None,
                task=method.local_task(cohort.round),
            ),
            session=session,
            tiers={client.id: client.tier for client in cohort.clients},
            keys=RoundKeys.of(user_secret(), cohort),
        )

    @property
    def store(self) -> ClientStore:
        """The store of what clients keep."""
        return ClientStore(paths=self.paths.run, run=self.run)

    def sign(self, clients: Sequence[str], digest: str) -> str:
        """Return the signatures of clients on an update file of theirs with this digest."""
        return self.keys.signatures(self.run.run_id, clients, digest)

    def training_of(self, client: str) -> TrainingSection:
        """Return how the clients of a client's tier train.

        Raises:
            UserError: the client is not in this round's cohort.
        """
        if client not in self.tiers:
            raise UserError(f"{self.paths.cohort}: client {client} is not in this round's cohort")
        return training_at(self.config.training_of(self.tiers[client]), self.cohort.round)

    def trainer_of(self, client: str) -> Trainer:
        """Return the trainer of a client's tier; its first use loads the base model."""
        settings = replace(self.settings, training=self.training_of(client))
        change = base_change_of(self.method, self.state, self.cohort.base_change)
        return self.session.trainer(self.config, self.prepared, settings, change)

    def received(self, client: str) -> Adapter:
        """Return the adapter from which a client starts; a small one is kept for its tier."""
        tier = self.tiers[client]
        if tier in self._adapters and client not in self._own_ranks:
            adapter = self._adapters[tier]
            self._received[client] = received_record(adapter, self.settings.task.trained)
            return adapter
        to = Recipient(client=client, round=self.cohort.round)
        kept = self.store.read(client, to.round) if self.method.keeps_at_clients else Kept()
        self._kept_notes[client] = kept.notes
        adapter = received_adapter(self.method, self.state, self._ranks_of(client), to, kept)
        self._received[client] = received_record(adapter, self.settings.task.trained)
        if adapter_bytes(adapter) <= self.session.kept_bytes and not self._is_personal(client):
            self._adapters[tier] = adapter
        else:
            self.state.release()
        return adapter

    @property
    def _own_ranks(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks of clients that have others than their tier."""
        return {client.id: client.ranks for client in self.cohort.clients if client.ranks}

    def _ranks_of(self, client: str) -> Mapping[str, int]:
        return self._own_ranks.get(client) or self.cohort.ranks[self.tiers[client]]

    def _is_personal(self, client: str) -> bool:
        """Return whether a client receives what no other one of its tier does."""
        return self.method.per_client or client in self._own_ranks

    def group_of(self, client: str) -> tuple[str, ...]:
        """Return the group of clients with which a client of the cohort trains, itself included."""
        if not self._groups:
            engine = engine_of(self.config.training)
            for group in engine.groups(self.cohort.clients, self.cohort.ranks):
                self._groups.update(dict.fromkeys(group.clients, group.clients))
        return self._groups.get(client, (client,))

    def train(
        self,
        clients: Sequence[str],
        *,
        attempt: int,
        bundle: int,
        identity: TaskIdentity,
        processes: Processes | None = None,
        before_step: Callable[[int, Save], None] = lambda _step, _save: None,
        resume: bool = True,
    ) -> list[Trained]:
        """Train a client, or a whole group together, and resume from checkpoints if there are any.

        The losses and factors depend on the round and the group alone, wherever and however often
        the training is interrupted. If memory runs out and `training.smaller_micro_batch` allows
        it, the clients are trained again from their start with half the micro-batch size. That
        changes their rounding and is recorded; the next clients begin with the configured size.

        Args:
            clients: a group of the round's cohort, as `group_of` returns it.
            attempt: the number of the attempt.
            bundle: the number of their bundle in the attempt.
            identity: the task that trains.
            processes: the processes of the task, which all train; None: this one alone.
            before_step: called before each optimizer step with its number, from 0, and `save`.
                `save` writes the clients' state before that step to their checkpoints, if a step
                was taken since the training began or was resumed. An error that `before_step`
                raises ends the training.
            resume: False ignores all checkpoints and trains from the start.

        Raises:
            DataError: a client has no training rows.
            OutOfMemory: there is not enough memory.
            UserError: the trainer needs another number of processes.
        """
        members = [self._member_of(client) for client in clients]
        self._require_processes(identity, clients[0])
        sizes = self._sizes_to_try(members)
        trainings = self._resume_or_start(members, sizes, resume=resume)
        (processes or OneProcess()).send_order(self._order_for(trainings, attempt))
        done, results = self._train_in_memory(trainings, members, sizes, before_step)
        return [
            self._trained(training, result, partial(self._update_record, attempt, bundle, identity))
            for training, result in zip(done, results, strict=True)
        ]

    def take_part(
        self,
        order: Order,
        *,
        identity: TaskIdentity,
        before_step: Callable[[int, Save], None],
    ) -> None:
        """Train a group together with the first process of a task, which keeps the results.

        Raises:
            OutOfMemory: there is not enough memory.
            RunDirectoryError: this process reads other checkpoints than the first one.
            UserError: the trainer needs another number of processes.
        """
        members = [self._member_of(client) for client in order.clients]
        self._require_processes(identity, order.clients[0])
        size, sizes = order.micro_batch_size, self._sizes_to_try(members)
        trainings = [self._new_training(client, order.clients, size) for client in order.clients]
        if any(order.steps):
            visibility_seconds = traits_of(self.config).visibility_seconds
            trainings = read_late_file(
                lambda: self._resume_as_ordered(order, trainings, members), visibility_seconds
            )
        self._train_in_memory(trainings, members, sizes, before_step, is_first=False)

    def discard_checkpoint(self, client: str) -> None:
        """Remove the checkpoint of a client that is published."""
        self.paths.checkpoint(client).unlink(missing_ok=True)

    def _member_of(self, client: str) -> Member:
        if client not in self.tiers:
            raise UserError(f"{self.paths.cohort}: client {client} is not in this round's cohort")
        received = partial(self.received, client)
        rows = self.session.data(self.prepared).rows(client, "train")
        if not rows:
            raise DataError(
                f"{self.prepared.data_path}: client {client} has no training rows; "
                "prepare the data again: fedllm prepare"
            )
        draws = Draws(seed=self.config.seed, round=self.cohort.round, client=client)
        return Member(received=received, rows=rows, draws=draws)

    def _require_processes(self, identity: TaskIdentity, client: str) -> None:
        needed = self.trainer_of(client).num_processes
        if identity.num_processes != needed:
            raise UserError(
                f"{identity.task}: a task of {identity.num_processes} processes; the trainer of "
                f"tier {self.tiers[client]} needs {needed}; start the task with as many "
                "(FEDLLM_PROCESSES)"
            )

    def _sizes_to_try(self, members: Sequence[Member]) -> list[int]:
        """Return the micro-batch sizes to try, the next one each time that memory runs out."""
        max_rows = max(len(member.rows) for member in members)
        sizes = list(micro_batch_sizes(self.config.training, max_rows))
        # processes that wait for weights of one that ran out cannot begin again with it
        engine = engine_of(self.training_of(members[0].draws.client))
        return sizes[:1] if engine.divides_base else sizes

    def _order_for(self, trainings: Sequence[Resumable], attempt: int) -> Order:
        return Order(
            attempt=str(self.paths.attempt(attempt).root),
            number=attempt,
            clients=tuple(training.identity.client for training in trainings),
            steps=tuple(training.begun_at for training in trainings),
            micro_batch_size=trainings[0].micro_batch_size,
        )

    def _resume_as_ordered(
        self, order: Order, trainings: Sequence[Resumable], members: Sequence[Member]
    ) -> list[Resumable]:
        """Return the trainings resumed at the steps of an order, or refuse other checkpoints."""
        trained = self.settings.task.trained
        try:
            resumed = [
                training.resumed([order.micro_batch_size], member.received, trained)
                for training, member in zip(trainings, members, strict=True)
            ]
        except UnusableCheckpointError as error:
            raise RunDirectoryError(str(error)) from error
        steps = tuple(training.begun_at for training in resumed)
        if steps != order.steps:
            raise RunDirectoryError(
                f"{resumed[0].path}: this process reads {steps} steps, the first process of this "
                f"task reads {order.steps}"
            )
        return resumed

    def _train_in_memory(
        self,
        trainings: Sequence[Resumable],
        members: Sequence[Member],
        sizes: Sequence[int],
        before_step: Callable[[int, Save], None],
        *,
        is_first: bool = True,
    ) -> tuple[Sequence[Resumable], list[TrainResult]]:
        """Train with the first micro-batch size for which there is enough memory."""
        while True:
            try:
                return trainings, self._train(trainings, members, before_step, is_first=is_first)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
            # the tensors can be freed only here, where the error's traceback is gone
            self.trainer_of(members[0].draws.client).let_go()
            trainings = self._with_smaller_micro_batches(trainings, sizes)

    def _resume_or_start(
        self, members: Sequence[Member], sizes: Sequence[int], *, resume: bool
    ) -> list[Resumable]:
        """Return the clients' trainings, resumed if the checkpoints of all of them fit together."""
        clients = [member.draws.client for member in members]
        trainings = [self._new_training(client, clients, sizes[0]) for client in clients]
        if not resume:
            return trainings
        try:
            resumed = [
                training.resumed(sizes, member.received, self.settings.task.trained)
                for training, member in zip(trainings, members, strict=True)
            ]
            ends = [
                len(plan_steps(len(member.rows), self.config.training, member.draws))
                for member in members
            ]
            step = common_step(resumed, ends)
        except UnusableCheckpointError as error:
            say(f"{_label(clients)}: trains from its start: {error}")
            return trainings
        if step:
            say(f"{_label(clients)}: goes on after {step} steps, from {resumed[0].path}")
        return resumed

    def _new_training(self, client: str, group: Sequence[str], size: int) -> Resumable:
        return Resumable(
            path=self.paths.checkpoint(client),
            identity=CheckpointIdentity(
                run_id=self.run.run_id,
                result_fingerprint=self.result_fingerprint,
                round=self.cohort.round,
                client=client,
                base_fingerprint=self.cohort.base_fingerprint,
                data_fingerprint=self.cohort.data_fingerprint,
                state_sha256=self.cohort.state_sha256,
                group=tuple(group) if len(group) > 1 else (),
            ),
            micro_batch_size=size,
            environment=dict(self.trainer_of(client).environment),
            sign=partial(self.sign, [client]),
        )

    def _train(
        self,
        trainings: Sequence[Resumable],
        members: Sequence[Member],
        before_step: Callable[[int, Save], None],
        *,
        is_first: bool,
    ) -> list[TrainResult]:
        def hook(step: int, snapshots: Snapshots) -> None:
            def save() -> None:
                # every process may have to take part in a snapshot; only the first one writes
                for training, progress in zip(trainings, snapshots(), strict=True):
                    if is_first:
                        training.save(progress)

            before_step(step, save)

        begun = [
            replace(member, progress=training.progress)
            for member, training in zip(members, trainings, strict=True)
        ]
        size = trainings[0].micro_batch_size
        trainer = self.trainer_of(members[0].draws.client)
        return trainer.train(begun, micro_batch_size=size, before_step=hook)

    def _with_smaller_micro_batches(
        self, trainings: Sequence[Resumable], sizes: Sequence[int]
    ) -> list[Resumable]:
        """Return the trainings at their start, with the next smaller micro-batch size.

        Raises:
            OutOfMemory: there is no smaller size.
        """
        clients = [training.identity.client for training in trainings]
        size = trainings[0].micro_batch_size
        problem = f"{_label(clients)}: memory ran out with micro-batches of {size} rows"
        smaller = next((other for other in sizes if other < size), None)
        if smaller is not None:
            say(f"{problem}; it is trained again from its start with {smaller}")
            return [training.restarted(smaller) for training in trainings]
        remedies = ", ".join(self.trainer_of(clients[0]).remedies(len(clients), size))
        raise OutOfMemory(
            f"{problem}; give the task more memory and resume, or begin a new run with {remedies}"
        )

    def _trained(
        self,
        training: Resumable,
        result: TrainResult,
        record_of: Callable[[Resumable, TrainResult], UpdateRecord],
    ) -> Trained:
        """Return what a client sends and keeps of its training."""
        method, client = self.method, training.identity.client
        notes = (
            method.client_notes(trained=result.adapter, received=partial(self.received, client))
            if result.adapter
            else {}
        )
        sent = {
            module: method.sent(module=module, trained=own, notes=notes)
            for module, own in result.adapter.items()
        }
        norms = dict(result.norms)
        for module, own in sent.items():
            if own is not result.adapter[module]:
                norms[module] = (float(own.a_RI.norm()), float(own.b_OR.norm()))
        record = record_of(training, replace(result, norms=norms))
        record = record.model_copy(update={"notes": dict(notes)})
        return Trained(record=record, adapter=sent, kept=self._kept(client, result.adapter))

    def _kept(self, client: str, trained: Adapter) -> Kept | None:
        """Return what a client keeps of its training; None: its method keeps nothing."""
        method = self.method
        if not (method.keeps_at_clients and trained):
            return None
        return Kept(
            tensors={m: method.kept(module=m, trained=own) for m, own in trained.items()},
            notes=method.kept_notes(before=self._kept_notes[client], trained=trained),
        )

    def _update_record(
        self,
        attempt: int,
        bundle: int,
        identity: TaskIdentity,
        training: Resumable,
        result: TrainResult,
    ) -> UpdateRecord:
        size = training.micro_batch_size
        return UpdateRecord(
            run_id=self.run.run_id,
            round=self.cohort.round,
            client=training.identity.client,
            attempt=attempt,
            bundle=bundle,
            status="failed" if result.reason else "ok",
            reason=result.reason,
            base_fingerprint=self.cohort.base_fingerprint,
            base_change=self.cohort.base_change,
            **dict(result.stats),
            norms=result.norms,
            scales=result.scales,
            group=list(training.identity.group),
            received=self._received.get(training.identity.client),
            micro_batch_size=None if size == micro_batch_size(self.config.training) else size,
            resumed_at=training.resumed_at,
            earlier_environments=training.earlier_environments,
            environment=training.environment,
            node=identity.node,
            task=identity.task,
            log=identity.log,
        )


def _label(clients: Sequence[str]) -> str:
    return f"client {clients[0]}" if len(clients) == 1 else f"group of {', '.join(clients)}"


def _open_state(run: RunPaths, cohort: CohortRecord) -> TensorFile:
    state = read_state(run.round(cohort.round - 1))
    if state.sha256 != cohort.state_sha256:
        raise RunDirectoryError(
            f"{state.path}: not the state that round {cohort.round} was drawn from; restore it"
        )
    return state
