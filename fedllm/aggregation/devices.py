"""Which number types a device multiplies fast."""

import os

import torch


def is_fast_at_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 matrices several times as fast as float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() and _onednn_may_use_amx()


def _onednn_may_use_amx() -> bool:
    """Say whether oneDNN, which computes these products, may use the processor's AMX."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return limit in ("", "ALL", "DEFAULT") or "AMX" in limit
