"""Modules of known models and clients' factors of them, the same for every run.

Legend: O out, I in, R rank, J directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from fedllm.lora.factors import Factors, ModuleShape
from fedllm.planning.seeding import seed_of

SPECTRA = ("decaying", "flat")
_NOISE = 0.3  # of a shared direction's size


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Modules of one shape that a model has several of; `mlp` says which rank is meant."""

    name: str
    shape: ModuleShape
    number: int
    mlp: bool


def kinds_of(shape: str) -> list[Kind]:
    """Return the kinds of modules of a named model (Touvron et al., arXiv 2302.13971, 2307.09288).

    Any OUTxIN is one module of that shape, an MLP's; OUTxINxNUMBER are several.
    """
    if shape not in MODELS:
        out, in_, number = (*(int(side) for side in shape.split("x")), 1)[:3]
        return [Kind(name=shape, shape=ModuleShape(out=out, in_=in_), number=number, mlp=True)]
    layers, hidden, inner, values = MODELS[shape]
    sides = {
        "q,o": (hidden, hidden, 2, False),
        "k,v": (values, hidden, 2, False),
        "gate,up": (inner, hidden, 2, True),
        "down": (hidden, inner, 1, True),
    }
    return [
        Kind(name=name, shape=ModuleShape(out=out, in_=in_), number=number * layers, mlp=mlp)
        for name, (out, in_, number, mlp) in sides.items()
    ]


# layers, hidden size, inner size of the MLP, size of keys and values
MODELS = {
    "llama-1.3b": (24, 2048, 5504, 2048),
    "llama-7b": (32, 4096, 11008, 4096),
    "llama-70b": (80, 8192, 28672, 1024),
}


def ranks_of(text: str, *, clients: int, mlp: bool) -> list[int]:
    """Return the clients' ranks from `8,30+200`: in turn, one rank or attention's + the MLP's."""
    pairs = [word.split("+") for word in text.split(",")]
    return list(islice(cycle(int(pair[-1 if mlp else 0]) for pair in pairs), clients))


def client_factors(
    shape: ModuleShape, ranks: Sequence[int], *, spectrum: str, seed: int = 0
) -> list[Factors]:
    """Return a client's factors per rank, float32.

    `flat`: normal factors, whose sum has no leading directions. `decaying`: as training leaves
    them, clients share directions whose strength falls as 1 / j, each with noise of its own.
    """
    draws = torch.Generator().manual_seed(seed_of("benchmark", seed))
    shared_OJ = torch.randn(shape.out, max(ranks), generator=draws)
    shared_JI = torch.randn(max(ranks), shape.in_, generator=draws)

    def drawn(rank: int) -> tuple[Tensor, Tensor]:
        b_OR = torch.randn(shape.out, rank, generator=draws)
        a_RI = torch.randn(rank, shape.in_, generator=draws)
        if spectrum == "flat":
            return b_OR, a_RI
        strength_R = torch.arange(1, rank + 1).rsqrt()
        b_OR = (shared_OJ[:, :rank] + _NOISE * b_OR) * strength_R
        return b_OR, (shared_JI[:rank] + _NOISE * a_RI) * strength_R[:, None]

    pairs = [drawn(rank) for rank in ranks]
    return [Factors(a_RI=a, b_OR=b, scale=2.0) for b, a in pairs]
