"""`fedllm evaluate`: score a run's state or a PEFT adapter."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli import execution
from fedllm.cli.completion import complete_runs
from fedllm.cli.options import (
    AsJson,
    Overrides,
    RoundNumber,
    chosen_round,
    configuration,
    default_run_dir,
    say,
    say_json,
)
from fedllm.cli.progress_bar import progress_bar
from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import ConfigError, RunDirectoryError
from fedllm.planning.engines import engines_of, scoring_engine
from fedllm.planning.federation import plan_federation
from fedllm.reporting.tables import text_table
from fedllm.rounds.dispatch.asked_evaluation import AskedEvaluation, asked_place
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.scheduling.traits import cache_for, traits_of
from fedllm.storage.kept_records import Count, RequestRecord
from fedllm.storage.paths import RunPaths, shown_path
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import AggregateRecord, EvaluationRecord, PreparedRecord, RunRecord
from fedllm.storage.trust.sealed_commands import commands_of, require_accepted

if TYPE_CHECKING:
    from fedllm.process.session import Session

_FEDLLM = (sys.executable, "-c", "from fedllm.cli.main import main; main()")
_PEFT_CONFIG = "adapter_config.json"


def evaluate(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|ADAPTER",
            help="A run directory, or a PEFT adapter.",
            autocompletion=complete_runs,
        ),
    ],
    round_: RoundNumber = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", help="Rank for all clients. Default: each one's own."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="CONFIG", help="Configuration with the data, to score an adapter."
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Score on tasks of lm-evaluation-harness instead: names, or a task's YAML file.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Where to keep the harness's JSON. Default: in the run."
        ),
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Score the state of a run, or a PEFT adapter, on the test rows.

    It does so in one process on this host. Tasks of the scheduler share the evaluations of a run
    itself. Where all tiers divide the base (ZeRO stage 3), this command divides it too and has
    several processes.
    """
    if lm_eval is not None:
        asked = _Asked(round_number=round_, rank=rank, config=config, overrides=set_ or [])
        results, table = _harness(target, lm_eval, asked, out)
        say_json(results) if json_ else say(table)
        return
    if out is not None:
        raise ConfigError("--out: is for --lm-eval; `--json` prints the scores of test rows")
    record = _score(target, round_number=round_, rank=rank, config=config, overrides=set_ or [])
    if record is None:
        return
    if json_:
        say_json(record.model_dump(mode="json"))
        return
    from fedllm.reporting.results.metrics import categories_of
    from fedllm.reporting.results.summary import score_table

    of_run = (target / "run.json").exists()
    title = f"{target}, round {record.round}" if of_run else str(target)
    say(score_table(title, record, categories_of(RunPaths(root=target)) if of_run else None))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked of a run, or of an adapter."""

    round_number: str | None
    rank: int | None
    config: Path | None
    overrides: Sequence[str]


def _harness(
    target: Path, tasks: str, asked: _Asked, out: Path | None
) -> tuple[dict[str, Any], str]:
    """Score with lm-evaluation-harness and keep its JSON; return it, and a table.

    Raises:
        ConfigError: it is not installed, does not know a task, or an option is missing.
    """
    from fedllm.programs import harness

    known = harness.harness_tasks(tasks)
    paths = RunPaths(root=target.resolve())
    if paths.run.exists():
        from fedllm.server.export import newest_state

        chosen = chosen_round(paths, asked.round_number)
        number = newest_state(paths) if chosen is None else chosen
        names = "+".join(known.names)[:100].replace("/", "-")
        kept = out or paths.harness(f"round-{number:04d}-{names}")
        with redirect_stdout(sys.stderr):
            results = harness.score_run(paths, number, asked.rank, known)
    else:
        if asked.config is None or out is None:
            raise ConfigError(
                f"--config, --out: missing; they say on which model to score {target} and where "
                "the harness's JSON is kept"
            )
        loaded = configuration(asked.config, asked.overrides)
        kept, prepared = out, _prepared(loaded, asked.config)
        with redirect_stdout(sys.stderr):
            results = harness.score_adapter(target, loaded, prepared, known)
    publish_bytes(kept, (json.dumps(results, indent=1) + "\n").encode())
    header = ["task", "metric", "filter", "value", "standard error"]
    table = text_table(f"{target}, lm-evaluation-harness", header, harness.harness_rows(results))
    return results, f"{table}\n\nthe harness's JSON: {shown_path(kept)}"


def _score(
    target: Path,
    *,
    round_number: str | None,
    rank: int | None,
    config: Path | None,
    overrides: Sequence[str],
) -> EvaluationRecord | None:
    """Score a run's state or an adapter; return None in a process that helps another one.

    Raises:
        RunDirectoryError: the target is neither.
        ConfigError: an option is missing, or not for this target.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: got {rank}, need >= 1")
    paths = RunPaths(root=target.resolve())
    if paths.run.exists():
        return _score_run(paths, chosen_round(paths, round_number), rank)
    if not (target / _PEFT_CONFIG).is_file():
        from fedllm.adapters.peft_config import adapters_below

        raise RunDirectoryError(
            f"{target}: neither a run (run.json) nor a PEFT adapter ({_PEFT_CONFIG})"
            f"{adapters_below(target)}"
        )
    if config is None:
        raise ConfigError(
            f"--config: missing; give the configuration of the model and data that score {target}"
        )
    if round_number is not None or rank is not None:
        raise ConfigError(
            f"--round, --rank: {target} is an adapter, they are for runs; leave them out"
        )
    return _score_adapter(target, config, overrides)


def _score_run(
    paths: RunPaths, round_number: int | None, rank: int | None
) -> EvaluationRecord | None:
    from fedllm.server.export import newest_state

    number = newest_state(paths) if round_number is None else round_number
    if not paths.round(number).aggregate_record.exists():
        raise RunDirectoryError(
            f"--round {number}: not aggregated in {paths.root}; give an earlier round, or resume "
            "the run"
        )
    config = read_config(paths.config)
    if _is_shared(config):
        return _score_with_tasks(paths, config, RequestRecord(round=number, rank=rank))
    from fedllm.programs.evaluate import evaluate_state

    arguments = ["evaluate", str(paths.root), "--round", str(number)]
    arguments += [] if rank is None else ["--rank", str(rank)]
    execution.say_where(config, "evaluate", f"fedllm {shlex.join(arguments)}")
    return _in_processes(
        config,
        arguments,
        lambda session, count: evaluate_state(paths, number, rank, session, count),
    )


def _is_shared(config: Config) -> bool:
    """Return whether tasks of the run's scheduler score: not in a job, which is one already."""
    if traits_of(config).tasks_run_in_caller or TaskEnvironment().job is not None:
        return False
    return not scoring_engine(engines_of(config)).divides_base


def _score_with_tasks(paths: RunPaths, config: Config, request: RequestRecord) -> EvaluationRecord:
    """Score with the workers that the configuration names, or with an array of jobs."""
    record = RunRecord.read(paths.run)
    commands = commands_of(config, record.own_code)
    require_accepted(paths.root, record.run_id, record.seals, commands)
    federation = plan_federation(config, PreparedRecord.read(paths.prepared))
    sha256 = AggregateRecord.read(paths.round(request.round).aggregate_record).sha256
    with (
        progress_bar() as count,
        closing(execution.make_scheduler(paths, config)) as scheduler,
    ):
        return AskedEvaluation(
            run=paths,
            place=asked_place(paths, request, federation, sha256),
            request=request,
            federation=federation,
            scheduler=scheduler,
            count=count,
        ).record()


def _score_adapter(folder: Path, config: Path, overrides: Sequence[str]) -> EvaluationRecord | None:
    from fedllm.programs.evaluate import evaluate_adapter

    loaded = configuration(config, overrides)
    arguments = ["evaluate", str(folder), "--config", str(config)]
    arguments += [word for override in overrides for word in ("--set", override)]
    execution.say_where(loaded, "evaluate", f"fedllm {shlex.join(arguments)}")
    prepared = _prepared(loaded, config)
    return _in_processes(
        loaded,
        arguments,
        lambda session, count: evaluate_adapter(folder, loaded, prepared, session, count),
    )


def _prepared(config: Config, file: Path) -> PreparedRecord:
    from fedllm.programs.prepare import prepare

    with progress_bar() as count:
        return prepare(config, cache_for(config, default_run_dir(file)), count=count)


def _in_processes(
    config: Config, arguments: Sequence[str], score: Callable[["Session", Count], EvaluationRecord]
) -> EvaluationRecord | None:
    """Score in as many processes of this host as divide the base; the first one has the record."""
    from fedllm.process.session import Session
    from fedllm.programs.companions import companions
    from fedllm.programs.scoring import scoring_task

    engine, session = scoring_engine(engines_of(config)), Session()
    with (
        progress_bar() as count,
        companions(engine.processes, [*_FEDLLM, *arguments]) as identity,
        scoring_task(session, identity if engine.divides_base else None, config),
    ):
        record = score(session, count)
    return record if identity.is_first else None
