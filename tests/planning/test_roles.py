"""Roles: dev and unseen never train; they are drawn evenly over the categories."""

import random
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedllm.errors import ConfigError
from fedllm.planning.roles import Roles, split_roles
from fedllm.storage.records import ClientRecord
from tests.planning.federations import client, client_lists, config_of


def split(clients: list[ClientRecord], dev: int, unseen: int, seed: int = 0) -> Roles:
    config = config_of(clients__dev=dev, clients__unseen=unseen, clients__split_seed=seed)
    return split_roles(config.clients, clients)


def candidates(clients: list[ClientRecord]) -> list[ClientRecord]:
    return [c for c in clients if c.held_out_candidate and c.test_rows]


@given(clients=client_lists(), data=st.data())
def test_roles_are_disjoint_exact_and_only_of_clients_with_the_rows_they_need(
    clients: list[ClientRecord], data: st.DataObject
) -> None:
    dev = data.draw(st.integers(0, len(candidates(clients))))
    unseen = data.draw(st.integers(0, len(candidates(clients)) - dev))
    roles = split(clients, dev, unseen, data.draw(st.integers(0, 3)))
    assert (len(roles.dev), len(roles.unseen)) == (dev, unseen)
    chosen = [*roles.train, *roles.dev, *roles.unseen]
    assert len(chosen) == len(set(chosen))
    by_id = {c.id: c for c in clients}
    assert {*roles.dev, *roles.unseen} <= {c.id for c in candidates(clients)}
    assert all(by_id[id_].train_rows for id_ in roles.train)
    held_out = {*roles.dev, *roles.unseen}
    assert set(roles.train) == {c.id for c in clients if c.train_rows and c.id not in held_out}
    assert all(list(ids) == sorted(ids) for ids in (roles.train, roles.dev, roles.unseen))


def test_all_clients_of_unseen_categories_are_a_group_of_their_own() -> None:
    clients = [client(str(n), category="abc"[n % 3], test=n % 5) for n in range(30)]
    config = config_of(clients__dev=3, clients__unseen=4, clients__unseen_categories=["b"])
    roles = split_roles(config.clients, clients)
    new = {c.id: c for c in clients if c.category == "b"}
    assert set(roles.new_category) == {id_ for id_, c in new.items() if c.test_rows}
    assert not new.keys() & {*roles.train, *roles.dev, *roles.unseen}
    with pytest.raises(ConfigError, match=r"no client of 'd'; the data has 3 categories: a, b, c$"):
        split_roles(config_of(clients__unseen_categories=["d"]).clients, clients)


@given(clients=client_lists(min_size=5), data=st.data())
def test_dev_and_unseen_are_within_one_of_every_categorys_share(
    clients: list[ClientRecord], data: st.DataObject
) -> None:
    pool = candidates(clients)
    dev = data.draw(st.integers(0, len(pool)))
    unseen = data.draw(st.integers(0, len(pool) - dev))
    roles = split(clients, dev, unseen)
    left = [c for c in pool if c.id not in roles.dev]
    for drawn, of in ((roles.dev, pool), (roles.unseen, left)):
        sizes = Counter(c.category for c in of)
        counts = Counter(c.category for c in of if c.id in drawn)
        for category, size in sizes.items():
            assert abs(counts[category] - len(drawn) * size / len(of)) < 1 + 1e-6


@given(clients=client_lists(), order=st.randoms(), seed=st.integers(0, 5))
def test_roles_do_not_depend_on_the_order_of_the_clients(
    clients: list[ClientRecord], order: random.Random, seed: int
) -> None:
    assume(len(candidates(clients)) >= 2)
    shuffled = list(clients)
    order.shuffle(shuffled)
    assert split(shuffled, 1, 1, seed) == split(clients, 1, 1, seed)


def test_another_split_seed_holds_out_other_clients() -> None:
    clients = [client(str(n)) for n in range(40)]
    assert len({split(clients, 5, 5, seed).dev for seed in range(4)}) == 4


def test_clients_without_training_rows_may_be_held_out() -> None:
    clients = [client("silent", train=0), client("a"), client("b", candidate=False)]
    assert split(clients, 1, 1).train == ("b",)
    assert split(clients, 0, 0) == Roles(train=("a", "b"), dev=(), unseen=())


def test_more_held_out_clients_than_there_are_candidates_is_an_error_that_counts_them() -> None:
    clients = [client("a"), client("b", candidate=False), client("c", test=0)]
    with pytest.raises(
        ConfigError, match=r"clients.dev \+ clients.unseen: got 2, only 1 client of"
    ):
        split(clients, 1, 1)
