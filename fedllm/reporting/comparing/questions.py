"""The two questions of a comparison, which are never mixed.

*These models*: are the models that were trained better on clients like these? Differences per
client, averaged over seeds; whole categories are drawn. *These methods*: would the method be better
with another seed too? Differences per seed, on common random numbers. Pure.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedllm.reporting.comparing.scored_runs import ScoredArms, ScoredRun, Values
from fedllm.reporting.results.task_kinds import kinds_of
from fedllm.statistics.intervals import Interval, cluster_bootstrap, two_level_bootstrap
from fedllm.statistics.paired_tests import PairedTest, holm, sign_flip_test, signed_rank_test

FEWEST_SEEDS = 6
TOO_FEW_SEEDS = "too few seeds for a claim"
Role = Literal["primary", "secondary", "noise floor"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A contrast on an endpoint: the first arm minus the second.

    Attributes:
        contrast: the two arms.
        endpoint: the endpoint.
        role: whether it is the primary one, one of the others, or the A/A arm.
        count: seeds of a question about methods; clients of one about models.
        difference: the mean difference.
        interval: its 95 % interval; None where nothing can be drawn.
        test: the test; None where too little was seen for one.
        adjusted: its p-value; of secondary ones adjusted for their number (Holm).
        why: why there is no test.
    """

    contrast: tuple[str, str]
    endpoint: str
    role: Role
    count: int
    difference: float
    interval: Interval | None
    test: PairedTest | None
    adjusted: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class CategoryAnswer:
    """A category, or a kind of them, under the primary contrast; few clients have no test.

    `noise` is the difference of the A/A arm there; None: there is no such arm.
    """

    category: str
    clients: int
    difference: float
    noise: float | None
    test: PairedTest | None
    adjusted: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to both questions, and to that about models by category and kind of tasks."""

    models: tuple[Answer, ...]
    methods: tuple[Answer, ...]
    categories: tuple[CategoryAnswer, ...]
    kinds: tuple[CategoryAnswer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Contrast:
    arms: tuple[str, str]
    role: Role


def answer(scored: ScoredArms) -> Answers:
    """Answer both questions for all contrasts and endpoints."""
    models, methods = [], []
    for contrast in _contrasts(scored):
        for endpoint in scored.comparison.endpoints:
            role = contrast.role
            if role == "primary" and endpoint != scored.comparison.endpoint:
                role = "secondary"
            first, second = (scored.arms[arm] for arm in contrast.arms)
            pairs = _pairs(first, second, by_seed=contrast.role != "noise floor")
            models.append(_of_models(scored, contrast.arms, endpoint, role, pairs))
            methods.append(_of_methods(scored, contrast.arms, endpoint, role, pairs))
    return Answers(
        models=_adjusted(models, is_named=scored.is_named),
        methods=_adjusted(methods, is_named=scored.is_named),
        categories=_by_category(scored),
        kinds=_by_kind(scored),
    )


def _contrasts(scored: ScoredArms) -> list[_Contrast]:
    """Return the primary contrast, every other arm against its second one, and the A/A arm."""
    first, second = scored.contrast
    noise = scored.noise[0] if scored.noise else ""
    others = [arm for arm in scored.arms if arm not in {first, second, noise}]
    contrasts = [_Contrast(arms=(first, second), role="primary")]
    contrasts += [_Contrast(arms=(arm, second), role="secondary") for arm in others]
    if scored.noise:
        contrasts.append(_Contrast(arms=scored.noise, role="noise floor"))
    return contrasts


def _pairs(
    first: Sequence[ScoredRun], second: Sequence[ScoredRun], *, by_seed: bool
) -> list[tuple[ScoredRun, ScoredRun]]:
    """Return the pairs of runs: of one seed, or, where seeds differ on purpose, in their order."""
    if not by_seed:
        return list(zip(first, second, strict=False))
    of_seed = {run.seed: run for run in second}
    return [(run, of_seed[run.seed]) for run in first if run.seed in of_seed]


def _differences(pair: tuple[ScoredRun, ScoredRun], endpoint: str) -> dict[str, float]:
    first, second = (run.values[endpoint] for run in pair)
    return {client: first[client] - second[client] for client in first if client in second}


def _of_models(
    scored: ScoredArms,
    arms: tuple[str, str],
    endpoint: str,
    role: Role,
    pairs: Sequence[tuple[ScoredRun, ScoredRun]],
) -> Answer:
    differences = _client_differences(scored, arms, endpoint, pairs)
    clusters = _cluster_means(differences, scored.clusters)
    enough = len(clusters) >= scored.comparison.min_clients
    test = signed_rank_test(list(clusters.values())) if enough else None
    return Answer(
        contrast=arms,
        endpoint=endpoint,
        role=role,
        count=len(differences),
        difference=statistics.fmean(differences.values()),
        interval=cluster_bootstrap(differences, scored.clusters),
        test=test,
        adjusted=test.p if test else None,
        why="" if test else "too few categories",
    )


def _client_differences(
    scored: ScoredArms,
    arms: tuple[str, str],
    endpoint: str,
    pairs: Sequence[tuple[ScoredRun, ScoredRun]],
) -> dict[str, float]:
    """Return client -> difference averaged over the common seeds, or over all if none is."""
    if pairs:
        of_seeds = [_differences(pair, endpoint) for pair in pairs]
        return {c: statistics.fmean(seed[c] for seed in of_seeds) for c in of_seeds[0]}
    first, second = (_mean_values(scored.arms[arm], endpoint) for arm in arms)
    return {client: first[client] - second[client] for client in first}


def _mean_values(runs: Sequence[ScoredRun], endpoint: str) -> dict[str, float]:
    clients = runs[0].values[endpoint]
    return {c: statistics.fmean(run.values[endpoint][c] for run in runs) for c in clients}


def _cluster_means(values: Values, clusters: Mapping[str, str]) -> dict[str, float]:
    members: dict[str, list[float]] = {}
    for client, value in values.items():
        members.setdefault(clusters[client], []).append(value)
    return {cluster: statistics.fmean(of_cluster) for cluster, of_cluster in members.items()}


def _of_methods(
    scored: ScoredArms,
    arms: tuple[str, str],
    endpoint: str,
    role: Role,
    pairs: Sequence[tuple[ScoredRun, ScoredRun]],
) -> Answer:
    of_seeds = [_differences(pair, endpoint) for pair in pairs]
    means = [statistics.fmean(differences.values()) for differences in of_seeds]
    enough = len(means) >= FEWEST_SEEDS and role != "noise floor"
    test = sign_flip_test(means) if enough else None
    why = "" if enough or role == "noise floor" else TOO_FEW_SEEDS
    return Answer(
        contrast=arms,
        endpoint=endpoint,
        role=role,
        count=len(means),
        difference=statistics.fmean(means) if means else math.nan,
        interval=two_level_bootstrap(of_seeds, scored.clusters) if of_seeds else None,
        test=test,
        adjusted=test.p if test else None,
        why=why if means else "no common seed",
    )


def _adjusted(answers: Sequence[Answer], *, is_named: bool) -> tuple[Answer, ...]:
    """Adjust all p-values but that of a primary contrast that was named; the A/A arm has none."""
    answers = [
        replace(a, test=None, adjusted=None) if a.role == "noise floor" else a for a in answers
    ]
    family = {
        place: a.test.p
        for place, a in enumerate(answers)
        if a.test and not (a.role == "primary" and is_named)
    }
    adjusted = holm(family)
    return tuple(
        replace(a, adjusted=adjusted[place]) if place in adjusted else a
        for place, a in enumerate(answers)
    )


def _by_category(scored: ScoredArms) -> tuple[CategoryAnswer, ...]:
    """Return the primary contrast by category; none where every client is its own."""
    endpoint = scored.comparison.endpoint
    first, second = (scored.arms[arm] for arm in scored.contrast)
    pairs = _pairs(first, second, by_seed=True)
    differences = _client_differences(scored, scored.contrast, endpoint, pairs)
    members: dict[str, list[float]] = {}
    for client, value in differences.items():
        members.setdefault(scored.clusters[client], []).append(value)
    if len(members) == len(differences):
        return ()
    noise = _noise_by_category(scored)
    found = [
        CategoryAnswer(
            category=category,
            clients=len(values),
            difference=statistics.fmean(values),
            noise=noise.get(category),
            test=signed_rank_test(values) if len(values) >= scored.comparison.min_clients else None,
        )
        for category, values in sorted(members.items())
    ]
    adjusted = holm({a.category: a.test.p for a in found if a.test})
    return tuple(replace(a, adjusted=adjusted.get(a.category)) for a in found)


def _by_kind(scored: ScoredArms) -> tuple[CategoryAnswer, ...]:
    """Return the primary contrast by kind of tasks: the means of its clients, without a test."""
    first, second = (scored.arms[arm] for arm in scored.contrast)
    pairs = _pairs(first, second, by_seed=True)
    differences = _client_differences(scored, scored.contrast, scored.comparison.endpoint, pairs)
    noise = _noise_of_clients(scored)
    return tuple(
        CategoryAnswer(
            category=kind,
            clients=len(clients),
            difference=statistics.fmean(differences[client] for client in clients),
            noise=statistics.fmean(noise[client] for client in clients) if noise else None,
            test=None,
        )
        for kind, clients in kinds_of(scored.categories, differences).items()
    )


def _noise_by_category(scored: ScoredArms) -> dict[str, float]:
    return _cluster_means(_noise_of_clients(scored), scored.clusters)


def _noise_of_clients(scored: ScoredArms) -> dict[str, float]:
    if scored.noise is None:
        return {}
    first, second = (scored.arms[arm] for arm in scored.noise)
    pairs = _pairs(first, second, by_seed=False)
    return _client_differences(scored, scored.noise, scored.comparison.endpoint, pairs)


def worst_tenth(runs: Sequence[ScoredRun], endpoint: str) -> float:
    """Return the mean over the worst tenth of the clients, at least one, averaged over seeds."""
    values = sorted(_mean_values(runs, endpoint).values(), reverse=endpoint.endswith("_loss"))
    return statistics.fmean(values[: max(1, math.ceil(len(values) / 10))])
