"""Every method of the catalog through the aggregation job."""

from pathlib import Path

import pytest

from fedllm.config.loading import read_config
from fedllm.methods.catalog import METHODS, method_of
from fedllm.process.server_state import read_state
from fedllm.server.aggregate import aggregate_round
from fedllm.storage.records import AggregateRecord
from tests.server.collection import MODULES, RANKS, collect, make_round


@pytest.mark.parametrize("name", METHODS)
def test_a_round_gives_every_tier_its_adapter_and_the_same_bits_again(
    tmp_path: Path, name: str
) -> None:
    ranks = RANKS if METHODS[name].ranks == "any" else dict.fromkeys(RANKS, 3)
    paths = make_round(tmp_path / "one", method=name, ranks=ranks)
    record = aggregate_round(paths)
    assert record == AggregateRecord.read(paths.aggregate_record)
    other = make_round(tmp_path / "two", method=name, ranks=ranks, device=["cpu", "cpu"])
    again = aggregate_round(other)
    assert again.sha256 == record.sha256
    assert again.modules == record.modules
    collect(other, without=[0, 3])
    # the state of a method whose clients keep everything never changes
    depends_on_clients = METHODS[name].client_state != "all"
    assert (aggregate_round(other).sha256 != record.sha256) == depends_on_clients
    method = method_of(read_config(paths.run.config))
    with read_state(paths) as file:
        for module in MODULES:
            for rank in set(ranks.values()):
                got = method.module_adapter(module=module, state=file.module(module), rank=rank)
                assert got.rank == rank
                assert not ((got.a_RI == 0).all(1) & (got.b_OR == 0).all(0)).any()
            parts = record.modules[module].partitions
            assert [part.last for part in parts] == sorted(set(ranks.values()))
            assert parts[0].reach == 1.0
            assert 0 < parts[-1].reach <= 1.0
