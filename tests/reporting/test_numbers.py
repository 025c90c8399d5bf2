"""Numbers of a run: means over clients, energies over modules, side by side for several runs."""

import json
from pathlib import Path

import pytest

from fedllm.errors import RunDirectoryError, UserError
from fedllm.reporting.comparing.side_by_side import side_by_side
from fedllm.reporting.results.metrics import (
    Mean,
    by_group,
    by_tier,
    headline,
    mean_scores,
    other_means,
    write_metrics,
)
from fedllm.reporting.results.summary import (
    last_evaluation,
    run_summary,
    score_table,
    scores_by_group,
    spectra_text,
    update_bytes,
)
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import (
    CollectionRecord,
    EvaluationRecord,
    RoundRecord,
)
from tests.planning.federations import MODULES
from tests.reporting.runs import aggregated, begin, draw, evaluation, module, prepare

NOTHING = Mean(clients=0, loss=0.0, rouge_l=0.0, exact_match=0.0)
TIERS = {"a": "small", "b": "large", "d": "large"}


def finished(root: Path, losses: dict[str, float], tiers: dict[str, str] = TIERS) -> RunPaths:
    """Make a run of one round, whose clients' losses at the end are given; 9.0 at the start."""
    paths = begin(root, rounds=1)
    prepare(paths)
    draw(paths, 1)
    for number in (0, 1):
        here = paths.round(number)
        modules = [module(1.0, r2=0.75)] if number else []
        aggregated(number, *modules).publish(here.aggregate_record)
        scores = losses if number else dict.fromkeys(losses, 9.0)
        evaluation(number, scores, tiers).publish(here.evaluation_record)
        RoundRecord(round=number, lease=1, state_sha256="", clients=4).publish(here.record)
    return paths


def test_a_mean_counts_every_client_once() -> None:
    found = evaluation(1, {"a": 1.0, "b": 2.0, "d": 6.0}, TIERS)
    means = by_tier(found.clients)
    assert {tier: (m.clients, m.loss) for tier, m in means.items()} == {
        "small": (1, 1.0),
        "large": (2, 4.0),
    }
    assert {group: m.loss for group, m in by_group(found.clients).items()} == {
        "train": 1.5,
        "dev": 6.0,
    }
    names = {name: m.loss for name, m in scores_by_group(found.clients).items()}
    assert names == {
        "dev clients": 6.0,
        "training clients": 1.5,
        "training clients, large": 2.0,
        "training clients, small": 1.0,
    }
    assert mean_scores([]) is None
    assert scores_by_group([]) == {}


def test_other_means_count_rows_or_categories_once() -> None:
    found = evaluation(1, {"a": 1.0, "b": 2.0, "d": 6.0}, TIERS)
    rows = {"a": 1, "b": 2, "d": 5}
    clients = [
        c.model_copy(
            update={"as_deployed": c.as_deployed.model_copy(update={"rows": rows[c.client]})}
        )
        for c in found.clients
    ]
    means = other_means(clients, {"a": "x", "b": "x", "d": "y"})
    # (1 * 1 + 2 * 2 + 5 * 6) / 8, ((1 + 2) / 2 + 6) / 2
    assert (means["row_weighted"] or NOTHING).loss == 4.375
    assert (means["category_mean"] or NOTHING).loss == 3.75
    assert set(other_means([], {}).values()) == {None}


def test_the_headline_names_every_group() -> None:
    words = headline(evaluation(1, {"a": 1.0, "d": 6.0}))
    assert words == (
        "; on test rows: training clients loss 1.000 Rouge-L 0.100 exact 0.500; "
        "dev clients loss 6.000 Rouge-L 0.600 exact 0.500"
    )
    assert headline(None) == headline(evaluation(1, {})) == ""


def test_metrics_are_a_line_per_round_that_is_done_rebuilt_from_the_records(
    tmp_path: Path,
) -> None:
    paths = finished(tmp_path, {"a": float("nan"), "d": 2.0})
    (paths.rounds / "0001.replaced-1").mkdir()
    draw(paths, 2)
    norms = {"gradient_norm_mean": 0.5, "gradient_norm_max": 2.0}
    CollectionRecord(round=1, lease=1, updates=[], training=norms).publish(
        paths.round(1).collection
    )
    RoundRecord(round=3, lease=1, state_sha256="", clients=1).publish(paths.round(3).record)
    for _ in range(2):
        write_metrics(paths)
        rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
        assert [row["round"] for row in rows] == [0, 1, 3]
    assert rows[0]["train_loss"] == 9.0
    assert rows[1]["train_loss"] is None
    assert (rows[1]["dev_loss"], rows[1]["dev_exact_match"]) == (2.0, 0.5)
    assert (rows[1]["aggregate_seconds"], rows[1]["evaluation_complete"]) == (2.0, True)
    assert "dev_loss" not in rows[2]
    assert (rows[1]["beyond_smallest_rank"], rows[1]["energy_kept_rank_2"]) == (0.25, 0.75)
    assert rows[1]["overlap"] is None
    assert (rows[1]["gradient_norm_mean"], rows[1]["gradient_norm_max"]) == (0.5, 2.0)
    assert "gradient_norm_max" not in rows[0]
    assert "energy_kept_rank_2" not in rows[0]


def test_a_client_sends_both_factors_in_float32() -> None:
    ranks = dict.fromkeys(MODULES, 2)
    assert update_bytes(ranks, MODULES) == 4 * 2 * ((16 + 16) + (8 + 16) + (40 + 16))


def test_the_last_evaluation_is_the_newest_there_is(tmp_path: Path) -> None:
    paths = RunPaths(root=tmp_path)
    assert last_evaluation(paths, 3) is None
    evaluation(1, {"a": 1.0}).publish(paths.round(1).evaluation_record)
    found = last_evaluation(paths, 3)
    assert found is not None
    assert found.round == 1


def test_a_run_ends_with_whether_it_helped_where_the_adapter_is_and_what_next(
    tmp_path: Path,
) -> None:
    paths = finished(tmp_path, {"a": 1.0, "b": 2.0, "d": 10.0})
    paths.round(1).global_state.touch()
    lines = run_summary(paths, best={0}).splitlines()
    verdict = "base -> round 1: answer loss lower for"
    assert lines[2] == f"dev clients, {verdict} 0 of 1; Rouge-L higher for 1, lower for 0"
    assert lines[3] == f"training clients, {verdict} 2 of 2; Rouge-L higher for 0, lower for 2"
    row = "training 2 9.000 -> 1.500 -7.500 ± 0.707"
    assert any(" ".join(line.split()).startswith(row) for line in lines)
    assert any(line.split()[:4] == ["small", "1", "9.000", "->"] for line in lines)
    assert f"adapter: round 1, in {paths.round(1).global_state}" in lines
    assert any("dev clients are better in round 0: add --round best" in line for line in lines)
    assert any(line.startswith(f"  fedllm export {tmp_path} --out adapter") for line in lines)


def test_the_spectra_are_shown_on_request(tmp_path: Path) -> None:
    paths = begin(tmp_path / "begun")
    assert spectra_text(paths) == "no round was aggregated yet"
    text = spectra_text(finished(tmp_path / "run", {"a": 1.0, "b": 2.0}))
    lines = text.splitlines()
    assert any(line.split() == ["2", "1", "75.00", "%", "0.5000"] for line in lines)
    assert "how the aggregated update spreads" in text
    assert any(line.split() == ["1", "1.50", "25.00", "%", "-"] for line in lines)
    assert "what a client sends per round" in text


def test_a_tier_that_was_not_scored_at_the_start_is_shown_without_an_arrow(
    tmp_path: Path,
) -> None:
    paths = finished(tmp_path, {"a": 1.0})
    evaluation(1, {"a": 1.0, "b": 2.0}, TIERS).publish(paths.round(1).evaluation_record)
    lines = run_summary(paths).splitlines()
    assert any(line.split()[:3] == ["large", "1", "2.000"] for line in lines)


def test_a_run_without_evaluations_has_no_table_of_scores(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    text = run_summary(paths)
    assert text.splitlines()[0] == f"run {tmp_path} (flexlora + fedit), 3 rounds"
    assert "scores" not in text
    assert "not known: evaluation.every is 0, or no round was evaluated" in text


def test_the_summary_names_the_options_of_the_method(tmp_path: Path) -> None:
    paths = begin(tmp_path, method__options={"truncated": "keep"})
    first = run_summary(paths).splitlines()[0]
    assert first == f"run {tmp_path} (flexlora truncated=keep + fedit), 3 rounds"


def test_scores_of_a_state_are_shown_by_tier_and_group() -> None:
    rows = [
        line.split()
        for line in score_table("round 2", evaluation(2, {"a": 1.0, "d": 3.0})).splitlines()
    ]
    assert ["training", "clients", "1", "1.000", "0.100", "0.500"] in rows
    assert ["dev", "clients", "1", "3.000", "0.300", "0.500"] in rows


# --- comparison


def test_runs_are_compared_on_the_clients_that_all_have_scored(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", {"a": 1.0, "b": 2.0, "only one": 100.0})
    two = finished(tmp_path / "two", {"a": 3.0, "b": 4.0, "only two": 100.0})
    loss = side_by_side({"one": one.root, "two": two.root}).split("\n\n")[0]
    text = side_by_side({"one": one.root, "two": two.root})
    assert "how the last aggregated update spreads" in text
    spread = [line.split() for line in text.splitlines()]
    assert ["one", "1.50", "25.00", "%", "-"] in spread
    assert ["two", "1.50", "25.00", "%", "-"] in spread
    assert [line.split() for line in loss.splitlines()[1:]] == [
        ["clients", "base", "one", "two"],
        ["training", "clients", "9.000", "1.500", "3.500"],
        ["training", "clients,", "large", "9.000", "2.000", "4.000"],
        ["training", "clients,", "small", "9.000", "1.000", "3.000"],
    ]


def test_runs_whose_clients_have_other_tiers_are_compared_by_group_only(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", {"a": 1.0, "b": 2.0})
    two = finished(tmp_path / "two", {"a": 3.0, "b": 4.0}, {"a": "x", "b": "large"})
    runs = {"one": one.root, "two": two.root}
    with pytest.raises(UserError) as error:
        side_by_side(runs)
    (message,) = str(error.value).splitlines()
    assert "two: client a is in tier x, in " in message and "one in tier small" in message
    assert "--by group" in message and "clients.tier_seed" in message
    loss = side_by_side(runs, "group").split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in loss[1:]] == ["clients", "training"]


def test_an_unfinished_run_is_compared_by_its_last_state(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", {"a": 1.0, "b": 2.0})
    two = finished(tmp_path / "two", {"a": 3.0, "b": 4.0})
    through = side_by_side({"one": one.root, "two": two.root})
    begin(two.root, rounds=3)
    draw(two, 2)
    assert side_by_side({"one": one.root, "two": two.root}) == through


def test_runs_that_share_no_clients_or_have_no_later_round_are_refused(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", {"a": 1.0})
    other = finished(tmp_path / "other", {"z": 1.0})
    begun = begin(tmp_path / "begun")
    with pytest.raises(RunDirectoryError, match="no evaluation of the base or of a later round"):
        side_by_side({"x": begun.root})
    with pytest.raises(RunDirectoryError, match="no client was scored in all of them"):
        side_by_side({"x": one.root, "y": other.root})


def test_an_evaluation_record_comes_back(tmp_path: Path) -> None:
    record = evaluation(1, {"a": float("inf")})
    record.publish(tmp_path / "evaluation.json")
    assert EvaluationRecord.read(tmp_path / "evaluation.json") == record
