"""Paths: every file has one place, every client its own file name."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import UserError
from fedllm.storage.paths import (
    MAX_ENTRIES,
    JobPaths,
    RoundPaths,
    RunPaths,
    backup_name,
    cache_of,
    encode_client,
    shipped,
)

RUN = RunPaths(root=Path("RUN"))
AWKWARD = ["", ".", "..", "../x", "a/b", "a b", "A", "a", "é", "🦙", "~a", "a\0b", "nul", "x" * 300]


@given(one=st.text(), other=st.text())
def test_two_clients_never_share_a_name_even_where_case_is_ignored(one: str, other: str) -> None:
    assert (encode_client(one).casefold() == encode_client(other).casefold()) == (one == other)


@given(client=st.text() | st.sampled_from(AWKWARD))
def test_a_clients_name_is_one_plain_file_name(client: str) -> None:
    assert re.fullmatch(r"~{0,2}[a-z0-9_]*", encode_client(client))
    assert 0 < len(encode_client(client)) <= 100


def test_awkward_clients_have_names_of_their_own() -> None:
    assert len({encode_client(client) for client in AWKWARD}) == len(AWKWARD)


def test_plain_clients_keep_their_names() -> None:
    assert encode_client("task_0967") == "task_0967"
    assert encode_client("Task") != "task"


def test_every_file_of_a_run_has_its_place() -> None:
    third = RUN.round(3)
    attempt = third.attempt(1)
    assert third.number == 3
    assert {
        str(path.relative_to(RUN.root))
        for path in (
            RUN.config,
            RUN.run,
            RUN.prepared,
            RUN.lease(7),
            RUN.released(7),
            RUN.metrics,
            RUN.logs(3),
            RUN.prepare_job(1).submission,
            third.cohort,
            third.update(attempt=1, bundle=7, part=0),
            third.checkpoints,
            third.collection,
            third.global_state,
            third.aggregate_record,
            third.aggregate_job(2).jobs,
            third.evaluation_record,
            third.evaluation_job(2).error,
            third.record,
            attempt.submission,
            attempt.claim(7),
            attempt.task("12_3"),
        )
    } == {
        "config.yaml",
        "run.json",
        "prepared.json",
        "coordinator/0007.json",
        "coordinator/0007.released.json",
        "metrics.jsonl",
        "logs/0003",
        "prepare/attempts/01/submission.json",
        "rounds/0003/cohort.json",
        "rounds/0003/updates/01-007-00.safetensors",
        "rounds/0003/checkpoints",
        "rounds/0003/collection.json",
        "rounds/0003/aggregate/global.safetensors",
        "rounds/0003/aggregate/aggregate.json",
        "rounds/0003/aggregate/attempts/02/jobs.json",
        "rounds/0003/evaluation/evaluation.json",
        "rounds/0003/evaluation/attempts/02/error.json",
        "rounds/0003/round.json",
        "rounds/0003/attempts/01/submission.json",
        "rounds/0003/attempts/01/claims/007.json",
        "rounds/0003/attempts/01/tasks/12/12_3.json",
    }
    assert RUN.rounds == RUN.root / "rounds"
    assert RoundPaths(root=third.root) == third
    assert JobPaths(root=attempt.root).submission == attempt.submission


def test_a_backup_never_replaces_an_earlier_backup(tmp_path: Path) -> None:
    path = tmp_path / "collection.json"
    for number in (1, 2, 3):
        path.write_text(str(number))
        path.rename(backup_name(path, "replaced"))
    assert (tmp_path / "collection.json.replaced-1").read_text() == "1"
    assert (tmp_path / "collection.json.replaced-3").read_text() == "3"


def test_shipped_files_are_found_and_a_missing_one_is_named() -> None:
    assert shipped("jobs/client.py").is_file()
    assert shipped("errors.py").is_file()
    with pytest.raises(UserError, match=r"jobs/nothing.py: not part of this installation"):
        shipped("jobs/nothing.py")


def test_the_cache_is_where_it_is_configured_else_where_the_environment_says_else_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "a"
    monkeypatch.delenv("FEDLLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    beside = tmp_path / "runs" / ".fedllm-cache"
    assert cache_of(None, run).root == tmp_path / "user" / "fedllm"
    assert cache_of(None, run, beside_runs=True).root == beside
    # one of an earlier version is used further
    beside.mkdir(parents=True)
    assert cache_of(None, run).root == beside
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_of(None, tmp_path / "new" / "a").root == tmp_path / "home" / ".cache" / "fedllm"
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "shared"))
    assert cache_of(None, run).root == tmp_path / "shared"
    cache = cache_of(str(tmp_path / "mine"), run)
    assert cache.model("k") == tmp_path / "mine" / "models" / "k"
    assert cache.data("k") == tmp_path / "mine" / "data" / "k"


def test_no_folder_of_a_large_attempt_has_more_than_a_few_hundred_entries() -> None:
    paths = RUN.round(3)
    attempt = paths.attempt(1)
    many = range(20_000)
    files = [attempt.claim(n) for n in many]
    files += [paths.update(attempt=1, bundle=n, part=part) for n in many for part in (0, 1)]
    files += [attempt.task(f"{array}_{n}") for array in (7, 8) for n in range(400)]
    files += [attempt.task_error(f"7_{n}") for n in range(400)]
    files += [RUN.lease(n) for n in many]
    entries: dict[Path, set[Path]] = {}
    for file in files:
        for path in (file, *file.parents):
            entries.setdefault(path.parent, set()).add(path)
    assert len(set(files)) == len(files)
    assert max(map(len, entries.values())) <= MAX_ENTRIES
