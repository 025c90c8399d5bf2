"""Time the SVD of a weighted sum of adapters: fedllm's route against the dense product + full SVD.

    python benchmarks/aggregation.py --shape 2048x2048 --clients 10 --ranks 8 --wanted 8

Both start from the clients' factors, in one process, on the same inputs. The dense way is the
published code's: the product in float32, then a full (economical) SVD.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from fedllm.aggregation.decomposition import Problem
from fedllm.aggregation.routes import route_for, truncated_svd
from fedllm.lora.factors import Factors, stack

# O out, I in, R rank


def client_factors(*, out: int, in_: int, ranks: Sequence[int], device: str) -> list[Factors]:
    """Return one client's normal factors per rank, the same for every run."""
    draws = torch.Generator().manual_seed(0)
    return [
        Factors(
            a_RI=torch.randn(rank, in_, generator=draws).to(device),
            b_OR=torch.randn(out, rank, generator=draws).to(device),
            scale=16.0 / rank,
        )
        for rank in ranks
    ]


def dense_svd(factors: Sequence[Factors], weights: Sequence[float], wanted: int) -> Tensor:
    """Return the leading singular values by the product and a full SVD."""
    w_OI = torch.zeros(factors[0].shape.out, factors[0].shape.in_, device=factors[0].a_RI.device)
    for item, weight in zip(factors, weights, strict=True):
        w_OI += weight * item.scale * (item.b_OR @ item.a_RI)
    s_R: Tensor = torch.linalg.svd(w_OI, full_matrices=False).S
    return s_R[:wanted]


def seconds_of(run: Callable[[], Tensor], *, repeats: int, device: str) -> list[float]:
    """Return the seconds of each repeat, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--shape", default="2048x2048", help="OUTxIN (default: 2048x2048)")
    parser.add_argument("--clients", type=int, default=10, help="default: 10")
    parser.add_argument("--ranks", default="8", help="the clients' ranks in turn (default: 8)")
    parser.add_argument("--wanted", type=int, default=8, help="triplets wanted (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return parser.parse_args(argv)


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of both ways on the same inputs, their medians and their difference."""
    out, in_ = (int(side) for side in asked.shape.split("x"))
    ranks = list(islice(cycle(int(rank) for rank in asked.ranks.split(",")), asked.clients))
    factors = client_factors(out=out, in_=in_, ranks=ranks, device=asked.device)
    weights = [1.0 / len(factors)] * len(factors)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: truncated_svd(stack(factors, weights), rank=asked.wanted).spectral.s_R,
        "dense": lambda: dense_svd(factors, weights, asked.wanted),
    }
    ours, dense = ways["ours"](), ways["dense"]()
    shared = min(len(ours), len(dense))
    seconds = {
        name: seconds_of(run, repeats=asked.repeats, device=asked.device)
        for name, run in ways.items()
    }
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "shape": [out, in_],
        "ranks": ranks,
        "wanted": asked.wanted,
        "device": asked.device,
        "threads": torch.get_num_threads(),
        "route": route_for(Problem(out=out, in_=in_, stacked_rank=sum(ranks), rank=asked.wanted)),
        "seconds": seconds,
        "median_seconds": medians,
        "times_faster": medians["dense"] / medians["ours"],
        "difference_over_sigma_1": float((ours[:shared] - dense[:shared]).abs().max() / dense[0]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both and print medians, spread and their ratio."""
    asked = parsed(argv)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    report = measured(asked)
    if asked.json:
        print(json.dumps(report))
        return
    print(
        f"{asked.shape}, {len(report['ranks'])} clients, stacked rank {sum(report['ranks'])}, "
        f"wanted {asked.wanted}, {asked.device}, {report['threads']} threads, "
        f"median of {asked.repeats} (range)"
    )
    titles = {"ours": f"{report['route']} route", "dense": "dense product + full SVD"}
    for name, seconds in report["seconds"].items():
        middle, low, high = 1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds)
        print(f"{titles[name]:26} {middle:10.2f} ms  ({low:.2f} to {high:.2f})")
    print(
        f"{report['times_faster']:.0f} times faster; the singular values differ by "
        f"{report['difference_over_sigma_1']:.1e} sigma_1"
    )


if __name__ == "__main__":
    main()
