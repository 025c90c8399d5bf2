"""Updates are signed by their client's worker: nobody speaks for another client or round."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fedllm.errors import RunDirectoryError, UserError
from fedllm.rounds.opening import close_run, open_run, resumed_config
from fedllm.scheduling.inline import InlineScheduler
from fedllm.storage.paths import RoundPaths, RunPaths, encode_client
from fedllm.storage.records import CohortRecord, CollectionRecord
from fedllm.storage.tensors import publish_update
from fedllm.storage.trust.secret import STATE_VARIABLE, user_secret
from fedllm.storage.trust.signatures import RoundKeys
from fedllm.storage.updates import PublishedUpdate, read_update
from tests.rounds.simulation import Simulation, complete, config_of, opened, states


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> RunPaths:
    """A run of two rounds, of which nothing of the second was collected."""
    config = config_of(**getattr(request, "param", {}))
    simulation = Simulation()

    def keep_first_round(program: str, target: Path) -> None:
        if program == "aggregate" and target.name == "0001":
            shutil.copytree(target, tmp_path / "kept" / "rounds" / "0001")

    simulation.before = keep_first_round
    complete(tmp_path / "run", simulation, config)
    paths = RunPaths(root=tmp_path / "run")
    second = paths.round(2)
    for path in (second.aggregate, second.evaluation.root):
        shutil.rmtree(path)
    for path in (second.collection, second.record):
        path.unlink()
    return paths


def updates_of(paths: RoundPaths) -> list[PublishedUpdate]:
    return [u for path in sorted(paths.updates.glob("*.safetensors")) for u in read_update(path)]


def forge(
    paths: RoundPaths,
    update: PublishedUpdate,
    source: RoundPaths,
    *,
    file: str = "00-000-00.safetensors",
    **changes: object,
) -> None:
    """Publish an update as a file of a round, with valid checksums, as others can."""
    record = update.record.model_copy(update=changes)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(source.updates / update.file, "pt") as content:
        for name in content.keys():  # noqa: SIM118
            client, module, part = name.split("|")
            if client == encode_client(update.record.client):
                pairs.setdefault(module, {})[part] = content.get_tensor(name)
    tensors = {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}
    # whoever has the key of another user, or of another client or round, signs with it
    keys = RoundKeys.of(user_secret(), CohortRecord.read(source.cohort))
    sign = partial(keys.signatures, record.run_id, [update.record.client])
    publish_update(paths.updates / file, [record], {record.client: tensors}, sign=sign)


def resumed(run: RunPaths) -> list[str]:
    lines: list[str] = []
    before = states(run.root)
    complete(run.root, Simulation(log=lines.append), resumed_config(run.root, []))
    assert states(run.root)["0001"] == before["0001"]
    return lines


def test_an_update_in_the_name_of_another_client_is_refused_and_counted(run: RunPaths) -> None:
    second = run.round(2)
    one, other, *_ = updates_of(second)
    forge(second, one, second, client=other.record.client)
    lines = resumed(run)
    assert any("not signed with the key of this client" in line for line in lines)
    assert any("collected 4 of 4 clients; 1 update file refused" in line for line in lines)
    assert CollectionRecord.read(second.collection).refused == 1


# as on a file system that may show files late
@pytest.mark.parametrize(
    "run",
    [{"scheduler__kind": "slurm", "storage__visibility_seconds": 60.0}],
    indirect=True,
    ids=["late files"],
)
def test_a_forged_update_beside_all_true_ones_is_refused_and_counted(run: RunPaths) -> None:
    second = run.round(2)
    one, other, *_ = updates_of(second)
    forge(second, one, second, file="99-000-00.safetensors", client=other.record.client)
    lines = resumed(run)
    assert any("99-000-00.safetensors: client" in line for line in lines)
    assert CollectionRecord.read(second.collection).refused == 1


def test_an_update_of_an_earlier_round_is_refused(run: RunPaths) -> None:
    first, second = RunPaths(root=run.root.with_name("kept")).round(1), run.round(2)
    clients = {update.record.client for update in updates_of(second)}
    again = next(u for u in updates_of(first) if u.record.client in clients)
    forge(second, again, first, round=2)
    assert any("not signed with the key" in line for line in resumed(run))


def test_a_file_without_signatures_is_refused(run: RunPaths) -> None:
    second = run.round(2)
    update = updates_of(second)[0]
    place = second.updates / "00-000-00.safetensors"
    publish_update(place, [update.record.model_copy(update={"status": "failed"})], {})
    assert any("not signed with the key" in line for line in resumed(run))


def test_a_second_user_is_told_that_the_round_trains_again(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [(2, update.record.client) for update in updates_of(run.round(2))]
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "second"))
    lines: list[str] = []
    simulation = Simulation(log=lines.append)
    complete(run.root, simulation)
    assert "update files of round 2 cannot be checked with your key" in lines[0]
    assert sorted(simulation.trained) == sorted(expected)
    # from then on the run is the second user's
    assert not any("another secret" in line for line in resumed(run))


def test_a_task_without_the_secret_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    with pytest.raises(UserError, match=r"set FEDLLM_STATE to a folder of yours"):
        user_secret()
    assert len(user_secret(create=True)) == 32
    assert (tmp_path / "state" / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("spoil", ["readable", "link", "fifo", "short"])
def test_a_secret_that_others_may_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    file = tmp_path / "secret"
    if spoil == "link":
        (tmp_path / "other").write_bytes(bytes(32))
        file.symlink_to(tmp_path / "other")
    elif spoil == "fifo":
        os.mkfifo(file, 0o600)
    else:
        file.write_bytes(bytes(3 if spoil == "short" else 32))
        file.chmod(0o640 if spoil == "readable" else 0o600)
    with pytest.raises(UserError, match="secret"):
        user_secret()


def test_commands_of_another_member_of_the_group_are_shown_first(run: RunPaths) -> None:
    given = config_of(rounds=3, scheduler__setup=["module load python"])
    close_run(opened(run.root, Simulation(), given))
    run.root.chmod(0o2770)

    def resume(setup: str = "module load python", given: tuple[str, ...] = ()) -> None:
        text = run.config.read_text().replace("module load python", setup)
        run.config.write_text(text)
        resumed = open_run(
            run.root,
            resumed_config(run.root, []),
            make_scheduler=lambda _p, _c: InlineScheduler(execute=Simulation()),
            say=lambda _line: None,
            given=given,
        )
        close_run(resumed)

    resume()  # as this user accepted it
    before = run.run.read_bytes()
    with pytest.raises(RunDirectoryError, match=r"scheduler\.setup: .*evil.*--accept-changes"):
        resume("evil")
    assert run.run.read_bytes() == before
    resume(given=("scheduler.setup",))
    resume()  # accepted from then on
    record = json.loads(run.run.read_bytes())
    record["seals"]["scheduler.setup"] = "0" * 64
    run.run.write_text(json.dumps(record))
    with pytest.raises(RunDirectoryError, match="accept-changes"):
        resume()
    # nobody else can write there: nobody else can have changed it
    run.root.chmod(0o755)
    resume()


def test_a_copy_of_another_user_s_run_shows_its_commands_first(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_run(opened(run.root, Simulation(), config_of(scheduler__python="python3")))
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "second"))
    with pytest.raises(RunDirectoryError, match="python3; if you trust them"):
        open_run(
            run.root,
            resumed_config(run.root, []),
            make_scheduler=lambda _p, _c: InlineScheduler(execute=Simulation()),
            say=lambda _line: None,
            given=(),
        )


def test_a_folder_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(RunDirectoryError, match="chmod -R o-w"):
        opened(root, Simulation())
    assert list(root.iterdir()) == []
