"""Partitions: every row has one client, and clients differ as their kind says."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.loading import validate
from fedllm.config.models import Config, DataSection, PartitionSection
from fedllm.data.partitions import client_names, partition_tables
from fedllm.data.readers import open_source
from fedllm.errors import ConfigError, DataError
from fedllm.storage.paths import CachePaths

KINDS = ("iid", "dirichlet", "pathological", "quantity")


def table(rows: int, categories: int = 4) -> pa.Table:
    return pa.table(
        {
            "client": pa.array([""] * rows, pa.large_string()),
            "category": pa.array([f"k{n % categories}" for n in range(rows)], pa.large_string()),
            "input": pa.array([f"{n}" for n in range(rows)], pa.large_string()),
        }
    )


def section(kind: str, clients: int = 8, **changes: object) -> PartitionSection:
    raw = {"kind": kind, "clients": clients, **changes}
    return PartitionSection.model_validate(raw)


def rows_of(tables: "dict[str, pa.Table]", split: str = "train") -> dict[str, Counter[str]]:
    """Return client -> category -> rows."""
    found: dict[str, Counter[str]] = {}
    pairs = zip(
        tables[split]["client"].to_pylist(), tables[split]["category"].to_pylist(), strict=True
    )
    for client, category in pairs:
        found.setdefault(client, Counter())[category] += 1
    return found


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(60, 200),
    clients=st.integers(4, 10),
    seed=st.integers(0, 3),
)
def test_every_row_keeps_its_place_and_every_client_has_its_rows(
    kind: str, rows: int, clients: int, seed: int
) -> None:
    whole = table(rows)
    keys = section(kind, clients, seed=seed, alpha=2.0)
    parted = partition_tables({"train": whole}, keys)
    assert parted["train"].drop_columns("client") == whole.drop_columns("client")
    found = rows_of(parted)
    assert sorted(found) == client_names(clients)
    assert min(sum(counts.values()) for counts in found.values()) >= 2
    assert partition_tables({"train": whole}, keys)["train"] == parted["train"]


def test_iid_clients_have_equal_shares_of_all_categories() -> None:
    found = rows_of(partition_tables({"train": table(160)}, section("iid")))
    assert {tuple(sorted(counts.values())) for counts in found.values()} == {(5, 5, 5, 5)}


def test_pathological_clients_have_their_number_of_categories() -> None:
    for wanted in (1, 2, 3):
        keys = section("pathological", categories=wanted)
        found = rows_of(partition_tables({"train": table(160)}, keys))
        assert {len(counts) for counts in found.values()} == {wanted}
        assert {category for counts in found.values() for category in counts} == {
            f"k{n}" for n in range(4)
        }


def test_quantity_skew_changes_sizes_and_not_the_mixture() -> None:
    found = rows_of(partition_tables({"train": table(4000)}, section("quantity", alpha=1.0)))
    sizes = [sum(counts.values()) for counts in found.values()]
    assert max(sizes) > 3 * min(sizes)
    assert all(max(c.values()) - min(c.values()) <= 1 for c in found.values())


def test_a_smaller_alpha_makes_clients_differ_more() -> None:
    def largest_shares(alpha: float) -> float:
        keys = section("dirichlet", alpha=alpha)
        found = rows_of(partition_tables({"train": table(4000)}, keys)).values()
        return sum(max(c.values()) / sum(c.values()) for c in found) / len(found)

    assert largest_shares(0.1) > 0.65 > 0.4 > largest_shares(100.0)


def test_test_rows_follow_the_shares_of_the_training_rows() -> None:
    tables = {"train": table(4000), "test": table(400)}
    parted = partition_tables(tables, section("dirichlet", alpha=0.3))
    train, test = rows_of(parted), rows_of(parted, "test")
    for client, counts in test.items():
        for category, count in counts.items():
            assert abs(count - train[client][category] / 10) < 1.5


def test_what_cannot_be_partitioned_is_refused_in_one_line() -> None:
    for keys, rows, categories, words in (
        (section("iid", 30), 40, 4, "40 training rows are too few for 30 clients of at least 2"),
        (section("pathological", categories=5), 100, 4, "got 5, the data have 4 categories"),
        (section("pathological", 2, categories=1), 100, 4, "leave some of the 4 categories to no"),
        (section("dirichlet", 20, alpha=0.01), 60, 4, "none of 100 draws of kind dirichlet gives"),
        (section("dirichlet"), 100, 1, "dirichlet divides categories, and all rows have the same"),
    ):
        with pytest.raises(DataError) as error:
            partition_tables({"train": table(rows, categories)}, keys)
        assert words in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def config(**data: object) -> Config:
    tiers = {"all": {"ranks": 2}}
    return validate({"model": {"path": "embedded"}, "data": data, "clients": {"tiers": tiers}})


def test_keys_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.partition\.clients: missing; kind iid needs"):
        config(path="x", partition={"kind": "iid"})
    with pytest.raises(ConfigError, match=r"data\.columns\.client: got null, name the column"):
        config(path="x", columns={"client": None})


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_without_a_client_column_become_clients(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [
        {"category": f"k{n % 2}", "instruction": "I", "input": f"{n}", "output": "o"}
        for n in range(20)
    ]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    keys = DataSection(path=str(path), partition=section("iid", 3))
    cache = CachePaths(root=tmp_path / "cache")
    source = open_source(keys, cache, 0)
    tables = source.read()
    assert set(tables["train"]["client"].to_pylist()) == set(client_names(3))
    other = keys.model_copy(update={"partition": section("iid", 3, seed=1)})
    assert open_source(other, cache, 0).fingerprint != source.fingerprint


def test_data_with_clients_can_be_divided_anew(tmp_path: Path) -> None:
    keys = DataSection(path="embedded", partition=section("pathological", 5, categories=1))
    tables = open_source(keys, CachePaths(root=tmp_path), 0).read()
    assert set(tables["train"]["client"].to_pylist()) == set(client_names(5))
