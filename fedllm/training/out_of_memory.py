"""When memory runs out: how it shows, how much smaller the next try is, what is let go of."""

import gc
from collections.abc import Iterator

import torch

from fedllm.config.models import TrainingSection
from fedllm.packing.slots import AdapterSlots

# torch has an error of its own for the memory of GPUs alone, and not for all of that
_SHORTAGES = (
    "std::bad_alloc",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def ran_out(error: BaseException) -> bool:
    """Say whether an error means that there was not enough memory, of the host or of a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SHORTAGES)


def micro_batch_size(training: TrainingSection) -> int:
    """Return the rows in memory at once that the configuration asks for."""
    return min(training.micro_batch_size or training.batch_size, training.batch_size)


def micro_batch_sizes(training: TrainingSection, num_rows: int) -> Iterator[int]:
    """Yield the micro-batches to train a client with, one after the other while memory runs out.

    The first is the configured one. With `training.smaller_micro_batch` each further one has half
    the rows of the one before, where a client of `num_rows` fills it, down to a single row.
    """
    size = micro_batch_size(training)
    yield size
    while training.smaller_micro_batch and (size := min(size, num_rows) // 2):
        yield size


def let_go(slots: AdapterSlots) -> None:
    """Free what a training that failed has left in memory."""
    slots.model.zero_grad(set_to_none=True)
    gc.collect()
    if slots.device.type == "cuda":
        torch.cuda.empty_cache()
