"""Update files: whole, of this run and round, and of the expected shapes, or refused."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.errors import AdapterError
from fedllm.storage.checked import (
    DIGEST,
    DIGESTS,
    METADATA,
    RECORDS,
    DamagedUpdateError,
    digest_of,
    read_and_check,
)
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import UpdateRecord
from fedllm.storage.tensors import TensorFile, UpdateFile, publish_update
from fedllm.storage.update_problems import Expected, update_problem
from fedllm.storage.updates import (
    Origin,
    PublishedUpdate,
    UpdateScanner,
    check_update,
    read_records,
    read_update,
    tensor_name,
)
from tests.storage.interference import just_before
from tests.storage.samples import RANKS, record_of
from tests.storage.updates import CLIENTS, SIDES, publish, round_in, tensors_of

EXPECTED = Expected(ranks=RANKS, sides=SIDES, max_rows=7)


@pytest.fixture
def paths(tmp_path: Path) -> RoundPaths:
    return round_in(tmp_path)


def scanner(paths: RoundPaths) -> UpdateScanner:
    origin = Origin(run_id="run", round=paths.number, base_fingerprint="base")
    return UpdateScanner(round=paths, origin=origin)


def test_an_update_is_read_as_it_was_published(paths: RoundPaths) -> None:
    path = publish(paths, *CLIENTS)
    found = read_update(path)
    assert found == check_update(path)
    assert [update.record for update in found] == [record_of(client) for client in CLIENTS]
    assert read_records(path) == [update.record for update in found]
    with TensorFile(path) as file:
        for client in CLIENTS:
            for module, pair in tensors_of(client).items():
                for factor, tensor in zip("AB", pair, strict=True):
                    assert torch.equal(file.get(tensor_name(client, module, factor)), tensor)
    for update in found:
        assert update.shapes == {
            f"{module}|{factor}": tuple(tensor.shape)
            for module, pair in tensors_of("any").items()
            for factor, tensor in zip("AB", pair, strict=True)
        }
        assert update_problem(update, EXPECTED) is None


def test_a_collected_file_is_known_by_its_header_and_checked_tensor_by_tensor(
    paths: RoundPaths,
) -> None:
    path = publish(paths, *CLIENTS)
    sha256 = read_update(path)[0].sha256
    file = UpdateFile(path, sha256)
    assert [file.scale(client, module) for client in CLIENTS for module in RANKS] == [2.0] * 4
    for client in CLIENTS:
        for module, pair in tensors_of(client).items():
            for factor, tensor in zip("AB", pair, strict=True):
                assert torch.equal(file.view(client, module, factor), tensor)
                file.check(client, module, factor)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    # only the last tensor is damaged; the rest is as it was sent
    last = UpdateFile(path, sha256)
    altered = [
        (client, module, factor)
        for client in CLIENTS
        for module in RANKS
        for factor in "AB"
        if is_altered(last, client, module, factor)
    ]
    assert altered == [("task/7 ü", "layers.0.up_proj", "B")]
    with pytest.raises(
        AdapterError,
        match=rf"{path.name}: damaged update \(client task/7 ü: the checksum of "
        r"layers\.0\.up_proj B does not match\)",
    ):
        last.check("task/7 ü", "layers.0.up_proj", "B")


MANY = """
import sys, tracemalloc
from pathlib import Path
from fedllm.storage.tensors import UpdateFile
from fedllm.storage.updates import read_update
paths = sorted(Path(sys.argv[1]).glob("*.safetensors"))
digests = [read_update(path)[0].sha256 for path in paths]
first = UpdateFile(paths[0], digests[0])
tracemalloc.start()
files = [UpdateFile(*pair) for pair in zip(paths[1:], digests[1:])]
print(tracemalloc.get_traced_memory()[0] // len(files))
"""


def test_an_open_file_takes_little_memory_however_many_modules_it_has(tmp_path: Path) -> None:
    modules = [f"model.layers.{n // 7}.self_attn.q_proj.{n % 7}" for n in range(168)]
    scales, norms = dict.fromkeys(modules, 2.0), dict.fromkeys(modules, (1.0, 2.0))
    pair = (torch.ones(1, 3), torch.ones(2, 1))
    for number in range(9):
        record = record_of(f"task/{number}", scales=scales, norms=norms)
        path = tmp_path / f"{number}.safetensors"
        publish_update(path, [record], {record.client: dict.fromkeys(modules, pair)})
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # a digest and a place for each of 336 tensors, and one-time allocations
    assert int(done.stdout) < 32 << 10


def is_altered(file: UpdateFile, client: str, module: str, factor: str) -> bool:
    try:
        file.check(client, module, factor)
    except AdapterError:
        return True
    return False


def test_a_file_in_the_place_of_a_collected_one_is_refused_by_its_header(
    paths: RoundPaths,
) -> None:
    path = publish(paths, "a")
    sha256 = read_update(path)[0].sha256
    rewritten(path, lambda header: header["__metadata__"].update(records="[]"))
    with pytest.raises(AdapterError, match="header's checksum does not match"):
        UpdateFile(path, sha256)
    # another training of the same client: only values differ
    draw = {m: (a + 1, b) for m, (a, b) in tensors_of("a").items()}
    publish_update(path, [record_of("a")], {"a": draw})
    with pytest.raises(AdapterError, match="not that of the file that was collected"):
        UpdateFile(path, sha256)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(AdapterError, match="bytes, its header says"):
        UpdateFile(path, sha256)
    path.unlink()
    with pytest.raises(AdapterError, match=r"damaged update .*No such file"):
        UpdateFile(path, sha256)


def test_a_client_that_failed_sends_a_record_and_no_tensors(paths: RoundPaths) -> None:
    path = paths.update(attempt=1, bundle=0, part=0)
    failed = record_of("a", status="failed", reason="loss is nan", losses=[1.0, float("nan")])
    publish_update(path, [failed], {})
    (found,) = read_update(path)
    assert found.record.reason == "loss is nan"
    assert str(found.record.losses) == "[1.0, nan]"
    assert update_problem(found, EXPECTED) is None


def test_a_truncated_file_is_damaged_wherever_it_ends(paths: RoundPaths) -> None:
    path = publish(paths, *CLIENTS)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedUpdateError, match="bytes, its header says"):
        read_update(path)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(DamagedUpdateError):
            read_records(path)


def test_an_altered_byte_is_found_wherever_it_is(paths: RoundPaths) -> None:
    path = publish(paths, CLIENTS[0])
    whole = path.read_bytes()
    before = check_update(path)
    tensors_begin = 8 + int.from_bytes(whole[:8], "little")
    flips = random.Random(0)
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(whole):
            # a letter of the other case, one bit, or any other byte
            flipped = flips.choice([0x20, 1 << flips.randrange(8), flips.randrange(1, 256)])
            os.pwrite(file.fileno(), bytes([byte ^ flipped]), place)
            found, by_header = unless_damaged(check_update, path), unless_damaged(read_update, path)
            # the padding of the header says nothing
            assert not found or (found == before and byte == ord(" "))
            assert by_header == (before if place >= tensors_begin else found)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert check_update(path) == before


def unless_damaged(
    read: Callable[[Path], list[PublishedUpdate]], path: Path
) -> list[PublishedUpdate]:
    try:
        return read(path)
    except DamagedUpdateError:
        return []


def test_a_scan_reads_headers_and_leaves_tensors_to_the_aggregation(paths: RoundPaths) -> None:
    path = publish(paths, "a")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    scan = scanner(paths).scan()
    assert (set(scan.published), scan.damaged) == ({"a"}, {})
    with pytest.raises(DamagedUpdateError, match=r"the checksum of a\|.* does not match"):
        check_update(path)


def resealed(path: Path, records: Callable[[str], str]) -> None:
    """Change the records of an update file and make its checksum fit."""

    def change(header: dict[str, Any]) -> None:
        metadata = header.pop(METADATA)
        layout, text = dict(header), records(metadata[RECORDS])
        names, digests = sorted(layout), metadata[DIGESTS]
        each = {name: digests[64 * n : 64 * n + 64] for n, name in enumerate(names)}
        header[METADATA] = metadata | {RECORDS: text, DIGEST: digest_of(text, layout, each)}

    rewritten(path, change)
    with path.open("rb") as file:
        read_and_check(file)


def rewritten(path: Path, change: Any) -> Path:
    """Rewrite the header of an update file, its checksum left as it was."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return path


NAME = tensor_name(CLIENTS[0], "layers.0.q_proj", "A")


@pytest.mark.parametrize(
    "change",
    [
        lambda _: ["not", "a", "header"],
        lambda _: {"__metadata__": []},
        lambda _: {"__metadata__": {"records": "[]"}},
        lambda header: header["__metadata__"].update(records=["not", "text"]),
        lambda header: header.pop("__metadata__") and None,
        lambda header: header["__metadata__"].update(tensors=""),
        lambda header: header["__metadata__"].update(records="\ud800"),
        lambda header: header[NAME].update(data_offsets=[]),
        lambda header: header[NAME].update(data_offsets=[0, 8]),
        lambda header: header[NAME].update(data_offsets="48"),
        lambda header: header[NAME].update(dtype="I32"),
        lambda header: header[NAME].update(dtype="F31"),
        lambda header: header[NAME].update(shape=[4, 3]),
        lambda header: header[NAME].update(shape=[[2], [6]]),
        lambda header: header.update({"other": header.pop(NAME)}),
        lambda header: header.update({NAME: None}),
    ],
)
def test_a_header_that_was_tampered_with_is_damaged(paths: RoundPaths, change: Any) -> None:
    path = rewritten(publish(paths, CLIENTS[0]), change)
    with pytest.raises(DamagedUpdateError):
        read_update(path)
    assert scanner(paths).scan().damaged.keys() == {path.name}


def test_a_header_nested_without_end_is_damaged(paths: RoundPaths) -> None:
    path = publish(paths, "a")
    text = b"[" * 200_000
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(DamagedUpdateError, match="header cannot be read"):
        read_update(path)


def test_another_tensor_file_is_not_an_update(paths: RoundPaths) -> None:
    path = publish(paths, "a")
    rewritten(path, lambda header: header["__metadata__"].update(records="[]"))
    with pytest.raises(DamagedUpdateError, match="checksum"):
        read_records(path)
    resealed(path, lambda _: "[]")
    with pytest.raises(DamagedUpdateError, match="of a client without a record"):
        read_records(path)
    resealed(path, lambda _: '[{"client": "a"}]')
    with pytest.raises(DamagedUpdateError, match="records are not valid"):
        read_records(path)


def send(paths: RoundPaths, client: str, pair: tuple[torch.Tensor, torch.Tensor]) -> Path:
    path = paths.update(attempt=1, bundle=0, part=0)
    publish_update(path, [record_of(client)], {client: {"layers.0.q_proj": pair}})
    return path


def test_tensors_that_are_not_numbers_with_a_fraction_are_refused(paths: RoundPaths) -> None:
    path = send(paths, "a", (torch.ones(2, 6, dtype=torch.int32), torch.ones(4, 2)))
    words = r"client a: layers\.0\.q_proj A is of type I32, need one of F64, F32, BF16, F16"
    with pytest.raises(DamagedUpdateError, match=words):
        read_update(path)


def test_factors_of_two_types_are_refused(paths: RoundPaths) -> None:
    path = send(paths, "a", (torch.ones(2, 6), torch.ones(4, 2, dtype=torch.bfloat16)))
    words = r"client a: layers\.0\.q_proj B is of type BF16, its A of type F32: need one type"
    with pytest.raises(DamagedUpdateError, match=words):
        read_update(path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert read_update(
            send(paths, "a", (torch.ones(2, 6).to(dtype), torch.ones(4, 2).to(dtype)))
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scales": {"layers.0.q_proj": 2.0}}, "layers.0.up_proj has the scale None"),
        (
            {"scales": dict.fromkeys(RANKS, float("nan"))},
            "layers.0.q_proj has the scale nan, need a finite number",
        ),
        (
            {"norms": {"layers.0.up_proj": (1.0, float("nan"))}},
            "layers.0.up_proj has the norms (1.0, nan) of A and B, need finite numbers >= 0",
        ),
        (
            {"norms": {"layers.0.q_proj": (float("inf"), 1.0)}},
            "layers.0.q_proj has the norms (inf, 1.0) of A and B",
        ),
        ({"norms": {"layers.0.q_proj": (1.0, -1.0)}}, "layers.0.q_proj has the norms (1.0, -1.0)"),
    ],
)
def test_scales_and_norms_that_cannot_be_used_are_refused(
    paths: RoundPaths, changes: dict[str, Any], words: str
) -> None:
    path = publish(paths, "a", **changes)
    with pytest.raises(DamagedUpdateError, match=re.escape(f"client a: {words}")):
        read_update(path)
    assert scanner(paths).scan().damaged.keys() == {path.name}


def test_a_failed_client_may_record_norms_that_are_not_finite(paths: RoundPaths) -> None:
    path = paths.update(attempt=1, bundle=0, part=0)
    norms = {"layers.0.q_proj": (float("nan"), 1.0)}
    publish_update(path, [record_of("a", status="failed", reason="diverged", norms=norms)], {})
    assert set(scanner(paths).scan().published) == {"a"}


def test_tensors_need_the_record_of_their_client(paths: RoundPaths) -> None:
    path = paths.update(attempt=1, bundle=0, part=0)
    publish_update(path, [record_of("a")], {c: tensors_of(c) for c in ("a", "b")})
    words = r"b\|layers\.0\.q_proj\|A is of a client without a record"
    with pytest.raises(DamagedUpdateError, match=words):
        read_update(path)


def test_two_records_of_one_client_in_a_file_are_refused(paths: RoundPaths) -> None:
    path = paths.update(attempt=1, bundle=0, part=0)
    records = [record_of("a"), record_of("b"), record_of("a", rows=70)]
    publish_update(path, records, {c: tensors_of(c) for c in "ab"})
    with pytest.raises(DamagedUpdateError, match="client a has two records"):
        read_update(path)


def test_negative_rows_are_no_record(paths: RoundPaths) -> None:
    path = publish(paths, "a")
    resealed(path, lambda records: records.replace('"rows":7', '"rows":-7'))
    with pytest.raises(DamagedUpdateError, match="records are not valid"):
        read_records(path)


def test_without_a_folder_nothing_is_published(paths: RoundPaths) -> None:
    scan = scanner(paths).scan()
    assert (scan.published, scan.damaged, scan.duplicates) == ({}, {}, ())


def test_a_scan_finds_published_updates_and_ignores_other_files(paths: RoundPaths) -> None:
    publish(paths, *CLIENTS)
    last = publish(paths, "late", bundle=1)
    shutil.copy(last, last.with_name(f".{last.name}.0.part"))
    shutil.copy(last, last.with_name(f"{last.name}.damaged-1"))
    scan = scanner(paths).scan()
    assert set(scan.published) == {*CLIENTS, "late"}
    assert not scan.damaged
    assert scan.published["late"].file == last.name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run_id": "other"}, "client a: it is of run other, need run"),
        ({"round": 4}, "client a: it is of round 4, need 3"),
        ({"base_fingerprint": "other"}, "client a: it is of base model other, need base"),
    ],
)
def test_foreign_updates_are_named_and_not_published(
    paths: RoundPaths, change: dict[str, Any], words: str
) -> None:
    foreign = publish(paths, "a", **change)
    publish(paths, "b", bundle=1)
    scan = scanner(paths).scan()
    assert scan.damaged == {foreign.name: words}
    assert set(scan.published) == {"b"}


def test_the_first_of_duplicates_is_used_and_the_others_are_counted(paths: RoundPaths) -> None:
    first = publish(paths, *CLIENTS)
    second = publish(paths, CLIENTS[1], attempt=2)
    scan = scanner(paths).scan()
    assert [(u.record.client, u.file) for u in scan.duplicates] == [(CLIENTS[1], second.name)]
    assert {update.file for update in scan.published.values()} == {first.name}


def test_a_file_is_read_once_until_it_is_forgotten(paths: RoundPaths) -> None:
    path = publish(paths, "a")
    scans = scanner(paths)
    assert set(scans.scan().published) == {"a"}
    path.write_bytes(b"altered")
    assert set(scans.scan().published) == {"a"}
    scans.forget(path.name)
    scans.forget("never seen")
    assert scans.scan().damaged == {path.name: "its header cannot be read"}
    path.unlink()
    assert not scans.scan().damaged


def test_forgetting_one_file_leaves_the_others_as_they_are(paths: RoundPaths) -> None:
    first = publish(paths, "a")
    publish(paths, "b", bundle=1)
    far = publish(paths, "c", bundle=150)
    scans = scanner(paths)
    assert set(scans.scan().published) == {"a", "b", "c"}
    scans.forget(first.name)
    scan = scans.scan()
    assert (set(scan.published), scan.duplicates) == ({"a", "b", "c"}, ())
    far.unlink()
    assert set(scans.scan().published) == {"a", "b"}
    first.unlink()
    publish(paths, "d", bundle=151)
    assert set(scans.scan().published) == {"b", "d"}


def test_a_damaged_file_is_read_again_because_it_may_be_on_its_way(paths: RoundPaths) -> None:
    path = publish(paths, "a")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    scans = scanner(paths)
    assert set(scans.scan().damaged) == {path.name}
    path.write_bytes(whole)
    assert set(scans.scan().published) == {"a"}


def test_a_file_that_vanishes_during_a_scan_is_not_there(paths: RoundPaths) -> None:
    path = publish(paths, "a")
    with just_before("open", lambda *_: path.unlink()):
        scan = scanner(paths).scan()
    assert (scan.published, scan.damaged) == ({}, {})


def test_the_memory_of_a_scanner_does_not_grow_with_the_modules(paths: RoundPaths) -> None:
    publish(paths, *CLIENTS)
    kept = scanner(paths).scan().published
    assert len({id(update.shapes) for update in kept.values()}) == 1
    assert all(not update.record.norms and not update.record.scales for update in kept.values())
    assert all(update.record.losses == [1.5, 1.25] for update in kept.values())


def test_an_update_names_what_was_measured(paths: RoundPaths) -> None:
    (update,) = read_update(publish(paths, "a"))
    assert UpdateRecord.model_validate_json(update.record.to_bytes()) == update.record
    assert update.record.norms == dict.fromkeys(RANKS, (1.0, 2.0))
