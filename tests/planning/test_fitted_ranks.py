"""Ranks that fit into the memory of a tier."""

import pytest

from fedllm.errors import ConfigError
from fedllm.planning.tiers import candidate_ranks, fitted, predicted_bytes, resolve_ranks
from tests.planning.federations import MODULES, config_of

GIB = 1 << 30
FIT = {"clients__tiers": {"one": {"memory_gib": 2.0}}, "clients__ranks": "fit"}
NUMBERS = 32 + 24 + 56  # of an adapter, for each rank


def test_a_rank_costs_its_numbers_and_what_stands_beside_each() -> None:
    # trained, gradient; two moments with AdamW
    for optimizer, copies in (("sgd", 2), ("adamw", 4)):
        found = predicted_bytes(1000, ranks=[2, 4, 20], modules=MODULES, optimizer=optimizer)
        beyond = (16 - 4) * (32 + 56) + (8 - 4) * 24  # rank 20 is cut to the smaller sides
        assert found == {
            2: 1000,
            4: 1000 + 4 * copies * 2 * NUMBERS,
            20: 1000 + 4 * copies * (2 * NUMBERS + beyond),
        }


def test_the_largest_rank_that_fits_is_chosen() -> None:
    predicted = {2: GIB, 4: 2 * GIB, 8: 2 * GIB + 1}
    record = fitted("one", 2.0, GIB, predicted)
    assert (record.rank, record.measured_rank, record.measured_bytes) == (4, 2, GIB)
    assert record.predicted_bytes == predicted
    assert fitted("one", 3.0, GIB, predicted).rank == 8
    with pytest.raises(ConfigError) as refused:
        fitted("one", 0.5, GIB, predicted)
    assert str(refused.value).startswith(
        "clients.tiers.one.memory_gib: got 0.5, but a process that trains at rank 2, the smallest "
        "of clients.fit_ranks, needs 1 GiB; need more memory"
    )
    assert "\n" not in str(refused.value)


def test_ranks_that_a_module_does_not_take_are_no_candidates() -> None:
    assert candidate_ranks(config_of(**FIT), MODULES) == [2, 4, 8]
    capped = config_of(**FIT, clients__ranks_above_module="cap")
    assert candidate_ranks(capped, MODULES) == [2, 4, 8, 16, 32, 64]
    with pytest.raises(ConfigError, match=r"^clients.fit_ranks: got 9, 12, but the small"):
        candidate_ranks(config_of(**FIT, clients__fit_ranks=[12, 9]), MODULES)


def test_tiers_without_ranks_have_the_fitted_ones() -> None:
    tiers = {"own": {"ranks": 3}, "fits": {"memory_gib": 1.0}}
    config = config_of(clients__tiers=tiers, clients__ranks="fit")
    ranks = resolve_ranks(config, MODULES, {"fits": 8})
    assert {tier: set(each.values()) for tier, each in ranks.items()} == {"own": {3}, "fits": {8}}


@pytest.mark.parametrize(
    ("clients", "line"),
    [
        ({"tiers": {"one": {}}}, "clients.tiers.one.ranks: missing; give a rank, or clients.ranks"),
        (
            {"tiers": {"one": {}}, "ranks": "fit"},
            "clients.tiers.one.memory_gib: missing; clients.ranks: fit chooses a rank for it",
        ),
        (
            {"tiers": {"one": {"ranks": 2}}, "ranks": "fit"},
            "clients.ranks: got fit, but all tiers have ranks; remove theirs, or set tiers",
        ),
        ({"tiers": {"one": {"ranks": 2}}, "ranks": "fits"}, "clients.ranks: got 'fits', need "),
    ],
)
def test_what_is_missing_is_named(clients: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(clients=clients)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)
