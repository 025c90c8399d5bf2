"""Clipping for client-level differential privacy: what each client's change counts.

Legend: O out, I in, R rank.
"""

import math
from collections.abc import Callable, Mapping

import torch

from fedllm.lora.factors import Factors
from fedllm.methods.catalog import PrivateSpace
from fedllm.methods.local_task import Recipient
from fedllm.methods.protocol import Method, ModuleState
from fedllm.server.collected_updates import CollectedUpdates
from fedllm.storage.records import CohortRecord


def clip_factors(
    method: Method,
    space: PrivateSpace,
    updates: CollectedUpdates,
    cohort: CohortRecord,
    before: Callable[[str], ModuleState],
    clip_norm: float,
) -> dict[int, float]:
    """Return min(1, C / |change|) by the clients' places in the cohort.

    The norm is that of a client's change over all modules, in the space that the method averages.

    Args:
        method: the run's method.
        space: what it averages.
        updates: the collected updates.
        cohort: has the clients' ranks.
        before: returns a module's state before the round.
        clip_norm: C.
    """
    energies = dict.fromkeys(updates.updates, 0.0)
    trained = method.local_task(cohort.round).trained
    for module in next(iter(cohort.ranks.values())):
        state = before(module)
        for place in energies:
            client = cohort.clients[place]
            a_RI, b_OR = updates.factors(place, module)
            sent = Factors(a_RI=a_RI, b_OR=b_OR, scale=updates.scale(place, module))
            received = method.hand_out(
                module=module,
                state=state,
                rank=cohort.ranks_of(client)[module],
                to=Recipient(client=client.id, round=cohort.round),
            )
            energies[place] += _ENERGIES[space](sent, received, trained)
    return {place: _factor(math.sqrt(energy), clip_norm) for place, energy in energies.items()}


def _factor(norm: float, clip_norm: float) -> float:
    return min(1.0, clip_norm / norm) if norm > 0 else 1.0


def product_energy(sent: Factors, received: Factors, trained: str) -> float:
    """Return |s B A - s_0 B_0 A_0|^2 from Gram matrices of 2 R x 2 R."""
    del trained
    b = torch.cat(
        [sent.scale * sent.b_OR.double(), -received.scale * received.b_OR.double()], dim=1
    )
    a = torch.cat([sent.a_RI.double(), received.a_RI.double()])
    return max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))


def factor_energy(sent: Factors, received: Factors, trained: str) -> float:
    """Return |A - A_0|^2 + |B - B_0|^2 of the factors that train."""
    parts = {"A": (sent.a_RI, received.a_RI), "B": (sent.b_OR, received.b_OR)}
    return sum(float((parts[f][0].double() - parts[f][1].double()).square().sum()) for f in trained)


_ENERGIES: Mapping[PrivateSpace, Callable[[Factors, Factors, str], float]] = {
    "products": product_energy,
    "factors": factor_energy,
}
