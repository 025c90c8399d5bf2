"""What number formats change: losses, the effect of batching, the time of a step.

    python benchmarks/precision.py --model BASE --data NATURAL_INSTRUCTIONS --rank 8

For each pair of `model.dtype` and `training.precision`, on the same base, clients and seeds:

    losses     of the same optimizer steps, and how far the last one is from float32 throughout
    batching   answer losses of rows read together and of each by itself: the largest difference
               of a client's mean loss per token
    time       of a step, one pair after the other in every turn; the first turn does not count

`--against CHECKOUT` times bfloat16 steps here and by the code of another checkout in turn, in
processes that stay: their order changes with every turn, and a ratio is of one turn. Seconds of the
processor count beside those of the clock, since other work on the machine disturbs them less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm.config.loading import validate
from fedllm.config.models import Config
from fedllm.data.cache import TokenizedClients
from fedllm.errors import FedllmError
from fedllm.evaluation.reading import answer_losses, num_targets
from fedllm.lora.factors import Factors
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.programs.prepare import prepare
from fedllm.storage.paths import CachePaths
from fedllm.storage.records import PreparedRecord
from fedllm.training.loop import LocalSettings, train_client
from fedllm.training.step_plan import Draws

PAIRS = ("float32/float32", "float32/bfloat16", "bfloat16/bfloat16", "bfloat16/float32")
TIMED = "bfloat16/bfloat16"


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Seconds of a step, by the clock and of the processor."""

    wall: float
    processor: float


def main() -> int:
    """Run the benchmark, or be a process that takes steps when it is told to."""
    asked = parsed()
    torch.set_num_threads(asked.threads)
    if asked.serve:
        return serve(asked)
    try:
        with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
            asked.scratch = Path(scratch)
            prepared_in(asked)
            found = compared(asked)
            if asked.against:
                found["against"] = against(asked)
    except FedllmError as error:
        sys.exit(str(error))
    report(found, asked)
    return 0


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("FEDLLM_MODEL", "embedded"))
    parser.add_argument("--data", default=os.environ.get("FEDLLM_DATA", "embedded"))
    parser.add_argument("--template", default="alpaca", help="of prompts (default: alpaca)")
    parser.add_argument("--cutoff", type=int, default=384, help="tokens of a row (default: 384)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (default: 4)")
    parser.add_argument("--clients", type=int, default=3, help="default: 3")
    parser.add_argument("--steps", type=int, default=8, help="of each client (default: 8)")
    parser.add_argument(
        "--rows", type=int, default=4, help="of a client that are read (default: 4)"
    )
    parser.add_argument("--rank", type=int, default=8, help="default: 8")
    parser.add_argument("--rate", type=float, default=1e-4, help="default: 0.0001")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--repeats", type=int, default=10, help="timed turns (default: 10)")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="all")
    parser.add_argument("--against", type=Path, help="a checkout whose bfloat16 step is timed too")
    parser.add_argument("--scratch", type=Path, help="where rows go (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def configuration(asked: argparse.Namespace, pair: str) -> Config:
    """Return how clients train."""
    dtype, name = pair.split("/")
    return validate(
        {
            "model": {"path": asked.model, "dtype": dtype},
            "data": {
                "path": asked.data,
                "cutoff_tokens": asked.cutoff,
                "template": asked.template,
            },
            "clients": {"tiers": {"all": {"ranks": asked.rank}}},
            "training": {
                "epochs": 1000,
                "max_steps": asked.steps,
                "batch_size": asked.batch,
                "learning_rate": asked.rate,
                "schedule": "constant",
                "precision": name,
                "threads": asked.threads,
            },
        }
    )


def prepared_in(asked: argparse.Namespace) -> None:
    """Tokenise the rows of the clients, as fedllm does it."""
    cache = CachePaths(root=asked.scratch / "cache")
    prepared = prepare(configuration(asked, TIMED), cache, lambda _line: None)
    prepared.publish(asked.scratch / "prepared.json")


class Bench:
    """The base in one pair of formats, with an adapter and the rows of some clients."""

    def __init__(self, asked: argparse.Namespace, pair: str) -> None:
        self.config = configuration(asked, pair)
        self._num_read = asked.rows
        prepared = PreparedRecord.read(asked.scratch / "prepared.json")
        base = load_base(Path(prepared.model_path), dtype=self.config.model.dtype, device="cpu")
        assert prepared.layout is not None
        targets = self.config.lora.target_modules
        self.slots = AdapterSlots(base, target_modules=targets, layout=prepared.layout.cpu)
        data = TokenizedClients.open(Path(prepared.data_path))
        ids = sorted(record.id for record in prepared.clients if record.train_rows >= asked.rows)
        self.rows = {id_: list(data.rows(id_, "train")) for id_ in ids[: asked.clients]}
        draws = torch.Generator().manual_seed(0)
        self.adapter = {
            name: Factors(
                a_RI=torch.randn(asked.rank, m.in_features, generator=draws) / m.in_features**0.5,
                b_OR=torch.zeros(m.out_features, asked.rank),
                scale=self.config.lora.alpha / asked.rank,
            )
            for name, m in prepared.modules.items()
        }

    def losses(self, client: str, steps: int) -> list[float]:
        """Return the losses of a client's steps."""
        training = self.config.training.model_copy(update={"max_steps": steps})
        return train_client(
            self.slots,
            self.adapter,
            self.rows[client],
            settings=LocalSettings(training=training, rule=LOCAL_RULES["fedit"]),
            draws=Draws(seed=0, round=1, client=client),
        ).stats.losses

    def step(self) -> Taken:
        """Take one step of the first client."""
        wall, processor = time.perf_counter(), time.process_time()
        self.losses(next(iter(self.rows)), 1)
        return Taken(wall=time.perf_counter() - wall, processor=time.process_time() - processor)

    def apart(self) -> float:
        """Return how far two batchings of a client's rows are apart, a loss per token, at most."""
        self.slots.install(self.adapter)
        found = []
        for rows in (each[: self._num_read] for each in self.rows.values()):
            with precision_of(self.config):
                one, other = (
                    sum(
                        answer_losses(self.slots, [rows], layout=self.slots.layout, batch_size=size)
                    )
                    for size in (self._num_read, 1)
                )
            found.append(abs(one - other) / sum(map(num_targets, rows)))
        return max(found)


def precision_of(config: Config) -> AbstractContextManager[object]:
    """Return the context of an evaluation; older checkouts, of `--against` too, had none."""
    try:
        from fedllm.packing.precision import precision
    except ImportError:
        return nullcontext()
    return precision(config.training.precision, torch.device("cpu"))


def compared(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every pair."""
    benches = {pair: Bench(asked, pair) for pair in asked.pairs}
    found: dict[str, Any] = {}
    for pair, bench in benches.items():
        losses = {client: bench.losses(client, asked.steps) for client in bench.rows}
        found[pair] = {"losses": losses, "apart": bench.apart(), "taken": []}
    for turn in range(asked.repeats + 1 if asked.repeats else 0):
        for pair in asked.pairs[:: 1 if turn % 2 else -1]:
            taken = benches[pair].step()
            if turn:
                found[pair]["taken"].append(asdict(taken))
    return {"pairs": found}


def against(asked: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Return the seconds of steps here and by another checkout, in turn."""
    roots = {"here": Path(__file__).parents[1], "there": asked.against.resolve()}
    names = "model", "data", "template", "cutoff", "batch", "clients", "rank", "threads", "scratch"
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    command += [f"--{name}={getattr(asked, name)}" for name in names]
    servers = {
        name: subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        for name, root in roots.items()
    }
    turns = []
    for turn in range(asked.repeats + 1):
        order = list(servers)[:: 1 if turn % 2 else -1]
        turns.append({name: told_to_step(servers[name]) for name in order})
    for server in servers.values():
        server.communicate()
    return turns[1:]


def told_to_step(server: "subprocess.Popen[str]") -> dict[str, float]:
    """Have a process take a step; return its seconds."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write("\n")
    server.stdin.flush()
    taken: dict[str, float] = json.loads(server.stdout.readline())
    return taken


def serve(asked: argparse.Namespace) -> int:
    """Take a step for every line on stdin."""
    bench = Bench(asked, TIMED)
    for _ in sys.stdin:
        print(json.dumps(asdict(bench.step())), flush=True)
    return 0


def report(found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Print the figures."""
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    exact = found["pairs"].get(PAIRS[0])
    print(f"rank {asked.rank}, rate {asked.rate}, {asked.threads} threads; dtype/precision")
    for pair, each in found["pairs"].items():
        wall, processor = (spread([t[kind] for t in each["taken"]]) for kind in clocks())
        print(
            f"{pair:18} step {wall} s by the clock, {processor} of the processor; "
            f"batchings {each['apart']:.4f} apart"
        )
        for client, losses in each["losses"].items():
            off = f" ({losses[-1] / exact['losses'][client][-1] - 1:+.2%})" if exact else ""
            print(f"    {client:8} {' '.join(f'{loss:.4f}' for loss in losses)}{off}")
    turns = found.get("against", [])
    for kind in clocks() if turns else ():
        here, there = ([turn[name][kind] for turn in turns] for name in ("here", "there"))
        ratios = [ours / theirs for ours, theirs in zip(here, there, strict=True)]
        print(f"{TIMED} {kind}: here {spread(here)} s, there {spread(there)} s, {spread(ratios)} x")


def clocks() -> tuple[str, ...]:
    """Return the clocks of a step."""
    return tuple(Taken.__dataclass_fields__)


def spread(values: Sequence[float]) -> str:
    """Return the median, and smallest and largest in brackets."""
    if not values:
        return "-"
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    sys.exit(main())
