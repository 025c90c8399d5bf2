"""A sweep as a user runs it: real training, an arm that fails, more seeds, the comparison."""

import json
from pathlib import Path

import pytest
import yaml

from fedllm.storage.paths import SweepPaths
from fedllm.storage.records import EvaluationRecord
from tests.cli.commands import in_process, one_line
from tests.tiny import Tiny

SMALL = {
    "rounds": 1,
    "clients.cohort.count": 2,
    "clients.unseen": 3,
    "clients.dev": 1,
    "training.max_steps": 1,
    "evaluation.max_new_tokens": 2,
}
ARMS: dict[str, dict[str, object]] = {
    "flexlora": {},
    "smallest rank": {"method.name": "factor_mean", "clients.tiers": {"all": {"ranks": 1}}},
}


def sweep_file(tiny: Tiny, folder: Path, **keys: object) -> Path:
    path = folder / "question.yaml"
    raw = {"base": str(tiny.config), "set": SMALL, "arms": ARMS, **keys}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def swept(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> SweepPaths:
    """A sweep with tuned rates and an arm whose rank no module takes."""
    folder = tmp_path_factory.mktemp("swept")
    file = sweep_file(
        tiny,
        folder,
        arms={**ARMS, "broken": {"clients.tiers.large.ranks": 640}},
        noise_floor={"arm": "flexlora", "seeds": [5]},
        comparison={"contrast": ["flexlora", "smallest rank"]},
    )
    done = in_process("sweep", file, "--out", folder / "out")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 4 runs failed (runs/broken/seed-0: clients.tiers.large.ranks: got 640" in one_line(
        done, 1
    )
    return SweepPaths(root=folder / "out")


def test_a_failed_arm_does_not_end_the_others(swept: SweepPaths) -> None:
    status = in_process("status", swept.root, "--json")
    assert status.returncode == 1
    runs = {run["name"]: run["state"] for run in json.loads(status.stdout)["runs"]}
    assert runs == {
        "runs/flexlora/seed-0": "done",
        "runs/smallest_rank/seed-0": "done",
        "runs/broken/seed-0": "failed",
        "runs/A-A/seed-5": "done",
    }
    text = in_process("status", swept.root).stdout
    assert "runs/broken/seed-0: clients.tiers.large.ranks: got 640" in text
    assert f"next: fedllm resume {swept.root}" in text


def test_the_runs_share_the_evaluation_of_the_base(swept: SweepPaths) -> None:
    records = [
        EvaluationRecord.read(swept.run(name).round(0).evaluation_record)
        for name in ("runs/flexlora/seed-0", "runs/smallest_rank/seed-0", "runs/A-A/seed-5")
    ]
    first, *others = [{c.client: c.as_deployed for c in record.clients} for record in records]
    assert len(first) > 3 and all(other == first for other in others)


def test_the_comparison_answers_two_questions_beside_the_noise_floor(swept: SweepPaths) -> None:
    # the tier of one arm has a name of its own
    refused = in_process("compare", swept.root)
    assert "compare without tiers: --by group" in one_line(refused, 2)
    assert one_line(in_process("compare", swept.root, "--json"), 2) == one_line(refused, 2)
    done = in_process("compare", swept.root, "--by", "group")
    assert done.returncode == 0, done.stderr
    assert "training clients, large" not in done.stdout
    assert "too few seeds for a claim" in done.stdout
    assert "A/A - flexlora" in done.stdout
    assert "left out: broken seed 0 (not done" in done.stdout
    found = json.loads(in_process("compare", swept.root, "--by", "group", "--json").stdout)
    assert found["endpoint"] == "unseen_loss" and found["primary_is_named"]
    assert found["answers"]["methods"][0]["count"] == 1
    assert len(found["arms"][0]["within"]) == 3


def test_a_run_of_a_sweep_is_an_ordinary_run(swept: SweepPaths) -> None:
    done = in_process("resume", swept.run("runs/flexlora/seed-0").root)
    assert done.returncode == 0
    assert "fedllm export" in done.stdout


def test_resume_takes_the_failed_run_up_again_and_no_other(swept: SweepPaths) -> None:
    before = swept.run("runs/flexlora/seed-0").round(1).record.stat().st_mtime_ns
    done = in_process("resume", swept.root)
    assert "1 of 4 runs failed" in one_line(done, 1)
    assert swept.run("runs/flexlora/seed-0").round(1).record.stat().st_mtime_ns == before
    assert "--set: a sweep has many configurations" in one_line(
        in_process("resume", swept.root, "--set", "rounds=3")
    )


def test_cancel_looks_at_every_run_that_is_not_done(swept: SweepPaths) -> None:
    done = in_process("cancel", swept.root)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "runs/broken/seed-0:"
    assert "no task was running" in done.stdout


def test_a_file_with_more_seeds_goes_on_and_another_one_is_refused(
    swept: SweepPaths, tiny: Tiny, tmp_path: Path
) -> None:
    line = one_line(in_process("sweep", sweep_file(tiny, tmp_path), "--out", swept.root))
    assert "runs/broken/seed-0 is missing in the file; choose another --out" in line
    other = sweep_file(tiny, tmp_path, set={**SMALL, "training.max_steps": 2})
    line = one_line(in_process("sweep", other, "--out", swept.root))
    assert "runs/flexlora/seed-0 has other keys in the file" in line
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "not empty and not a sweep" in one_line(
        in_process("sweep", other, "--out", tmp_path / "full")
    )


def test_a_plan_of_a_sweep_has_the_hours_of_every_arm(tiny: Tiny, tmp_path: Path) -> None:
    file = sweep_file(tiny, tmp_path, seeds=[0, 1, 2])
    done = in_process("plan", file)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["hours", "of", "a", "sweep"]
    assert ["flexlora", "3", "3"] in [row[:3] for row in rows]
    assert ["all", "6", "6"] in [row[:3] for row in rows]
    assert done.stderr.count("data: rows of format") == 1
    assert not (tmp_path / "runs").exists()


def test_a_bad_sweep_is_refused_before_anything_is_written(tiny: Tiny, tmp_path: Path) -> None:
    same = sweep_file(tiny, tmp_path, arms={"a": {}, "b": {"scheduler.workers": 1}})
    line = one_line(in_process("sweep", same, "--out", tmp_path / "out"))
    assert "arms.b: no difference from arm a" in line
    assert not (tmp_path / "out").exists()
    assert "no such sweep file" in one_line(in_process("sweep", tmp_path / "none.yaml"))
    assert "need a sweep file" in one_line(in_process("sweep"))
    assert "a directory, need a sweep file; to continue" in one_line(in_process("sweep", tmp_path))
    lost = sweep_file(tiny, tmp_path, base="lost.yaml")
    assert "base: lost.yaml: no such configuration file" in one_line(in_process("sweep", lost))


def test_a_configuration_is_told_from_a_sweep_file(tiny: Tiny, tmp_path: Path) -> None:
    line = one_line(in_process("sweep", tiny.config))
    assert "a configuration, but this command needs a sweep file" in line
    assert line.endswith(f"to run it once: fedllm run {tiny.config}")
    file = tmp_path / "sweep.yaml"
    file.write_text(f"base: {tiny.config}\narms: {{a: {{}}}}\nseeds: [0, 1]\n", encoding="utf-8")
    line = one_line(in_process("run", file, "--run-dir", tmp_path / "run"))
    assert line.endswith(f"needs a configuration; to run the sweep: fedllm sweep {file}")


def test_the_example_is_a_sweep_file() -> None:
    done = in_process("sweep", "--example")
    assert yaml.safe_load(done.stdout)["comparison"]["contrast"] == ["flexlora", "factor mean"]
