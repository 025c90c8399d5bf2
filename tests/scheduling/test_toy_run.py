"""A run has the same results on a batch system that fedllm does not know."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedllm.config.loading import load_config
from fedllm.rounds.coordinate import coordinate
from fedllm.rounds.opening import open_run
from fedllm.scheduling.seam import EndReason
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import ClaimRecord, JobsRecord, TaskRecord
from tests.cli.commands import in_process
from tests.rounds.simulation import states
from tests.scheduling.toy_batch import ToyBatch
from tests.tiny import Tiny

CHANGES = (
    *("rounds=1", "evaluation.every=0", "scheduler.clients_per_bundle=2"),
    *("data.path=embedded", "data.embedded_rows=20", "data.embedded_clients=12"),
    *("training.max_steps=20", "training.checkpoint_every_minutes=1e-9"),
)


@dataclass(kw_only=True)
class Preempting(ToyBatch):
    """Preempts the workers of a run once, after one of them has saved a client's progress."""

    run: RunPaths
    preempted: list[str] = field(default_factory=list)

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        paths = self.run.round(1)
        while time.monotonic() < deadline:
            if not self.preempted and any(paths.checkpoints.rglob("*.safetensors")):
                claims = [ClaimRecord.read(path) for path in paths.attempt(1).claim_files()]
                self.preempted += {claim.task for claim in claims}
                for task in self.preempted:
                    self.end(task, EndReason.PREEMPTED, comes_back=True)
            time.sleep(0.01)


@pytest.mark.slow
def test_a_run_on_another_batch_system_whose_tasks_are_preempted_ends_in_the_same_bits(
    tiny: Tiny, tmp_path: Path
) -> None:
    words = [word for change in CHANGES for word in ("--set", change)]
    inline = in_process("run", tiny.config, "--run-dir", tmp_path / "inline", *words)
    assert inline.returncode == 0, inline.stderr

    root = tmp_path / "toy"
    paths = RunPaths(root=root)
    toy = Preempting(run=paths)
    try:
        coordinate(
            open_run(
                root,
                load_config(tiny.config, CHANGES),
                make_scheduler=lambda _paths, _config: toy,
                say=lambda _line: None,
            )
        )
    finally:
        toy.shut_down()

    assert states(root) == states(tmp_path / "inline")
    attempt = paths.round(1).attempt(1)
    assert toy.preempted
    assert [toy.starts(task) for task in toy.preempted] == [2] * len(toy.preempted)
    assert max(TaskRecord.read(attempt.task(task)).starts for task in toy.preempted) == 2
    # a task that came back went on with the clients it had claimed
    assert not paths.round(1).attempt(2).root.exists()
    tasks = {task for ids in JobsRecord.read(attempt.jobs).ids.values() for task in ids}
    assert tasks >= {*toy.preempted}
