"""Records and updates of a run directory that nobody wrote so."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import FedllmError
from fedllm.rounds.opening import resumed_config
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CollectionRecord
from fedllm.storage.updates import check_update, update_files
from tests.rounds.simulation import Simulation, complete, config_of, states
from tests.security.answers import answer, replaced, unchanged
from tests.security.mutations import mutated, profile

LOOKS = (("status",), ("status", "--json"), ("verify",), ("prune", "--dry-run"))


def silent(_line: str) -> None:
    return


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """Return a run whose second round has two of its four updates."""
    root = tmp_path_factory.mktemp("run") / "run"
    simulation = Simulation(log=silent)
    simulation.limit = 6
    with pytest.raises(FedllmError):
        complete(root, simulation, config_of(storage__keep_every=1, scheduler__max_attempts=1))
    return RunPaths(root=root)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("quiet") / "run"
    complete(root, Simulation(log=silent), config_of(storage__keep_every=1))
    return states(root)


@profile("records")
@given(data=st.data())
def test_no_record_is_more_than_a_line_of_errors_and_looking_changes_nothing(
    unfinished: RunPaths, data: st.DataObject
) -> None:
    kinds = {".json", ".yaml", ".safetensors"}
    files = sorted(p for p in unfinished.root.rglob("*") if p.suffix in kinds)
    file = data.draw(st.sampled_from(files))
    content = data.draw(mutated([file.read_bytes(), b"", b"{}", b"[]", b"\0" * 64]))
    # the next input has others: commands take longer than to draw one
    looks = data.draw(st.lists(st.sampled_from(LOOKS), min_size=1, max_size=2, unique=True))
    with replaced(file, content), unchanged(unfinished.root):
        for command, *options in looks:
            answer(command, unfinished.root, *options)


@profile("updates")
@given(data=st.data())
def test_a_damaged_update_is_never_used_and_its_clients_send_the_same_again(
    unfinished: RunPaths,
    quiet: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.mktemp("resumed", numbered=True) / "run"
    shutil.copytree(unfinished.root, root)
    paths = RunPaths(root=root)
    updates = paths.round(2).updates
    name = data.draw(st.sampled_from(update_files(paths.round(2))))
    content = data.draw(mutated([(updates / name).read_bytes()]))
    (updates / name).write_bytes(content)
    try:
        check_update(updates / name)
        damaged = False
    except DamagedUpdateError:
        damaged = True
    complete(root, Simulation(log=silent), resumed_config(root, ["scheduler.max_attempts=3"]))
    assert states(root) == quiet
    if damaged:
        used = CollectionRecord.read(paths.round(2).collection).updates
        assert name not in {update.file for update in used}
    shutil.rmtree(root.parent)
