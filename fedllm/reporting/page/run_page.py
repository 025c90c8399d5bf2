"""The report of a run, from its files: finished, unfinished or failed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import counted
from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.method_words import method_words
from fedllm.reporting.page.contents import Fact, PageSection, Report, table_of
from fedllm.reporting.page.cost_sections import cost_section, efficiency_section, task_section
from fedllm.reporting.page.quality_sections import (
    answer_section,
    category_section,
    kind_section,
    score_section,
    tier_section,
    training_section,
)
from fedllm.reporting.page.update_sections import partition_section, spectrum_section
from fedllm.reporting.results import run_rows
from fedllm.reporting.results.accounting import RoundAccount, round_accounts
from fedllm.reporting.results.cost_to_target import ScoreTarget
from fedllm.reporting.results.run_rows import Row, rounds_of
from fedllm.reporting.status.status import FAILED, RunStatus, run_status
from fedllm.reporting.tables import size
from fedllm.storage.kept_records import duration
from fedllm.storage.paths import AttemptPaths, RunPaths, attempts_of
from fedllm.storage.record_cache import RecordCache
from fedllm.storage.records import CollectionRecord, ErrorRecord, OutcomeRecord, RunRecord

# the group whose scores stand first: the most telling that was scored
_HEADLINE = ("unseen", "dev", "train")


def run_report(root: Path, targets: Sequence[ScoreTarget] = ()) -> Report:
    """Return the report of the run at `root`.

    Args:
        root: the run directory, as the user named it.
        targets: scores whose cost is wanted; none: shares of the fall of the loss.
    """
    paths = RunPaths(root=root.resolve())
    config, status = read_config(paths.config), run_status(paths)
    groups, accounts = run_rows.group_rows(paths), round_accounts(paths, status.rounds)
    clients = run_rows.client_rows(paths)
    found = {row["group"] for row in groups}
    group = next((name for name in _HEADLINE if name in found), _HEADLINE[-1])
    sections = [
        score_section(groups),
        answer_section(paths),
        category_section(run_rows.category_rows(paths), group),
        kind_section(run_rows.kind_rows(paths)),
        tier_section(run_rows.tier_rows(paths), group),
        training_section(clients),
        efficiency_section(paths, groups, accounts, group=group, targets=targets),
        cost_section(paths, accounts),
        spectrum_section(paths),
        partition_section(paths),
        task_section(run_rows.task_rows(paths)),
        _failure_section(paths, status),
        _identity_section(paths, config),
    ]
    return Report(
        title=f"Run {root.resolve().name}",
        subtitle=(
            f"{method_words(config)} · base {config.model.path} · data {config.data.path} "
            f"· run {status.run_id}"
        ),
        notices=list(_notices(status)),
        facts=list(_facts(status, groups, clients, accounts, group)),
        sections=[section for section in sections if section],
    )


def _notices(status: RunStatus) -> Iterator[str]:
    if status.state == "done":
        return
    done = f"{status.rounds_done} of {counted(status.rounds, 'round')} done"
    words = "failed" if status.state == FAILED else f"is not finished ({status.state})"
    yield f"This run {words}: {done}. The report shows what is recorded so far."
    if status.failure:
        failure = status.failure
        where = f"{failure.step} of round {failure.round}" if failure.round else failure.step
        yield f"Failed in {where}: {failure.message}"
        yield f"Remedy: {failure.remedy}"


def _facts(
    status: RunStatus,
    groups: Sequence[Row],
    clients: Sequence[Row],
    accounts: Sequence[RoundAccount],
    group: str,
) -> Iterator[Fact]:
    mine = [row for row in groups if row["group"] == group]
    if len(mine) > 1:
        for key, name in (("test_loss", "answer loss"), ("test_rouge_l", "Rouge-L")):
            yield Fact(
                label=f"{name}, {GROUP_WORDS[group]}",
                value=f"{mine[0][key]:.3f} → {mine[-1][key]:.3f}",
                note=f"round {mine[0]['round']} → {mine[-1]['round']}",
            )
        yield _spread_fact(clients, group, mine[0]["round"], mine[-1]["round"])
    yield Fact(label="rounds", value=f"{status.rounds_done} of {status.rounds}")
    if accounts:
        yield Fact(
            label="sent and received",
            value=size(sum(each.bytes_up + each.bytes_down for each in accounts)),
            note="all clients and rounds",
        )
        seconds = sum(account.client_seconds for account in accounts)
        yield Fact(label="training, all clients", value=duration(seconds))
    if status.gpu_hours:
        yield Fact(label="GPUs, allocated", value=f"{status.gpu_hours:.2f} h")


def _spread_fact(clients: Sequence[Row], group: str, first: int, last: int) -> Fact:
    """Return how many clients are better at the end than before training."""
    losses: dict[str, dict[int, float]] = {}
    for row in clients:
        if row.get("group") == group and row["test_loss"] is not None:
            losses.setdefault(row["client"], {})[row["round"]] = row["test_loss"]
    pairs = [(found[first], found[last]) for found in losses.values() if {first, last} <= {*found}]
    better = sum(after < before for before, after in pairs)
    return Fact(label="clients with a lower loss", value=f"{better} of {len(pairs)}")


def _failure_section(paths: RunPaths, status: RunStatus) -> PageSection:
    counts: Counter[tuple[int, str, str]] = Counter()
    for each in rounds_of(paths):
        collection = CollectionRecord.find(each.collection)
        if collection:
            for reason in collection.failed.values():
                counts[each.number, "client left out", reason.split(" (log ")[0]] += 1
            missed = len(collection.missing)
            counts[each.number, "client without an update", "not there when collected"] += missed
        for attempt in attempts_of(each.attempt):
            for what, reason in _attempt_failures(attempt):
                counts[each.number, what, reason] += 1
    rows: list[Row] = [
        {"round": number, "what": what, "reason": reason, "count": count}
        for (number, what, reason), count in sorted(counts.items())
        if count
    ]
    if status.failure:
        failure = status.failure
        rows.append(
            {"round": failure.round, "what": f"run failed in {failure.step}"}
            | {"reason": failure.message, "count": 1}
        )
    return PageSection(
        name="failures",
        title="Failures",
        words="Equal failures of a round are one line with a count." if rows else "None.",
        tables=table_of("failures", "Failures", rows, is_open=True),
    )


def _attempt_failures(attempt: AttemptPaths) -> Iterator[tuple[str, str]]:
    outcome = OutcomeRecord.find(attempt.outcome)
    for task, ending in outcome.endings.items() if outcome else ():
        why = outcome.cancelled.get(task) if outcome else None
        code = f", exit code {ending.exit_code}" if ending.exit_code else ""
        yield "task ended", why or f"{ending.state}{code}"
    for error in RecordCache().all(ErrorRecord, attempt.task_errors()):
        yield "error in a task", error.message


def _identity_section(paths: RunPaths, config: Config) -> PageSection:
    record = RunRecord.read(paths.run)
    versions = [{"package": name, "version": text} for name, text in record.versions.items()]
    environments = _environments(paths)
    changes = [change.model_dump() for change in record.changes]
    return PageSection(
        name="configuration",
        title="Configuration and versions",
        words=(
            f"Seed {config.seed}; fingerprint of the configuration "
            f"{record.result_fingerprint[:12]}. Every key as the run used it, defaults included."
        ),
        verbatim=paths.config.read_text(encoding="utf-8"),
        tables=[
            *table_of("versions", "Versions", versions, is_open=True),
            *table_of("environments", "Where clients trained", environments),
            *table_of("changes", "Keys that changed on resume", changes),
        ],
    )


def _environments(paths: RunPaths) -> list[Row]:
    found: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for each in rounds_of(paths):
        collection = CollectionRecord.find(each.collection)
        for environment in collection.environments if collection else ():
            found.setdefault(tuple(sorted(environment.items())), []).append(each.number)
    names = list(dict.fromkeys(name for key in found for name, _ in key))
    return [
        {"rounds": f"{min(rounds)}-{max(rounds)}"} | {name: dict(key).get(name) for name in names}
        for key, rounds in found.items()
    ]
