"""What tasks do on the simulated cluster: stand-ins for the programs in `jobs/`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.simulated.cluster import Running, Task
from benchmarks.simulated.federation import MODULES, Recorded, prepared_record
from benchmarks.simulated.worker import Attempt, Trained, Worker
from fedllm.config.loading import read_config
from fedllm.planning.evaluation_targets import choose_targets
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    ClientScores,
    CollectionRecord,
    EvaluationRecord,
    PreparedRecord,
    Scores,
)
from fedllm.storage.tensors import write_tensors

_PREPARE_SECONDS = 20.0
_AGGREGATE_SECONDS = 10.0
_EVALUATE_SECONDS = 30.0


@dataclass(kw_only=True)
class Programs:
    """The programs of a run of `num_clients`; `rounds` tells what its workers did."""

    num_clients: int
    seed: int
    recorded: Recorded
    now: Callable[[], float]
    before_aggregation: Callable[[int], None] = lambda _round: None
    rounds: dict[int, Trained] = field(default_factory=dict)
    _attempts: dict[Path, Attempt] = field(default_factory=dict)

    def __call__(self, task: Task) -> Running:
        """Start what a task's command line says."""
        program, target, *more = task.array.command
        if Path(program).stem == "client":
            return Worker(
                task=task,
                attempt=self._attempt(Path(target)),
                worker_class=more[more.index("--class") + 1],
                trained=self.of(int(Path(target).parts[-3])),
                recorded=self.recorded,
                now=self.now,
            ).run()
        single = {
            "prepare": self._prepare,
            "aggregate": self._aggregate,
            "evaluate": self._evaluate,
        }
        return single[Path(program).stem](Path(target))

    def of(self, number: int) -> Trained:
        """Return what is known of a round."""
        return self.rounds.setdefault(number, Trained())

    def _attempt(self, folder: Path) -> Attempt:
        if folder not in self._attempts:
            self._attempts[folder] = Attempt.open(folder)
        return self._attempts[folder]

    def _prepare(self, target: Path) -> Running:
        yield _PREPARE_SECONDS
        prepared = prepared_record(self.num_clients, self.seed, self.recorded)
        prepared.publish(RunPaths(root=target).prepared)
        return False

    def _aggregate(self, target: Path) -> Running:
        yield _AGGREGATE_SECONDS
        paths = RoundPaths(root=target)
        self.before_aggregation(paths.number)
        collection = CollectionRecord.find(paths.collection)
        state = {f"{name}.S": torch.ones(1) for name in MODULES}
        write_tensors(paths.global_state, state, {"round": str(paths.number)})
        AggregateRecord(
            round=paths.number,
            method="flexlora",
            rank=dict.fromkeys(MODULES, 16),
            sha256=sha256_of(paths.global_state),
            seconds=_AGGREGATE_SECONDS,
            clients=len(collection.updates) if collection else 0,
            device="cpu",
        ).publish(paths.aggregate_record)
        return False

    def _evaluate(self, target: Path) -> Running:
        yield _EVALUATE_SECONDS
        paths = RoundPaths(root=target)
        run = paths.run
        scores = Scores(rows=1, loss=1.0 / (1 + paths.number), rouge_l=0.5, exact_match=0.5)
        targets = choose_targets(
            read_config(run.config), PreparedRecord.read(run.prepared), paths.number
        )
        EvaluationRecord(
            round=paths.number,
            state_sha256="",
            complete=False,
            seconds=_EVALUATE_SECONDS,
            clients=[
                ClientScores(
                    client=scored.client,
                    group=scored.group,
                    tier=scored.tier,
                    as_deployed=scores,
                    at_largest_rank=scores,
                )
                for scored in targets
            ],
        ).publish(paths.evaluation_record)
        return False
