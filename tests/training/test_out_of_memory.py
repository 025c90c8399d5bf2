"""What a lack of memory looks like, and how much less the next try takes."""

import pytest
import torch

from fedllm.config.models import TrainingSection
from fedllm.training.out_of_memory import micro_batch_size, micro_batch_sizes, ran_out


def test_the_allocators_errors_are_recognised_and_no_others() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert ran_out(refused.value)
    with pytest.raises(MemoryError) as none_left:
        bytearray(1 << 60)
    assert ran_out(none_left.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not ran_out(other.value)
    assert not ran_out(ValueError("DefaultCPUAllocator: can't allocate memory"))


def sizes(num_rows: int, **changes: object) -> list[int]:
    training = TrainingSection.model_validate({"smaller_micro_batch": True, **changes})
    found = list(micro_batch_sizes(training, num_rows))
    assert found[0] == micro_batch_size(training)
    return found


def test_micro_batches_are_halved_down_to_a_single_row() -> None:
    assert sizes(100, batch_size=16) == [16, 8, 4, 2, 1]
    assert sizes(100, batch_size=16, micro_batch_size=6) == [6, 3, 1]
    assert sizes(100, batch_size=16, micro_batch_size=99) == [16, 8, 4, 2, 1]
    assert sizes(100, batch_size=16, micro_batch_size=1) == [1]
    assert sizes(100, batch_size=16, smaller_micro_batch=False) == [16]


def test_a_try_that_a_client_of_few_rows_would_not_notice_is_left_out() -> None:
    assert sizes(3, batch_size=16) == [16, 1]
    assert sizes(1, batch_size=16) == [16]
