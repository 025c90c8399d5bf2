"""Sweep: several runs advanced by one coordinator, to the end of them all.

A sweep's folder has one record; everything else is in the directories of its runs. So a restart is
ordinary running: runs that are done are passed over, all others go on where they stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.config.loading import validate
from fedllm.config.models import Config
from fedllm.errors import FedllmError, Incomplete, LeaseError, RunFailed
from fedllm.planning.sweeps.sweep_runs import NOISE_ARM, with_rate
from fedllm.reporting.sweeps.tuned_rates import tuned_rate
from fedllm.rounds.advance import advance
from fedllm.rounds.aggregating import redo_damaged_state
from fedllm.rounds.coordinate import pause_seconds, stopping_on_signals
from fedllm.rounds.dispatch.cancelling import cancel_jobs
from fedllm.rounds.dispatch.in_flight import find_in_flight, is_done
from fedllm.rounds.failing import recorded_failure
from fedllm.rounds.opening import close_run
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import SchedulerFull, SchedulerUnreachable
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import SweepPaths
from fedllm.storage.records import ErrorRecord
from fedllm.storage.sweep_records import SweepRecord, SweepRunRecord

OpenRun = Callable[[Path, Config, Callable[[str], None]], Run]


@dataclass(kw_only=True)
class Sweep:
    """A sweep that is being coordinated.

    Attributes:
        paths: its folder.
        record: its runs.
        open_run: opens a run for coordination; its third argument prints a line.
        end_workers: ends the processes that all runs share.
        say: prints a line.
        opened: the runs that go on now.
        ended: the runs that failed, or that others hold, and why.
        configs: the configurations of the runs that may start.
        done: the runs that are done.
    """

    paths: SweepPaths
    record: SweepRecord
    open_run: OpenRun
    end_workers: Callable[[], None]
    say: Callable[[str], None]
    opened: dict[str, Run] = field(default_factory=dict)
    ended: dict[str, FedllmError] = field(default_factory=dict)
    configs: dict[str, Config] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)


def drive(sweep: Sweep) -> None:
    """Take every run of a sweep to its end; one that fails does not end the others.

    On one machine one run goes on after the other; with a batch system all side by side, once the
    first has prepared the data and scored the base for all.

    Raises:
        RunFailed: some runs failed; all others are done.
        LeaseError: other coordinators hold the runs that are left.
        Incomplete: it was stopped, or there is no space left; resume goes on.
    """
    with stopping_on_signals():
        try:
            while _open_due(sweep):
                for name in list(sweep.opened):
                    _step(sweep, name)
                if sweep.opened:
                    _wait(sweep)
        finally:
            # first the workers, in order: they publish what they have finished
            sweep.end_workers()
            for run in sweep.opened.values():
                close_run(run)
    _raise_for_the_others(sweep)


def _open_due(sweep: Sweep) -> bool:
    """Open the runs that may go on now; return whether any is open."""
    for item in sweep.record.runs:
        if item.name in sweep.opened.keys() | sweep.ended.keys() | sweep.done:
            continue
        config = _config(sweep, item)
        if config is None or _is_done(sweep, item.name, config):
            continue
        if sweep.opened and not (_base_is_scored(sweep) and _is_batch(config)):
            break
        _open(sweep, item.name, config)
    return bool(sweep.opened)


def _config(sweep: Sweep, item: SweepRunRecord) -> Config | None:
    config = sweep.configs.get(item.name) or config_of(sweep.paths, sweep.record, item)
    if config is not None:
        sweep.configs[item.name] = config
    return config


def _is_batch(config: Config) -> bool:
    return traits_of(config).jobs_outlive_coordinator


def _base_is_scored(sweep: Sweep) -> bool:
    """Return whether a run has prepared the data and scored the base, which the others share."""
    runs = (sweep.paths.run(item.name) for item in sweep.record.runs)
    return any(run.round(0).record.exists() for run in runs)


def _is_done(sweep: Sweep, name: str, config: Config) -> bool:
    paths = sweep.paths.run(name)
    if not (paths.run.exists() and is_done(paths, config)):
        return False
    sweep.done.add(name)
    return True


def config_of(paths: SweepPaths, record: SweepRecord, item: SweepRunRecord) -> Config | None:
    """Return the configuration of a run; None as long as its learning rate is not tuned."""
    config = validate(item.config)
    # the A/A arm repeats another arm, with its rate
    arm = record.noise_of if item.arm == NOISE_ARM and record.noise_of else item.arm
    if item.phase == "tuning" or not record.tuning_of(arm):
        return config
    best = tuned_rate(paths, record, arm).best
    return None if best is None else with_rate(config, best)


def _open(sweep: Sweep, name: str, config: Config) -> None:
    try:
        run = sweep.open_run(
            sweep.paths.run(name).root, config, lambda line: sweep.say(f"{name}: {line}")
        )
        sweep.opened[name] = run
        redo_damaged_state(run)
        # tasks of an earlier coordinator count for the common throttle
        find_in_flight(run)
    except (SchedulerUnreachable, SchedulerFull) as error:
        sweep.say(f"{name}: {error}")
    except Incomplete:
        raise
    except FedllmError as error:
        _end(sweep, name, error)


def _step(sweep: Sweep, name: str) -> None:
    """Take the steps of a run that are possible now."""
    run = sweep.opened[name]
    try:
        with recorded_failure(run):
            if not advance(run):
                return
    except (SchedulerUnreachable, SchedulerFull) as error:
        if run.observations.is_due(str(error), run.config.scheduler.query_seconds):
            run.say(f"{error}; asking again")
        return
    except Incomplete:
        raise
    except FedllmError as error:
        _end(sweep, name, error)
        return
    # it may have stopped before the last round of its configuration
    sweep.done.add(name)
    close_run(sweep.opened.pop(name))


def _end(sweep: Sweep, name: str, error: FedllmError) -> None:
    """Leave a run that failed, or that another coordinator holds, so that the others go on."""
    sweep.ended[name] = error
    run = sweep.opened.pop(name, None)
    if run is not None:
        if not _is_batch(run.config):
            cancel_jobs(run.paths, run.config, run.scheduler)
        close_run(run)
    sweep.say(f"{name}: {error}")
    if not isinstance(error, LeaseError):
        reason = ErrorRecord(
            kind=type(error).__name__, message=str(error), exit_code=error.exit_code
        )
        reason.publish(sweep.paths.failure(name))


def _wait(sweep: Sweep) -> None:
    runs = list(sweep.opened.values())
    runs[0].scheduler.wait(min(pause_seconds(run) for run in runs))


def _raise_for_the_others(sweep: Sweep) -> None:
    failed = [name for name, e in sweep.ended.items() if not isinstance(e, LeaseError)]
    held = [name for name in sweep.ended if name not in failed]
    waiting = [item.name for item in sweep.record.runs if _config(sweep, item) is None]
    total = len(sweep.record.runs)
    if failed or (waiting and not held):
        why = f", {len(waiting)} wait for a learning rate" if waiting else ""
        first = f" ({failed[0]}: {sweep.ended[failed[0]]})" if failed else ""
        raise RunFailed(
            f"{sweep.paths.root}: {len(failed)} of {total} runs failed{first}{why}; correct the "
            f"cause, then: fedllm resume {sweep.paths.root}"
        )
    if held:
        raise LeaseError(f"{sweep.paths.root}: {sweep.ended[held[0]]}")
