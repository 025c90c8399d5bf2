"""Groups: the bits of clients that train together depend on the group alone."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import BloomConfig, BloomForCausalLM

from fedllm.cli.execution import resume, start
from fedllm.config.loading import override_config, read_config
from fedllm.errors import ConfigError, OutOfMemory
from fedllm.planning.engines import group_clients
from fedllm.process.session import Session
from fedllm.programs.prepare import prepare, prepare_run
from fedllm.storage.paths import AttemptPaths, CachePaths, RunPaths
from fedllm.storage.records import (
    CohortRecord,
    JobsRecord,
    LayoutRecord,
    PreparedRecord,
    SubmissionRecord,
    TaskRecord,
)
from fedllm.worker.client_training import ClientRound, Save, Trained
from fedllm.worker.replay import replay
from fedllm.worker.worker import work
from tests.tiny import Tiny, make_tiny
from tests.worker.attempts import (
    ME,
    OTHER,
    alone,
    assert_same_bits,
    change_config,
    files,
    plan,
    round_of,
    untrained,
    updates,
)
from tests.worker.client_program import as_plain

TOGETHER = 3
OVERRIDES = [
    "rounds=1",
    "evaluation.every=5",
    "clients.cohort.count=6",
    # groups of both tiers, whose factors have unequal ranks
    "clients.tiers.large.ranks.mlp=3",
    f"training.clients_per_batch={TOGETHER}",
    "training.max_steps=4",
]


@pytest.fixture(scope="module")
def done(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed round of groups."""
    return start(tiny.config, OVERRIDES, tmp_path_factory.mktemp("done") / "run")


def groups_of(attempt: AttemptPaths) -> list[tuple[str, ...]]:
    cohort = CohortRecord.read(round_of(attempt).cohort)
    return [group.clients for group in group_clients(cohort.clients, cohort.ranks, TOGETHER)]


def opened(attempt: AttemptPaths, session: Session) -> ClientRound:
    return ClientRound.open(attempt, session)


def train(
    attempt: AttemptPaths,
    session: Session,
    clients: Sequence[str],
    before_step: Callable[[int, Save], None] = lambda _step, _save: None,
) -> list[Trained]:
    return opened(attempt, session).train(
        clients, attempt=1, bundle=0, identity=ME, before_step=before_step
    )


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed round over all epochs, where every other client has few rows."""
    tiny = make_tiny(tmp_path_factory.mktemp("unequal"))
    rows = tiny.data.read_text(encoding="utf-8").splitlines()
    of_client = itertools.groupby(rows, key=lambda row: json.loads(row)["client_id"])
    kept = [list(mine)[: 5 if n % 2 else 20] for n, (_, mine) in enumerate(of_client)]
    tiny.data.write_text("\n".join(itertools.chain(*kept)) + "\n", encoding="utf-8")
    return start(tiny.config, [*OVERRIDES, "training.max_steps=null"], tiny.cache.parent / "run")


class Interrupted(Exception):
    """The worker ended here."""


def leave_at(attempt: AttemptPaths, session: Session, clients: Sequence[str], stop: int) -> None:
    """Train up to a step and save, as a worker that a signal ends."""

    def leave(step: int, save: Save) -> None:
        if step == stop:
            save()
            raise Interrupted

    with pytest.raises(Interrupted):
        train(attempt, session, clients, leave)


def assert_as_recorded(found: Sequence[Trained], done: Path) -> None:
    recorded = updates(RunPaths(root=done).round(1))
    for trained in found:
        assert trained.record.losses == recorded[trained.record.client][0].losses
        assert trained.record.norms == recorded[trained.record.client][0].norms


def test_records_name_the_group_and_ranks_are_mixed(done: Path, attempt: AttemptPaths) -> None:
    groups = groups_of(attempt)
    assert [len(group) for group in groups] == [3, 3]
    recorded = updates(RunPaths(root=done).round(1))
    cohort = CohortRecord.read(round_of(attempt).cohort)
    tiers = {client.id: client.tier for client in cohort.clients}
    assert {tuple(record.group) for record, _ in recorded.values()} == set(groups)
    assert any(len({tiers[client] for client in group}) > 1 for group in groups)
    bundles = SubmissionRecord.read(RunPaths(root=done).round(1).attempt(1).submission).bundles
    assert all(set(g) <= set(b.clients) for b in bundles for g in groups if g[0] in b.clients)


def test_bits_do_not_depend_on_bundles_even_where_they_cut_groups(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    (a, b, c), (d, e, f) = groups_of(attempt)
    plan(attempt, [[a, e], [d, b, f], [c]])
    assert work(attempt, None, ME, session) == 0
    assert_same_bits(round_of(attempt), done)
    assert TaskRecord.read(attempt.task(ME.task)).clients_done == 6


def test_of_a_group_that_misses_one_update_only_that_one_is_published(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    second, first = groups_of(attempt)
    plan(attempt, [[*first[:2]], [*second]])
    work(attempt, None, ME, session)
    later = round_of(attempt).attempt(2)
    SubmissionRecord.read(attempt.submission).publish(later.submission)
    plan(later, [[*first, *second]])
    work(later, None, OTHER, session)
    assert_same_bits(round_of(attempt), done)
    attempts = {client: r.attempt for client, (r, _) in updates(round_of(later)).items()}
    assert attempts == {**dict.fromkeys([*first[:2], *second], 1), first[2]: 2}
    assert not list((round_of(attempt).root / "checkpoints").glob("*"))


def test_checkpoints_of_a_group_stay_until_its_missing_update_is_published(
    attempt: AttemptPaths, done: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, group = groups_of(attempt)
    checkpoints = [round_of(attempt).checkpoint(client) for client in group]
    plan(attempt, [[*other, *group[:2]]])
    work(attempt, None, ME, session)
    later = round_of(attempt).attempt(2)
    SubmissionRecord.read(attempt.submission).publish(later.submission)
    plan(later, [[group[2]]])
    leave_at(attempt, session, group, 2)

    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if round_of(attempt).updates in target.parents:
            raise Interrupted
        return replace(path, target)

    with monkeypatch.context() as away, pytest.raises(Interrupted):
        away.setattr(Path, "replace", killed)
        work(later, None, OTHER, session)
    assert all(path.exists() for path in checkpoints)
    assert work(later, None, OTHER, session) == 0
    assert updates(round_of(attempt))[group[2]][0].resumed_at == [2]
    assert not any(path.exists() for path in checkpoints)
    assert_same_bits(round_of(attempt), done)


def test_the_coordinator_plans_whole_groups_for_what_is_missing(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    second, first = groups_of(attempt)
    costs = {b.clients[0]: b.cost for b in SubmissionRecord.read(attempt.submission).bundles}
    plan(attempt, [[*first[:2]], [*second]])
    work(attempt, None, ME, session)
    JobsRecord(ids={}).publish(attempt.jobs)
    resume(attempt.run.root)
    assert_same_bits(round_of(attempt), done)
    (bundle,) = SubmissionRecord.read(round_of(attempt).attempt(2).submission).bundles
    assert bundle.clients == [first[2]]
    # all its members train for it
    assert bundle.cost == pytest.approx(costs[first[0]])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_group_goes_on_after_any_step_with_the_same_bits(
    attempt: AttemptPaths, done: Path, session: Session, stop: int
) -> None:
    group = groups_of(attempt)[1]
    leave_at(attempt, session, group, stop)
    found = train(attempt, session, group)
    assert [trained.record.resumed_at for trained in found] == [[stop]] * TOGETHER
    assert_as_recorded(found, done)


def test_a_group_goes_on_after_its_shortest_members_ended(
    unequal: Path, session: Session, tmp_path: Path
) -> None:
    recorded = updates(RunPaths(root=unequal).round(1))
    shutil.copytree(unequal, tmp_path / "run")
    attempt = untrained(RunPaths(root=tmp_path / "run").round(1))
    group, *_ = groups_of(attempt)
    ends = {client: recorded[client][0].steps for client in group}
    short, long = sorted(set(ends.values()))
    assert short < 5 < 7 < long

    leave_at(attempt, session, group, 5)
    ended = [round_of(attempt).checkpoint(c) for c in group if ends[c] == short]
    written = [path.stat().st_mtime_ns for path in ended]
    again = train(attempt, session, group)
    assert [t.record.resumed_at for t in again] == [[min(5, ends[c])] for c in group]
    assert_as_recorded(again, unequal)

    # those that ended before have nothing to save, and the files still go together
    leave_at(attempt, session, group, 7)
    assert [path.stat().st_mtime_ns for path in ended] == written
    again = train(attempt, session, group)
    expected = [[short] if ends[c] == short else [5, 7] for c in group]
    assert [t.record.resumed_at for t in again] == expected
    assert_as_recorded(again, unequal)


def test_a_signal_saves_all_members_and_the_task_goes_on(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    other, group = groups_of(attempt)
    plan(attempt, [[*other, *group]])
    change_config(attempt, "training", checkpoint_every_minutes=1e-9)
    paths = round_of(attempt)
    leave_at(attempt, session, group, 2)
    assert all(paths.checkpoint(client).exists() for client in group)
    assert work(attempt, None, ME, session) == 0
    assert files(attempt) == ["01-000-00.safetensors", "01-000-01.safetensors"]
    assert not any(paths.checkpoint(client).exists() for client in group)
    assert_same_bits(paths, done)
    assert updates(paths)[group[0]][0].resumed_at == [2]


def test_checkpoints_of_different_steps_are_refused_and_all_train_from_their_start(
    attempt: AttemptPaths, done: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    group = groups_of(attempt)[1]
    paths = round_of(attempt)
    leave_at(attempt, session, group, 2)
    # killed while the next ones were written
    early = paths.checkpoint(group[1]).read_bytes()
    leave_at(attempt, session, group, 3)
    paths.checkpoint(group[1]).write_bytes(early)
    found = train(attempt, session, group)
    assert [trained.record.resumed_at for trained in found] == [[]] * TOGETHER
    assert_as_recorded(found, done)
    message = f"group of {', '.join(group)}: trains from its start: {paths.checkpoint(group[1])}: "
    assert f"{message}is of another step than its group's" in capsys.readouterr().err


def test_a_checkpoint_of_another_group_is_left_alone(
    attempt: AttemptPaths, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    group = groups_of(attempt)[1]
    leave_at(attempt, session, group, 2)
    (alone,) = train(attempt, session, group[:1])
    assert alone.record.resumed_at == []
    assert alone.record.group == []
    assert "it is of another group: written by another version" in capsys.readouterr().err


def test_a_replay_trains_the_whole_group(done: Path, session: Session, tmp_path: Path) -> None:
    attempt = RunPaths(root=done).round(1).attempt(1)
    client = groups_of(attempt)[1][1]
    found = replay(alone(session, attempt), attempt, client, tmp_path / "scratch")
    assert found.recorded is not None
    assert found.agrees
    assert found.record.client == client


def test_where_memory_runs_out_all_members_train_again_with_smaller_micro_batches(
    attempt: AttemptPaths, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    group = groups_of(attempt)[1]
    change_config(attempt, "training", smaller_micro_batch=True)
    shortages = [MemoryError()]

    def fail_once(step: int, _save: Save) -> None:
        if step == 1 and shortages:
            raise shortages.pop()

    found = train(attempt, session, group, fail_once)
    assert {trained.record.micro_batch_size for trained in found} == {1}
    message = f"group of {', '.join(group)}: memory ran out with micro-batches of 2 rows"
    assert f"{message}; it is trained again from its start with 1" in capsys.readouterr().err
    change_config(attempt, "training", smaller_micro_batch=False, micro_batch_size=1)
    for one, other in zip(found, train(attempt, session, group), strict=True):
        assert as_plain(one)[1] == as_plain(other)[1]


def test_too_little_memory_for_a_group_names_the_key_that_makes_it_smaller(
    attempt: AttemptPaths, session: Session
) -> None:
    def fail(_step: int, _save: Save) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory, match=r"begin a new run with a smaller training\.clients_per"):
        train(attempt, session, groups_of(attempt)[1], fail)


@pytest.fixture
def bloom(tmp_path: Path) -> Tiny:
    """A base whose rows are padded."""
    tiny = make_tiny(tmp_path / "bloom")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (tiny.model / file).unlink()
    config = BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tiny.model)
    return tiny


def test_clients_of_a_base_whose_rows_are_padded_do_not_train_together(
    bloom: Tiny, attempt: AttemptPaths
) -> None:
    run = attempt.run
    round_of(attempt).cohort.unlink()
    change_config(attempt, "model", path=str(bloom.model))
    change_config(attempt, "lora", target_modules=["query_key_value"])
    change_config(attempt, "clients", tiers={"small": {"ranks": 2}, "large": {"ranks": 3}})
    config = read_config(run.config)
    assert config.training.clients_per_batch == TOGETHER
    refused = r"clients_per_batch: got 3, but .* padded.*; need 1"
    with pytest.raises(ConfigError, match=refused):
        prepare_run(run)
    cache = CachePaths(root=bloom.cache)
    with pytest.raises(ConfigError, match=refused):
        prepare(config, cache)
    alone = prepare(override_config(config, ["training.clients_per_batch=1"]), cache)
    assert Session().slots(config, alone).layout == "padded"


@pytest.mark.parametrize(
    ("layout", "used"),
    [
        (LayoutRecord(cpu="parts", cuda="flex"), "parts"),
        (LayoutRecord(cpu="mask", cuda="flex"), "mask"),
        (None, "padded"),
    ],
)
def test_the_layout_of_groups_is_taken_where_it_was_found_right(
    attempt: AttemptPaths, layout: LayoutRecord | None, used: str
) -> None:
    run = attempt.run
    prepared = PreparedRecord.read(run.prepared).model_copy(update={"layout": layout})
    assert Session().slots(read_config(run.config), prepared).layout == used
