"""A sweep on Slurm: its runs share one throttle, and end with the bits of inline runs."""

from pathlib import Path

import pytest
import yaml

from fedllm.reporting.sweeps.sweep_status import sweep_status
from fedllm.storage.paths import SweepPaths
from tests.cli.commands import fedllm, in_process
from tests.rounds.simulation import states
from tests.slurm.cluster import until
from tests.slurm.runs import ON_CLUSTER, PATIENCE_SECONDS
from tests.tiny import Tiny

pytestmark = pytest.mark.slurm


@pytest.mark.usefixtures("cluster")
def test_the_arms_of_a_sweep_share_a_throttle_and_give_the_bits_of_inline_runs(
    tiny: Tiny, tmp_path: Path
) -> None:
    small = {
        "rounds": 1,
        "clients.cohort.count": 2,
        "training.max_steps": 1,
        "evaluation.max_new_tokens": 2,
        **{key: yaml.safe_load(value) for key, _, value in (k.partition("=") for k in ON_CLUSTER)},
    }
    raw = {
        "base": str(tiny.config),
        "set": small,
        "arms": {"a": {}, "b": {"lora.alpha": 4.0}},
        "comparison": {"endpoint": "train_loss"},
        "max_parallel": 2,
    }
    file = tmp_path / "question.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    done = fedllm("submit", file, "--run-dir", tmp_path / "slurm", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "coordinator job " in done.stdout
    swept = SweepPaths(root=tmp_path / "slurm")
    until(lambda: sweep_status(swept).state == "done", seconds=PATIENCE_SECONDS)
    raw["set"] = {**small, "scheduler.kind": "inline"}
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    assert in_process("sweep", file, "--out", tmp_path / "inline").returncode == 0
    one, other = SweepPaths(root=tmp_path / "slurm"), SweepPaths(root=tmp_path / "inline")
    for name in ("runs/a/seed-0", "runs/b/seed-0"):
        assert states(one.run(name).root) == states(other.run(name).root) != {}
