"""Devices are fast at bfloat16 by their features and by what their library may use."""

import pytest
import torch

from fedllm.aggregation.devices import is_fast_at_bfloat16


@pytest.mark.parametrize(
    ("limit", "may"),
    [
        (None, True),
        ("", True),
        ("default", True),
        ("AVX512_CORE_AMX_FP16", True),
        ("AVX2", False),
        ("AVX512_CORE_BF16", False),
    ],
)
def test_a_cpu_is_fast_where_it_has_tiles_that_the_library_may_use(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, may: bool
) -> None:
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    has_tiles = torch.cpu._is_amx_tile_supported()
    assert is_fast_at_bfloat16(torch.device("cpu")) == (has_tiles and may)
