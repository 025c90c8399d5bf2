"""Tensor files: the same bytes for the same tensors, whole or absent, read one by one."""

import hashlib
import itertools
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedllm.errors import RunDirectoryError
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.tensors import (
    TensorFile,
    TensorSpec,
    TensorWriter,
    write_tensors,
    writing_checked,
    writing_tensors,
)
from tests.storage.mounts import python_on_tmpfs

TENSORS = {
    "m.A": torch.arange(6.0).reshape(2, 3),
    "m.B": torch.ones(3, 2),
    "m.sub.A": torch.ones(1),
}
WRITE = """
import sys, torch
from pathlib import Path
from fedllm.storage.tensors import write_tensors
metadata = {str(number): "x" for number in range(20)}
print(write_tensors(Path(sys.argv[1]), {"b": torch.ones(2), "a": torch.zeros(3)}, metadata))
"""


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "global.safetensors"
    assert write_tensors(path, TENSORS, {"method": "flexlora"}) == sha256_of(path)
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with TensorFile(path) as file:
        assert set(file.names) == set(TENSORS)
        assert file.metadata == {"method": "flexlora"}
        assert all(torch.equal(file.get(name), tensor) for name, tensor in TENSORS.items())
        assert file.shape("m.A") == (2, 3)
        assert set(file.module("m")) == {"A", "B"}
        assert set(file.module("m.sub")) == {"A"}


def test_a_file_stays_readable_after_its_memory_is_released(tmp_path: Path) -> None:
    path = tmp_path / "global.safetensors"
    write_tensors(path, TENSORS, {})
    with TensorFile(path) as file:
        before = file.get("m.A")
        file.release()
        assert torch.equal(file.get("m.A"), before)
        assert torch.equal(before, TENSORS["m.A"])
        write_tensors(tmp_path / "other", TENSORS, {})
        (tmp_path / "other").replace(path)
        with pytest.raises(RunDirectoryError, match="was replaced while"):
            file.release()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_type_and_shape_is_read_alike_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kinds = [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    shapes = st.lists(st.integers(0, 4), max_size=3)
    tensors = {
        name: (10 * torch.randn(shape)).to(kind)
        for name, kind, shape in data.draw(
            st.lists(
                st.tuples(st.text(min_size=1, max_size=8), st.sampled_from(kinds), shapes),
                max_size=6,
                unique_by=lambda drawn: drawn[0],
            )
        )
        if name != "__metadata__"
    }
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    write_tensors(path, tensors, {})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_that_are_not_contiguous_or_need_a_gradient_are_written_as_their_values(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.safetensors"
    slanted = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    # two names may share memory, as slices of one factor do
    write_tensors(path, {"a": slanted, "b": slanted[:1], "c": slanted}, {})
    with TensorFile(path) as file:
        assert torch.equal(file.get("a"), slanted)
        assert torch.equal(file.get("b"), slanted[:1])
        assert file.metadata == {}


def test_the_same_tensors_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    elsewhere = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "t.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    metadata = {str(number): "x" for number in reversed(range(20))}
    tensors = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert write_tensors(tmp_path / "u", tensors, metadata) == elsewhere.stdout.strip()


def test_others_may_read_what_their_umask_allows(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_tensors(tmp_path / "t.safetensors", TENSORS, {})
    assert (tmp_path / "t.safetensors").stat().st_mode == plain.stat().st_mode


def test_a_damaged_file_or_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, {})
    with TensorFile(path) as file, pytest.raises(RunDirectoryError, match="no tensor m"):
        file.get("m.C")
    whole = path.read_bytes()
    for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunDirectoryError, match="not a whole tensor file"):
            TensorFile(path)
    with pytest.raises(FileNotFoundError):
        TensorFile(tmp_path / "none")


def planned_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("order", list(itertools.permutations(TENSORS)))
def test_tensors_may_be_written_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    expected = write_tensors(one, TENSORS, {"method": "flexlora"})
    with writing_tensors(other, planned_of(TENSORS), {"method": "flexlora"}) as writer:
        for name in order:
            assert not other.exists()
            writer.write(name, TENSORS[name])
    assert writer.sha256 == expected == sha256_of(other)
    assert other.read_bytes() == one.read_bytes()


def test_several_threads_may_write_at_once(tmp_path: Path) -> None:
    # tensors of more than a chunk, of types of unequal width, and one without values
    kinds = [torch.float32, torch.bfloat16, torch.float64]
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"m{number}.A": torch.randn(600, 700, generator=draw).to(kinds[number % 3])
        for number in range(24)
    }
    tensors["none"] = torch.ones(0, 3)
    expected = write_tensors(tmp_path / "one", tensors, {})
    names = list(tensors)
    for seed in range(3):
        random.Random(seed).shuffle(names)
        path = tmp_path / "other"
        with (
            writing_tensors(path, planned_of(tensors), {}) as writer,
            ThreadPoolExecutor(6) as pool,
        ):
            list(pool.map(lambda name: writer.write(name, tensors[name]), names))
        assert writer.sha256 == expected == sha256_of(path)
        with (
            writing_checked(tmp_path / f"checked{seed}", "[]", planned_of(tensors)) as writer,
            ThreadPoolExecutor(6) as pool,
        ):
            list(pool.map(lambda name: writer.write(name, tensors[name]), names))
    files = {(tmp_path / f"checked{seed}").read_bytes() for seed in range(3)}
    assert len(files) == 1


def test_a_file_that_is_not_finished_is_not_published(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    for kind in (writing_tensors(path, planned_of(TENSORS), {}), half_checked(path)):
        with pytest.raises(AssertionError, match=r"m\.B was never written"), kind as writer:
            writer.write("m.A", TENSORS["m.A"])
            writer.write("m.sub.A", TENSORS["m.sub.A"])
    with pytest.raises(KeyError), writing_tensors(path, planned_of(TENSORS), {}) as writer:
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def half_checked(path: Path) -> AbstractContextManager[TensorWriter]:
    return writing_checked(path, "[]", planned_of(TENSORS))


def test_a_tensor_that_was_not_planned_or_is_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    for tensor in (torch.ones(3, 2), torch.ones(2, 3).double()):
        with (
            pytest.raises(AssertionError, match=", planned "),
            writing_tensors(path, planned_of(TENSORS), {}) as writer,
        ):
            writer.write("m.A", tensor)
    with (
        pytest.raises(AssertionError, match="written twice"),
        writing_tensors(path, planned_of(TENSORS), {}) as writer,
    ):
        writer.write("m.A", TENSORS["m.A"])
        writer.write("m.A", TENSORS["m.A"])
    assert not path.exists()


FULL = """
import torch
from pathlib import Path
from fedllm.errors import StorageFull
from fedllm.storage.tensors import TensorSpec, publish_update, write_tensors, writing_checked
from tests.storage.samples import record_of
folder = Path({folder!r})
big = torch.ones(300, 300)
try:
    write_tensors(folder / "global.safetensors", {{"m.A": big}}, {{}})
except StorageFull as error:
    print(error)
try:
    publish_update(folder / "u.safetensors", [record_of("a")], {{"a": {{"m": (big, big)}}}})
except StorageFull as error:
    print(error)
try:
    with writing_checked(folder / "f.safetensors", "[]", {{"m": TensorSpec.of(big)}}) as writer:
        try:
            writer.write("m", big)
        except StorageFull as error:
            print(error)
            raise
except StorageFull as error:
    print(error)
print(list(folder.iterdir()))
"""


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    said = python_on_tmpfs(folder, "size=64k", FULL.format(folder=str(folder))).splitlines()
    assert [line.partition(";")[0] for line in said] == [
        f"{folder}/global.safetensors: no space left on device",
        f"{folder}/u.safetensors: no space left on device",
        f"{folder}/f.safetensors: no space left on device",
        f"{folder}/f.safetensors: no space left on device",
        "[]",
    ]
