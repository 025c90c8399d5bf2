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
import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from fedllm.aggregation.groups import ModuleRanks, blocks_of, group_modules, with_weights
from fedllm.errors import AdapterError
from fedllm.lora.entries import entries_of, entry_places, with_entries
from fedllm.lora.factors import FactorBlock, Factors, ModuleShape, delta, formed
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
# and parts that different clients train all follow the same rest: together they move too far
STEP_SHARES = dict.fromkeys(("fslora", "fed_plora"), lambda rank, largest: rank / largest)
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


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of all clients of a seed: `left` (256, 64) cores[c] `right`^T for client c."""

    left: Tensor
    right: Tensor
    cores: Tensor
    generator_state: Tensor

    def of(self, client: int) -> Tensor:
        """Return a client's target (256, 256)."""
        return self.left @ self.cores[client] @ self.right.mT


@lru_cache(maxsize=64)
def targets_of(seed: int, strength: float) -> Targets:
    """Draw the targets of a seed, the same for all methods and distributions."""
    draw = torch.Generator().manual_seed(seed_of("known rank", seed))
    u_OK, v_IK = (
        torch.linalg.qr(torch.randn(SIDE, DIRECTIONS, generator=draw)).Q for _ in range(2)
    )
    d_K = 2.0 ** (-torch.arange(DIRECTIONS) / 4)
    own_CKK = torch.randn(CLIENTS, DIRECTIONS, DIRECTIONS, generator=draw) / 8
    core_CKK = torch.diag(d_K) + strength * (d_K.sqrt()[:, None] * own_CKK * d_K.sqrt())
    return Targets(left=u_OK, right=v_IK, cores=core_CKK, generator_state=draw.get_state())


@dataclass(kw_only=True)
class Federation:
    """One seed's clients, their targets and weights, and the server's state."""

    seed: int
    ranks: list[int]
    rows: list[float]
    targets: Targets
    state: ModuleState
    beyond: dict[int, float] = field(default_factory=dict)
    bytes_sent: int = 0

    @property
    def best_core(self) -> Tensor:
        """The weighted mean of the cores: the optimum has its singular values."""
        weights = torch.tensor(self.rows, dtype=torch.float64)
        return torch.einsum("c,cjk->jk", weights / weights.sum(), self.targets.cores.double())

    @property
    def optimum(self) -> Tensor:
        """The weighted mean of the targets."""
        return self.targets.left.double() @ self.best_core @ self.targets.right.double().mT


def federation_of(arm: Arm, method: Method, seed: int) -> Federation:
    """Draw a federation; only the ranks depend on the distribution, only targets on strength."""
    targets = targets_of(seed, arm.strength)
    draw = torch.Generator()
    draw.set_state(targets.generator_state)
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
        targets=targets,
        state=method.start_module(module="m", shape=SHAPE, rank=max(ranks)),
    )


def cohort_of(seed: int, round_number: int) -> list[int]:
    """Return the clients of a round, the same for every method."""
    draw = torch.Generator().manual_seed(seed_of("known rank", seed, round_number))
    return sorted(torch.randperm(CLIENTS, generator=draw)[:COHORT].tolist())


@dataclass(frozen=True, kw_only=True)
class Training:
    """What clients of one rank do side by side: gradient descent on |s B A - T|^2 / 2.

    `received` are the factors that each begins with, `places` each one's federation and number,
    `task` says which factors train.
    """

    received: Sequence[Factors]
    places: Sequence[tuple[Federation, int]]
    task: LocalTask
    rate: float = LEARNING_RATE

    def updates(self, changes: Sequence[Tensor | None]) -> list[Factors]:
        """Return what the clients send; frozen factors and `changes` of the base are in T.

        The columns of `changes` are in the basis U, unless entries train.
        """
        if self.task.entries_seed is not None:
            targets = [
                federation.targets.of(client) - (0.0 if change is None else change)
                for (federation, client), change in zip(self.places, changes, strict=True)
            ]
            return _trained_entries(self.received, targets, self.task.entries_seed)
        core = torch.stack([federation.targets.cores[client] for federation, client in self.places])
        frozen = [got.frozen for got in self.received]
        if not any(part is not None for part in (*changes, *frozen)):
            return self._stepped(core, "right")
        wide = self._out(core, "right")
        for (federation, _), change, held, mine in zip(
            self.places, changes, frozen, wide, strict=True
        ):
            mine -= 0.0 if change is None else change
            if held is not None:
                left = _in_span(held.b_OR, federation.targets.left)
                mine.addmm_(left, held.a_RI, alpha=-held.scale)
        return self._stepped(wide, None)

    def _stepped(self, core: Tensor, right: str | None) -> list[Factors]:
        """Return the updates for T = U core V^T, or U core, by small matrices.

        The parts of A and B in the spans of V and U see the core; the rest only shrinks. B is
        transposed here, so that both factors go the same way.

        Args:
            core: (C, 64, 64), or (C, 64, 256).
            right: the basis V; None: all directions.
        """
        a = torch.stack([f.a_RI for f in self.received])
        b = torch.stack([f.b_OR.mT for f in self.received])
        begun_a, begun_b = self._in(a, right), self._in(b, "left")
        gram_a, gram_b = a @ a.mT - begun_a @ begun_a.mT, b @ b.mT - begun_b @ begun_b.mT
        in_a, in_b = begun_a, begun_b
        rest_a, rest_b = (torch.eye(a.shape[1]).expand_as(gram_a) for _ in range(2))
        step, squared = self.rate * self.scale, self.rate * self.scale**2
        for _ in range(STEPS):
            of_a = torch.baddbmm(in_b @ in_b.mT, rest_b @ gram_b, rest_b.mT)
            of_b = torch.baddbmm(in_a @ in_a.mT, rest_a @ gram_a, rest_a.mT)
            next_a = torch.baddbmm(in_a, of_a, in_a, alpha=-squared).baddbmm_(
                in_b, core, alpha=step
            )
            if "B" in self.task.trained:
                in_b = torch.baddbmm(in_b, of_b, in_b, alpha=-squared).baddbmm_(
                    in_a, core.mT, alpha=step
                )
                rest_b = torch.baddbmm(rest_b, of_b, rest_b, alpha=-squared)
            if "A" in self.task.trained:
                in_a, rest_a = next_a, torch.baddbmm(rest_a, of_a, rest_a, alpha=-squared)
        a = in_a if right is None else rest_a @ a + self._out(in_a - rest_a @ begun_a, right)
        b = rest_b @ b + self._out(in_b - rest_b @ begun_b, "left")
        return self._sent(a, b.mT)

    def _in(self, factors: Tensor, basis: str | None) -> Tensor:
        """Return factors (C, r, 256) in a basis of each client's targets; None: as they are."""
        if basis is None:
            return factors
        found = [factors[part].flatten(0, 1) @ getattr(t, basis) for part, t in self._seeds()]
        return torch.cat(found).view(*factors.shape[:2], DIRECTIONS)

    def _out(self, factors: Tensor, basis: str) -> Tensor:
        """Return factors (C, r, 64) that are in the bases of the targets, as they are."""
        found = [factors[part].flatten(0, 1) @ getattr(t, basis).mT for part, t in self._seeds()]
        return torch.cat(found).view(*factors.shape[:2], SIDE)

    def _seeds(self) -> Iterator[tuple[slice, Targets]]:
        """Yield the clients of each seed, whose bases are the same at any strength."""
        begin = 0
        for _, members in groupby(federation.seed for federation, _ in self.places):
            end = begin + len(list(members))
            yield slice(begin, end), self.places[begin][0].targets
            begin = end

    @property
    def scale(self) -> float:
        """The scale of all clients' adapters."""
        return self.received[0].scale

    def _sent(self, a: Tensor, b: Tensor) -> list[Factors]:
        return [Factors(a_RI=x, b_OR=y, scale=self.scale) for x, y in zip(a, b, strict=True)]


def _in_span(columns: Tensor, basis: Tensor) -> Tensor:
    """Return columns (256, N) in a basis (256, 64) of the targets' columns.

    Every B that begins at zero lies in their span, and so does what the base has of it.
    """
    inside = basis.mT @ columns
    whole, held = (float(part.square().sum()) for part in (columns, inside))
    assert abs(whole - held) <= 1e-4 * whole, "columns beyond those of the targets"
    return inside


def _trained_entries(
    received: Sequence[Factors], targets: Sequence[Tensor], seed: int
) -> list[Factors]:
    """Return what clients send that train entries of W: gradient descent on |D - T|^2 / 2."""
    places = entry_places(seed=seed, shape=SHAPE, rank=received[0].rank)
    reached = 1 - (1 - LEARNING_RATE) ** STEPS  # the share of the way that all steps go
    sent = []
    for target, got in zip(targets, received, strict=True):
        entries = with_entries(got.a_RI, got.b_OR, places)
        a_RI, b_OR = entries_of(torch.lerp(entries, target, reached), places, got.rank)
        sent.append(replace(got, a_RI=a_RI, b_OR=b_OR, frozen=None))
    return sent


def change_of(method: Method, state: ModuleState) -> Tensor | None:
    """Return the change of the base that goes with a state, as one matrix."""
    change = method.base_delta(state)
    return None if change is None else formed(change)


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
    changes = [change_of(method, federation.state) for federation in federations]
    if method.local_task(number).entries_seed is None:
        changes = [
            None if change is None else _in_span(change, federation.targets.left)
            for change, federation in zip(changes, federations, strict=True)
        ]
    for rank, members in by_rank.items():
        received = _received(method, federations, members, rank, number)
        training = Training(
            received=received,
            places=[(federations[place], client) for place, client in members],
            task=method.local_task(number),
            rate=LEARNING_RATE
            * STEP_SHARES.get(method.name, _whole)(rank, max(federations[members[0][0]].ranks)),
        )
        updates = training.updates([changes[place] for place, _ in members])
        for (place, client), got, update in zip(members, received, updates, strict=True):
            sent[place][client] = update
            federations[place].bytes_sent += got.num_bytes + update.num_bytes  # down and up
    return sent


def _received(
    method: Method,
    federations: Sequence[Federation],
    members: Sequence[tuple[int, int]],
    rank: int,
    number: int,
) -> list[Factors]:
    """Return what clients of one rank receive; where nothing is drawn for each, once for all."""
    found: dict[tuple[int, int], Factors] = {}
    keys = [(place, client if method.per_client else 0) for place, client in members]
    for key, (place, client) in zip(keys, members, strict=True):
        if key not in found:
            to = Recipient(client=str(client), round=number)
            state = federations[place].state
            found[key] = method.hand_out(module="m", state=state, rank=rank, to=to)
    return [found[key] for key in keys]


def aggregate(
    method: Method,
    federations: Sequence[Federation],
    sent: Sequence[dict[int, Factors]],
    round_number: int,
) -> None:
    """Take federations that differ in their targets alone to their next states, side by side."""
    federation, clients = federations[0], sorted(sent[0])
    weights = dict(enumerate(method.weigh([federation.rows[client] for client in clients])))
    ranks = ModuleRanks(
        shape=SHAPE,
        clients=tuple(federation.ranks[client] for client in clients),
        received=tuple(sorted(set(federation.ranks))),
    )
    (group,) = group_modules({"m": ranks}, block_clients=32, exact=False, tolerance=1e-4)
    blocks = [
        _block([[each[clients[place]] for place in places] for each in sent], weights, places)
        for places in blocks_of(range(len(clients)), 32)
    ]
    step = ServerStep(
        modules=["m"] * len(federations),
        problem=with_weights(group, weights).problem,
        total=sum(weights.values()),
        before=[each.state for each in federations],
        ranks=group.received,
        round=round_number,
        clients=list(map(str, clients)),
    )
    results = method.finish([method.fold(block, step) for block in blocks], step)
    for each, result, updates in zip(federations, results, sent, strict=True):
        each.state = result.state
        if round_number in SHOWN_ROUNDS:
            each.beyond[round_number] = result.diagnostics.beyond_smallest_rank
        if method.base_delta(each.state) is not None:
            # to each client the entries, or at most the factors, of what goes into the base
            is_sparse = method.local_task(round_number).entries_seed is not None
            stacked = sum(update.rank for update in updates.values())
            rank = max(each.ranks) if is_sparse else min(SIDE, stacked)
            each.bytes_sent += len(updates) * rank * 2 * SIDE * 4


def _block(
    factors: Sequence[Sequence[Factors]], weights: Mapping[int, float], places: tuple[int, ...]
) -> FactorBlock:
    """Return a block of the clients at `places`, with the factors of every federation."""
    return FactorBlock(
        a_GRI=torch.stack([torch.cat([item.a_RI for item in each]) for each in factors]),
        b_GOR=torch.stack([torch.cat([item.b_OR for item in each], dim=1) for each in factors]),
        ranks=tuple(item.rank for item in factors[0]),
        scales_GC=torch.tensor(
            [[item.scale for item in each] for each in factors], dtype=torch.float64
        ),
        weights_GC=torch.tensor(
            [[weights[place] for place in places]] * len(factors), dtype=torch.float64
        ),
        clients=places,
    )


def measured(method: Method, federation: Federation, rounds: int) -> Measured:
    """Return a seed's figures after the last round."""
    optimum, s = federation.optimum, torch.linalg.svdvals(federation.best_core)
    change = change_of(method, federation.state)
    far, best = {}, {}
    for rank in set(federation.ranks):
        got = delta(method.module_adapter(module="m", state=federation.state, rank=rank))
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


def run_arms(arms: Sequence[Arm], seeds: int, rounds: int) -> list[list[Measured]]:
    """Run all seeds of arms that differ in strength alone, round by round side by side.

    An arm has no figures if one of its seeds diverges.
    """
    try:
        return _run_arms(arms, seeds, rounds)
    except AdapterError:  # values that are not finite
        alone = [run_arms([arm], seeds, rounds) for arm in arms] if len(arms) > 1 else [[[]]]
        return [figures for (figures,) in alone]


def _run_arms(arms: Sequence[Arm], seeds: int, rounds: int) -> list[list[Measured]]:
    torch.set_num_threads(1)
    options = dict(arms[0].options)
    method = build_method(
        arms[0].method, seed=0, alpha=1.0, scaling="proportional", options=options
    )
    # of each seed those of all arms
    found = [[federation_of(arm, method, seed) for arm in arms] for seed in range(seeds)]
    every = [federation for of_seed in found for federation in of_seed]
    for number in range(1, rounds + 1):
        cohorts = [cohort_of(federation.seed, number) for federation in every]
        updates = iter(train_round(method, every, cohorts, number))
        for of_seed in found:
            aggregate(method, of_seed, [next(updates) for _ in of_seed], number)
    return [
        [measured(method, each, rounds) for each in of_arm] for of_arm in zip(*found, strict=True)
    ]


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


def interval_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval."""
    draws = torch.Generator().manual_seed(0)
    found = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(len(values), (2000, len(values)), generator=draws)
    low, high = found[chosen].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return float(found.mean()), low, high


def interval(values: Sequence[float]) -> str:
    """Return the mean and its interval as a text."""
    mean, low, high = interval_of(values)
    return f"{mean:.3f} ({low:.3f}-{high:.3f})"


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
    parser.add_argument("--save", type=Path, help="the figures of every seed, as JSON")
    parser.add_argument("--methods", nargs="+", choices=MEASURED, default=MEASURED)
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    every = sorted(
        arms(given.methods),
        key=lambda arm: (arm.strength, METHODS[arm.method].ranks, arm.distribution),
    )
    together: dict[Arm, list[Arm]] = {}
    for arm in every:
        together.setdefault(replace(arm, strength=STRENGTHS[0]), []).append(arm)
    work = partial(run_arms, seeds=given.seeds, rounds=given.rounds)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        figures = list(pool.map(work, together.values()))
    of_arm = {
        arm: each
        for group, found in zip(together.values(), figures, strict=True)
        for arm, each in zip(group, found, strict=True)
    }
    header = ["ranks", "method", "distance as deployed", "at the largest rank"]
    header += ["energy beyond the smallest rank", "bytes a round"]
    for strength in STRENGTHS:
        mine = [arm for arm in every if arm.strength == strength]
        rows = [row for arm in mine for row in rows_of(arm, of_arm[arm])]
        print(text_table(f"clients' own parts: strength {strength}", header, rows) + "\n")
    if given.save:
        each = [{**asdict(arm), "seeds": list(map(asdict, of_arm[arm]))} for arm in every]
        given.save.write_text(json.dumps(each), "utf-8")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{given.seeds} seeds, {given.rounds} rounds: {time.perf_counter() - started:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of CPU time"
    )


if __name__ == "__main__":
    main()
