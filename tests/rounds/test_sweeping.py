"""Sweeps to their end: kills, failures and tuning, without a language model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import LeaseError, RunFailed, StorageFull
from fedllm.planning.sweeps.sweep_runs import NOISE_ARM, with_rate
from fedllm.reporting.sweeps.sweep_status import SweepStatus, sweep_status
from fedllm.reporting.sweeps.sweep_text import sweep_status_text
from fedllm.rounds.dispatch.in_flight import is_done
from fedllm.rounds.opening import close_run, open_run
from fedllm.rounds.run import Run
from fedllm.rounds.sweeping import Sweep, drive
from fedllm.scheduling.inline import InlineScheduler
from fedllm.scheduling.shared_scheduler import SchedulerPool
from fedllm.storage.paths import RunPaths, SweepPaths
from fedllm.storage.records import EvaluationRecord
from fedllm.storage.sweep_records import SweepRecord, SweepRunRecord
from tests.rounds.cluster import HandMoved
from tests.rounds.simulation import Simulation, complete, config_of, states

ARMS = {"a": config_of(rounds=1), "b": config_of(rounds=1, method__name="factor_mean")}
ARMS["b"] = ARMS["b"].model_copy(
    update={"clients": config_of(clients__tiers={"small": {"ranks": 2}}).clients}
)
RATES = (0.01, 0.1)


class Compute(Simulation):
    """Simulation whose dev loss is the distance of the learning rate from the arm's best one."""

    best: "dict[str, float] | None" = None
    broken: tuple[str, ...] = ()

    def __call__(self, program: str, argv: "list[str]", task: str, log: Path) -> int:  # type: ignore[override]
        if any(name in argv[0] for name in self.broken):
            return 1
        return super().__call__(program, argv, task, log)

    def evaluate(self, paths: "object") -> None:
        super().evaluate(paths)  # type: ignore[arg-type]
        if self.best is None:
            return
        config = read_config(paths.run.config)  # type: ignore[attr-defined]
        loss = abs(config.training.learning_rate - self.best[config.method.name])
        record = EvaluationRecord.read(paths.evaluation_record)  # type: ignore[attr-defined]
        clients = [
            c.model_copy(update={"as_deployed": c.as_deployed.model_copy(update={"loss": loss})})
            for c in record.clients
        ]
        record.model_copy(update={"clients": clients}).publish(paths.evaluation_record)  # type: ignore[attr-defined]


def record_of(*, tuned: bool = False, noise: bool = False) -> SweepRecord:
    """Return a sweep of two arms of one round and two seeds."""
    runs = []
    for arm, config in ARMS.items() if tuned else ():
        runs += [
            SweepRunRecord(
                name=f"tuning/{arm}/{rate}",
                arm=arm,
                phase="tuning",
                config=with_rate(config, rate).model_dump(mode="json"),
                rate=rate,
            )
            for rate in RATES
        ]
    for seed in (0, 1):
        arms = {**ARMS, NOISE_ARM: ARMS["a"]} if noise else ARMS
        for arm, config in arms.items():
            changed = config.model_copy(update={"seed": seed + 10 * (arm == NOISE_ARM)})
            runs.append(
                SweepRunRecord(
                    name=f"runs/{arm.replace('/', '-')}/{seed}",
                    arm=arm,
                    phase="run",
                    config=changed.model_dump(mode="json"),
                )
            )
    return SweepRecord(runs=runs, noise_of="a")


def sweep_of(root: Path, compute: Simulation, record: SweepRecord, lines: "list[str]") -> Sweep:
    paths = SweepPaths(root=root)
    record.publish(paths.record)

    def opened(run: Path, config: Config, say: Callable[[str], None]) -> Run:
        opened_run = open_run(
            run,
            config,
            make_scheduler=lambda _paths, _config: InlineScheduler(execute=compute),
            say=say,
        )
        lines.append(sweep_status_text(sweep_status(paths)).splitlines()[-1])
        return opened_run

    return Sweep(
        paths=paths, record=record, open_run=opened, end_workers=lambda: None, say=lines.append
    )


def status_of(sweep: Sweep) -> SweepStatus:
    return sweep_status(sweep.paths)


def done_runs(sweep: Sweep) -> list[str]:
    return [run.name for run in status_of(sweep).runs if run.state == "done"]


def test_a_sweep_runs_every_run_once_and_again_changes_nothing(tmp_path: Path) -> None:
    compute, lines = Compute(), list[str]()
    sweep = sweep_of(tmp_path, compute, record_of(), lines)
    drive(sweep)
    assert done_runs(sweep) == ["runs/a/0", "runs/b/0", "runs/a/1", "runs/b/1"]
    assert f"it runs; to follow it: fedllm status {tmp_path} --watch" in lines
    assert f"next: fedllm compare {tmp_path}" in sweep_status_text(status_of(sweep))
    trained = len(compute.trained)
    drive(sweep_of(tmp_path, compute, record_of(), lines))
    assert len(compute.trained) == trained
    # arms of one seed share cohorts
    first, second, third = (sorted(compute.trained[n : n + 4]) for n in (0, 4, 8))
    assert first == second != third
    assert any(line.startswith("runs/b/1: round 1/1: done") for line in lines)


def test_a_failed_arm_does_not_end_the_others_and_goes_on_when_resumed(tmp_path: Path) -> None:
    compute, lines = Compute(), list[str]()
    compute.broken = ("runs/a/0",)
    sweep = sweep_of(tmp_path, compute, record_of(), lines)
    with pytest.raises(RunFailed, match=r"1 of 4 runs failed \(runs/a/0: .* fedllm resume"):
        drive(sweep)
    assert done_runs(sweep) == ["runs/b/0", "runs/a/1", "runs/b/1"]
    failed = status_of(sweep).runs[0]
    assert failed.state == "failed" and "ended early" in failed.problem
    assert "runs/a/0: prepare job ended early" in sweep_status_text(status_of(sweep))
    compute.broken = ()
    again = sweep_of(tmp_path, compute, record_of(), lines)
    drive(again)
    assert status_of(again).state == "done"


def test_a_sweep_that_stops_anywhere_resumes_to_the_same_states(tmp_path: Path) -> None:
    undisturbed, lines = Compute(), list[str]()
    drive(sweep_of(tmp_path / "whole", undisturbed, record_of(), lines))
    compute, count = Compute(), 0

    def stop(_program: str, _target: Path) -> "int | None":
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise StorageFull("no space left")
        return None

    compute.before = stop
    stops = 0
    while True:
        try:
            drive(sweep_of(tmp_path / "stopped", compute, record_of(), lines))
            break
        except StorageFull:
            stops += 1
    assert stops > 5
    for item in record_of().runs:
        assert states(tmp_path / "stopped" / item.name) == states(tmp_path / "whole" / item.name)


def test_every_arm_gets_the_rate_that_its_dev_clients_prefer(tmp_path: Path) -> None:
    compute, lines = Compute(), list[str]()
    compute.best = {"flexlora": 0.02, "factor_mean": 0.09}
    sweep = sweep_of(tmp_path, compute, record_of(tuned=True, noise=True), lines)
    drive(sweep)
    rates = {
        item.arm: read_config(sweep.paths.run(item.name).config).training.learning_rate
        for item in sweep.record.runs
        if item.phase == "run"
    }
    assert rates == {"a": 0.01, "b": 0.1, NOISE_ARM: 0.01}
    text = sweep_status_text(status_of(sweep))
    assert "answer loss of dev clients by learning rate, equal budget (* chosen)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["a", "0.010*", "0.080"] in rows and ["b", "0.080", "0.010*"] in rows


def test_an_arm_whose_tuning_failed_waits_and_the_others_are_done(tmp_path: Path) -> None:
    compute, lines = Compute(), list[str]()
    compute.best = {"flexlora": 0.02, "factor_mean": 0.09}
    compute.broken = (f"tuning/b/{RATES[0]}",)
    sweep = sweep_of(tmp_path, compute, record_of(tuned=True), lines)
    with pytest.raises(RunFailed, match=r"1 of 8 runs failed .* 2 wait for a learning rate"):
        drive(sweep)
    states_ = {run.name: run.state for run in status_of(sweep).runs}
    assert (states_["runs/a/0"], states_["runs/b/0"]) == ("done", "untuned")


def test_runs_that_another_coordinator_holds_are_left_to_it(tmp_path: Path) -> None:
    compute, lines = Compute(), list[str]()
    sweep = sweep_of(tmp_path, compute, record_of(), lines)
    held = sweep.open_run(sweep.paths.run("runs/a/0").root, ARMS["a"], lines.append)
    with pytest.raises(LeaseError):
        drive(sweep)
    assert done_runs(sweep) == ["runs/b/0", "runs/a/1", "runs/b/1"]
    assert status_of(sweep).state == "running"
    close_run(held)
    drive(sweep_of(tmp_path, compute, record_of(), lines))
    assert is_done(RunPaths(root=tmp_path / "runs/a/0"), ARMS["a"])


def test_the_estimate_takes_the_rounds_that_are_left_at_the_pace_of_finished_ones(
    tmp_path: Path,
) -> None:
    compute, lines = Compute(), list[str]()
    compute.broken = ("runs/b/1",)
    sweep = sweep_of(tmp_path, compute, record_of(), lines)
    assert status_of(sweep).estimate is None
    assert {run.state for run in status_of(sweep).runs} == {"waiting"}
    with pytest.raises(RunFailed):
        drive(sweep)
    estimate = status_of(sweep).estimate
    assert estimate is not None and estimate.how.startswith("1 round of 1 run, 1 at once")


class Batch(HandMoved):
    """A cluster where one queued task runs whenever the coordinator waits."""

    most: int = 0
    together: int = 0

    def wait(self, seconds: float) -> None:
        del seconds
        self.most = max(self.most, len(self.alive))
        runs = {Path(job.argv[0]).parents[3] for job, _ in self.alive.values()}
        self.together = max(self.together, len(runs))
        for task in list(self.alive)[:1]:
            self.work(task)


def test_on_a_cluster_runs_go_on_side_by_side_under_one_throttle(tmp_path: Path) -> None:
    runs = [
        SweepRunRecord(
            name=f"runs/{arm}/{seed}",
            arm=arm,
            phase="run",
            config=on_cluster("slurm", seed, block).model_dump(mode="json"),
        )
        for seed in (0, 1)
        for arm, block in (("a", 1), ("b", 32))
    ]
    alone = Compute()
    for run in runs:
        complete(
            tmp_path / "alone" / run.name,
            alone,
            on_cluster("inline", int(run.name[-1]), 1 if run.arm == "a" else 32),
        )
    batch, lines = Batch(Compute()), list[str]()
    pool = SchedulerPool(make=lambda _config: batch, max_parallel=6)
    sweep = sweep_of(tmp_path / "sweep", batch.simulation, SweepRecord(runs=runs), lines)
    sweep.open_run = lambda root, config, say: open_run(
        root, config, make_scheduler=lambda _paths, config: pool.scheduler(config), say=say
    )
    drive(sweep)
    assert len(done_runs(sweep)) == 4
    assert 4 < batch.most <= 6 and batch.together > 1
    # the first run prepares the data and scores the base for all
    scored = next(n for n, line in enumerate(lines) if "runs/a/0: round 0/1: done" in line)
    assert scored < next(n for n, line in enumerate(lines) if "runs/b/0: prepare" in line)
    for run in runs:
        assert states(tmp_path / "sweep" / run.name) == states(tmp_path / "alone" / run.name)


def on_cluster(kind: str, seed: int, block: int) -> Config:
    """Return a configuration of one round whose clients are divided among several tasks."""
    return config_of(
        seed=seed,
        rounds=1,
        aggregation__block_clients=block,
        scheduler__kind=kind,
        scheduler__query_seconds=1e-9,
        scheduler__worker_minutes_min=1e-6,
        scheduler__clients_per_bundle=1,
    )
