"""Which method reaches the optimum, where it is known? Least squares through the real methods.

A module W (256 x 256) is to minimise sum_i p_i |W - T_i|^2 over 40 clients: the optimum is the mean
target. T_i = U (D + strength C_i) V^T: a spectrum that all share, sigma_j = 2^(-j/4) over 64
directions, and a part of the client's own, C_i = sqrt(D) G_i sqrt(D) / 8 with G_i normal. Four
tiers train ranks 2, 8, 8 and 32, in the shares of `clients.distribution`; 8 clients a round take 5
gradient steps on their factors, 30 rounds. Methods for one rank train all clients at rank 2.

Prints, for each method, means over seeds and their 95 % bootstrap intervals: the relative distance
to the optimum as deployed (each client at its own rank) and at the largest rank, the share of the
energy beyond the smallest rank after rounds 1, 10 and 30, and the bytes of a round.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
from torch import Tensor

from fedllm.aggregation.groups import ModuleRanks, blocks_of, group_modules, with_weights
from fedllm.errors import AdapterError
from fedllm.lora.entries import entries_of, entry_places, with_entries
from fedllm.lora.factors import FactorBlock, Factors, ModuleShape, delta
from fedllm.methods.catalog import METHODS, build_method
from fedllm.methods.local_task import LocalTask, Recipient
from fedllm.methods.protocol import Method, ModuleState, ServerStep
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.seeding import seed_of
from fedllm.planning.tiers import DISTRIBUTIONS
from fedllm.reporting.tables import text_table

SIDE, DIRECTIONS = 256, 64
RANKS = (2, 8, 8, 32)
CLIENTS, COHORT, STEPS = 40, 8, 5
# for all methods: with scales of 2 a step on B makes up for 4 x 0.2 of what is missing
LEARNING_RATE = 0.2
# a sketch of r of R directions counts each R / r times, and so does the gradient of A
STEP_SHARES = {"fslora": lambda rank, largest: rank / largest}
STRENGTHS = (0.5, 2.0)
SHOWN_ROUNDS = (1, 10, 30)
SHAPE = ModuleShape(out=SIDE, in_=SIDE)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method with its options, a distribution of ranks, the strength of clients' own parts."""

    method: str
    options: tuple[tuple[str, str | bool], ...] = ()
    distribution: str
    strength: float

    @property
    def label(self) -> str:
        """The method and its options."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options)])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of one seed: distances, energy beyond the smallest rank by round, bytes.

    `best_deployed` and `best_largest` are the distances of the optimum's own best approximations.
    """

    deployed: float
    largest: float
    best_deployed: float
    best_largest: float
    beyond: dict[int, float]
    bytes_a_round: float


@dataclass(kw_only=True)
class Federation:
    """One seed's clients, their targets and weights, and the server's state.

    The target of client c is `left[c] @ right`, (256, 64) times (64, 256).
    """

    seed: int
    ranks: list[int]
    rows: list[float]
    left: Tensor
    right: Tensor
    state: ModuleState
    beyond: dict[int, float] = field(default_factory=dict)
    bytes_sent: int = 0

    @property
    def optimum(self) -> Tensor:
        """The weighted mean of the targets."""
        weights = torch.tensor(self.rows, dtype=torch.float64)
        shares = weights / weights.sum()
        return torch.einsum("c,cok->ok", shares, self.left.double()) @ self.right.double()


def federation_of(arm: Arm, method: Method, seed: int) -> Federation:
    """Draw a federation; only the ranks depend on the distribution, only targets on strength."""
    draw = torch.Generator().manual_seed(seed_of("known rank", seed))
    u_OK, v_IK = (
        torch.linalg.qr(torch.randn(SIDE, DIRECTIONS, generator=draw)).Q for _ in range(2)
    )
    d_K = 2.0 ** (-torch.arange(DIRECTIONS) / 4)
    own_CKK = torch.randn(CLIENTS, DIRECTIONS, DIRECTIONS, generator=draw) / 8
    core_CKK = torch.diag(d_K) + arm.strength * (d_K.sqrt()[:, None] * own_CKK * d_K.sqrt())
    shares = dict(enumerate(DISTRIBUTIONS[arm.distribution]))
    counts = largest_remainder({str(tier): share for tier, share in shares.items()}, CLIENTS)
    ranks = [RANKS[int(tier)] for tier, count in counts.items() for _ in range(count)]
    ranks = [ranks[place] for place in torch.randperm(CLIENTS, generator=draw).tolist()]
    if METHODS[arm.method].ranks == "one":
        ranks = [min(RANKS)] * CLIENTS
    return Federation(
        seed=seed,
        ranks=ranks,
        rows=torch.randint(20, 61, (CLIENTS,), generator=draw).double().tolist(),
        left=u_OK @ core_CKK,
        right=v_IK.mT,
        state=method.start_module(module="m", shape=SHAPE, rank=max(ranks)),
    )


def cohort_of(seed: int, round_number: int) -> list[int]:
    """Return the clients of a round, the same for every method."""
    draw = torch.Generator().manual_seed(seed_of("known rank", seed, round_number))
    return sorted(torch.randperm(CLIENTS, generator=draw)[:COHORT].tolist())


def trained(
    received: Sequence[Factors],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    task: LocalTask,
    changes: Sequence[Tensor | None],
    rate: float = LEARNING_RATE,
) -> list[Factors]:
    """Return what clients of one rank send: gradient descent on |s B A - T|^2 / 2, all at once.

    `task` says which factors train. Frozen factors, and changes of the base, are taken off the
    target.
    """
    tall, flat = _targets(received, left, right, changes)
    if task.entries_seed is not None:
        return _trained_entries(received, tall if flat is None else tall @ flat, task.entries_seed)
    a, b = torch.stack([f.a_RI for f in received]), torch.stack([f.b_OR for f in received])
    scale = received[0].scale
    for _ in range(STEPS):
        flat_a = a.mT if flat is None else flat @ a.mT
        b_target = b.mT @ tall if flat is None else (b.mT @ tall) @ flat
        of_b = scale * (scale * b @ (a @ a.mT) - tall @ flat_a)
        of_a = scale * (scale * (b.mT @ b) @ a - b_target)
        a = a - rate * of_a if "A" in task.trained else a
        b = b - rate * of_b if "B" in task.trained else b
    return [Factors(a_RI=x, b_OR=y, scale=scale) for x, y in zip(a, b, strict=True)]


def _targets(
    received: Sequence[Factors],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    changes: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """Return the targets as products of two matrices, or (None) as they are."""
    frozen = [factors.frozen for factors in received if factors.frozen]
    if frozen:
        left = [torch.cat([t, -f.scale * f.b_OR], 1) for t, f in zip(left, frozen, strict=True)]
        right = [torch.cat([t, f.a_RI]) for t, f in zip(right, frozen, strict=True)]
    tall, flat = torch.stack(list(left)), torch.stack(list(right))
    changed = [change for change in changes if change is not None]
    return (tall @ flat - torch.stack(changed), None) if changed else (tall, flat)


def _trained_entries(received: Sequence[Factors], targets: Tensor, seed: int) -> list[Factors]:
    """Return what clients send that train entries of W: gradient descent on |D - T|^2 / 2."""
    places = entry_places(seed=seed, shape=SHAPE, rank=received[0].rank)
    sent = []
    for target, got in zip(targets, received, strict=True):
        entries = with_entries(got.a_RI, got.b_OR, places).flatten()
        for _ in range(STEPS):
            entries[places] -= LEARNING_RATE * (entries[places] - target.flatten()[places])
        a_RI, b_OR = entries_of(entries.view(SIDE, SIDE), places, got.rank)
        sent.append(replace(got, a_RI=a_RI, b_OR=b_OR, frozen=None))
    return sent


def _whole(_rank: int, _largest: int) -> float:
    return 1.0


def train_round(
    method: Method, federations: Sequence[Federation], cohorts: Sequence[list[int]], number: int
) -> list[dict[int, Factors]]:
    """Return every federation's updates by client; clients of one rank train side by side."""
    sent: list[dict[int, Factors]] = [{} for _ in federations]
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for place, (federation, cohort) in enumerate(zip(federations, cohorts, strict=True)):
        for client in cohort:
            by_rank.setdefault(federation.ranks[client], []).append((place, client))
    for rank, members in by_rank.items():
        received = [
            method.hand_out(
                module="m",
                state=federations[place].state,
                rank=rank,
                to=Recipient(client=str(client), round=number),
            )
            for place, client in members
        ]
        left = [federations[place].left[client] for place, client in members]
        right = [federations[place].right for place, _ in members]
        changes = [method.base_delta(federations[place].state) for place, _ in members]
        rate = LEARNING_RATE * STEP_SHARES.get(method.name, _whole)(
            rank, max(federations[members[0][0]].ranks)
        )
        updates = trained(received, left, right, method.local_task(number), changes, rate)
        for (place, client), got, update in zip(members, received, updates, strict=True):
            sent[place][client] = update
            federations[place].bytes_sent += got.num_bytes + update.num_bytes  # down and up
    return sent


def aggregate(
    method: Method, federation: Federation, sent: dict[int, Factors], round_number: int
) -> float:
    """Take the federation to its next state; return the energy beyond the smallest rank."""
    clients = sorted(sent)
    weights = dict(enumerate(method.weigh([federation.rows[client] for client in clients])))
    ranks = ModuleRanks(
        shape=SHAPE,
        clients=tuple(federation.ranks[client] for client in clients),
        received=tuple(sorted(set(federation.ranks))),
    )
    (group,) = group_modules({"m": ranks}, block_clients=32, exact=False, tolerance=1e-4)
    blocks = [
        _block([sent[clients[place]] for place in places], weights, places)
        for places in blocks_of(range(len(clients)), 32)
    ]
    step = ServerStep(
        modules=["m"],
        problem=with_weights(group, weights).problem,
        total=sum(weights.values()),
        before=[federation.state],
        ranks=group.received,
        round=round_number,
        clients=list(map(str, clients)),
    )
    (result,) = method.finish([method.fold(block, step) for block in blocks], step)
    federation.state = result.state
    if method.base_delta(federation.state) is not None:
        # the factors of what goes into the base, at most, to each client
        rank = min(SIDE, sum(update.rank for update in sent.values()))
        federation.bytes_sent += len(sent) * rank * 2 * SIDE * 4
    return result.diagnostics.beyond_smallest_rank


def _block(
    factors: Sequence[Factors], weights: Mapping[int, float], places: tuple[int, ...]
) -> FactorBlock:
    return FactorBlock(
        a_GRI=torch.cat([item.a_RI for item in factors])[None],
        b_GOR=torch.cat([item.b_OR for item in factors], dim=1)[None],
        ranks=tuple(item.rank for item in factors),
        scales_GC=torch.tensor([[item.scale for item in factors]], dtype=torch.float64),
        weights_GC=torch.tensor([[weights[place] for place in places]], dtype=torch.float64),
        clients=places,
    )


def measured(method: Method, federation: Federation, rounds: int) -> Measured:
    """Return a seed's figures after the last round."""
    optimum = federation.optimum
    s = torch.linalg.svdvals(optimum)
    far, best = {}, {}
    for rank in set(federation.ranks):
        got = delta(method.module_adapter(module="m", state=federation.state, rank=rank))
        change = method.base_delta(federation.state)
        got = got if change is None else got + change
        far[rank] = float((got - optimum).norm() / s.norm())
        best[rank] = float(s[rank:].norm() / s.norm())
    total = sum(federation.rows)
    shares = [(rank, n / total) for rank, n in zip(federation.ranks, federation.rows, strict=True)]
    return Measured(
        deployed=sum(share * far[rank] for rank, share in shares),
        largest=far[max(far)],
        best_deployed=sum(share * best[rank] for rank, share in shares),
        best_largest=best[max(best)],
        beyond=federation.beyond,
        bytes_a_round=federation.bytes_sent / rounds,
    )


def run_arm(arm: Arm, seeds: int, rounds: int) -> list[Measured]:
    """Run all seeds of an arm, round by round side by side; nothing if one of them diverges."""
    try:
        return _run_arm(arm, seeds, rounds)
    except AdapterError:  # values that are not finite
        return []


def _run_arm(arm: Arm, seeds: int, rounds: int) -> list[Measured]:
    torch.set_num_threads(1)
    method = build_method(
        arm.method, seed=0, alpha=1.0, scaling="proportional", options=dict(arm.options)
    )
    federations = [federation_of(arm, method, seed) for seed in range(seeds)]
    for number in range(1, rounds + 1):
        cohorts = [cohort_of(federation.seed, number) for federation in federations]
        updates = train_round(method, federations, cohorts, number)
        for federation, sent in zip(federations, updates, strict=True):
            beyond = aggregate(method, federation, sent, number)
            if number in SHOWN_ROUNDS:
                federation.beyond[number] = beyond
    return [measured(method, each, rounds) for each in federations]


# where clients keep a part of their adapters there is none for all to measure
MEASURED = [name for name, entry in METHODS.items() if entry.client_state == "none"]


def arms(methods: Sequence[str] = MEASURED) -> Iterator[Arm]:
    """Yield every method on every distribution; methods for one rank only once."""
    for strength, name in product(STRENGTHS, methods):
        if METHODS[name].ranks == "one":
            yield Arm(method=name, distribution="uniform", strength=strength)
            continue
        for distribution in DISTRIBUTIONS:
            yield Arm(method=name, distribution=distribution, strength=strength)
            if name == "flexlora":
                keep = (("truncated", "keep"),)
                for more in (keep, (*keep, ("frozen_tail", True))):
                    yield Arm(
                        method=name, options=more, distribution=distribution, strength=strength
                    )


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and its 95 % bootstrap interval."""
    draws = torch.Generator().manual_seed(0)
    found = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(len(values), (2000, len(values)), generator=draws)
    low, high = found[chosen].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return f"{found.mean():.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def rows_of(arm: Arm, found: Sequence[Measured]) -> Iterator[list[str]]:
    """Yield a row of the table; before a distribution's first method what is possible at best."""
    one = METHODS[arm.method].ranks == "one"
    ranks = f"all rank {min(RANKS)}" if one else arm.distribution
    if found and (arm.label == "flexlora" or arm.method == "factor_mean"):
        best = ([each.best_deployed for each in found], [each.best_largest for each in found])
        yield [ranks, "(the optimum's own)", *map(interval, best), "", ""]
    if not found:
        yield [ranks, arm.label, "diverges", "", "", ""]
        return
    shown = [number for number in SHOWN_ROUNDS if number in found[0].beyond]
    yield [
        ranks,
        arm.label,
        interval([each.deployed for each in found]),
        interval([each.largest for each in found]),
        " / ".join(f"{sum(m.beyond[n] for m in found) / len(found):.4f}" for n in shown),
        f"{sum(each.bytes_a_round for each in found) / len(found) / 1024:.0f} KiB",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each strength of the clients' own parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=MEASURED, default=MEASURED)
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    every = sorted(
        arms(given.methods),
        key=lambda arm: (arm.strength, METHODS[arm.method].ranks, arm.distribution),
    )
    work = partial(run_arm, seeds=given.seeds, rounds=given.rounds)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(work, every))
    header = ["ranks", "method", "distance as deployed", "at the largest rank"]
    header += ["energy beyond the smallest rank", "bytes a round"]
    for strength in STRENGTHS:
        mine = [pair for pair in zip(every, found, strict=True) if pair[0].strength == strength]
        rows = [row for arm, figures in mine for row in rows_of(arm, figures)]
        print(text_table(f"clients' own parts: strength {strength}", header, rows) + "\n")
    print(f"{given.seeds} seeds, {given.rounds} rounds: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
