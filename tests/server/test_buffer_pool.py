"""The layout of a block in memory: on the CPU, and as it is sent to a GPU."""

import pytest
import torch

from fedllm.aggregation.route_types import Problem
from fedllm.server.buffer_pool import BlockLayout, CpuBuffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [(3,), (2, 0, 5), (1, 1, 1, 1)])
def test_a_block_sent_client_by_client_equals_the_block_of_the_cpu(
    dtype: torch.dtype, ranks: tuple[int, ...]
) -> None:
    problem = Problem(out=5, in_=7, stacked_rank=sum(ranks), rank=2)
    layout = BlockLayout(modules=3, problem=problem, ranks=ranks, dtype=dtype)
    buffer, memory = CpuBuffer(), torch.zeros(layout.size, dtype=torch.uint8)
    draws = torch.Generator().manual_seed(0)
    sent = zip(
        torch.split(layout.all_a(memory), list(ranks), dim=1),
        layout.b_of_each(memory),
        strict=True,
    )
    for on_cpu, to_gpu in zip(buffer.lay_out(layout), sent, strict=True):
        for one, two in zip(on_cpu, to_gpu, strict=True):
            assert one.shape == two.shape
            one.copy_(torch.randn(one.shape, generator=draws))
            two.copy_(one)
    a_GRI, b_GOR = buffer.tensors()
    assert torch.equal(layout.all_a(memory), a_GRI)
    assert torch.equal(torch.cat(layout.b_of_each(memory), dim=2), b_GOR)
    assert (a_GRI.shape, b_GOR.shape) == ((3, sum(ranks), 7), (3, 5, sum(ranks)))


def test_a_smaller_block_takes_the_memory_of_a_larger_one() -> None:
    buffer = CpuBuffer()

    def first_byte(modules: int) -> int:
        problem = Problem(out=5, in_=7, stacked_rank=3, rank=2)
        layout = BlockLayout(modules=modules, problem=problem, ranks=(1, 2), dtype=torch.float32)
        buffer.lay_out(layout)
        return buffer.tensors()[0].data_ptr()

    large = first_byte(4)
    assert first_byte(2) == first_byte(4) == large
