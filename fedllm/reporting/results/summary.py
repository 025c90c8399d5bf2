"""Summary of a run as tables, from its records."""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence

from fedllm.config.loading import read_config
from fedllm.errors import counted
from fedllm.reporting.method_words import method_words, privacy_words
from fedllm.reporting.results.gains import GROUPS, gains_by_group, gains_table, verdicts
from fedllm.reporting.results.metrics import Mean, by_kind, by_tier, mean_scores, other_means
from fedllm.reporting.results.spectra import rank_table, spectra_table
from fedllm.reporting.tables import number, size, text_table
from fedllm.storage.paths import RunPaths, shown_path
from fedllm.storage.records import (
    AggregateRecord,
    ClientScores,
    CohortRecord,
    EvaluationRecord,
    ModuleRecord,
    PreparedRecord,
    SentFactors,
    StopRecord,
)

_FLOAT32_BYTES = 4


def scores_by_group(clients: Sequence[ClientScores]) -> dict[str, Mean]:
    """Return the mean scores as deployed of each group of clients, and of its tiers.

    Trained, dev and unseen clients are never in one mean.
    """
    means: dict[str, Mean] = {}
    for group, name in GROUPS.items():
        members = [client for client in clients if client.group == group]
        tiers = by_tier(members)
        if whole := mean_scores(client.as_deployed for client in members):
            means[name] = whole
        if len(tiers) > 1:
            means |= {f"{name}, {tier}": mean for tier, mean in tiers.items()}
    return means


def last_evaluation(paths: RunPaths, rounds: int) -> EvaluationRecord | None:
    """Return the newest evaluation of a run."""
    for round_number in range(rounds, -1, -1):
        evaluation = EvaluationRecord.find(paths.round(round_number).evaluation_record)
        if evaluation:
            return evaluation
    return None


def update_bytes(
    ranks: Mapping[str, int], modules: Mapping[str, ModuleRecord], sent: SentFactors = "AB"
) -> int:
    """Return the bytes of the factors that a client sends per round, in float32."""
    sides = {name: {"A": m.in_features, "B": m.out_features} for name, m in modules.items()}
    return _FLOAT32_BYTES * sum(
        rank * sides[name][factor] for name, rank in ranks.items() for factor in sent
    )


def run_summary(paths: RunPaths, best: Collection[int] = ()) -> str:
    """Return what `fedllm run` prints at its end: did it help, where is the adapter, what next.

    `best` is the round in which dev clients are best, if it is known.
    """
    config = read_config(paths.config)
    root = shlex.quote(shown_path(paths.root))
    parts = [f"run {root} ({method_words(config)}), {counted(config.rounds, 'round')}"]
    base = EvaluationRecord.find(paths.round(0).evaluation_record)
    last = last_evaluation(paths, config.rounds)
    if base and last and last.round:
        first = "start" if config.model.adapter else "base"
        gains = gains_by_group(base, last)
        parts.append("\n".join(verdicts(gains, first=first, last=last.round)))
        parts.append(gains_table(gains, first=first, last=last.round))
    else:
        parts.append("did it help? not known: evaluation.every is 0, or no round was evaluated")
    aggregated = AggregateRecord.find(paths.round(config.rounds).aggregate_record)
    if aggregated and aggregated.privacy:
        parts.append(privacy_words(aggregated.privacy, config.rounds))
    stop = StopRecord.find(paths.stop)
    if stop and stop.round == config.rounds:
        parts.append(
            f"stopped after round {stop.round}: dev clients are best in round {stop.best_round}"
        )
    parts.append("\n".join(_next_lines(paths, root, best)))
    return "\n\n".join(filter(None, parts))


def _next_lines(paths: RunPaths, root: str, best: Collection[int]) -> Iterator[str]:
    state = paths.newest_state()
    if state is None:
        return
    yield f"adapter: round {state.number}, in {shown_path(state.global_state)}"
    if best and min(best) != state.number:
        yield (
            f"  dev clients are better in round {min(best)}: add --round best to export, and to "
            "evaluate"
        )
    yield "next:"
    commands = {
        f"fedllm export {root} --out adapter": "an adapter for PEFT, vLLM and others",
        f"fedllm report {root}": "a page with curves, tiers, costs and answers",
        f"fedllm status {root} --spectra": "what adapters of each rank keep of the update",
    }
    width = max(map(len, commands))
    yield from (f"  {command:<{width}}  {what}" for command, what in commands.items())


def spectra_text(paths: RunPaths) -> str:
    """Return how the aggregated updates spread, and what each rank keeps and sends."""
    config = read_config(paths.config)
    state = paths.newest_state()
    record = AggregateRecord.find(state.aggregate_record) if state else None
    if state is None or record is None or not record.modules:
        return "no round was aggregated yet"
    parts = [rank_table(record), spectra_table(paths, config.rounds)]
    cohort = CohortRecord.find(state.cohort)
    prepared = PreparedRecord.find(paths.prepared)
    if cohort and prepared:
        parts.append(bytes_table(cohort, prepared))
    return "\n\n".join(filter(None, parts))


def bytes_table(cohort: CohortRecord, prepared: PreparedRecord) -> str:
    """Return a table of the bytes that a client of each tier sends per round."""
    rows = [
        [tier, _span(ranks), size(update_bytes(ranks, prepared.modules, cohort.sent))]
        for tier, ranks in cohort.ranks.items()
    ]
    return text_table("what a client sends per round", ["tier", "ranks", "bytes"], rows)


def _span(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return str(low) if low == high else f"{low}-{high}"


def score_table(
    title: str, record: EvaluationRecord, categories: Mapping[str, str] | None = None
) -> str:
    """Return a table of one evaluation, per group of clients and tier, and in other ways.

    Args:
        title: what was scored.
        record: the evaluation.
        categories: client -> category; None: not known.
    """
    groups = dict(scores_by_group(record.clients))
    for group, words in GROUPS.items():
        members = [client for client in record.clients if client.group == group]
        for name, mean in other_means(members, categories or {}).items():
            if mean and (categories or name != "category_mean"):
                groups[f"{words}, {name.replace('_', ' ')}"] = mean
        for kind, mean in by_kind(members, categories or {}).get(group, {}).items():
            groups[f"{words}, {kind}"] = mean
    rows = [
        [name, str(m.clients), number(m.loss), number(m.rouge_l), number(m.exact_match)]
        for name, m in groups.items()
    ]
    header = ["clients", "number", "answer loss", "Rouge-L", "exact match"]
    return text_table(f"{title}, mean over clients", header, rows)
