"""Slurm's notations."""

import pytest

from fedllm.scheduling.slurm.notation import (
    counts,
    expressions,
    generic,
    hosts,
    mebibytes,
    tasks_of,
    whole_arrays,
)


def test_sizes_are_mebibytes_unless_they_say_otherwise() -> None:
    assert [mebibytes(text) for text in (4000, "4000M", "2G", "1T", "512K", "1.5g")] == [
        *(4000, 4000, 2048, 1024**2, 0.5, 1536)
    ]
    with pytest.raises(ValueError, match="not a size of memory: much"):
        mebibytes("much")


def test_a_list_of_hosts_is_expanded() -> None:
    assert hosts("n[1-3,07],login,gpu[08-10]-ib") == {
        *("n1", "n2", "n3", "n07", "login", "gpu08-ib", "gpu09-ib", "gpu10-ib")
    }
    assert hosts("") == set()


def test_resources_are_counted_by_name_and_type() -> None:
    assert counts("cpu=64,mem=1T,gres/gpu=8,node=2") == {
        "cpu": 64,
        "mem": 1024**2,
        "gres/gpu": 8,
        "node": 2,
    }
    assert generic("gpu:a100:4(S:0-1),gpu:a100:2(IDX:0,3),lustre:1,gpu:h100:1") == {
        "a100": 6,
        "h100": 1,
    }
    assert generic("(null)") == {}
    assert generic("gpu") == {"": 1}


def test_ids_of_tasks_are_read_and_written() -> None:
    assert tasks_of("7_[0-2,5%8]") == ["7_0", "7_1", "7_2", "7_5"]
    assert tasks_of("7") == []
    assert whole_arrays(["7_2", "9_[0-1]"]) == ["7_0", "7_1", "7_2", "9_0", "9_1"]
    assert expressions(["7_4", "7_0", "8_1", "7_4"]) == ["7_[0,4]", "8_[1]"]
