"""Blocks folded ahead: the aggregation takes what it would have made itself, and nothing else."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedllm.aggregation.devices import is_fast_at_bfloat16
from fedllm.errors import AdapterError
from fedllm.steps.aggregate import aggregate_round, fold_ahead
from fedllm.steps.programs import run as run_program
from fedllm.steps.session import Session
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import AggregateRecord, CollectionRecord
from fedllm.storage.tensors import CheckedFile, UpdateFile, publish_update, writing_checked
from fedllm.storage.updates import read_records
from tests.steps.collection import MODULES, collect, make_round

METHODS = {"flexlora": {"small": 7, "large": 8}, "factor_mean": {"small": 3, "large": 3}}
BLOCKS = [0, 1, 2]  # of four, four and three clients


def uncollected(folder: Path, method: str = "flexlora", **aggregation: Any) -> RoundPaths:
    """A round whose updates are all there and that nobody has collected yet."""
    paths = make_round(
        folder,
        clients=11,
        ranks=METHODS[method],
        method=method,
        **{"block_clients": 4, "fold_ahead": True, **aggregation},
    )
    paths.collection.unlink()
    return paths


def aggregated(paths: RoundPaths, *without: int) -> AggregateRecord:
    collect(paths, without=without)
    return aggregate_round(paths)


def one_shot(folder: Path, method: str = "flexlora", *without: int) -> str:
    return aggregated(uncollected(folder, method, fold_ahead=False), *without).sha256


@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"]])
@pytest.mark.parametrize("method", METHODS)
def test_folded_ahead_or_not_the_bits_are_the_same(
    tmp_path: Path, method: str, devices: str | list[str]
) -> None:
    paths = uncollected(tmp_path / "run", method, device=devices)
    assert fold_ahead(paths, BLOCKS) == BLOCKS
    for block in BLOCKS:
        file = CheckedFile(paths.fold(block))
        assert {name.partition("|")[0] for name in file.header.layout} == {"a.down", "a.q", "a.up"}
    found = aggregated(paths)
    assert found.folded_ahead == BLOCKS
    assert found.sha256 == one_shot(tmp_path / "other", method)


def test_large_modules_that_are_searched_have_the_same_bits_too(tmp_path: Path) -> None:
    found = {}
    for ahead in (True, False):
        paths = make_round(
            tmp_path / str(ahead),
            clients=10,
            modules={"a.q": (520, 516)},
            ranks={"small": 60, "large": 70},
            block_clients=5,
            fold_ahead=ahead,
        )
        if ahead:
            paths.collection.unlink()
            assert fold_ahead(paths, [0, 1]) == [0, 1]
        found[ahead] = aggregated(paths)
        assert found[ahead].modules["a.q"].route.startswith("iterative")
    assert found[True].folded_ahead == [0, 1]
    assert found[True].sha256 == found[False].sha256


def test_what_is_folded_ahead_is_not_folded_again(tmp_path: Path) -> None:
    paths = uncollected(tmp_path / "run")
    fold_ahead(paths, BLOCKS)
    collect(paths)
    file = min(paths.updates.glob("*.safetensors"))
    content = file.read_bytes()
    # of what is taken as it is no update is read but for its header
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert aggregate_round(paths).sha256 == one_shot(tmp_path / "other")


def test_a_block_alone_and_later_the_rest(tmp_path: Path) -> None:
    paths = uncollected(tmp_path / "run")
    assert fold_ahead(paths, [1]) == [1]
    found = aggregated(paths)
    assert (found.folded_ahead, found.sha256) == ([1], one_shot(tmp_path / "other"))


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_is_left_out_has_its_block_alone_folded_again(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = uncollected(tmp_path / "run", method)
    fold_ahead(paths, BLOCKS)
    found = aggregated(paths, 5)
    assert found.folded_ahead == [0, 2]
    assert found.sha256 == one_shot(tmp_path / "other", method, 5)
    said = capsys.readouterr().err
    assert f"{paths.fold(1)}: not of these updates and settings; block 1 is folded again" in said


def test_a_block_of_which_nobody_is_left_needs_no_file(tmp_path: Path) -> None:
    paths = uncollected(tmp_path / "run")
    fold_ahead(paths, BLOCKS)
    found = aggregated(paths, 4, 5, 6, 7)
    assert found.folded_ahead == [0, 2]
    assert found.sha256 == one_shot(tmp_path / "other", "flexlora", 4, 5, 6, 7)


def test_an_update_that_came_anew_has_its_block_folded_again(tmp_path: Path) -> None:
    paths, other = uncollected(tmp_path / "run"), uncollected(tmp_path / "other", fold_ahead=False)
    fold_ahead(paths, BLOCKS)
    for each in (paths, other):
        send_anew(each)
    found = aggregated(paths)
    assert found.folded_ahead == [1, 2]
    assert found.sha256 == aggregated(other).sha256


def send_anew(paths: RoundPaths) -> None:
    """Publish the first file anew, by the next attempt and with other factors."""
    first = min(paths.updates.glob("*.safetensors"))
    sent, records = UpdateFile(first, CheckedFile(first).header.digest), read_records(first)
    publish_update(
        paths.update(attempt=2, bundle=0, part=0),
        [record.model_copy(update={"attempt": 2}) for record in records],
        {
            client: {m: (sent.view(client, m, "A") * 2, sent.view(client, m, "B")) for m in MODULES}
            for client in [record.client for record in records]
        },
    )
    first.unlink()


def flipped(content: bytes, at: int) -> bytes:
    altered = bytearray(content)
    altered[at] ^= 1
    return bytes(altered)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-7], "cannot be read"),
        (lambda _: b"", "cannot be read"),
        (lambda content: flipped(content, 40), "cannot be read"),
        (lambda content: flipped(content, -1), "the checksum of .* does not match; folded again"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_was_altered_is_told_and_its_block_folded_again(
    tmp_path: Path,
    method: str,
    change: Callable[[bytes], bytes],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = uncollected(tmp_path / "run", method)
    fold_ahead(paths, BLOCKS)
    file = paths.fold(1)
    file.write_bytes(change(file.read_bytes()))
    assert aggregated(paths).sha256 == one_shot(tmp_path / "other", method)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if str(file) in line]
    assert re.search(words, said), said


def test_another_file_in_the_place_of_a_fold_is_not_taken_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = uncollected(tmp_path / "run")
    with writing_checked(paths.fold(0), "{}", {}):
        pass
    assert aggregated(paths).folded_ahead == []
    assert f"{paths.fold(0)}: cannot be read" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from fedllm.steps.aggregate import fold_ahead
from fedllm.storage.paths import RoundPaths

def kill(event, arguments):
    if event == "os.rename" and "002.safetensors" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
fold_ahead(RoundPaths(root=Path(sys.argv[1])), [0, 1, 2])
"""


def test_of_a_job_that_was_killed_what_it_had_folded_is_used(tmp_path: Path) -> None:
    paths = uncollected(tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", KILLED, str(paths.root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not paths.fold(2).exists()
    assert any(paths.folds.glob(".*.part"))
    found = aggregated(paths)
    assert (found.folded_ahead, found.sha256) == ([0, 1], one_shot(tmp_path / "other"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("aggregation", "exact", True), ("lora", "alpha", 3), ("method", "name", "factor_mean")],
)
def test_what_was_folded_under_other_settings_is_folded_again(
    tmp_path: Path, section: str, key: str, value: object
) -> None:
    paths = make_round(
        tmp_path / "run", clients=8, ranks=METHODS["factor_mean"], block_clients=4, fold_ahead=True
    )
    paths.collection.unlink()
    fold_ahead(paths, [0, 1])
    config = paths.run.config
    raw = yaml.safe_load(config.read_text())
    raw[section][key] = value
    config.write_text(yaml.safe_dump(raw))
    if section == "method":
        (paths.before.aggregate_record).unlink()
        aggregate_round(paths.before)
    assert aggregated(paths).folded_ahead == []


def test_without_the_key_nothing_that_was_folded_is_looked_at(tmp_path: Path) -> None:
    paths = uncollected(tmp_path / "run", fold_ahead=False)
    fold_ahead(paths, BLOCKS)
    assert aggregated(paths).folded_ahead == []


@pytest.mark.parametrize(
    ("ranks", "block_clients"),
    [({"small": 1, "large": 1}, 4), ({"small": 5, "large": 6}, 1)],
    ids=["factored", "blocks of one client"],
)
def test_a_block_that_comes_to_no_less_is_not_folded(
    tmp_path: Path, ranks: dict[str, int], block_clients: int
) -> None:
    paths = make_round(tmp_path / "run", ranks=ranks, block_clients=block_clients, fold_ahead=True)
    paths.collection.unlink()
    assert fold_ahead(paths, [0, 1]) == []
    assert not paths.folds.exists()


def test_only_modules_that_come_to_less_are_folded(tmp_path: Path) -> None:
    modules = {"a.small": (12, 12), "a.large": (200, 200)}
    runs = {
        key: make_round(
            tmp_path / str(key),
            clients=8,
            modules=modules,
            ranks=METHODS["flexlora"],
            block_clients=4,
            fold_ahead=key,
        )
        for key in (True, False)
    }
    runs[True].collection.unlink()
    assert fold_ahead(runs[True], [0, 1]) == [0, 1]
    assert set(CheckedFile(runs[True].fold(0)).header.layout) == {"a.small|W"}
    assert aggregated(runs[True]).sha256 == aggregated(runs[False]).sha256


def test_blocks_that_are_not_all_there_and_rounds_that_are_collected_are_left_alone(
    tmp_path: Path,
) -> None:
    paths = uncollected(tmp_path / "run")
    first = min(paths.updates.glob("*.safetensors"))
    records = read_records(first)
    publish_update(first, [r.model_copy(update={"status": "failed"}) for r in records], {})
    last = max(paths.updates.glob("*.safetensors"))
    last.unlink()
    assert fold_ahead(paths, [*BLOCKS, 9]) == [1]
    paths.fold(1).unlink()
    CollectionRecord(round=1, lease=1, updates=[]).publish(paths.collection)
    assert fold_ahead(paths, BLOCKS) == []


def test_a_block_that_cannot_be_folded_is_told_after_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = uncollected(tmp_path / "run")
    first = min(paths.updates.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"damaged update .*checksum"):
        fold_ahead(paths, BLOCKS)
    assert [block for block in BLOCKS if paths.fold(block).exists()] == [1, 2]
    assert not list(paths.folds.glob(".*"))
    assert "block 0: " in capsys.readouterr().err


def test_the_program_folds_where_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = uncollected(tmp_path / "run")
    assert run_program("aggregate", [str(paths.root), "--fold", "0,2"], session=Session()) == 0
    assert "blocks folded ahead: 0, 2" in capsys.readouterr().err
    assert not paths.aggregate_record.exists()
    assert run_program("aggregate", [str(paths.root), "--fold", "9"], session=Session()) == 0
    assert "blocks folded ahead: none is worth it" in capsys.readouterr().err
    assert run_program("aggregate", [str(paths.root), "--fold", "x"], session=Session()) == 2


@pytest.mark.parametrize("what", ["the processor", "bfloat16", "fedllm's version"])
def test_blocks_folded_on_another_processor_or_by_another_version_are_folded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    paths = uncollected(tmp_path / "run")
    with monkeypatch.context() as elsewhere:
        if what == "the processor":
            elsewhere.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        elif what == "bfloat16":
            slow = not is_fast_at_bfloat16(torch.device("cpu"))
            elsewhere.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
            elsewhere.setattr(torch.cpu, "_is_amx_tile_supported", lambda: slow)
        else:
            other = tmp_path / "installed" / "fedllm-0.0.dist-info"
            other.mkdir(parents=True)
            (other / "METADATA").write_text("Metadata-Version: 2.1\nName: fedllm\nVersion: 0.0\n")
            elsewhere.syspath_prepend(other.parent)
        fold_ahead(paths, BLOCKS)
    assert aggregated(paths).folded_ahead == []
    assert fold_ahead(uncollected(tmp_path / "here"), BLOCKS) == BLOCKS


def test_a_client_that_counts_more_has_its_block_folded_again(tmp_path: Path) -> None:
    paths = uncollected(tmp_path / "run")
    fold_ahead(paths, BLOCKS)
    collect(paths)
    frozen = CollectionRecord.read(paths.collection)
    heavier = frozen.updates[0].model_copy(update={"weight": 99.0})
    frozen.model_copy(update={"updates": [heavier, *frozen.updates[1:]]}).publish(paths.collection)
    assert aggregate_round(paths).folded_ahead == [1, 2]
