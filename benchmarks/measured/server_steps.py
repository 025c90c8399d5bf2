"""The server steps of all methods on the same updates: time against FlexLoRA's, and memory.

Methods for one rank are compared with FlexLoRA at that rank.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.inputs.adapters import Kind, client_factors, kinds_of, ranks_of
from benchmarks.measured.whole_round import WholeRound, whole_round
from fedllm.aggregation.groups import ModuleRanks, blocks_of, group_modules, with_weights
from fedllm.aggregation.route_types import Problem
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.catalog import METHODS, build_method
from fedllm.methods.protocol import Method, ModuleState, ServerStep
from fedllm.reporting.tables import text_table

REFERENCE = "flexlora"
LIMIT = 3.0  # times FlexLoRA's step
_ALPHA = 16.0


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """The seconds of a method's step on one module, and of FlexLoRA's on the same updates."""

    module: str
    ranks: str
    method: str
    seconds: list[float]
    reference: list[float]

    @property
    def ratio(self) -> float:
        """The method's median over FlexLoRA's."""
        return statistics.median(self.seconds) / statistics.median(self.reference)

    def ratio_of(self, number: int) -> float:
        """The method's seconds of a round, from 1, over FlexLoRA's median."""
        return self.seconds[number - 1] / statistics.median(self.reference)

    @property
    def mean_ratio(self) -> float:
        """The method's mean over FlexLoRA's."""
        return statistics.mean(self.seconds) / statistics.mean(self.reference)


@dataclass(frozen=True, kw_only=True)
class Updates:
    """The updates of one module, the memory of their blocks, and the problem that they make."""

    factors: Sequence[Factors]
    places: Sequence[tuple[int, ...]]
    problem: Problem
    received: tuple[int, ...]

    @classmethod
    def of(cls, kind: Kind, ranks: Sequence[int], asked: argparse.Namespace) -> "Updates":
        """Return what clients of these ranks send, `decaying` like trained adapters."""
        received = tuple(sorted(set(ranks)))
        module = ModuleRanks(shape=kind.shape, clients=tuple(ranks), received=received)
        [group] = group_modules(
            {"m": module},
            block_clients=asked.block_clients,
            exact=asked.exact,
            tolerance=asked.tolerance,
        )
        factors = client_factors(kind.shape, ranks, spectrum="decaying")
        return cls(
            factors=factors,
            places=blocks_of(range(len(ranks)), asked.block_clients),
            problem=with_weights(group, dict.fromkeys(range(len(ranks)), 1.0)).problem,
            received=received,
        )

    def blocks(self, device: str) -> Iterator[FactorBlock]:
        """Copy the factors side by side, block by block, as an aggregation does."""
        for places in self.places:
            chosen = [self.factors[place] for place in places]
            yield FactorBlock(
                a_GRI=torch.cat([f.a_RI for f in chosen])[None].to(device),
                b_GOR=torch.cat([f.b_OR for f in chosen], dim=1)[None].to(device),
                ranks=tuple(f.rank for f in chosen),
                scales_GC=torch.tensor([[f.scale for f in chosen]], dtype=torch.float64),
                weights_GC=torch.ones(1, len(chosen), dtype=torch.float64),
            )

    def step(self, before: ModuleState, round_number: int) -> ServerStep:
        """Return a round's step from a state."""
        return ServerStep(
            modules=["m"],
            problem=self.problem,
            total=float(len(self.factors)),
            before=[before],
            ranks=self.received,
            round=round_number,
        )

    def aggregated(
        self, method: Method, before: ModuleState, number: int, device: str
    ) -> ModuleState:
        """Return the state after a round."""
        step = self.step(before, number)
        partials = (method.fold(block, step) for block in self.blocks(device))
        return method.finish(partials, step)[0].state


def step_timings(asked: argparse.Namespace) -> Iterator[StepTiming]:
    """Time every method against FlexLoRA, in turn, from the state after some rounds."""
    for kind in kinds_of(asked.shape):
        mixed = ranks_of(asked.ranks, clients=asked.clients, mlp=kind.mlp)
        for ranks, takes in ((mixed, "any"), ([mixed[0]] * len(mixed), "one")):
            names = [name for name, entry in METHODS.items() if entry.ranks == takes]
            updates = Updates.of(kind, ranks, asked)
            for name in names:
                if name != REFERENCE:
                    pair = _timed(name, updates, asked)
                    yield StepTiming(
                        module=kind.name,
                        ranks=asked.ranks if takes == "any" else str(ranks[0]),
                        method=name,
                        seconds=pair[name],
                        reference=pair[REFERENCE],
                    )


def _timed(name: str, updates: Updates, asked: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of a method and of FlexLoRA, which take turns."""
    found: dict[str, list[float]] = {REFERENCE: [], name: []}
    methods = {n: build_method(n, seed=0, alpha=_ALPHA, scaling="proportional") for n in found}
    shape = updates.factors[0].shape
    timed_after = 0 if asked.rounds else asked.rounds_before
    before = {}
    for each, method in methods.items():
        start = method.start_module(module="m", shape=shape, rank=updates.problem.rank)
        moved = {part: tensor.to(asked.device) for part, tensor in start.items()}
        for number in range(1, timed_after + 1):
            moved = dict(updates.aggregated(method, moved, number, asked.device))
        before[each] = moved
    for repeat in range(asked.rounds or asked.repeats):
        number = 1 + timed_after + (repeat if asked.rounds else 0)
        for each, method in methods.items():
            begun = _now(asked.device)
            after = updates.aggregated(method, before[each], number, asked.device)
            found[each].append(_now(asked.device) - begun)
            before[each] = dict(after) if asked.rounds else before[each]
    return found


def _now(device: str) -> float:
    """Return a clock: CPU time of this process on a CPU, where waiting for a core is no work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def step_table(timings: Sequence[StepTiming]) -> str:
    """Return the timings as a table."""
    rows = [
        [
            t.module,
            t.ranks,
            t.method,
            _milliseconds(t.seconds),
            _milliseconds(t.reference),
            f"{t.ratio:.2f}",
        ]
        for t in timings
    ]
    header = ["module", "ranks", "method", "ms (range)", f"{REFERENCE}, ms (range)", "times"]
    return text_table("server step of one module, median", header, rows)


def rounds_table(timings: Sequence[StepTiming]) -> str:
    """Return the timings of rounds that follow each other as a table."""
    rows = []
    for timing in timings:
        numbers = range(1, len(timing.seconds) + 1)
        worst = max(numbers, key=timing.ratio_of)
        slow = [number for number in numbers if timing.ratio_of(number) > LIMIT]
        cells = [f"{1e3 * statistics.mean(s):.1f}" for s in (timing.seconds, timing.reference)]
        ratios = [f"{timing.mean_ratio:.2f}", f"{timing.ratio_of(worst):.2f} ({worst})"]
        about = [timing.module, timing.ranks, timing.method]
        rows.append([*about, *cells, *ratios, ", ".join(map(str, slow)) or "-"])
    header = ["module", "ranks", "method", "mean ms", f"{REFERENCE}, mean ms"]
    header += ["times", "worst (round)", f"rounds above {LIMIT:g}"]
    return text_table("server steps of all rounds of one module", header, rows)


def whole_rounds(asked: argparse.Namespace) -> Iterator[tuple[str, WholeRound]]:
    """Aggregate a whole model by every method, from files below `asked.files`."""
    folder: Path = asked.files
    first = asked.ranks.partition(",")[0]
    for takes, ranks in (("any", asked.ranks), ("one", first)):
        for name, entry in METHODS.items():
            if name == REFERENCE or entry.ranks == takes:
                given = {"files": folder / f"{takes}-{name}", "ranks": ranks, "method": name}
                yield f"{name}, {ranks}", whole_round(argparse.Namespace(**(vars(asked) | given)))


def whole_round_table(found: Sequence[tuple[str, WholeRound]]) -> str:
    """Return seconds and memory as a table."""
    rows = [
        [name, f"{each.seconds:.1f}", f"{each.gib:.2f}", f"{each.peak_anonymous_gib:.2f}"]
        for name, each in found
    ]
    header = ["method, ranks", "seconds", "GiB of updates", "peak, GiB"]
    return text_table("aggregation of a whole model from files", header, rows)


def _milliseconds(seconds: Sequence[float]) -> str:
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"
