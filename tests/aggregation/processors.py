"""Another processor than this one, as PyTorch would tell of it."""

import pytest
import torch


def pretend(monkeypatch: pytest.MonkeyPatch, *, amx: bool) -> None:
    """Let PyTorch say that the processor has AMX, or has not."""
    # oneDNN looks at its limit once, with its first product: the variable says no more to it
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    _ = ones @ ones
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
