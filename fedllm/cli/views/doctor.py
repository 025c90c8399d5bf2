"""`fedllm doctor`: find problems before a run, and the keys to change."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.execution import check_before_run
from fedllm.cli.options import (
    AsJson,
    Overrides,
    RunDir,
    configuration,
    default_run_dir,
    say,
    say_json,
    say_with_paths,
)
from fedllm.config.models import SchedulerSection, StorageSection, is_own
from fedllm.doctor.examination import DoctorRequest, examine
from fedllm.doctor.findings import Finding, describe_findings
from fedllm.errors import UserError
from fedllm.methods.catalog import method_of


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A configuration. Default: check the cluster alone."),
    ] = None,
    run_dir: RunDir = None,
    set_: Overrides = None,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", help="Time to wait for a free compute node."),
    ] = 120.0,
    json_: AsJson = False,
) -> None:
    """Check configuration, cluster, nodes and storage before a run."""
    findings, request = _request(config, run_dir, set_ or [], wait)
    if not json_:
        say("checking; a probe of each kind of compute node may take a minute")
    findings += [*examine(request)]
    if json_:
        say_json([dataclasses.asdict(finding) for finding in findings])
    else:
        say_with_paths(describe_findings(findings))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(2)


def _request(
    file: Path | None, run_dir: Path | None, overrides: Sequence[str], wait: float
) -> tuple[list[Finding], DoctorRequest]:
    findings, config = [], None
    if file is None:
        why = "no CONFIG was given: the cluster is checked with its own defaults"
        findings.append(Finding(check="configuration", level="not done", found=why))
    else:
        try:
            loaded = configuration(file, overrides)
            check_before_run(loaded, run_dir or default_run_dir(file))
            if is_own(loaded.method.name):
                method_of(loaded)
            config = loaded
            findings.append(Finding(check="configuration", level="ok", found=f"{file} is valid"))
        except UserError as error:
            findings += [
                Finding(check="configuration", level="fail", found=line)
                for line in str(error).splitlines()
            ]
            why = "the cluster is checked with its own defaults until CONFIG is valid"
            findings.append(Finding(check="options of jobs", level="not done", found=why))
    root = run_dir or default_run_dir(file or Path("run"))
    request = DoctorRequest(
        scheduler=config.scheduler if config else SchedulerSection(),
        storage=config.storage if config else StorageSection(),
        root=root,
        config=config,
        wait_seconds=wait,
    )
    return findings, request
