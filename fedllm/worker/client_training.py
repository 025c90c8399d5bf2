"""What the clients of a round share, and the training of one or a group of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedllm.config.loading import result_fingerprint
from fedllm.config.models import Config
from fedllm.errors import DataError, OutOfMemory, RunDirectoryError, UserError
from fedllm.lora.factors import Adapter, adapter_bytes
from fedllm.methods.catalog import local_rule, method_of
from fedllm.methods.protocol import Method
from fedllm.planning.grouping import engine_of
from fedllm.process.adapters import adapter_of
from fedllm.process.late_files import patiently
from fedllm.process.log import say
from fedllm.process.server_state import read_state
from fedllm.process.session import Session
from fedllm.scheduling.environment import TaskIdentity
from fedllm.scheduling.traits import traits_of
from fedllm.storage.checkpoint_header import CheckpointIdentity
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord, RunRecord, UpdateRecord
from fedllm.storage.tensors import TensorFile
from fedllm.training.loop import LocalSettings, TrainResult
from fedllm.training.out_of_memory import micro_batch_size, micro_batch_sizes, ran_out
from fedllm.training.step_plan import Draws, plan_steps
from fedllm.training.trainer import Member, Snapshots, Trainer
from fedllm.worker.checkpoints import Resumable, UnusableCheckpointError, common_step
from fedllm.worker.process_group import OneProcess, Order, Processes

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
    _groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, attempt: AttemptPaths, session: Session) -> "ClientRound":
        """Read what an attempt's round trains from.

        Raises:
            RunDirectoryError: a record or the server state is missing or damaged.
        """
        paths, run = attempt.round, attempt.run
        config = session.config(run.config)
        # files of another node may become visible late
        patience = traits_of(config).visibility_seconds
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
                # a run that was prepared before there were layouts keeps its bits
                by_length=prepared.layout is not None,
            ),
            session=session,
            tiers={client.id: client.tier for client in cohort.clients},
        )

    @property
    def trainer(self) -> Trainer:
        """What trains the clients; the base model is loaded on first use."""
        return self.session.trainer(self.config, self.prepared, self.settings)

    def received(self, client: str) -> Adapter:
        """Return what a client starts from: its tier's adapter, kept for the next one if small."""
        tier = self.tiers[client]
        if tier in self._adapters:
            return self._adapters[tier]
        adapter = adapter_of(self.method, self.state, self.cohort.ranks[tier])
        if adapter_bytes(adapter) <= self.session.kept_bytes:
            self._adapters[tier] = adapter
        else:
            self.state.release()
        return adapter

    def group_of(self, client: str) -> tuple[str, ...]:
        """Return the clients that a client of the cohort is trained together with, itself too."""
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
        """Train a client, or a whole group together, from checkpoints of the same training.

        The losses and factors depend on round and group alone, wherever and however often the
        training was interrupted. Where memory runs out and `training.smaller_micro_batch` allows
        it, the clients are trained again from their start with half the micro-batch, which changes
        their rounding and is recorded; the next ones begin with the configured one.

        Args:
            clients: of the round's cohort, as `group_of` has them.
            attempt: the attempt that they are trained in.
            bundle: their bundle there.
            identity: the task that trains.
            processes: those of the task, who train too; None: this one alone.
            before_step: called with the number of the optimizer step, from 0, and `save`, which
                writes the clients' state as it is before that step to their checkpoints; nothing
                is written where no step was taken since the training began or was resumed. What
                it raises ends the training.
            resume: False trains from the start, whatever checkpoints there are.

        Raises:
            DataError: a client has no training rows.
            OutOfMemory: there is not enough memory.
            UserError: the trainer needs another number of processes.
        """
        self._require_processes(identity)
        members = [self._member(client) for client in clients]
        sizes = self._sizes(members)
        trainings = self._begin(members, sizes, resume=resume)
        (processes or OneProcess()).tell(self._order(trainings, attempt))
        done, results = self._train_in_memory(trainings, members, sizes, before_step)
        return [
            Trained(
                record=self._record(training, result, attempt, bundle, identity),
                adapter=result.adapter,
            )
            for training, result in zip(done, results, strict=True)
        ]

    def take_part(
        self,
        order: Order,
        *,
        identity: TaskIdentity,
        before_step: Callable[[int, Save], None],
    ) -> None:
        """Train a group with the first process of a task, which keeps what it comes to.

        Raises:
            OutOfMemory: there is not enough memory.
            RunDirectoryError: this process reads other checkpoints than the first one.
            UserError: the trainer needs another number of processes.
        """
        self._require_processes(identity)
        sizes = [order.micro_batch_size]
        members = [self._member(client) for client in order.clients]
        trainings = [
            self._from_its_start(client, order.clients, sizes[0]) for client in order.clients
        ]
        if any(order.steps):
            patience = traits_of(self.config).visibility_seconds
            trainings = patiently(lambda: self._as_ordered(order, trainings, members), patience)
        self._train_in_memory(trainings, members, sizes, before_step, is_first=False)

    def discard_checkpoint(self, client: str) -> None:
        """Remove what was saved of a client that is published."""
        self.paths.checkpoint(client).unlink(missing_ok=True)

    def _member(self, client: str) -> Member:
        if client not in self.tiers:
            raise UserError(f"{self.paths.cohort}: client {client} is not in this round's cohort")
        received = partial(self.received, client)
        rows = self.session.data(self.prepared.data_path).rows(client, "train")
        if not rows:
            raise DataError(f"{self.prepared.data_path}: client {client} has no training rows")
        draws = Draws(seed=self.config.seed, round=self.cohort.round, client=client)
        return Member(received=received, rows=rows, draws=draws)

    def _require_processes(self, identity: TaskIdentity) -> None:
        needed = self.trainer.num_processes
        if identity.num_processes != needed:
            raise UserError(
                f"{identity.task}: a task of {identity.num_processes} processes; what trains this "
                f"run's clients needs {needed}"
            )

    def _sizes(self, members: Sequence[Member]) -> list[int]:
        """Return the micro-batches to train with, one after the other while memory runs out."""
        most = max(len(member.rows) for member in members)
        sizes = list(micro_batch_sizes(self.config.training, most))
        # the others would not know that one of them lacks memory
        return sizes if self.trainer.num_processes == 1 else sizes[:1]

    def _order(self, trainings: Sequence[Resumable], attempt: int) -> Order:
        return Order(
            attempt=str(self.paths.attempt(attempt).root),
            number=attempt,
            clients=tuple(training.identity.client for training in trainings),
            steps=tuple(training.begun_at for training in trainings),
            micro_batch_size=trainings[0].micro_batch_size,
        )

    def _as_ordered(
        self, order: Order, trainings: Sequence[Resumable], members: Sequence[Member]
    ) -> list[Resumable]:
        try:
            resumed = [
                training.resumed([order.micro_batch_size], member.received)
                for training, member in zip(trainings, members, strict=True)
            ]
        except UnusableCheckpointError as error:
            raise RunDirectoryError(str(error)) from error
        found = tuple(training.begun_at for training in resumed)
        if found != order.steps:
            raise RunDirectoryError(
                f"{resumed[0].path}: after {found} steps here, after {order.steps} where the first "
                "process of this task reads it"
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
        """Train with the first micro-batches for which there is memory."""
        while True:
            try:
                return trainings, self._train(trainings, members, before_step, is_first=is_first)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
            # only now, without the error's traceback, can the tensors of that attempt go
            self.trainer.let_go()
            trainings = self._smaller(trainings, sizes)

    def _begin(
        self, members: Sequence[Member], sizes: Sequence[int], *, resume: bool
    ) -> list[Resumable]:
        """Return the clients' trainings, with the checkpoints that all of them go on from."""
        clients = [member.draws.client for member in members]
        trainings = [self._from_its_start(client, clients, sizes[0]) for client in clients]
        if not resume:
            return trainings
        try:
            resumed = [
                training.resumed(sizes, member.received)
                for training, member in zip(trainings, members, strict=True)
            ]
            ends = [
                len(plan_steps(len(member.rows), self.config.training, member.draws))
                for member in members
            ]
            step = common_step(resumed, ends)
        except UnusableCheckpointError as error:
            say(f"{_named(clients)}: trains from its start: {error}")
            return trainings
        if step:
            say(f"{_named(clients)}: goes on after {step} steps, from {resumed[0].path}")
        return resumed

    def _from_its_start(self, client: str, group: Sequence[str], size: int) -> Resumable:
        return Resumable(
            path=self.paths.checkpoint(client),
            identity=CheckpointIdentity(
                run_id=self.run_id,
                result_fingerprint=self.result_fingerprint,
                round=self.cohort.round,
                client=client,
                base_fingerprint=self.cohort.base_fingerprint,
                data_fingerprint=self.cohort.data_fingerprint,
                state_sha256=self.cohort.state_sha256,
                group=tuple(group) if len(group) > 1 else (),
            ),
            micro_batch_size=size,
            environment=dict(self.trainer.environment),
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
                # all processes may be needed for it, one writes
                found = snapshots()
                for training, progress in zip(trainings, found, strict=True):
                    if is_first:
                        training.save(progress)

            before_step(step, save)

        begun = [
            replace(member, progress=training.progress)
            for member, training in zip(members, trainings, strict=True)
        ]
        size = trainings[0].micro_batch_size
        return self.trainer.train(begun, micro_batch_size=size, before_step=hook)

    def _smaller(self, trainings: Sequence[Resumable], sizes: Sequence[int]) -> list[Resumable]:
        """Return the trainings to try after those that found too little memory.

        Raises:
            OutOfMemory: there are none.
        """
        clients = [training.identity.client for training in trainings]
        size = trainings[0].micro_batch_size
        told = f"{_named(clients)}: memory ran out with micro-batches of {size} rows"
        smaller = next((other for other in sizes if other < size), None)
        if smaller is not None:
            say(f"{told}; it is trained again from its start with {smaller}")
            return [training.anew(smaller) for training in trainings]
        remedies = ", ".join(self.trainer.remedies(len(clients), size))
        raise OutOfMemory(
            f"{told}; give the task more memory and resume, or begin a new run with {remedies}"
        )

    def _record(
        self,
        training: Resumable,
        result: TrainResult,
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
            **dict(result.stats),
            norms=result.norms,
            scales=result.scales,
            group=list(training.identity.group),
            micro_batch_size=None if size == micro_batch_size(self.config.training) else size,
            resumed_at=training.resumed_at,
            earlier_environments=training.earlier_environments,
            environment=training.environment,
            node=identity.node,
            task=identity.task,
            log=identity.log,
        )


def _named(clients: Sequence[str]) -> str:
    return f"client {clients[0]}" if len(clients) == 1 else f"group of {', '.join(clients)}"


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
