"""A worker without a model: real claims, progress records and update files, drawn durations."""

import functools
import math
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.simulated.cluster import Running, Task
from benchmarks.simulated.federation import MODULES, Recorded
from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.config.scales import client_scales
from fedllm.storage.paths import AttemptPaths, RoundPaths
from fedllm.storage.records import (
    BundleRecord,
    ClaimRecord,
    CohortClient,
    CohortRecord,
    PreparedRecord,
    RunRecord,
    SubmissionRecord,
    TaskRecord,
    UpdateRecord,
)
from fedllm.storage.tensors import publish_update
from fedllm.storage.trust.secret import user_secret
from fedllm.storage.trust.signatures import RoundKeys
from fedllm.worker.heartbeat import State

_PROGRESS_SECONDS = 60.0
# the warning before the end of a task's time, as sbatch is asked for it
_WARNING_SECONDS = 90.0
_BATCH = 4
_ENVIRONMENT = {"torch": "2.13.0", "device": "cpu", "cpu": "simulated", "threads": "1"}
# two sums of the same seconds may differ by so much
_ROUNDING = 1e-6

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(kw_only=True)
class Trained:
    """What a round's workers did, in seconds of virtual time."""

    seconds: list[float] = field(default_factory=list)
    last_published: float = 0.0
    starts: int = 0
    idle_starts: int = 0
    requeues: int = 0
    bundles: int = 0


@dataclass(kw_only=True)
class Attempt:
    """An attempt as its workers see it; `claimed` spares them a look at what others took."""

    paths: AttemptPaths
    round: RoundPaths
    cohort: CohortRecord
    run_id: str
    config: Config
    bundles: list[BundleRecord]
    one_bundle: bool
    clients: dict[str, CohortClient]
    rows: dict[str, int]
    claimed: set[int] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path) -> "Attempt":
        """Read what an attempt's round trains from."""
        paths = AttemptPaths(root=folder, number=int(folder.name))
        round_, run = paths.round, paths.run
        submission = SubmissionRecord.read(paths.submission)
        cohort = CohortRecord.read(round_.cohort)
        rows = {
            client.id: client.train_rows for client in PreparedRecord.read(run.prepared).clients
        }
        return cls(
            paths=paths,
            round=round_,
            cohort=cohort,
            run_id=RunRecord.read(run.run).run_id,
            config=read_config(run.config),
            bundles=sorted(submission.bundles, key=lambda b: (-b.cost, b.number)),
            one_bundle=submission.one_bundle,
            clients={client.id: client for client in cohort.clients},
            rows=rows,
        )


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What a worker was at when its time was over: a saved client and the rest of its bundle."""

    bundle: BundleRecord
    clients: list[str]
    seconds_left: float
    parts: int


@dataclass(kw_only=True)
class Worker:
    """One start of an array task, as `fedllm.worker.worker` does it."""

    task: Task
    attempt: Attempt
    worker_class: str
    trained: Trained
    recorded: Recorded
    now: Callable[[], float]
    _held: list[UpdateRecord] = field(default_factory=list)
    _parts: int = 0
    _done: int = 0
    _busy: float = 0.0
    _startup: float = 0.0
    _published_at: float = 0.0
    _noted_at: float = 0.0

    def run(self) -> Running:
        """Claim bundle after bundle until none is left or the time is nearly over."""
        self.trained.starts += 1
        self._startup = self.recorded.startup(self.task.id, self.task.starts)
        yield self._startup
        self._published_at = self.now()
        self._note("training", None)
        for bundle, clients, seconds in self._claimable():
            unfinished = yield from self._train(bundle, clients, seconds)
            if unfinished:
                self.task.memory = unfinished
                self.trained.requeues += 1
                self._note("ended", None)
                return True
            if self.attempt.one_bundle:
                break
        self.trained.idle_starts += not self._done
        self._note("ended", None)
        return False

    @property
    def _stops_at(self) -> float:
        return self.task.ends_at - _WARNING_SECONDS

    def _claimable(self) -> Iterator[tuple[BundleRecord, list[str], float | None]]:
        """Yield what this task began before it was requeued, then what it can claim and end."""
        unfinished, self.task.memory = self.task.memory, None
        if isinstance(unfinished, Unfinished):
            self._parts = unfinished.parts
            yield unfinished.bundle, unfinished.clients, unfinished.seconds_left
        for bundle in self.attempt.bundles:
            if bundle.number in self.attempt.claimed or bundle.worker_class != self.worker_class:
                continue
            if self._done and self.now() + bundle.cost > self._stops_at:
                continue
            claim = ClaimRecord(
                bundle=bundle.number,
                task=self.task.id,
                node=self.task.node,
                log=self.task.array.log,
            )
            if claim.publish_once(self.attempt.paths.claim(bundle.number)):
                self.attempt.claimed.add(bundle.number)
                self.trained.bundles += 1
                self._parts = 0
                yield bundle, bundle.clients, None

    def _train(
        self, bundle: BundleRecord, clients: list[str], seconds_left: float | None
    ) -> Generator[float, None, Unfinished | None]:
        """Train clients; return what is left of them where the time is over."""
        minutes = self.attempt.config.training.checkpoint_every_minutes
        for at, client in enumerate(clients):
            whole = self._seconds(client)
            left = yield from self._spend(client, seconds_left or whole)
            seconds_left = None
            if left:
                self._publish(bundle)
                return Unfinished(
                    bundle=bundle, clients=clients[at:], seconds_left=left, parts=self._parts
                )
            self.trained.seconds.append(whole)
            self._done += 1
            self._held.append(self._record(client, bundle, whole))
            if self.now() - self._published_at >= 60.0 * minutes:
                self._publish(bundle)
        self._publish(bundle)
        return None

    def _spend(self, client: str, seconds: float) -> Generator[float, None, float]:
        """Pass time with a client, noting progress; return the seconds that are left at the end."""
        while seconds > _ROUNDING:
            step = min(
                seconds,
                self._noted_at + _PROGRESS_SECONDS - self.now(),
                self._stops_at - self.now(),
            )
            if step > _ROUNDING:
                yield step
                seconds -= step
                self._busy += step
            if self.now() >= self._noted_at + _PROGRESS_SECONDS - _ROUNDING:
                self._note("training", client)
            if self.now() >= self._stops_at - _ROUNDING:
                return seconds if seconds > _ROUNDING else 0.0
        return 0.0

    def _seconds(self, client: str) -> float:
        drawn = self.attempt.clients[client]
        identity = (self.attempt.cohort.round, client)
        return self.recorded.training_seconds(drawn.tier, drawn.cost, *identity)

    def _note(self, state: State, client: str | None) -> None:
        self._noted_at = self.now()
        TaskRecord(
            task=self.task.id,
            node=self.task.node,
            clients_done=self._done,
            client=client,
            state=state,
            worker_class=self.worker_class,
            startup_seconds=self._startup,
            busy_seconds=self._busy,
            allocated_seconds=self.now() - self.task.started,
            starts=self.task.starts,
        ).publish(self.attempt.paths.task(self.task.id))

    def _record(self, client: str, bundle: BundleRecord, seconds: float) -> UpdateRecord:
        drawn = self.attempt.clients[client]
        rows = self.attempt.rows[client]
        steps = math.ceil(rows / _BATCH)
        ranks = self.attempt.cohort.ranks[drawn.tier]
        return UpdateRecord(
            run_id=self.attempt.run_id,
            round=self.attempt.cohort.round,
            client=client,
            attempt=self.attempt.paths.number,
            bundle=bundle.number,
            base_fingerprint=self.attempt.cohort.base_fingerprint,
            rows=rows,
            steps=steps,
            tokens=round(drawn.cost),
            loss_tokens=round(drawn.cost / 8),
            losses=[1.0 / (3.0 + step) for step in range(steps)],
            seconds=seconds,
            step_seconds=seconds,
            peak_memory_bytes=1 << 30,
            norms={
                name: (float(a.norm()), float(b.norm()))
                for name, (a, b) in _factors(tuple(ranks.items())).items()
            },
            scales=client_scales(self.attempt.config, ranks) or {},
            environment=_ENVIRONMENT,
            node=self.task.node,
            task=self.task.id,
            log=self.task.array.log,
        )

    def _publish(self, bundle: BundleRecord) -> None:
        if not self._held:
            return
        number = self.attempt.paths.number
        path = self.attempt.round.update(attempt=number, bundle=bundle.number, part=self._parts)
        tiers = {record.client: self.attempt.clients[record.client].tier for record in self._held}
        tensors = {
            client: _factors(tuple(self.attempt.cohort.ranks[tier].items()))
            for client, tier in tiers.items()
        }
        keys = RoundKeys.of(user_secret(), self.attempt.cohort)
        sign = functools.partial(keys.signatures, self.attempt.run_id, list(tiers))
        publish_update(path, self._held, tensors, sign=sign)
        _date(path.parent, self.now())
        _date(self.attempt.round.updates, self.now())
        self._parts += 1
        self._held = []
        self._published_at = self.trained.last_published = self.now()


@functools.cache
def _factors(ranks: tuple[tuple[str, int], ...]) -> Factors:
    return {
        name: (
            torch.ones(rank, MODULES[name].in_features),
            torch.ones(MODULES[name].out_features, rank),
        )
        for name, rank in ranks
    }


def _date(folder: Path, seconds: float) -> None:
    """Give a folder virtual time: readers tell by it whether anything came."""
    nanoseconds = round(1e9 * seconds)
    os.utime(folder, ns=(nanoseconds, nanoseconds))
