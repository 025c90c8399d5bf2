"""What a client receives is counted as it is: frozen parts too, and what trains of it."""

import torch

from fedllm.lora.factors import Factors
from fedllm.process.state_adapters import received_record


def factors(rank: int, frozen: Factors | None = None) -> Factors:
    return Factors(a_RI=torch.zeros(rank, 10), b_OR=torch.zeros(6, rank), scale=1.0, frozen=frozen)


def test_bytes_and_values_count_frozen_parts_but_only_trained_factors_train() -> None:
    adapter = {"q": factors(2, frozen=factors(3)), "v": factors(1)}
    found = received_record(adapter, "AB")
    assert (found.values, found.num_bytes) == (6 * 16, 4 * 6 * 16)
    assert found.trained_values == 3 * 16
    assert received_record(adapter, "B").trained_values == 3 * 6
    assert received_record(adapter, "A").trained_values == 3 * 10
