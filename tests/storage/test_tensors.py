"""Tensor files: the same bytes for the same tensors, whole or absent, read one by one."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedllm.errors import RunDirectoryError
from fedllm.storage.tensors import TensorFile, sha256_of, write_tensors
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


def test_what_is_not_contiguous_or_needs_a_gradient_is_written_as_its_values(
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


FULL = """
import torch
from pathlib import Path
from fedllm.errors import StorageFull
from fedllm.storage.tensors import publish_update, write_tensors
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
print(list(folder.iterdir()))
"""


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    said = python_on_tmpfs(folder, "size=64k", FULL.format(folder=str(folder))).splitlines()
    assert [line.partition(";")[0] for line in said] == [
        f"{folder}/global.safetensors: no space left on device",
        f"{folder}/u.safetensors: no space left on device",
        "[]",
    ]
