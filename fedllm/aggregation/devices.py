"""What devices are good at."""

import torch


def is_fast_at_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 matrices several times as fast as float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()
