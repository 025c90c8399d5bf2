"""A simulated processor: PyTorch reports other features than this one has."""

import pytest
import torch


def pretend(monkeypatch: pytest.MonkeyPatch, *, amx: bool) -> None:
    """Let PyTorch report that the processor has AMX, or that it does not."""
    # oneDNN reads its limit once, at its first product: changing the variable later has no effect
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    _ = ones @ ones
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
