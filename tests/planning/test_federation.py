"""Federation from configuration and data, and the rows that are scored."""

from collections.abc import Mapping

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedllm.config.models import Config
from fedllm.errors import ConfigError
from fedllm.planning.evaluation_targets import Target, choose_targets, is_complete, is_evaluated
from fedllm.planning.federation import plan_federation
from fedllm.storage.records import ClientRecord
from tests.planning.federations import client, client_lists, config_of, prepared_of

TEN = [client(str(n), category="ab"[n % 2], test=5) for n in range(10)]


@given(clients=client_lists(), round_number=st.integers(1, 9))
def test_a_client_without_training_rows_is_never_drawn(
    clients: list[ClientRecord], round_number: int
) -> None:
    trainable = {c.id: c for c in clients if c.train_rows}
    assume(trainable)
    config = config_of(clients__cohort={"fraction": 1.0})
    federation = plan_federation(config, prepared_of(clients))
    cohort = federation.cohort(round_number)
    assert {c.id for c in cohort} == set(trainable)
    for drawn in cohort:
        assert drawn.cost == 7 * trainable[drawn.id].train_rows
        assert drawn.tier == federation.tiers[drawn.id]


def test_a_federation_knows_the_largest_rank_of_every_module() -> None:
    tiers = {"a": {"ranks": {"attention": 8, "mlp": 2}}, "b": {"ranks": 4}}
    federation = plan_federation(config_of(clients__tiers=tiers), prepared_of(TEN))
    assert list(federation.largest_ranks.values()) == [8, 8, 4]
    assert federation.classes == {"a": "a", "b": "a"}


def test_a_cohort_of_some_tiers_has_clients_of_these_alone() -> None:
    tiers = {"small": {"ranks": 2, "share": 60}, "large": {"ranks": 4, "share": 40}}
    config = config_of(clients__tiers=tiers, clients__cohort={"count": 3, "tiers": ["large"]})
    federation = plan_federation(config, prepared_of(TEN))
    drawn = [client for number in range(1, 9) for client in federation.cohort(number)]
    assert {client.tier for client in drawn} == {"large"}
    assert len({client.id for client in drawn}) == 4
    with pytest.raises(ConfigError, match="only 4 clients can train"):
        five = config_of(clients__tiers=tiers, clients__cohort={"count": 5, "tiers": ["large"]})
        plan_federation(five, prepared_of(TEN))


def test_a_configuration_that_does_not_fit_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 10 clients can train"):
        plan_federation(config_of(clients__cohort={"count": 11}), prepared_of(TEN))


# --- evaluation


def scored(**changes: object) -> list[Target]:
    clients = {"clients__dev": 2, "clients__unseen": 2}
    config = config_of(rounds=4, **clients, **changes)
    return choose_targets(config, prepared_of(TEN), 2)


def test_all_roles_are_scored_on_all_rows_unless_limited() -> None:
    targets = scored()
    assert sorted(t.client for t in targets) == sorted(c.id for c in TEN)
    assert [t.group for t in targets] == ["train"] * 6 + ["dev"] * 2 + ["unseen"] * 2
    assert all(target.rows == (0, 1, 2, 3, 4) for target in targets)


def test_limits_are_per_group_and_per_client_and_draw_subsets_in_order() -> None:
    targets = scored(evaluation__clients=1, evaluation__rows_per_client=2)
    assert [t.group for t in targets] == ["train", "dev", "unseen"]
    everyone = {t.client: t for t in scored()}
    for target in targets:
        assert len(target.rows) == 2
        assert list(target.rows) == sorted(target.rows)
        assert set(target.rows) <= set(everyone[target.client].rows)
        assert target.tier == everyone[target.client].tier


@given(number=st.integers(1, 3), other=st.integers(1, 3))
def test_the_subset_is_the_same_in_every_round(number: int, other: int) -> None:
    config = config_of(rounds=4, evaluation__clients=3, evaluation__rows_per_client=2)
    prepared = prepared_of(TEN)
    assert choose_targets(config, prepared, number) == choose_targets(config, prepared, other)


def test_another_split_seed_scores_another_subset() -> None:
    limits = {"evaluation__clients": 3, "evaluation__rows_per_client": 2}
    subsets = [
        choose_targets(config_of(rounds=9, clients__split_seed=s, **limits), prepared_of(TEN), 1)
        for s in range(3)
    ]
    assert len({str(subset) for subset in subsets}) == 3


def test_all_clients_are_scored_at_the_start_and_the_end() -> None:
    config = config_of(rounds=4, evaluation__clients=1, evaluation__rows_per_client=1)
    prepared = prepared_of(TEN)
    assert [len(choose_targets(config, prepared, number)) for number in range(5)] == [
        10,
        1,
        1,
        1,
        10,
    ]
    section = config_of(evaluation__complete_at_end=False).evaluation
    assert not any(is_complete(section, number, 4) for number in range(5))


def test_a_client_without_test_rows_is_not_scored() -> None:
    clients = [client("a"), client("b", test=0)]
    assert [t.client for t in choose_targets(config_of(), prepared_of(clients), 0)] == ["a"]


def test_rounds_are_scored_at_the_start_at_every_nth_and_at_the_end() -> None:
    section = config_of(evaluation__every=3).evaluation
    assert [n for n in range(9) if is_evaluated(section, n, 8)] == [0, 3, 6, 8]
    never = config_of(evaluation__every=0).evaluation
    assert not any(is_evaluated(never, n, 8) for n in range(9))


def test_a_base_that_does_not_fit_a_tiers_processes_is_refused_with_what_it_needs() -> None:
    prepared = prepared_of([client(str(n)) for n in range(20)])
    prepared = prepared.model_copy(update={"model_parameters": 1 << 30})

    def tiers(**large: object) -> Config:
        tiers = {"small": {"ranks": 2}, "large": {"ranks": 8, "engine": "zero", **large}}
        return config_of(clients__tiers=tiers, clients__cohort={"count": 2})

    with pytest.raises(ConfigError) as caught:
        plan_federation(tiers(processes=2, memory_gib=3.5), prepared)
    assert str(caught.value).startswith(
        "clients.tiers.large.memory_gib: got 3.5, but a process needs at least 4 GiB for a base of "
        "1,073,741,824 weights (engine zero, stage 3, 2 in all); need more memory, "
    )
    fits = plan_federation(tiers(processes=2, memory_gib=4.5), prepared)
    assert fits.engines["large"].processes == 2


def test_a_worker_is_expected_to_be_as_fast_as_its_processes_together_unless_told() -> None:
    tiers = {"one": {"ranks": 2}, "four": {"ranks": 2, "engine": "zero", "processes": 4}}

    def seconds(**more: object) -> Mapping[str, float]:
        config = config_of(clients__tiers=tiers, clients__cohort={"count": 2}, **more)
        return plan_federation(config, prepared_of(TEN)).seed_costs().seconds_per_token

    found, told = seconds(), seconds(scheduler__worker_teraflops=1.0)
    assert found["four"] == pytest.approx(found["one"] / 4)
    assert told["four"] == told["one"]
