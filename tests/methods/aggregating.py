"""One module's updates through a method, as the engine gives them to it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.aggregation.groups import ModuleGroup, with_weights
from fedllm.aggregation.route_types import Problem
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState, ServerStep, StatePart


def part_of(tensor: Tensor) -> StatePart:
    """Return the plan of a part of a state that is this tensor."""
    return StatePart(shape=tuple(tensor.shape), dtype=tensor.dtype)


def block_of(
    factors: Sequence[Factors], weights: Sequence[float], clients: Sequence[int] = ()
) -> FactorBlock:
    """Return the block of some clients' factors of one module."""
    return FactorBlock(
        a_GRI=torch.cat([item.a_RI for item in factors])[None],
        b_GOR=torch.cat([item.b_OR for item in factors], dim=1)[None],
        ranks=tuple(item.rank for item in factors),
        scales_GC=torch.tensor([[item.scale for item in factors]], dtype=torch.float64),
        weights_GC=torch.tensor([list(weights)], dtype=torch.float64),
        clients=tuple(clients),
    )


def aggregate(
    method: Method,
    factors: Sequence[Factors],
    weights: Sequence[float],
    ranks: Sequence[int],
    *,
    before: ModuleState | None = None,
    block_clients: int = 2,
    round_number: int = 1,
    total: float | None = None,
    noise_std: float = 0.0,
    clients: Sequence[str] = (),
    stacked_rank: int | None = None,
) -> ModuleAggregate:
    """Return what the clients' updates of the module `m` come to.

    `stacked_rank` is that of the whole cohort; None: nobody is left out.
    """
    shape = factors[0].shape
    problem = Problem(
        out=shape.out,
        in_=shape.in_,
        stacked_rank=stacked_rank or sum(item.rank for item in factors),
        rank=max(ranks),
    )
    group = ModuleGroup(
        modules=("m",),
        problem=problem,
        clients=tuple(item.rank for item in factors),
        received=tuple(ranks),
    )
    problem = with_weights(group, dict(enumerate(weights))).problem
    blocks = [
        block_of(
            factors[begin : begin + block_clients],
            weights[begin : begin + block_clients],
            range(len(factors))[begin : begin + block_clients],
        )
        for begin in range(0, len(factors), block_clients)
    ]
    step = ServerStep(
        modules=["m"],
        problem=problem,
        total=math.fsum(weights) if total is None else total,
        before=[before or method.start_module(module="m", shape=shape, rank=max(ranks))],
        ranks=ranks,
        round=round_number,
        noise_std=noise_std,
        clients=clients,
    )
    return method.finish([method.fold(block, step) for block in blocks], step)[0]


def can_train(factors: Factors) -> None:
    """One step of gradient descent on B, far enough, uses all of the adapter's directions."""
    both_zero = (factors.a_RI == 0).all(1) & (factors.b_OR == 0).all(0)
    assert not both_zero.any()
    b = factors.b_OR.double().requires_grad_()
    target = torch.randn(
        b.shape[0], factors.a_RI.shape[1], generator=torch.Generator().manual_seed(1)
    )
    ((b @ factors.a_RI.double()) * target.double()).sum().backward()
    assert b.grad is not None
    stepped = b.detach() / max(1e-30, float(b.detach().norm())) - b.grad
    assert int(torch.linalg.matrix_rank(stepped @ factors.a_RI.double())) == factors.rank
