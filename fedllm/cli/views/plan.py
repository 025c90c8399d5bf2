"""`fedllm plan`: print what a configuration would submit, and submit nothing."""

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    AsJson,
    ConfigOrSweep,
    Overrides,
    configuration,
    configuration_file,
    default_run_dir,
    fresh_folder,
    say,
    say_json,
)
from fedllm.cli.preparing import prepared_once
from fedllm.cli.progress_bar import progress_bar
from fedllm.cli.sweeps import default_sweep_dir, planned_sweep
from fedllm.config.models import Config
from fedllm.config.sweep_files import is_sweep_file
from fedllm.errors import ConfigError, UserError
from fedllm.planning.federation import plan_federation
from fedllm.planning.roles import Roles, split_roles
from fedllm.planning.sweeps.sweep_runs import refuse_leaks
from fedllm.process.log import say as note
from fedllm.reporting.method_words import privacy_words
from fedllm.reporting.plan.idle_resources import resource_warnings
from fedllm.reporting.plan.plan import Geometry
from fedllm.reporting.plan.plan_text import describe_plan
from fedllm.reporting.sweeps.sweep_plan import ArmPlan, arm_plan, describe_sweep_plan
from fedllm.rounds.dispatch.planned import plan_run
from fedllm.rounds.dispatch.preflight import check_jobs
from fedllm.scheduling.log_names import script_of
from fedllm.scheduling.seam import Scheduler, SchedulerUnreachable
from fedllm.scheduling.traits import cache_for, traits_of
from fedllm.storage.kept_records import Count
from fedllm.storage.paths import RunPaths, SweepPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import PreparedRecord

# devices that every machine has: no need to load torch and look
_EVERYWHERE = {"auto", "cpu"}


def _privacy(config: Config, prepared: PreparedRecord) -> str:
    """Return what the whole run says about any one client."""
    from fedllm.server.epsilon import privacy_after

    clients = len(plan_federation(config, prepared).roles.train)
    return privacy_words(privacy_after(config, clients, config.rounds), config.rounds)


def _check_devices(config: Config) -> None:
    """Refuse devices that are not here, where the jobs would run here.

    Raises:
        ConfigError: it names the key.
    """
    devices = {"training": config.training.device, "aggregation": config.aggregation.device}
    if traits_of(config).jobs_outlive_coordinator or {*devices.values()} <= _EVERYWHERE:
        return
    from fedllm.model.device import resolve_devices

    for section, device in devices.items():
        try:
            resolve_devices(device)
        except ConfigError as error:
            raise ConfigError(f"{section}.{error}") from error


def plan(
    config: ConfigOrSweep,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the sbatch files here.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", metavar="N", min=1, help="Plan for N free slots."),
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Print what a round or a sweep would submit and cost. Nothing is submitted."""
    if is_sweep_file(configuration_file(config)):
        _plan_sweep(configuration_file(config), json_=json_, others=(out, slots, set_))
        return
    loaded, root = configuration(config, set_ or []), default_run_dir(config)
    execution.check_before_run(loaded, root)
    _check_devices(loaded)
    if out is not None:
        fresh_folder(out)
    with progress_bar() as count:
        words = ["prepare", str(config), *(w for key in set_ or [] for w in ("--set", key))]
        here = _AnnouncedWork(count, loaded, f"fedllm {shlex.join(words)}")
        prepared = prepared_once(loaded, cache_for(loaded, root), here)
    run = RunPaths(root=root.resolve())
    with closing(execution.make_scheduler(run, loaded)) as scheduler:
        _check_jobs(scheduler, loaded, run)
        planned = plan_run(loaded, prepared, run, scheduler, slots=slots)
    if json_:
        say_json(dataclasses.asdict(planned.geometry))
    else:
        _describe(planned.geometry, loaded, prepared)
    if out is None:
        return
    for script in planned.scripts:
        file = script_of(out, script.job.name)
        publish_bytes(file, script.text.encode())
        if not json_:
            say(f"wrote {file}")


def _check_jobs(scheduler: Scheduler, config: Config, run: RunPaths) -> None:
    """Refuse jobs that a scheduler refuses; a plan is made where none answers too.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        check_jobs(scheduler, config, run)
    except ConfigError:
        raise
    except (SchedulerUnreachable, UserError):
        # the plan says that limits are unknown
        return


class _AnnouncedWork:
    """Count that first says where the work is done: on a login node a job may be wanted."""

    def __init__(self, count: Count, config: Config, command: str) -> None:
        self._count = count
        self._announce = partial(execution.say_where, config, "prepare", command)
        self._is_said = False

    def __call__(self, what: str, done: int, total: int) -> None:
        """Count, as the wrapped function does."""
        if not self._is_said:
            self._is_said = True
            self._announce()
        self._count(what, done, total)


def _describe(geometry: Geometry, config: Config, prepared: PreparedRecord) -> None:
    say(describe_plan(geometry))
    if config.privacy.clip_norm is not None:
        say(_privacy(config, prepared))
    if traits_of(config).jobs_outlive_coordinator:
        for line in resource_warnings(config):
            say(f"warning: {line}")


def _plan_sweep(file: Path, *, json_: bool, others: Sequence[object]) -> None:
    """Print the hours of a sweep: those of each arm's first run, times its runs."""
    if any(others):
        raise ConfigError("--out, --slots and --set: are for a configuration, not for a sweep")
    root = default_sweep_dir(file)
    _, runs = planned_sweep(file, root)
    plans: list[ArmPlan] = []
    roles: dict[str, Roles] = {}
    # runs of the same data have the same notes
    note_once = cache(note)
    for (arm, phase), of_arm in itertools.groupby(
        sorted(runs, key=lambda run: (run.phase != "tuning", run.arm)),
        key=lambda run: (run.arm, run.phase),
    ):
        members = list(of_arm)
        config, paths = members[0].config, SweepPaths(root=root.resolve()).run(members[0].name)
        with progress_bar() as count:
            prepared = prepared_once(config, cache_for(config, paths.root), count, note_once)
        roles[arm] = split_roles(config.clients, prepared.clients)
        with closing(execution.make_scheduler(paths, config)) as scheduler:
            geometry = plan_run(config, prepared, paths, scheduler).geometry
        plans.append(arm_plan(arm, phase, len(members), geometry))
    refuse_leaks(roles)
    if json_:
        say_json([dataclasses.asdict(each) for each in plans])
    else:
        say(describe_sweep_plan(plans, one_by_one=not traits_of(config).jobs_outlive_coordinator))
