"""Gains of a run: whether training helped, for each group of clients and its tiers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import stdev

from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.results.metrics import Mean, mean_scores
from fedllm.reporting.tables import number, text_table
from fedllm.storage.records import ClientScores, EvaluationRecord, Scores

# the most telling first
GROUPS = {group: GROUP_WORDS[group] for group in ("unseen", "new_category", "dev", "train")}


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Scores of some clients before and after training; each client counts once.

    `before` is None, and no client is counted, unless all were scored before on the same rows.
    `loss_changes` and `rouge_changes` are those of the single clients.
    """

    name: str
    after: Mean
    before: Mean | None
    loss_changes: tuple[float, ...] = ()
    rouge_changes: tuple[float, ...] = ()


def gains_by_group(base: EvaluationRecord, last: EvaluationRecord) -> dict[str, list[Gain]]:
    """Return for each group that of all its clients, then that of its clients in each tier."""
    before = {client.client: client.as_deployed for client in base.clients}
    found: dict[str, list[Gain]] = {}
    for group, name in GROUPS.items():
        clients = [client for client in last.clients if client.group == group]
        if clients:
            found[group] = list(_gains(name, clients, before))
    return found


def _gains(name: str, clients: Sequence[ClientScores], before: dict[str, Scores]) -> Iterator[Gain]:
    tiers = sorted({client.tier for client in clients})
    yield _gain(name, clients, before)
    if len(tiers) > 1:
        for tier in tiers:
            members = [client for client in clients if client.tier == tier]
            yield _gain(f"  {tier}", members, before)


def _gain(name: str, clients: Sequence[ClientScores], before: dict[str, Scores]) -> Gain:
    after = mean_scores(client.as_deployed for client in clients)
    assert after is not None, "a group has clients"
    pairs = [
        (was, client.as_deployed)
        for client in clients
        if (was := before.get(client.client)) and was.rows == client.as_deployed.rows
    ]
    if len(pairs) < len(clients):
        return Gain(name=name, after=after, before=None)
    return Gain(
        name=name,
        after=after,
        before=mean_scores(was for was, _ in pairs),
        loss_changes=tuple(now.loss - was.loss for was, now in pairs),
        rouge_changes=tuple(now.rouge_l - was.rouge_l for was, now in pairs),
    )


def verdicts(gains: dict[str, list[Gain]], *, first: str, last: int) -> list[str]:
    """Return for each group in a sentence how many of its clients became better and worse."""
    lines = []
    for of_group in gains.values():
        whole = of_group[0]
        if whole.before is None:
            continue
        losses, rouges = whole.loss_changes, whole.rouge_changes
        lines.append(
            f"{whole.name}, {first} -> round {last}: answer loss lower for "
            f"{sum(change < 0 for change in losses)} of {len(losses)}; Rouge-L higher for "
            f"{sum(change > 0 for change in rouges)}, lower for "
            f"{sum(change < 0 for change in rouges)}"
        )
    return lines


def gains_table(gains: dict[str, list[Gain]], *, first: str, last: int) -> str:
    """Return the means before and after, with the change and its deviation over clients."""
    rows = [
        [
            gain.name.removesuffix(" clients"),
            str(gain.after.clients),
            _arrow(gain, "loss"),
            _change(gain.loss_changes),
            _arrow(gain, "rouge_l"),
            _change(gain.rouge_changes),
            _arrow(gain, "exact_match"),
        ]
        for of_group in gains.values()
        for gain in of_group
    ]
    title = (
        f"scores on test rows, {first} -> round {last}: means over clients, and the change with "
        "its standard deviation over them"
    )
    header = ["clients", "number", "answer loss", "change", "Rouge-L", "change", "exact match"]
    return text_table(title, header, rows)


def _arrow(gain: Gain, name: str) -> str:
    before = f"{number(getattr(gain.before, name))} -> " if gain.before else ""
    return before + number(getattr(gain.after, name))


def _change(changes: Sequence[float]) -> str:
    if not changes:
        return ""
    mean = sum(changes) / len(changes)
    return f"{mean:+.3f} ± {stdev(changes):.3f}" if len(changes) > 1 else f"{mean:+.3f}"
