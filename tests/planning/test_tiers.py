"""Tiers: exact shares, drawn by their own seed; ranks that the modules can take."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.models import ClientsSection
from fedllm.errors import ConfigError
from fedllm.planning.tiers import DISTRIBUTIONS, assign_tiers, resolve_ranks, tier_shares
from tests.planning.federations import MODULES, config_of

FOUR = {f"type{n}": {"ranks": n} for n in (1, 2, 3, 4)}
IDS = st.lists(st.text(max_size=5), max_size=60, unique=True)


def section(**changes: object) -> ClientsSection:
    return config_of(**{f"clients__{key}": value for key, value in changes.items()}).clients


@given(ids=IDS, shares=st.lists(st.floats(0.001, 10), min_size=2, max_size=4), seed=st.integers())
def test_every_client_has_a_tier_and_the_quota_is_exact(
    ids: list[str], shares: list[float], seed: int
) -> None:
    tiers = {f"t{n}": {"ranks": 1, "share": share} for n, share in enumerate(shares)}
    assigned = assign_tiers(section(tiers=tiers), seed, ids)
    assert set(assigned) == set(ids)
    counts = Counter(assigned.values())
    for number, share in enumerate(shares):
        assert abs(counts[f"t{number}"] - len(ids) * share / sum(shares)) < 1 + 1e-6


@given(ids=IDS, seed=st.integers(), order=st.randoms())
def test_the_draw_does_not_depend_on_the_order_of_the_clients(
    ids: list[str], seed: int, order: random.Random
) -> None:
    shuffled = list(ids)
    order.shuffle(shuffled)
    clients = section()
    assert assign_tiers(clients, seed, shuffled) == assign_tiers(clients, seed, ids)


def test_tiers_have_a_seed_of_their_own() -> None:
    ids = [str(n) for n in range(50)]
    drawn = assign_tiers(section(), 1, ids)
    assert assign_tiers(section(), 2, ids) != drawn
    assert assign_tiers(section(tier_seed=1), 2, ids) == drawn


def test_a_client_that_is_assigned_has_its_tier_and_the_others_share_exactly() -> None:
    ids = [str(n) for n in range(12)]
    assigned = assign_tiers(section(assign={"3": "large", "5": "large"}), 0, ids)
    assert assigned["3"] == assigned["5"] == "large"
    others = Counter(tier for id_, tier in assigned.items() if id_ not in {"3", "5"})
    assert others == {"small": 5, "large": 5}


def test_all_assigned_clients_missing_in_the_data_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        assign_tiers(section(assign={"x": "large", "1": "large", "y": "small"}), 0, ["1"])
    assert str(caught.value).splitlines() == [
        "clients.assign.x: no such client in the data; remove it",
        "clients.assign.y: no such client in the data; remove it",
    ]


def test_the_named_distributions_are_those_of_the_paper_with_normal_as_it_was_meant() -> None:
    assert {name: list(shares) for name, shares in DISTRIBUTIONS.items()} == {
        "uniform": [25, 25, 25, 25],
        "heavy_tail_light": [80, 5, 5, 10],
        "heavy_tail_strong": [5, 5, 10, 80],
        "normal": [5.7, 44.3, 44.3, 5.7],
    }


def test_a_normal_distribution_gives_the_middle_tiers_most_clients() -> None:
    clients = section(tiers=FOUR, distribution="normal")
    assert tier_shares(clients) == {"type1": 5.7, "type2": 44.3, "type3": 44.3, "type4": 5.7}
    counts = Counter(assign_tiers(clients, 42, [str(n) for n in range(1000)]).values())
    assert counts == {"type1": 57, "type2": 443, "type3": 443, "type4": 57}


def test_shares_are_those_that_are_given_else_equal() -> None:
    assert tier_shares(section()) == {"small": 1.0, "large": 1.0}
    tiers = {"a": {"ranks": 1, "share": 0}, "b": {"ranks": 1, "share": 3}}
    assert tier_shares(section(tiers=tiers)) == {"a": 0.0, "b": 3.0}


def ranks_of(spec: object, **changes: object) -> dict[str, int]:
    config = config_of(clients__tiers={"only": {"ranks": spec}}, **changes)
    ranks = resolve_ranks(config, MODULES)["only"]
    return {path.rpartition(".")[2]: rank for path, rank in ranks.items()}


@pytest.mark.parametrize(
    ("spec", "ranks"),
    [
        (4, {"q_proj": 4, "k_proj": 4, "up_proj": 4}),
        ({"attention": 2, "mlp": 8}, {"q_proj": 2, "k_proj": 2, "up_proj": 8}),
        ({"attention": 2, "k_proj": 3, "mlp": 8}, {"q_proj": 2, "k_proj": 3, "up_proj": 8}),
        (
            {"attention": 2, "q_proj": 3, "mlp": 8, "model.layers.0.self_attn.q_proj": 5},
            {"q_proj": 5, "k_proj": 2, "up_proj": 8},
        ),
    ],
)
def test_the_most_specific_rank_counts(spec: object, ranks: dict[str, int]) -> None:
    assert ranks_of(spec) == ranks


def test_a_rank_above_a_module_names_the_module_its_sides_and_the_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        ranks_of(10)
    assert str(caught.value) == (
        "clients.tiers.only.ranks: got 10, model.layers.0.self_attn.k_proj is 8x16 and takes at "
        "most 8; lower it or set clients.ranks_above_module: cap"
    )
    capped = ranks_of(20, clients__ranks_above_module="cap")
    assert capped == {"q_proj": 16, "k_proj": 8, "up_proj": 16}


def test_the_problems_of_all_tiers_are_reported_together() -> None:
    tiers = {
        "a": {"ranks": {"attention": 2}},
        "b": {"ranks": {"attention": 2, "mlp": 2, "mpl": 3}},
        "c": {"ranks": 9},
    }
    with pytest.raises(ConfigError) as caught:
        resolve_ranks(config_of(clients__tiers=tiers), MODULES)
    assert [line.partition(";")[0] for line in str(caught.value).splitlines()] == [
        "clients.tiers.a.ranks: no rank for model.layers.0.mlp.up_proj (mlp)",
        "clients.tiers.b.ranks.mpl: no such module",
        "clients.tiers.c.ranks: got 9, model.layers.0.self_attn.k_proj is 8x16 and takes at most 8",
    ]
    assert "need one of attention, k_proj, mlp, q_proj, up_proj" in str(caught.value)
