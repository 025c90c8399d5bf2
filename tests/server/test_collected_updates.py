"""Updates of a collection: a file that becomes visible late is not damaged."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.errors import AdapterError
from fedllm.server.collected_updates import CollectedUpdates
from fedllm.storage.paths import RoundPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import CohortRecord, CollectionRecord
from tests.server.collection import make_round


def opened(paths: RoundPaths, visibility_seconds: float) -> CollectedUpdates:
    collection = CollectionRecord.read(paths.collection)
    weights = [update.weight for update in collection.updates]
    return CollectedUpdates.open(
        paths, collection, CohortRecord.read(paths.cohort), weights, visibility_seconds
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("late", [Path.unlink, truncate])
def test_a_file_of_another_node_may_become_visible_late(
    tmp_path: Path, late: Callable[[Path], None]
) -> None:
    paths = make_round(tmp_path / "run")
    file = max(paths.updates.glob("*.safetensors"))
    content = file.read_bytes()
    late(file)
    with pytest.raises(AdapterError, match=f"{file}: damaged update"):
        opened(paths, 0.0)
    coming = threading.Timer(0.2, publish_bytes, [file, content])
    coming.start()
    assert len(opened(paths, 60.0).updates) == 7
    coming.join()
