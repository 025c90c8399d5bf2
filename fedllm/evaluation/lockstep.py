"""Forward passes of processes that each hold a part of the base's weights: all in the same step.

A layer's weights are gathered from all processes, so each of them has to compute whenever one does,
though their rows, and the numbers of tokens that these ask for, differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fedllm.packing.slots import AdapterSlots


@contextmanager
def lockstep(slots: AdapterSlots) -> Iterator[None]:
    """Let the processes compute their own passes in the block, together.

    A process that is done computes a token for every pass of the others, and drops the result.
    """
    # before the hook of the divided base, which expects all processes to be there
    hook = slots.model.register_forward_pre_hook(_announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    model: Any = slots.model
    token = torch.tensor([[slots.pad_token]], device=slots.device)
    slots.evaluate()
    with torch.inference_mode():
        while _num_busy(0):
            model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)


def _num_busy(own: int) -> int:
    """Return the number of processes that have a pass to compute; `own` is 1 if this one has."""
    busy = torch.tensor([own])
    dist.all_reduce(busy)
    return int(busy.item())


def _announce(*_: object) -> None:
    """Announce a pass of this process, for a forward hook."""
    _num_busy(1)
