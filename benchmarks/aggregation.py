"""Time the SVD of a weighted sum of adapters: fedllm's route against the dense product + full SVD.

    python benchmarks/aggregation.py --shape 5504x2048 --clients 80 --ranks 8,30,200,200

All ways work on the same inputs in one process, in turn. The dense way is the published code's:
each client's product added up in float32, then a full (economical) SVD. Two floors stand beside
them: copying the factors side by side, which reads every byte once, and the one product that forms
the change from them. Inputs are `decaying` like trained adapters, and `flat`, the hardest.

With --files DIR the whole model's updates are written there as clients publish them, and
aggregated as a round is: time by stage, peak memory, and copying the same files to the device.

With --methods every method's server step is timed beside FlexLoRA's on the same updates, with
--rounds that of every round; with --files too, every method aggregates a whole model.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs.adapters import SPECTRA, Kind, client_factors, kinds_of, ranks_of
from benchmarks.measured.server_steps import (
    rounds_table,
    step_table,
    step_timings,
    whole_round_table,
    whole_rounds,
)
from benchmarks.measured.whole_round import whole_round
from fedllm.aggregation.groups import blocks_of
from fedllm.aggregation.route_types import Decomposition, Problem
from fedllm.aggregation.routes import decompose, fold, route_for
from fedllm.errors import FedllmError
from fedllm.lora.factors import FactorBlock, Factors

# O out, I in, R stacked rank
_LOOSE = 1e-2  # tolerance on flat spectra, beside the one asked for


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed: one kind of module, one input, one tolerance."""

    kind: Kind
    spectrum: str
    tolerance: float
    ranks: tuple[int, ...]
    wanted: int
    exact: bool

    @property
    def problem(self) -> Problem:
        """The case as the engine sees it."""
        return Problem(
            out=self.kind.shape.out,
            in_=self.kind.shape.in_,
            stacked_rank=sum(self.ranks),
            rank=self.wanted,
            exact=self.exact,
            tolerance=self.tolerance,
        )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each repeat by way, and what ours came to."""

    module: str
    shape: tuple[int, int]
    spectrum: str
    tolerance: float
    stacked_rank: int
    wanted: int
    route: str
    seconds: dict[str, list[float]]
    relative_excess: float
    failure_probability: float
    true_excess: float
    largest_difference: float

    @property
    def medians(self) -> dict[str, float]:
        """The median seconds of each way."""
        return {way: statistics.median(seconds) for way, seconds in self.seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Memory for a module's blocks, filled again and again as an aggregation does."""

    factors: Sequence[Factors]
    blocks: list[FactorBlock]

    @classmethod
    def of(cls, factors: Sequence[Factors], block_clients: int) -> "Buffers":
        """Return them filled once."""
        blocks = [
            FactorBlock(
                a_GRI=torch.cat([factors[place].a_RI for place in places])[None],
                b_GOR=torch.cat([factors[place].b_OR for place in places], dim=1)[None],
                ranks=tuple(factors[place].rank for place in places),
                scales_GC=torch.tensor([[factors[place].scale for place in places]]).double(),
                weights_GC=torch.ones(1, len(places), dtype=torch.float64),
            )
            for places in blocks_of(range(len(factors)), block_clients)
        ]
        return cls(factors=factors, blocks=blocks)

    def filled(self) -> list[FactorBlock]:
        """Copy the factors side by side, block by block."""
        each = iter(self.factors)
        for block in self.blocks:
            a_each = block.a_GRI[0].split(block.ranks)
            for a_RI, b_OR in zip(a_each, block.b_GOR[0].split(block.ranks, dim=1), strict=True):
                item = next(each)
                a_RI.copy_(item.a_RI)
                b_OR.copy_(item.b_OR)
        return self.blocks


def ours(blocks: Sequence[FactorBlock], problem: Problem, total: float) -> Decomposition:
    """Return the leading triplets by the route of the problem's shape."""
    return decompose((fold(block, problem) for block in blocks), problem, total=total)[0]


def dense(factors: Sequence[Factors]) -> Tensor:
    """Return all singular values by the published way."""
    w_OI = torch.zeros(factors[0].shape.out, factors[0].shape.in_, device=factors[0].a_RI.device)
    for item in factors:
        w_OI += item.scale / len(factors) * (item.b_OR @ item.a_RI)
    s_R: Tensor = torch.linalg.svd(w_OI, full_matrices=False).S
    return s_R


@dataclass(frozen=True, kw_only=True)
class Truth:
    """How good triplets really are, computed in float64."""

    excess: float
    largest_difference: float

    @classmethod
    def of(cls, found: Decomposition, factors: Sequence[Factors], wanted: int) -> "Truth":
        """Compare what triplets leave out, and their singular values, with the best."""
        b_OR = torch.cat([f.b_OR.double() * (f.scale / len(factors)) for f in factors], dim=1)
        w_OI = b_OR @ torch.cat([f.a_RI.double() for f in factors])
        tall = w_OI if w_OI.shape[0] >= w_OI.shape[1] else w_OI.mT
        energies_N = torch.linalg.eigvalsh(tall.mT @ tall).flip(0).clamp(min=0.0)
        u_OR, s_R, vh_RI = (part.double() for part in vars(found.spectral).values())
        left_out = float((w_OI - (u_OR * s_R) @ vh_RI).square().sum())
        best = float(energies_N[wanted:].sum())
        best_R = energies_N[: len(s_R)].sqrt()
        return cls(
            excess=left_out / best - 1 if best else 0.0,
            largest_difference=float((best_R - s_R).abs().max() / best_R[0]),
        )


def timed(case: Case, asked: argparse.Namespace) -> Timing:
    """Return the seconds of every way on one input."""
    factors = [
        Factors(a_RI=f.a_RI.to(asked.device), b_OR=f.b_OR.to(asked.device), scale=f.scale)
        for f in client_factors(case.kind.shape, case.ranks, spectrum=case.spectrum)
    ]
    total = float(len(factors))
    buffers = Buffers.of(factors, asked.block_clients)
    b_OR = torch.cat([f.b_OR for f in factors], dim=1)
    a_RI = torch.cat([f.a_RI for f in factors])
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(buffers.filled(), case.problem, total),
        "ours, stacked": lambda: ours(buffers.blocks, case.problem, total),
        "dense": lambda: dense(factors),
        "copy": buffers.filled,
        "product": lambda: b_OR @ a_RI,
    }
    found = ours(buffers.blocks, case.problem, total)
    truth = Truth.of(found, factors, case.wanted)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(asked.repeats + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if asked.device.startswith("cuda"):
                torch.cuda.synchronize(asked.device)
            if repeat:  # the first is a warm-up
                seconds[way].append(time.perf_counter() - start)
    return Timing(
        module=case.kind.name,
        shape=(case.kind.shape.out, case.kind.shape.in_),
        spectrum=case.spectrum,
        tolerance=case.tolerance,
        stacked_rank=sum(case.ranks),
        wanted=case.wanted,
        route=found.route,
        seconds=seconds,
        relative_excess=found.certificate.relative_excess,
        failure_probability=found.certificate.failure_probability,
        true_excess=truth.excess,
        largest_difference=truth.largest_difference,
    )


def cases(asked: argparse.Namespace) -> list[Case]:
    """Return what is timed."""
    found = []
    for kind in kinds_of(asked.shape):
        ranks = tuple(ranks_of(asked.ranks, clients=asked.clients, mlp=kind.mlp))
        wanted = min(asked.wanted or max(ranks), kind.shape.largest_rank)
        for spectrum in SPECTRA:
            case = Case(
                kind=kind,
                spectrum=spectrum,
                tolerance=asked.tolerance,
                ranks=ranks,
                wanted=wanted,
                exact=asked.exact,
            )
            found.append(case)
            if spectrum == "flat" and route_for(case.problem) == "iterative":
                found.append(Case(**{**vars(case), "tolerance": _LOOSE}))
    return found


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--shape",
        default="2048x2048",
        help="llama-1.3b, llama-7b, llama-70b, OUTxIN or OUTxINxMODULES",
    )
    parser.add_argument("--clients", type=int, default=10, help="default: 10")
    parser.add_argument(
        "--ranks", default="8", help="the clients' ranks in turn, such as 8,30+200 (attention+MLP)"
    )
    parser.add_argument("--wanted", type=int, help="triplets wanted (default: the largest rank)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="default: 1e-4")
    parser.add_argument("--exact", action="store_true", help="direct routes only")
    parser.add_argument("--block-clients", type=int, default=32, help="default: 32")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--files", type=Path, help="an empty folder: aggregate a whole model there")
    parser.add_argument("--methods", action="store_true", help="all methods beside FlexLoRA")
    parser.add_argument(
        "--rounds-before", type=int, default=1, help="with --methods: rounds before the timed one"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="with --methods: time each of this many rounds",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return parser.parse_args(argv)


def told(timing: Timing) -> list[str]:
    """Return a timing as lines."""
    medians = timing.medians
    lines = [
        f"{timing.module} {timing.shape[0]}x{timing.shape[1]}, {timing.spectrum}, "
        f"stacked rank {timing.stacked_rank}, wanted {timing.wanted}: route {timing.route}, "
        f"excess at most {timing.relative_excess:.1e} (true {timing.true_excess:.1e}), "
        f"tolerance {timing.tolerance:g}"
    ]
    for way, seconds in timing.seconds.items():
        low, high = 1e3 * min(seconds), 1e3 * max(seconds)
        lines.append(f"  {way:14} {1e3 * medians[way]:9.2f} ms  ({low:.2f} to {high:.2f})")
    lines.append(
        f"  {medians['dense'] / medians['ours']:.1f} times as fast as the dense way; "
        f"{medians['ours, stacked'] / medians['product']:.2f} times the product alone"
    )
    return lines


def compared(asked: argparse.Namespace) -> str:
    """Return the table of the methods, of one module's step or of whole rounds."""
    if asked.files:
        rounds = list(whole_rounds(asked))
        each = [{"method": name, **asdict(found)} for name, found in rounds]
        return json.dumps(each) if asked.json else whole_round_table(rounds)
    timings = list(step_timings(asked))
    if asked.json:
        return json.dumps([{**asdict(timing), "ratio": timing.ratio} for timing in timings])
    threads = torch.get_num_threads()
    about = f"{asked.clients} clients, {asked.device}, {threads} threads, torch {torch.__version__}"
    table = rounds_table(timings) if asked.rounds else step_table(timings)
    return f"{table}\n{about}"


def main(argv: Sequence[str] | None = None) -> None:
    """Time all cases and print medians, spread and ratios."""
    asked = parsed(argv)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.methods:
        print(compared(asked))
        return
    if asked.files:
        report = whole_round(asked)
        print(json.dumps(asdict(report)) if asked.json else "\n".join(report.lines()))
        return
    timings = []
    for case in cases(asked):
        timings.append(timed(case, asked))
        if not asked.json:
            print("\n".join(told(timings[-1])), flush=True)
    about = {"device": asked.device, "threads": torch.get_num_threads(), "clients": asked.clients}
    if asked.json:
        each = [{**asdict(timing), "median_seconds": timing.medians} for timing in timings]
        print(json.dumps({**about, "cases": each}))
    else:
        print(", ".join(f"{key} {value}" for key, value in about.items()), end=", ")
        print(f"torch {torch.__version__}, median of {asked.repeats} (range)")


if __name__ == "__main__":
    try:
        main()
    except FedllmError as error:
        sys.exit(f"error: {error}")
