"""Comparisons: two questions, each with its own numbers, worked out by hand."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fedllm.config.loading import dump_config
from fedllm.config.sweep_files import ComparisonSection, endpoint_parts
from fedllm.errors import UserError
from fedllm.planning.sweeps.sweep_runs import NOISE_ARM
from fedllm.reporting.comparing.comparison_tables import comparison_of, comparison_text
from fedllm.reporting.comparing.questions import TOO_FEW_SEEDS, Answer, answer, worst_tenth
from fedllm.reporting.comparing.scored_runs import ScoredArms, ScoredRun, read_scored_arms
from fedllm.reporting.comparing.spending import (
    BYTES,
    SpentRound,
    budgets_of,
    common_amount,
    value_within,
)
from fedllm.storage.paths import RunPaths, SweepPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import ClientScores, EvaluationRecord, Scores
from fedllm.storage.sweep_records import SweepRecord, SweepRunRecord
from tests.planning.federations import client, config_of, prepared_of
from tests.reporting.runs import begin

CLIENTS = [f"c{n}" for n in range(12)]
# six categories of two clients each
CATEGORIES = {c: f"k{n // 2}" for n, c in enumerate(CLIENTS)}


def run_of(arm: str, seed: int, loss: float, *, spread: float = 0.0) -> ScoredRun:
    """Return a run whose clients have `loss`, and more by category."""
    values = {c: loss + spread * int(CATEGORIES[c][1:]) for c in CLIENTS}
    spent = SpentRound(round=1, value=loss, num_bytes=2**20, client_seconds=1.0, parameters=1e6)
    return ScoredRun(
        root=Path(f"{arm}/{seed}"),
        arm=arm,
        seed=seed,
        values={"unseen_loss": values, "unseen_rouge_l": dict.fromkeys(CLIENTS, 0.5)},
        spent=(spent,),
    )


def arms_of(
    arms: Mapping[str, Sequence[ScoredRun]],
    *,
    noise: tuple[str, str] | None = None,
    is_named: bool = True,
    clusters: Mapping[str, str] = CATEGORIES,
    categories: Mapping[str, str] = CATEGORIES,
) -> ScoredArms:
    first, second = list(arms)[:2]
    return ScoredArms(
        arms={arm: tuple(runs) for arm, runs in arms.items()},
        clusters=clusters,
        categories=categories,
        comparison=ComparisonSection(),
        contrast=(first, second),
        is_named=is_named,
        noise=noise,
    )


def two_arms(seeds: int, gains: Sequence[float]) -> ScoredArms:
    """Return arms whose difference under seed n is `gains[n]`, the same for every client."""
    return arms_of(
        {
            "a": [run_of("a", n, 2.0 + gains[n]) for n in range(seeds)],
            "b": [run_of("b", n, 2.0) for n in range(seeds)],
        }
    )


def primary(answers: Sequence[Answer]) -> Answer:
    (found,) = [a for a in answers if a.role == "primary"]
    return found


def test_models_are_compared_by_client_and_methods_by_seed() -> None:
    answers = answer(two_arms(6, [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]))
    models, methods = primary(answers.models), primary(answers.methods)
    assert (models.count, methods.count) == (12, 6)
    assert models.difference == pytest.approx(-0.35)
    assert methods.difference == pytest.approx(-0.35)
    # averaged over seeds, all clients differ alike; the seeds do not
    assert models.interval is not None and methods.interval is not None
    assert models.interval.high - models.interval.low == pytest.approx(0.0)
    assert methods.interval.high - methods.interval.low > 0.1
    # six categories of one sign, and six seeds of one sign: the least that either test can give
    assert models.test is not None and methods.test is not None
    assert models.test.p == methods.test.p == 2 / 64
    assert models.test.pairs == 6


def test_below_six_seeds_there_is_an_interval_and_no_test() -> None:
    methods = primary(answer(two_arms(5, [-0.1, -0.2, -0.3, -0.4, -0.5])).methods)
    assert methods.test is None and methods.why == TOO_FEW_SEEDS
    assert methods.interval is not None and methods.interval.high < 0
    one = primary(answer(two_arms(1, [-0.1])).methods)
    assert one.interval is None and one.difference == pytest.approx(-0.1)


def test_only_what_is_not_the_named_primary_is_adjusted() -> None:
    arms = {
        name: [run_of(name, n, loss + 0.01 * n) for n in range(6)]
        for name, loss in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    }
    answers = answer(arms_of(arms)).methods
    # c - b on the loss: 2/64, times three others (both contrasts on Rouge-L, this one)
    adjusted = {(a.contrast, a.endpoint): a.adjusted for a in answers}
    assert adjusted[("a", "b"), "unseen_loss"] == 2 / 64
    assert adjusted[("c", "b"), "unseen_loss"] == 6 / 64
    assert adjusted[("a", "b"), "unseen_rouge_l"] == 1.0
    unnamed = answer(arms_of(arms, is_named=False)).methods
    assert {a.adjusted for a in unnamed if a.endpoint == "unseen_loss"} == {8 / 64}


def test_the_noise_floor_is_shown_with_the_rest_and_never_tested() -> None:
    arms = {
        "a": [run_of("a", n, 1.0) for n in range(6)],
        "b": [run_of("b", n, 2.0) for n in range(6)],
        NOISE_ARM: [run_of(NOISE_ARM, 10 + n, 1.2) for n in range(6)],
    }
    scored = arms_of(arms, noise=(NOISE_ARM, "a"))
    answers = answer(scored)
    for found in (answers.models, answers.methods):
        floor = [a for a in found if a.role == "noise floor"]
        assert [a.contrast for a in floor] == [(NOISE_ARM, "a")] * 2
        assert floor[0].difference == pytest.approx(0.2)
        assert all(a.test is None and a.adjusted is None for a in floor)
    assert [a.noise for a in answers.categories] == [pytest.approx(0.2)] * 6
    text = comparison_text(comparison_of(scored))
    assert text.count("noise floor") == 5
    assert "THESE MODELS" in text and "THESE METHODS" in text


def test_seeds_that_only_one_arm_has_do_not_count_for_methods() -> None:
    arms = {
        "a": [run_of("a", n, 1.0) for n in (0, 1, 2)],
        "b": [run_of("b", n, 2.0) for n in (2, 3)],
    }
    answers = answer(arms_of(arms))
    assert primary(answers.methods).count == 1
    apart = {"a": arms["a"][:2], "b": arms["b"]}
    answers = answer(arms_of(apart))
    methods = primary(answers.methods)
    assert methods.why == "no common seed" and math.isnan(methods.difference)
    assert primary(answers.models).difference == pytest.approx(-1.0)


def test_a_category_of_few_clients_is_shown_without_a_test() -> None:
    clusters = {c: "few" if c in CLIENTS[:5] else "many" for c in CLIENTS}
    scored = arms_of({"a": [run_of("a", 0, 1.0)], "b": [run_of("b", 0, 2.0)]}, clusters=clusters)
    few, many = answer(scored).categories
    assert (few.category, few.clients, few.test, few.adjusted) == ("few", 5, None, None)
    assert many.test is not None and many.adjusted == many.test.p == 2 / 2**7
    text = comparison_text(comparison_of(scored))
    assert "too few clients" in text and "too few categories" in text
    alone = arms_of(scored.arms, clusters={c: c for c in CLIENTS})
    assert answer(alone).categories == ()


def test_the_worst_tenth_are_the_clients_of_the_highest_loss_or_the_lowest_score() -> None:
    runs = [run_of("a", 0, 1.0, spread=1.0), run_of("a", 1, 2.0, spread=1.0)]
    # of 12 clients the worst two, of the last category: 1 + 5 and 2 + 5
    assert worst_tenth(runs, "unseen_loss") == 6.5
    assert worst_tenth(runs, "unseen_rouge_l") == 0.5


def test_quality_at_equal_bytes_is_the_last_round_within_them() -> None:
    def rounds(each: float) -> list[SpentRound]:
        return [
            SpentRound(round=n, value=5.0 - n, num_bytes=n * each * 2**20, is_known=True)
            for n in range(5)
        ]

    small, large = [rounds(1.0)], [rounds(4.0)]
    amount = common_amount([small, large], BYTES)
    assert amount == 4.0
    assert value_within(small, BYTES, amount) == 1.0
    assert value_within(large, BYTES, amount) == 4.0
    unknown = [SpentRound(round=1, value=0.0, is_known=False)]
    assert budgets_of([unknown]) == ()


# --- which runs can be compared


def finished(
    root: Path, losses: Mapping[int, float], *, seed: int = 0, categories: int = 3, rows: int = 2
) -> RunPaths:
    """Make a run with evaluations of these rounds on unseen clients, without anything else."""
    paths = begin(root, seed=seed, rounds=max(losses), clients__unseen=2)
    prepared_of([client(c, category=CATEGORIES[c]) for c in CLIENTS[:categories]]).publish(
        paths.prepared
    )
    for number, loss in losses.items():
        scores = Scores(rows=rows, loss=loss, rouge_l=0.5, exact_match=0.0)
        clients = [
            ClientScores(
                client=c, group="unseen", tier="small", as_deployed=scores, at_largest_rank=scores
            )
            for c in CLIENTS[:categories]
        ]
        EvaluationRecord(
            round=number, state_sha256="", complete=True, seconds=0.0, clients=clients
        ).publish(paths.round(number).evaluation_record)
    return paths


def test_runs_that_differ_in_their_seed_only_are_one_arm(tmp_path: Path) -> None:
    roots = [finished(tmp_path / f"one/seed-{n}", {1: 1.0 + n}, seed=n).root for n in (0, 1)]
    other = finished(tmp_path / "other", {1: 3.0}, seed=0)
    publish_bytes(other.config, dump_config(config_of(rounds=1, lora__alpha=3)).encode())
    scored = read_scored_arms([*map(str, roots), str(other.root)])
    assert {arm: [run.seed for run in runs] for arm, runs in scored.arms.items()} == {
        "one": [0, 1],
        "other": [0],
    }
    assert scored.contrast == ("one", "other") and not scored.is_named
    named = read_scored_arms([f"x={roots[0]}", f"y={other.root}"])
    assert list(named.arms) == ["x", "y"]


def test_the_mean_of_the_last_rounds_counts_not_the_best(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", {0: 9.0, 1: 1.0, 2: 3.0, 3: 5.0}).root
    two = finished(tmp_path / "two", {0: 9.0, 1: 1.0, 2: 2.0, 3: 2.0}).root
    scored = read_scored_arms([f"one={one}", f"two={two}"], 2)
    assert scored.arms["one"][0].values["unseen_loss"]["c0"] == 4.0
    assert [spent.round for spent in scored.arms["two"][0].spent] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="has 3 evaluated rounds, need last_rounds 4; lower it"):
        read_scored_arms([f"one={one}", f"two={two}"], 4)


def test_runs_that_cannot_be_compared_are_refused_in_one_line(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", {1: 1.0}).root
    fewer = finished(tmp_path / "fewer", {1: 1.0}, categories=2).root
    rows = finished(tmp_path / "rows", {1: 1.0}, rows=3).root
    other = finished(tmp_path / "other", {1: 1.0})
    prepared = prepared_of([client(c) for c in CLIENTS]).model_copy(
        update={"data_fingerprint": "another"}
    )
    prepared.publish(other.prepared)
    begun = begin(tmp_path / "begun", rounds=2)
    longer = finished(tmp_path / "longer", {1: 1.0, 3: 1.0}).root
    for arguments, words in (
        ([f"x={one}"], "need finished runs of two arms, found x"),
        ([f"x={one}", f"y={fewer}"], "other clients or test rows scored than in"),
        ([f"x={one}", f"y={rows}"], "other clients or test rows scored than in"),
        (
            [f"x={one}", f"y={other.root}"],
            "other data, clients.split_seed, tokenizer, data.template or data.cutoff",
        ),
        ([f"x={one}", f"y={begun.root}"], "not done: its last round is not evaluated; resume"),
        ([f"x={one}", f"y={longer}"], f"round 1; resume it: fedllm resume {one} --set rounds=3"),
        ([f"x={longer}", f"y={one}"], f"round 1; resume it: fedllm resume {one} --set rounds=3"),
        ([f"x={one}", f"x={one}"], "seed 0 of arm x is there already"),
        ([f"base={one}", f"y={one}"], "`base` has another meaning; choose another name"),
        ([f"x={tmp_path}", f"y={one}"], "not a run directory"),
    ):
        with pytest.raises(UserError) as error:
            read_scored_arms(arguments)
        assert words in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_a_sweep_is_compared_by_its_own_keys_without_what_is_not_done_or_diverged(
    tmp_path: Path,
) -> None:
    paths = SweepPaths(root=tmp_path)
    losses: dict[str, list[float | None]] = {
        "a": [1.0, 1.5],
        "b": [2.0, math.inf],
        "c": [3.0, None],
    }
    runs = []
    for arm, of_arm in losses.items():
        for seed, loss in enumerate(of_arm):
            name = f"runs/{arm}/seed-{seed}"
            config = config_of(seed=seed, rounds=1, clients__unseen=2).model_dump(mode="json")
            runs.append(SweepRunRecord(name=name, arm=arm, phase="run", config=config))
            if loss is not None:
                finished(paths.run(name).root, {1: loss}, seed=seed)
    comparison = ComparisonSection(contrast=("b", "a"), secondary=())
    record = SweepRecord(runs=runs, comparison=comparison.model_dump(mode="json"))
    record.publish(paths.record)
    scored = read_scored_arms([str(tmp_path)])
    assert {arm: len(found) for arm, found in scored.arms.items()} == {"a": 2, "b": 1, "c": 1}
    assert scored.contrast == ("b", "a") and scored.is_named
    assert [reason.split(" (")[0] for reason in scored.left_out] == ["b seed 1", "c seed 1"]
    assert "diverged" in scored.left_out[0] and "not done" in scored.left_out[1]
    text = comparison_text(comparison_of(scored))
    assert "left out: b seed 1 (diverged" in text


def test_the_twelve_categories_are_compared_by_kind_of_tasks_too() -> None:
    names = ["textual_entailment", "Word Analogy", "Keyword Tagging", "Data to Text", "", "Other"]
    kinds = {client: names[n // 2] for n, client in enumerate(CLIENTS)}
    arms = {
        "a": [run_of("a", n, 2.0, spread=0.1) for n in range(2)],
        "b": [run_of("b", n, 2.0) for n in range(2)],
        "A/A": [run_of("A/A", n, 2.5) for n in (7, 8)],
    }
    scored = arms_of(arms, categories=kinds, noise=("A/A", "b"))
    found = answer(scored).kinds
    assert [(a.category, a.clients, round(a.difference, 3), a.noise) for a in found] == [
        ("logical relation", 4, 0.05, 0.5),
        ("extraction", 2, 0.2, 0.5),
        ("generation", 2, 0.3, 0.5),
    ]
    text = comparison_text(comparison_of(scored))
    assert "unseen_loss by kind of tasks" in text
    assert "kind of tasks" not in comparison_text(comparison_of(arms_of(arms)))


def test_clients_of_unseen_categories_have_endpoints_of_their_own() -> None:
    assert endpoint_parts("new_category_exact_match") == ("new_category", "exact_match")
    assert endpoint_parts("unseen_rouge_l") == ("unseen", "rouge_l")
    assert endpoint_parts("train_loss") == ("train", "loss")
    section = ComparisonSection(endpoint="new_category_loss")
    assert section.endpoints == ("new_category_loss", "new_category_rouge_l")
