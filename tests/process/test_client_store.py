"""What clients keep between their rounds."""

from pathlib import Path

import pytest
import torch

from fedllm.errors import RunDirectoryError
from fedllm.process.client_store import ClientStore, Kept
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RunRecord
from tests.tiny import IDS


def store(root: Path, run_id: str = "one") -> ClientStore:
    record = RunRecord(run_id=run_id, result_fingerprint="", versions={})
    return ClientStore(paths=RunPaths(root=root), run=record)


def kept(value: float) -> Kept:
    own = {"B": torch.full((2, 3), value), "n": torch.tensor([7])}
    return Kept(tensors={"a.q": own, "b": {"B": torch.ones(1)}}, notes={"seen": [value, None]})


@pytest.mark.parametrize("client", IDS)
def test_a_client_reads_what_it_kept_of_its_last_round(tmp_path: Path, client: str) -> None:
    mine = store(tmp_path)
    assert mine.read(client, 5) == Kept()
    for number in (1, 3, 5):
        mine.publish(client, number, kept(number))
    mine.publish("another", 4, kept(9.0))
    for before, number in ((2, 1), (3, 1), (4, 3), (5, 3), (6, 5), (60, 5)):
        read = mine.read(client, before)
        assert read.notes == {"seen": [number, None]}
        found = read.tensors
        assert {m: sorted(parts) for m, parts in found.items()} == {"a.q": ["B", "n"], "b": ["B"]}
        assert torch.equal(found["a.q"]["B"], torch.full((2, 3), float(number)))
        assert found["a.q"]["n"].tolist() == [7]
    assert mine.read(client, 1) == Kept()


def test_a_client_may_keep_json_alone(tmp_path: Path) -> None:
    store(tmp_path).publish("a", 1, Kept(notes={"rounds": 1}))
    assert store(tmp_path).read("a", 2) == Kept(notes={"rounds": 1})


def test_a_round_that_is_trained_again_is_written_again(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.publish("a", 1, kept(1.0))
    before = [path.read_bytes() for path in tmp_path.rglob("*.safetensors")]
    mine.publish("a", 1, kept(1.0))
    assert [path.read_bytes() for path in tmp_path.rglob("*.safetensors")] == before


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.publish("a", 1, kept(1.0))
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=f"^{path}: cannot be read .*client a") as error:
        mine.read("a", 2)
    assert "\n" not in str(error.value)


def test_the_store_of_another_run_is_refused(tmp_path: Path) -> None:
    store(tmp_path, "other").publish("a", 1, kept(1.0))
    with pytest.raises(RunDirectoryError, match="of another run or client"):
        store(tmp_path).read("a", 2)
