"""Sections on cost: bytes, operations, seconds, memory; quality against them; tasks over time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.page.contents import (
    BarChart,
    Chart,
    LineChart,
    PageSection,
    Point,
    TaskBar,
    TaskChart,
    table_of,
)
from fedllm.reporting.results.accounting import RoundAccount, TierAccount, tier_accounts
from fedllm.reporting.results.cost_to_target import ScoreTarget, cost_to_target
from fedllm.reporting.results.run_rows import Row, rounds_of
from fedllm.storage.kept_records import ClientsRecord, duration
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import PreparedRecord

_MIB = 1024.0**2
_MAX_LANES = 40
# of the whole fall of the loss
_SHARES = (0.5, 0.8, 1.0)
_UNITS = (("hours", 3600.0), ("minutes", 60.0))


def cost_section(paths: RunPaths, accounts: Sequence[RoundAccount]) -> PageSection:
    """Return what rounds and tiers took."""
    tiers = _tiers(paths)
    rows = [
        {key: value for key, value in dataclasses.asdict(account).items() if key != "stages"}
        | {f"{stage} stage": account.stages.get(stage) for stage in _stages(accounts)}
        for account in accounts
    ]
    return PageSection(
        name="cost",
        title="Cost",
        words=(
            "Bytes are those of all clients: up as their updates lie in files, down as the "
            "adapters that they received in float32; the columns 16bit count two bytes per value. "
            "Operations are 4 per weight of the base and 6 per weight of the adapter for every "
            "token; padded ones are those of a loop that pads rows to the longest of a step. "
            "Memory is the peak of the process that trained the client, base included."
            if accounts
            else "No cost was recorded yet."
        ),
        charts=[*_tier_charts(tiers), *_stage_chart(accounts)],
        tables=[
            *table_of("tiers-cost", "Per tier", [dataclasses.asdict(tier) for tier in tiers]),
            *table_of("rounds-cost", "Per round", rows),
        ],
    )


def _tiers(paths: RunPaths) -> list[TierAccount]:
    prepared = PreparedRecord.find(paths.prepared)
    records = [ClientsRecord.find(each.clients) for each in rounds_of(paths)]
    clients = [client for record in records if record for client in record.clients]
    return tier_accounts(clients, prepared.model_parameters) if prepared else []


def _tier_charts(tiers: Sequence[TierAccount]) -> Iterator[Chart]:
    if not tiers:
        return
    for name, title, unit, values in (
        ("memory", "Peak memory", "MiB", [tier.peak_memory_bytes / _MIB for tier in tiers]),
        ("seconds", "Training of a client", "seconds, mean", [tier.seconds for tier in tiers]),
        ("sent", "An update", "MiB, mean", [tier.bytes_up / _MIB for tier in tiers]),
    ):
        labels = [f"{tier.tier} (rank {tier.rank})" for tier in tiers]
        bars = dict(zip(labels, values, strict=True))
        yield BarChart(
            name=f"tiers-{name}",
            title=f"{title}, by tier",
            text=", ".join(f"{label}: {value:.3g} {unit}" for label, value in bars.items()),
            values=bars,
            x_label=unit,
        )


def _stages(accounts: Sequence[RoundAccount]) -> list[str]:
    return list(dict.fromkeys(stage for account in accounts for stage in account.stages))


def _stage_chart(accounts: Sequence[RoundAccount]) -> Iterator[Chart]:
    stages = _stages(accounts)
    if stages:
        yield LineChart(
            name="stages",
            title="Time by stage",
            text="seconds from the submission of a stage's first task to the end of its last one, "
            "by round",
            series={
                stage: [(account.round, account.stages.get(stage)) for account in accounts]
                for stage in stages
            },
            x_label="round",
            y_label="seconds, waiting included",
            whole_x=True,
            from_zero=True,
        )


def efficiency_section(
    paths: RunPaths,
    groups: Sequence[Row],
    accounts: Sequence[RoundAccount],
    *,
    group: str,
    targets: Sequence[ScoreTarget],
) -> PageSection | None:
    """Return quality against bytes and seconds, and the cost of targets; None if unknown."""
    mine = [row for row in groups if row["group"] == group]
    if not accounts or len(mine) < 2:
        return None
    wanted = targets or _default_targets(mine, group)
    rows = target_rows(paths, wanted, accounts[-1].round)
    gpu = any(account.gpu_seconds for account in accounts)
    kind, seconds = ("GPU", _gpu_seconds) if gpu else ("client", _client_seconds)
    unit, unit_seconds = _unit_of(sum(map(seconds, accounts)))
    times = {n: total / unit_seconds for n, total in _cumulative(accounts, seconds).items()}
    return PageSection(
        name="efficiency",
        title="Quality against cost",
        words=(
            "Bytes both ways and time add up from the first round on. The time is that of "
            + ("allocated GPUs." if gpu else "training clients, summed.")
            + ("" if targets else " The targets are shares of the whole fall of the loss.")
        ),
        charts=[
            _against(mine, group, "bytes", "MiB up and down", _cumulative(accounts, _mebibytes)),
            _against(mine, group, "time", f"{kind} {unit}", times),
        ],
        tables=table_of("targets", "What a target took", rows, is_open=True),
    )


def _mebibytes(account: RoundAccount) -> float:
    return (account.bytes_up + account.bytes_down) / _MIB


def _gpu_seconds(account: RoundAccount) -> float:
    return account.gpu_seconds


def _client_seconds(account: RoundAccount) -> float:
    return account.client_seconds


def _unit_of(seconds: float) -> tuple[str, float]:
    """Return the unit of time for an axis that long, and its seconds."""
    return next(((unit, size) for unit, size in _UNITS if seconds > 3 * size), ("seconds", 1.0))


def _cumulative(
    accounts: Sequence[RoundAccount], amount: Callable[[RoundAccount], float]
) -> dict[int, float]:
    """Return round -> the amount of all rounds up to it; round 0 took nothing."""
    sums = accumulate(map(amount, accounts), initial=0.0)
    return dict(zip([0, *(account.round for account in accounts)], sums, strict=True))


def _against(
    rows: Sequence[Row], group: str, name: str, label: str, amounts: Mapping[int, float]
) -> LineChart:
    points: list[Point] = [
        (amounts[row["round"]], row["test_loss"]) for row in rows if row["round"] in amounts
    ]
    return LineChart(
        name=f"loss-against-{name}",
        title=f"Answer loss against {name}",
        text=f"answer loss of {GROUP_WORDS[group]} after {label}, one point per evaluated round",
        series={GROUP_WORDS[group]: points},
        x_label=label,
        y_label="answer loss",
    )


def _default_targets(rows: Sequence[Row], group: str) -> list[ScoreTarget]:
    first, best = rows[0]["test_loss"], min(row["test_loss"] for row in rows)
    return [
        ScoreTarget(group=group, metric="loss", value=first - share * (first - best))
        for share in _SHARES
    ]


def target_rows(paths: RunPaths, targets: Sequence[ScoreTarget], rounds: int) -> list[Row]:
    """Return a row per target: what it took, or that it was not reached."""
    rows: list[Row] = []
    for target in targets:
        cost = cost_to_target(paths, rounds, target)
        rows.append(
            {
                "clients": GROUP_WORDS[target.group] if target.group else "all clients",
                "target": f"{target.metric} {target.value:.4g}",
                "rounds": cost.round if cost else "not reached",
                "reached": cost.value if cost else None,
                "MiB": cost.num_bytes / _MIB if cost else None,
                "MiB at 16 bit": cost.num_bytes_16bit / _MIB if cost else None,
                "client hours": cost.client_hours if cost else None,
                "GPU hours": cost.gpu_hours if cost else None,
                "server hours": cost.server_hours if cost else None,
            }
        )
    return rows


def task_section(tasks: Sequence[Row]) -> PageSection | None:
    """Return the newest tasks over time, waiting and running; None if no task began."""
    if not tasks:
        return None
    shown = sorted(tasks, key=lambda row: row["submitted"])[-_MAX_LANES:]
    origin = min(row["submitted"] for row in shown)
    span = max(row["ended"] for row in shown) - origin
    unit, seconds = _unit_of(span)
    bars = [
        TaskBar(
            label=f"r{row['round']} {row['task']}",
            kind=row["kind"],
            submitted=(row["submitted"] - origin) / seconds,
            started=(row["started"] - origin) / seconds,
            ended=(row["ended"] - origin) / seconds,
        )
        for row in shown
    ]
    waited = sum(row["started"] - row["submitted"] for row in tasks)
    ran = sum(row["ended"] - row["started"] for row in tasks)
    hidden = len(tasks) > len(shown)
    rest = f" The chart has the last {len(shown)} of {len(tasks)}." if hidden else ""
    return PageSection(
        name="tasks",
        title="Tasks",
        words=(
            f"All tasks together waited {duration(waited)} and ran {duration(ran)}. A task that "
            f"was requeued is shown with its last start.{rest}"
        ),
        charts=[
            TaskChart(
                name="tasks",
                title="Tasks over time",
                text="one lane per task: light while it waited, then coloured while it ran",
                bars=bars,
                unit=unit,
            )
        ],
        tables=table_of("tasks", "Every task", tasks),
    )
