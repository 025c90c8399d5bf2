"""What the clients of a round share, and the training of one of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fedllm.config.models import Config
from fedllm.errors import DataError, RunDirectoryError, UserError
from fedllm.lora.factors import Adapter
from fedllm.methods.protocol import Method
from fedllm.methods.table import local_rule
from fedllm.model.slots import AdapterSlots
from fedllm.steps.adapters import adapter_of
from fedllm.steps.aggregate import method_of
from fedllm.steps.identity import TaskIdentity
from fedllm.steps.session import Session
from fedllm.steps.state import read_state
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord, RunRecord, UpdateRecord
from fedllm.storage.tensors import TensorFile, sha256_of
from fedllm.training.environment import environment
from fedllm.training.loop import LocalSettings, TrainResult, train_client
from fedllm.training.plan import Draws

T = TypeVar("T")
Save = Callable[[], None]
_RETRY_SECONDS = 1.0


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
        patience = config.storage.visibility_seconds if config.scheduler.kind == "slurm" else 0.0
        cohort = _patiently(lambda: CohortRecord.read(paths.cohort), patience)
        return cls(
            paths=paths,
            run_id=_patiently(lambda: RunRecord.read(run.run), patience).run_id,
            config=config,
            prepared=_patiently(lambda: session.prepared(run.prepared), patience),
            cohort=cohort,
            state=_patiently(lambda: _state(run, cohort), patience),
            method=method_of(config),
            settings=LocalSettings(
                training=config.training,
                rule=local_rule(config.method.local),
                loss_on=config.data.loss_on,
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
    ) -> Trained:
        """Train one client; the losses and factors depend on round and client alone.

        `before_step` gets the number of the optimizer step, from 0, and `save`, which writes the
        client's state as it is before that step; what it raises ends the training.

        Raises:
            DataError: the client has no training rows.
        """
        received = self.received(client)
        rows = self.session.data(self.prepared.data_path).rows(client, "train")
        if not rows:
            raise DataError(f"{self.prepared.data_path}: client {client} has no training rows")
        result = train_client(
            self.slots,
            received,
            rows,
            settings=self.settings,
            draws=Draws(seed=self.config.seed, round=self.cohort.round, client=client),
            before_step=lambda step: before_step(step, lambda: None),
        )
        record = self._record(client, result, attempt=attempt, bundle=bundle, identity=identity)
        return Trained(record=record, adapter=result.adapter)

    def _record(
        self,
        client: str,
        result: TrainResult,
        *,
        attempt: int,
        bundle: int,
        identity: TaskIdentity,
    ) -> UpdateRecord:
        return UpdateRecord(
            run_id=self.run_id,
            round=self.cohort.round,
            client=client,
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
            environment=environment(self.config.training, str(self.slots.device)),
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


def _patiently(read: Callable[[], T], seconds: float) -> T:
    """Read what another node wrote; only after `seconds` is it missing or damaged."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return read()
        except FileNotFoundError as error:
            problem = RunDirectoryError(f"{error.filename}: missing; resume the run")
            problem.__cause__ = error
        except RunDirectoryError as error:
            problem = error
        if time.monotonic() >= deadline:
            raise problem
        time.sleep(_RETRY_SECONDS)
