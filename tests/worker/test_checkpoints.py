"""Checkpoints: steps that a client took before its worker ended are not taken again."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fedllm.cli.execution import start
from fedllm.process.session import Session
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.checkpoint_header import CheckpointRecord
from fedllm.storage.paths import AttemptPaths, RunPaths
from fedllm.storage.records import UpdateRecord
from fedllm.storage.tensors import Checkpoint, publish_checkpoint, read_checkpoint
from fedllm.worker.client_training import ClientRound, Save, Trained
from tests.tiny import Tiny
from tests.worker import client_program as trainer
from tests.worker.attempts import change_sections
from tests.worker.client_program import as_plain

ME = TaskIdentity(task="9_1", node="n", log="")
ROOT = Path(__file__).parents[2]
STEPS = 9
Plain = tuple[dict[str, object], dict[str, list[object]]]


class Interrupted(Exception):
    """The worker ended here."""


@pytest.fixture(scope="module")
def done(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round."""
    overrides = ["rounds=1", "evaluation.every=5"]
    return start(tiny.config, overrides, tmp_path_factory.mktemp("done") / "run")


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


@pytest.fixture
def attempt(done: Path, tmp_path: Path) -> AttemptPaths:
    """The attempt of the round, with more steps and fewer rows at a time."""
    root = tmp_path / "run"
    shutil.copytree(done, root)
    attempt = RunPaths(root=root).round(1).attempt(1)
    change_training(attempt, max_steps=STEPS, micro_batch_size=1)
    return attempt


def change_training(attempt: AttemptPaths, local: str = "fedit", **keys: object) -> None:
    change_sections(run_of(attempt), {"training": keys, "method": {"local": local}})


def run_of(attempt: AttemptPaths) -> RunPaths:
    return attempt.run


def opened(attempt: AttemptPaths, session: Session) -> ClientRound:
    return ClientRound.open(attempt, session)


def client_of(found: ClientRound) -> str:
    return found.cohort.clients[0].id


def train(
    found: ClientRound,
    *,
    resume: bool = True,
    before_step: Callable[[int, Save], None] = lambda _step, _save: None,
) -> Trained:
    client = client_of(found)
    (trained,) = found.train(
        [client], attempt=1, bundle=0, identity=ME, before_step=before_step, resume=resume
    )
    return trained


def leave_at(found: ClientRound, stop: int) -> None:
    """Train up to a step and save, as a worker that a signal ends."""

    def leave(step: int, save: Save) -> None:
        if step == stop:
            save()
            raise Interrupted

    with pytest.raises(Interrupted):
        train(found, before_step=leave)


def in_a_process(
    attempt: AttemptPaths, client: str, *options: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, trainer.__file__),
            *(str(attempt.root), client, str(out_of(attempt)), *options),
        ],
        # one arena: threads would take a varying part of the address space, which tests limit
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def out_of(attempt: AttemptPaths) -> Path:
    return run_of(attempt).root / "trained.pickle"


def trained_by(attempt: AttemptPaths) -> Plain:
    found: Plain = pickle.loads(out_of(attempt).read_bytes())
    return found


def assert_same(found: Plain, expected: Plain) -> None:
    keys = ("status", "rows", "steps", "tokens", "loss_tokens", "losses", "norms", "scales")
    assert {key: found[0][key] for key in keys} == {key: expected[0][key] for key in keys}
    assert found[1] == expected[1]


@pytest.mark.slow
def test_a_client_whose_workers_are_killed_ends_in_the_bits_of_a_quiet_one(
    attempt: AttemptPaths, session: Session
) -> None:
    quiet = opened(attempt, session)
    client = client_of(quiet)
    expected = as_plain(train(quiet))
    assert expected[0]["resumed_at"] == []
    for die_at in (2, 8):
        assert in_a_process(attempt, client, "--die-at", str(die_at)).returncode == -9
        assert read_checkpoint(quiet.paths.checkpoint(client)).record.steps == die_at
    last = in_a_process(attempt, client)
    assert last.returncode == 0, last.stderr
    assert f"client {client}: goes on after 8 steps" in last.stderr
    found = trained_by(attempt)
    assert_same(found, expected)
    record = UpdateRecord.model_validate(found[0])
    assert record.resumed_at == [2, 8]
    assert record.earlier_environments == []
    assert record.micro_batch_size is None


def test_a_checkpoint_is_written_only_where_a_step_was_taken(
    attempt: AttemptPaths, session: Session
) -> None:
    found = opened(attempt, session)
    path = found.paths.checkpoint(client_of(found))
    leave_at(found, 0)
    assert not path.exists()
    leave_at(found, 4)
    written = path.stat()
    leave_at(found, 4)
    assert path.stat() == written
    leave_at(found, 5)
    assert read_checkpoint(path).record.resumed_at == [4]
    assert [name.name for name in path.parent.iterdir()] == [path.name]
    found.discard_checkpoint(client_of(found))
    assert not path.exists()
    found.discard_checkpoint(client_of(found))


def test_a_replay_begins_at_the_start(attempt: AttemptPaths, session: Session) -> None:
    found = opened(attempt, session)
    leave_at(found, 4)
    assert train(found, resume=False).record.resumed_at == []
    assert train(found).record.resumed_at == [4]


def truncate(content: bytes) -> bytes:
    return content[:-7]


def flip(content: bytes) -> bytes:
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


def empty(_content: bytes) -> bytes:
    return b""


def alter_header(content: bytes) -> bytes:
    at = content.index(b'\\"steps\\":4') + len(b'\\"steps\\":')
    return content[:at] + b"6" + content[at + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip, empty, alter_header])
def test_a_damaged_checkpoint_is_logged_and_the_client_trains_from_its_start(
    attempt: AttemptPaths,
    session: Session,
    damage: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = opened(attempt, session)
    path = found.paths.checkpoint(client_of(found))
    leave_at(found, 4)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedUpdateError):
        read_checkpoint(path)
    again = train(found)
    assert again.record.resumed_at == []
    assert_same(as_plain(again), as_plain(train(found, resume=False)))
    assert f"client {client_of(found)}: trains from its start: {path}: " in capsys.readouterr().err


def test_an_update_or_a_folder_in_its_place_is_no_checkpoint(
    attempt: AttemptPaths, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    found = opened(attempt, session)
    path = found.paths.checkpoint(client_of(found))
    path.parent.mkdir()
    shutil.copy(next(found.paths.updates.glob("*.safetensors")), path)
    assert train(found).record.resumed_at == []
    assert "its record is not valid" in capsys.readouterr().err
    path.unlink()
    path.mkdir()
    assert train(found).record.resumed_at == []
    assert "is a folder, need a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run_id", "another", "it is of another run id"),
        ("round", 7, "it is of another round"),
        ("client", "c6", "it is of another client"),
        ("base_fingerprint", "another", "it is of another base fingerprint"),
        ("state_sha256", "another", "it is of another state sha256"),
    ],
)
def test_a_checkpoint_of_another_training_is_left_alone(
    attempt: AttemptPaths,
    session: Session,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: object,
    message: str,
) -> None:
    found = opened(attempt, session)
    leave_at(found, 4)
    rewrite(
        found,
        lambda record: record.model_copy(
            update={"identity": record.identity.model_copy(update={key: value})}
        ),
    )
    again = train(found)
    assert again.record.resumed_at == []
    assert message in capsys.readouterr().err


def rewrite(found: ClientRound, change: Callable[[CheckpointRecord], CheckpointRecord]) -> None:
    path = found.paths.checkpoint(client_of(found))
    checkpoint = read_checkpoint(path)
    changed = Checkpoint(record=change(checkpoint.record), tensors=checkpoint.tensors)
    publish_checkpoint(path, changed, partial(found.sign, [client_of(found)]))


def test_a_checkpoint_that_is_not_the_client_s_own_is_not_resumed(
    attempt: AttemptPaths, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    found = opened(attempt, session)
    leave_at(found, 4)
    path = found.paths.checkpoint(client_of(found))
    forged = read_checkpoint(path)
    publish_checkpoint(path, Checkpoint(record=forged.record, tensors=forged.tensors))
    assert train(found).record.resumed_at == []
    assert "it is not signed with the key of this client" in capsys.readouterr().err


def test_a_checkpoint_of_another_configuration_is_left_alone(
    attempt: AttemptPaths, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_at(opened(attempt, session), 4)
    change_training(attempt, learning_rate=0.5)
    assert train(opened(attempt, session)).record.resumed_at == []
    message = capsys.readouterr().err
    assert f"client {client_of(opened(attempt, session))}: trains from its start: " in message
    assert (
        "it is of another result fingerprint: "
        "written by another version of fedllm or with another configuration"
    ) in message
    leave_at(opened(attempt, session), 4)
    # keys that do not change the result may change
    change_training(attempt, checkpoint_every_minutes=3.0, learning_rate=0.5)
    assert train(opened(attempt, session)).record.resumed_at == [4]


def test_a_checkpoint_of_other_micro_batches_or_ranks_is_not_resumed(
    attempt: AttemptPaths, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    found = opened(attempt, session)
    leave_at(found, 4)
    rewrite(found, lambda record: record.model_copy(update={"micro_batch_size": 2}))
    assert train(found).record.resumed_at == []
    assert "its micro-batches have 2 rows" in capsys.readouterr().err
    leave_at(found, 4)
    path = found.paths.checkpoint(client_of(found))
    read = read_checkpoint(path)
    halved = {name: tensor[:1] if tensor.dim() else tensor for name, tensor in read.tensors.items()}
    publish_checkpoint(path, Checkpoint(record=read.record, tensors=halved))
    assert train(found).record.resumed_at == []
    assert "its factors have other shapes" in capsys.readouterr().err


def test_a_client_that_was_trained_in_several_environments_says_so(
    attempt: AttemptPaths, session: Session
) -> None:
    found = opened(attempt, session)
    leave_at(found, 4)
    elsewhere = {"processor": "another"}
    rewrite(found, lambda record: record.model_copy(update={"environments": [elsewhere]}))
    leave_at(found, 6)
    record = train(found).record
    assert record.resumed_at == [4, 6]
    assert record.earlier_environments == [elsewhere]
    assert record.environment != elsewhere


# two steps of eight long rows each
LONG = {"batch_size": 8, "micro_batch_size": None, "max_steps": None, "epochs": 2}


@pytest.mark.slow
def test_where_memory_runs_out_the_client_is_trained_with_smaller_micro_batches(
    attempt: AttemptPaths, session: Session
) -> None:
    change_training(attempt, "fedavg", **LONG, smaller_micro_batch=True)
    client = client_of(opened(attempt, session))
    little = ("--long-rows", "--more-mib", "110")
    killed = in_a_process(attempt, client, *little, "--die-at", "1")
    assert killed.returncode == -9, killed.stderr
    message = f"client {client}: memory ran out with micro-batches of 8 rows"
    assert killed.stderr.startswith(f"{message}; it is trained again from its start with 4\n")
    done = in_a_process(attempt, client, *little)
    assert done.returncode == 0, done.stderr
    found = trained_by(attempt)
    record = UpdateRecord.model_validate(found[0])
    assert record.micro_batch_size in {1, 2}
    assert killed.stderr.endswith(f"from its start with {record.micro_batch_size}\n")
    # its checkpoint already has the size that fits
    assert "memory ran out" not in done.stderr
    assert record.resumed_at == [1]
    fitting = LONG | {"micro_batch_size": record.micro_batch_size}
    change_training(attempt, "fedavg", **fitting, smaller_micro_batch=False)
    expected = train(opened(attempt, trainer.LongRows()), resume=False)
    assert expected.record.micro_batch_size is None
    assert_same(found, as_plain(expected))


@pytest.mark.parametrize(
    ("keys", "more_mib", "message"),
    [
        (
            {"micro_batch_size": 6, "smaller_micro_batch": False},
            110,
            "of 6 rows; give the task more memory and resume, or begin a new run with a smaller "
            "training.micro_batch_size or training.smaller_micro_batch: true",
        ),
        (
            {"micro_batch_size": 2, "smaller_micro_batch": True},
            1,
            "of 1 rows; give the task more memory and resume, or begin a new run with "
            "training.gradient_checkpointing: true or a smaller data.cutoff_tokens",
        ),
    ],
)
def test_too_little_memory_is_one_line_that_names_client_micro_batch_and_keys(
    attempt: AttemptPaths, session: Session, keys: dict[str, object], more_mib: int, message: str
) -> None:
    change_training(attempt, "fedavg", **LONG | keys)
    client = client_of(opened(attempt, session))
    failed = in_a_process(attempt, client, "--long-rows", "--more-mib", str(more_mib))
    assert failed.returncode == 1, failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last == f"OutOfMemory: client {client}: memory ran out with micro-batches {message}"


def test_an_error_other_than_of_memory_is_raised_as_it_is(
    attempt: AttemptPaths, session: Session
) -> None:
    change_training(attempt, smaller_micro_batch=True, micro_batch_size=2)

    def fail(step: int, _save: Save) -> None:
        if step == 1:
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        train(opened(attempt, session), before_step=fail)
