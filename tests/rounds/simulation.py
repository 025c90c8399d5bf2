"""A federation without a language model: the compute side replaced at the scheduler's seam.

Clients "train" by drawing their factors from their identity, everything else is real: records,
claims, update files, aggregation, recovery.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from fedllm.config.loading import read_config, validate
from fedllm.config.models import Config
from fedllm.config.scales import scale_of
from fedllm.planning.evaluation_targets import choose_targets
from fedllm.planning.seeding import seed_of
from fedllm.process.session import Session
from fedllm.programs.entry_points import run as run_program
from fedllm.rounds.coordinate import coordinate
from fedllm.rounds.opening import open_run
from fedllm.rounds.run import Run
from fedllm.scheduling.inline import InlineScheduler
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import (
    ClaimRecord,
    ClientRecord,
    ClientScores,
    CohortRecord,
    EvaluationRecord,
    ModuleRecord,
    PreparedRecord,
    RunRecord,
    Scores,
    SubmissionRecord,
    UpdateRecord,
)
from fedllm.storage.tensors import publish_update
from fedllm.storage.trust.secret import user_secret
from fedllm.storage.trust.signatures import RoundKeys
from fedllm.storage.updates import Origin, UpdateScanner

MODULES = {
    "layer.q_proj": ModuleRecord(out_features=12, in_features=10, kind="attention"),
    "layer.up_proj": ModuleRecord(out_features=20, in_features=10, kind="mlp"),
}
RANKS = {"small": 2, "large": 4}


def config_of(**changes: object) -> Config:
    """Return a small configuration; `changes` are keys with `__` for dots."""
    raw: dict[str, object] = {
        "seed": 3,
        "rounds": 2,
        "clients": {
            "tiers": {name: {"ranks": rank} for name, rank in RANKS.items()},
            "cohort": {"count": 4},
            "dev": 1,
        },
        "scheduler": {"kind": "inline", "poll_seconds": 0.01, "clients_per_bundle": 2},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})  # type: ignore[assignment]
        node[last] = value
    return validate(raw)


class Simulation:
    """Callable behind an inline scheduler; `diverging` clients send values that are not finite.

    After `limit` clients none is trained any more, and of bundles the `only` ones alone. `loud`
    clients' changes are that many times as large, in all modules or in some; `poisoned` ones' hold
    what is not finite; `spoil` changes what clients record.
    """

    def __init__(self, diverging: Sequence[str] = (), log: Callable[[str], None] = print) -> None:
        self.diverging = set(diverging)
        self.trained: list[tuple[int, str]] = []
        self.log = log
        self.data_fingerprint = "data"
        self.misshapen = 0
        self.limit: int | None = None
        self.loud: dict[str, float | Mapping[str, float]] = {}
        self.poisoned: set[str] = set()
        self.spoil: Callable[[UpdateRecord], UpdateRecord] = lambda record: record
        self.only: set[str] | None = None
        self.before: Callable[[str, Path], int | None] = lambda _program, _target: None

    def __call__(self, program: str, argv: Sequence[str], task: str, log: Path) -> int:
        """Run a program as the compute side would."""
        del log
        target = Path(argv[0])
        early = self.before(program, target)
        if early is not None:
            return early
        if program == "prepare":
            self.prepare(RunPaths(root=target))
        elif program == "client":
            attempt = AttemptPaths(root=target, number=int(target.name))
            self.work(attempt, argv[argv.index("--class") + 1], task)
        elif program == "aggregate":
            # write the error where a coordinator looks for it
            return run_program("aggregate", argv, session=Session())
        else:
            self.evaluate(RoundPaths(root=target))
        return 0

    def prepare(self, paths: RunPaths) -> None:
        """Publish ten clients, one of them without training rows."""
        clients = [
            ClientRecord(
                id=f"client/{n} é",
                category=f"c{n % 2}",
                train_rows=0 if n == 9 else 10 + n,
                test_rows=3,
                train_tokens=100 + n,
            )
            for n in range(10)
        ]
        PreparedRecord(
            model_fingerprint="base",
            model_path=str(paths.root),
            data_fingerprint=self.data_fingerprint,
            data_path=str(paths.root),
            model_parameters=1,
            modules=MODULES,
            clients=clients,
        ).publish(paths.prepared)

    def work(self, attempt: AttemptPaths, worker_class: str, task: str) -> None:
        """Claim bundles of a class and publish their clients, as a worker does."""
        paths = attempt.round
        run = RunRecord.read(paths.run.run)
        cohort = CohortRecord.read(paths.cohort)
        tiers = {client.id: client.tier for client in cohort.clients}
        for bundle in SubmissionRecord.read(attempt.submission).bundles:
            if bundle.worker_class != worker_class or len(self.trained) == self.limit:
                continue
            if self.only is not None and not self.only.issuperset(bundle.clients):
                continue
            claim = ClaimRecord(bundle=bundle.number, task=task, node="here")
            if not claim.publish_once(attempt.claim(bundle.number)):
                continue
            scanner = UpdateScanner(round=paths, origin=Origin.of(run, cohort))
            todo = [c for c in bundle.clients if c not in scanner.scan().published]
            results = [self.train(run, cohort, c, tiers[c], attempt, bundle.number) for c in todo]
            if results:
                clients = [record.client for record, _ in results]
                keys = RoundKeys.of(user_secret(), cohort)
                publish_update(
                    paths.update(attempt=attempt.number, bundle=bundle.number, part=0),
                    [record for record, _ in results],
                    {record.client: tensors for record, tensors in results if tensors},
                    sign=partial(keys.signatures, run.run_id, clients),
                )

    def train(
        self,
        run: RunRecord,
        cohort: CohortRecord,
        client: str,
        tier: str,
        attempt: AttemptPaths,
        bundle: int,
    ) -> tuple[UpdateRecord, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Return an update that depends only on round and client."""
        self.trained.append((cohort.round, client))
        failed = client in self.diverging
        record = UpdateRecord(
            run_id=run.run_id,
            round=cohort.round,
            client=client,
            attempt=attempt.number,
            bundle=bundle,
            status="failed" if failed else "ok",
            reason="non-finite layer.q_proj A" if failed else "",
            base_fingerprint="base",
            rows=seed_of(client) % 10 + 1,
            steps=1,
            tokens=1,
            loss_tokens=1,
            losses=[1.0],
            seconds=0.0,
            step_seconds=0.0,
            peak_memory_bytes=0,
            scales=self.scales(cohort, tier),
        )
        if failed:
            return record, {}
        draw = torch.Generator().manual_seed(seed_of(cohort.round, client))
        tensors = {}
        for name, module in MODULES.items():
            rank = cohort.ranks[tier][name] + (self.misshapen > 0)
            a_RI = torch.randn(rank, module.in_features, generator=draw)
            b_OR = torch.randn(module.out_features, rank, generator=draw)
            loud = self.loud.get(client, 1.0)
            factor = loud.get(name, 1.0) if isinstance(loud, Mapping) else loud
            tensors[name] = (a_RI, factor * b_OR)
        self.misshapen = max(0, self.misshapen - 1)
        norms = {name: (float(a.norm()), float(b.norm())) for name, (a, b) in tensors.items()}
        if client in self.poisoned:
            # its record stays plausible, so a scan accepts it
            tensors["layer.up_proj"][0][0, 1] = torch.nan
        return self.spoil(record.model_copy(update={"norms": norms})), tensors

    @staticmethod
    def scales(cohort: CohortRecord, tier: str) -> dict[str, float]:
        """Return the scales of a tier's adapters, as the default `lora` makes them."""
        section = config_of().lora
        return {
            module: scale_of(alpha=section.alpha, scaling=section.scaling, rank=rank)
            for module, rank in cohort.ranks[tier].items()
        }

    def evaluate(self, paths: RoundPaths) -> None:
        """Publish scores without meaning."""
        run = paths.run
        scores = Scores(rows=1, loss=1.0 / (1 + paths.number), rouge_l=0.5, exact_match=0.5)
        targets = choose_targets(
            read_config(run.config), PreparedRecord.read(run.prepared), paths.number
        )
        EvaluationRecord(
            round=paths.number,
            state_sha256="",
            complete=True,
            seconds=0.0,
            clients=[
                ClientScores(
                    client=target.client,
                    group=target.group,
                    tier=target.tier,
                    as_deployed=scores,
                    at_largest_rank=scores,
                )
                for target in targets
            ],
        ).publish(paths.evaluation_record)


def opened(root: Path, simulation: Simulation, config: Config | None = None) -> Run:
    """Open a simulated run for coordination."""
    return open_run(
        root,
        config or config_of(),
        make_scheduler=lambda _paths, _config: InlineScheduler(execute=simulation),
        say=simulation.log,
    )


def complete(root: Path, simulation: Simulation, config: Config | None = None) -> None:
    """Run a simulated run to its end."""
    coordinate(opened(root, simulation, config))


def states(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every round's server state."""
    found = sorted(root.glob("rounds/*/aggregate/global.safetensors"))
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
