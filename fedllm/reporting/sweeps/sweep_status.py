"""Status of a sweep: every run's state, and when the last of them may end."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.config.models import Config
from fedllm.errors import counted
from fedllm.reporting.status.pace import Estimate, pace_of_round, written_at
from fedllm.reporting.sweeps.tuned_rates import TunedRate, present_config, tuned_rates
from fedllm.storage.lease import HolderIsGone, current_lease, process_is_gone
from fedllm.storage.paths import RunPaths, SweepPaths
from fedllm.storage.record_cache import RecordCache
from fedllm.storage.records import ErrorRecord
from fedllm.storage.sweep_records import SweepRecord, SweepRunRecord


@dataclass(frozen=True, kw_only=True)
class SweepRunStatus:
    """A run: its state, its rounds, and seconds of a round (None: no round is done).

    `state` is done, running, failed, stopped, waiting (its turn has not come) or untuned (its
    learning rate is not known yet).
    """

    name: str
    arm: str
    phase: str
    state: str
    rounds_done: int
    rounds: int
    round_seconds: float | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """A sweep: its runs, its tuned learning rates, and an estimate of its end."""

    root: str
    runs: tuple[SweepRunStatus, ...]
    tuned: tuple[TunedRate, ...] = ()
    estimate: Estimate | None = None

    @property
    def state(self) -> str:
        """`done`, or the state of what goes on: running, else failed, stopped, waiting."""
        states = [run.state for run in self.runs]
        order = ("running", "failed", "stopped", "untuned", "waiting")
        return next((state for state in order if state in states), "done")


def sweep_status(paths: SweepPaths, gone: HolderIsGone = process_is_gone) -> SweepStatus:
    """Read the present status of a sweep from its files.

    Args:
        paths: the sweep.
        gone: says whether the coordinator of a run ended.

    Raises:
        RunDirectoryError: a record is damaged.
    """
    record = SweepRecord.read(paths.record)
    cache = RecordCache()
    tuned = {each.arm: each for each in tuned_rates(paths, record)}
    runs = []
    for item in record.runs:
        arm = item.arm if item.arm in tuned else record.noise_of or ""
        untuned = item.phase == "run" and arm in tuned and tuned[arm].best is None
        runs.append(_run_status(paths, item, cache, gone, untuned=untuned))
    return SweepStatus(
        root=str(paths.root),
        runs=tuple(runs),
        tuned=tuple(tuned.values()),
        estimate=estimate_sweep(runs),
    )


def _run_status(
    paths: SweepPaths,
    item: SweepRunRecord,
    cache: RecordCache,
    gone: HolderIsGone,
    *,
    untuned: bool,
) -> SweepRunStatus:
    config, run = present_config(paths, item), paths.run(item.name)
    done = [n for n in range(config.rounds + 1) if run.round(n).record.exists()]
    failure = ErrorRecord.find(paths.failure(item.name))
    is_done = len(done) == config.rounds + 1
    state = "done" if is_done else _unfinished_state(run, gone, untuned=untuned)
    if failure and state == "stopped" and _is_newer(paths, item.name, run, config):
        state = "failed"
    return SweepRunStatus(
        name=item.name,
        arm=item.arm,
        phase=item.phase,
        state=state,
        rounds_done=sum(number > 0 for number in done),
        rounds=config.rounds,
        round_seconds=_round_seconds(run, done, cache),
        problem=failure.message if failure and state == "failed" else "",
    )


def _unfinished_state(run: RunPaths, gone: HolderIsGone, *, untuned: bool) -> str:
    if not run.run.exists():
        return "untuned" if untuned else "waiting"
    number, holder = current_lease(run)
    if holder is None or run.released(number).exists():
        return "stopped"
    return {True: "stopped", False: "running", None: "unknown"}[gone(holder)]


def _is_newer(paths: SweepPaths, name: str, run: RunPaths, config: Config) -> bool:
    """Return whether the run failed after its last finished round: for people to read only."""
    failed = written_at(paths.failure(name)) or 0.0
    rounds = (written_at(run.round(n).record) for n in range(config.rounds + 1))
    return failed >= max((time for time in rounds if time is not None), default=0.0)


def _round_seconds(run: RunPaths, done: Sequence[int], cache: RecordCache) -> float | None:
    """Return the median seconds from one finished round to the next, evaluations included."""
    written = [(n, written_at(run.round(n).record)) for n in done]
    times = {n: time for n, time in written if time is not None}
    gaps = [times[n] - times[n - 1] for n in times if n - 1 in times]
    if not gaps and 1 in times and (pace := pace_of_round(cache, run.round(1))):
        gaps = [pace.seconds]
    return max(0.0, statistics.median(gaps)) if gaps else None


def estimate_sweep(runs: Sequence[SweepRunStatus]) -> Estimate | None:
    """Estimate when the last run is done: the rounds that are left, shared by those that run now.

    A run without a finished round takes as long as the median run of its arm, else of the sweep.
    """
    left = [run for run in runs if run.state != "done"]
    known = [run.round_seconds for run in runs if run.round_seconds is not None]
    if not left or not known:
        return None
    at_once = max(1, sum(run.state == "running" for run in left))
    seconds = 0.0
    for run in left:
        of_arm = [r.round_seconds for r in runs if r.arm == run.arm and r.round_seconds is not None]
        usual = statistics.median(of_arm or known)
        each = usual if run.round_seconds is None else run.round_seconds
        seconds += (run.rounds - run.rounds_done) * each
    rounds = sum(run.rounds - run.rounds_done for run in left)
    how = (
        f"{counted(rounds, 'round')} of {counted(len(left), 'run')}, {at_once} at once, at the "
        "pace of finished rounds"
    )
    return Estimate(seconds=seconds / at_once, how=how)
