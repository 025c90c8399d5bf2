"""Time whole rounds of `fedllm run` against the bare optimizer steps of a plain loop.

    python benchmarks/rounds.py --model BASE --data NATURAL_INSTRUCTIONS

Workload A is 10 steps a client, B one step: 16 of the first 32 clients a round on 2 local workers
of one thread, LoRA r=8 on all seven modules, batch 4, at most 128 tokens, AdamW, float32,
evaluation off (a token of one client at the two ends). The floor is the sum of the seconds inside
forward, backward and update of a plain padded loop with transformers and PEFT over the same
clients and rows, in 2 processes at once, over 2. Floor and run alternate; a round counts from the
publication of one server state to that of the next, the first round of a run left out.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.measured.processes import Usage, measured

if TYPE_CHECKING:
    from fedllm.data.cache import Row, TokenizedClients

WORKERS = 2
CLIENTS = 32
COHORT = 16
STEPS = {"A": 10, "B": 1}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, BATCH, CUTOFF, RATE = 8, 16, 4, 128, 1e-3


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is inside optimizer steps."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: "Steps") -> "Steps":
        return Steps(
            seconds=self.seconds + other.seconds, cpu_seconds=self.cpu_seconds + other.cpu_seconds
        )


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One floor and one run of a workload, in turn."""

    workload: str
    floor_seconds: float
    round_seconds: list[float]
    peak_pss_mib: float

    @property
    def multiple(self) -> float:
        """A steady round in multiples of the floor."""
        return statistics.mean(self.round_seconds) / self.floor_seconds

    @property
    def overhead_ms(self) -> float:
        """What a steady round adds to the floor, per client."""
        more = statistics.mean(self.round_seconds) - self.floor_seconds
        return 1e3 * WORKERS * more / COHORT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or be one of the floor's processes."""
    asked = parsed(argv)
    if asked.floor_of:
        return floor_process(asked)
    repeats: list[Repeat] = []
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        root = Path(scratch)
        first_clients(asked.data, root / "data")
        for number in range(asked.repeats):
            for workload in asked.workloads:
                repeats.append(repeat(workload, number, root, asked))
                if not asked.json:
                    print(line(repeats[-1]), flush=True)
    report(repeats, asked)
    return 0


def workload_parser(module_doc: str) -> argparse.ArgumentParser:
    """Return a command line of base, data, workloads and repetitions, for a benchmark's module."""
    parser = argparse.ArgumentParser(description=module_doc.splitlines()[0])
    parser.add_argument("--model", type=Path, default=os.environ.get("FEDLLM_MODEL"))
    parser.add_argument("--data", type=Path, default=os.environ.get("FEDLLM_DATA"))
    parser.add_argument("--workloads", default="AB", help="A, B or AB (default)")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    return parser


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = workload_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of a run, 2 or more (default: 3)")
    parser.add_argument("--dropout", type=float, default=0.0, help="default: 0")
    parser.add_argument("--scratch", type=Path, help="where the runs go (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--floor-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--clients", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.floor_of is None and not (asked.model and asked.data):
        parser.error("--model and --data (or FEDLLM_MODEL and FEDLLM_DATA) are needed")
    return asked


def first_clients(source: Path, folder: Path) -> None:
    """Write the training and test rows of the first clients, so that prepare is short."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder.mkdir()
    ids = pc.unique(pq.read_table(source / "train.parquet", columns=["client_id"])["client_id"])
    first = sorted(ids.to_pylist())[:CLIENTS]
    for split in ("train", "test"):
        rows = pq.read_table(source / f"{split}.parquet", filters=[("client_id", "in", set(first))])
        pq.write_table(rows, folder / f"{split}.parquet")


def configuration(workload: str, root: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration of a workload."""
    return {
        "seed": 0,
        "rounds": asked.rounds,
        "model": {"path": str(asked.model.resolve())},
        "data": {"path": str(root / "data"), "cutoff_tokens": CUTOFF},
        "lora": {"target_modules": list(TARGETS), "alpha": ALPHA, "dropout": asked.dropout},
        "clients": {"tiers": {"all": {"ranks": RANK}}, "cohort": {"count": COHORT}},
        "training": {
            "max_steps": STEPS[workload],
            "batch_size": BATCH,
            "learning_rate": RATE,
            "schedule": "constant",
            "threads": 1,
        },
        "evaluation": {
            "every": asked.rounds + 1,
            "clients": 1,
            "rows_per_client": 1,
            "max_new_tokens": 1,
            "complete_at_end": False,
        },
        "scheduler": {"kind": "local", "workers": WORKERS},
        "storage": {"cache": str(root / "cache")},
    }


def repeat(workload: str, number: int, root: Path, asked: argparse.Namespace) -> Repeat:
    """Run a workload, then the floor of its steady rounds."""
    run = root / f"{workload}{number}"
    used = run_workload(workload, run, asked)
    ends = round_ends(run, asked.rounds)
    floor = floor_of(run, range(2, asked.rounds + 1), workload, asked)
    shutil.rmtree(run)
    return Repeat(
        workload=workload,
        floor_seconds=floor.seconds,
        round_seconds=[after - before for before, after in pairwise(ends)],
        peak_pss_mib=used.peak_pss_mib,
    )


def run_workload(workload: str, run: Path, asked: argparse.Namespace) -> Usage:
    """Run a workload in the run directory `run`, beside its configuration and the data."""
    config = run.parent / f"{workload}.yaml"
    content = yaml.safe_dump(configuration(workload, run.parent, asked))
    config.write_text(content, encoding="utf-8")
    return run_fedllm(config, run)


def round_ends(run: Path, rounds: int) -> list[float]:
    """Return when each round's server state was published, in seconds since the epoch."""
    states = [run / "rounds" / f"{n:04d}/aggregate/aggregate.json" for n in range(1, rounds + 1)]
    return [state.stat().st_mtime_ns / 1e9 for state in states]


def run_fedllm(config: Path, run: Path) -> Usage:
    """Run a configuration to its end."""
    entry = "import sys; from fedllm.cli.main import main; main()"
    command = [sys.executable, "-c", entry, "run", str(config), "--run-dir", str(run)]
    log = config.with_suffix(".log")
    used = measured(command, log, os.environ | {"OMP_NUM_THREADS": "1"})
    if used.returncode:
        tail = log.read_text(encoding="utf-8")[-2000:]
        sys.exit(f"fedllm run exited {used.returncode}:\n{tail}")
    return used


def cohorts_of(run: Path, rounds: Sequence[int]) -> list[list[str]]:
    """Return the clients of some rounds."""
    records = [run / "rounds" / f"{n:04d}/cohort.json" for n in rounds]
    return [[client["id"] for client in json.loads(r.read_text())["clients"]] for r in records]


def floor_of(run: Path, rounds: Sequence[int], workload: str, asked: argparse.Namespace) -> Steps:
    """Return the plain loop's steps, a round of `rounds`: seconds over the slots, CPU seconds."""
    cohorts = cohorts_of(run, rounds)
    halves = [
        [[n, c] for n, cohort in zip(rounds, cohorts, strict=True) for c in cohort[w::WORKERS]]
        for w in range(WORKERS)
    ]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                f"--floor-of={run}",
                f"--clients={json.dumps(half)}",
                f"--workloads={workload}",
                f"--dropout={asked.dropout}",
            ],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for half in halves
    ]
    total = Steps()
    for process in processes:
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"the floor's process exited {process.returncode}")
        total += Steps(**json.loads(out))
    seconds, cpu = total.seconds / WORKERS / len(rounds), total.cpu_seconds / len(rounds)
    return Steps(seconds=seconds, cpu_seconds=cpu)


def floor_process(asked: argparse.Namespace) -> int:
    """Train some clients with a plain loop and print the seconds inside its steps."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from fedllm.data.cache import TokenizedClients

    torch.set_num_threads(1)
    prepared = json.loads((asked.floor_of / "prepared.json").read_text())
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(prepared["model_path"], dtype=torch.float32),
        LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=asked.dropout, target_modules=list(TARGETS)
        ),
    )
    model.train()
    data = TokenizedClients.open(Path(prepared["data_path"]))
    work = json.loads(asked.clients)
    total = Steps()
    # the first steps of a process are slower: one client that does not count
    for turn, (number, client) in enumerate([work[0], *work]):
        steps = rows_of(data, number, client, asked.workloads)
        found = plain_steps(model, [plain_batch(rows) for rows in steps])
        total += found if turn else Steps()
    print(json.dumps(asdict(total)))
    return 0


def rows_of(data: "TokenizedClients", number: int, client: str, workload: str) -> list[list["Row"]]:
    """Return the rows of each step of a client in a round, in an order of its own."""
    rows = data.rows(client, "train")
    random.Random(f"{number} {client}").shuffle(rows)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)][: STEPS[workload]]


def plain_batch(rows: Sequence[Any]) -> dict[str, Any]:
    """Pad rows on the right, as most loops do, with loss on the answers."""
    import torch

    texts = [[*row.prompt_ids, *row.answer_ids] for row in rows]
    width = max(map(len, texts))
    labels = [
        [-100] * len(row.prompt_ids) + [*row.answer_ids] + [-100] * (width - len(text))
        for row, text in zip(rows, texts, strict=True)
    ]
    return {
        "input_ids": torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        "attention_mask": torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts]),
        "labels": torch.tensor(labels),
    }


def plain_steps(model: Any, batches: Sequence[dict[str, Any]]) -> Steps:
    """Take a client's steps; return what is inside them: forward, backward, update."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    seconds = cpu_seconds = 0.0
    for batch in batches:
        begun, cpu_begun = time.perf_counter(), time.process_time()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - begun
        cpu_seconds += time.process_time() - cpu_begun
    return Steps(seconds=seconds, cpu_seconds=cpu_seconds)


def line(found: Repeat) -> str:
    """Return one repeat as a line."""
    rounds = " ".join(f"{seconds:.2f}" for seconds in found.round_seconds)
    return (
        f"{found.workload}: floor {found.floor_seconds:.2f} s a round, rounds {rounds} s: "
        f"{found.multiple:.3f}x, {found.overhead_ms:+.0f} ms a client, "
        f"{found.peak_pss_mib:.0f} MiB PSS"
    )


def report(repeats: Sequence[Repeat], asked: argparse.Namespace) -> None:
    """Print the medians."""
    medians = {
        workload: {
            "multiple": statistics.median(r.multiple for r in repeats if r.workload == workload),
            "overhead_ms": statistics.median(
                r.overhead_ms for r in repeats if r.workload == workload
            ),
            "peak_pss_mib": max(r.peak_pss_mib for r in repeats if r.workload == workload),
        }
        for workload in asked.workloads
    }
    if asked.json:
        print(json.dumps({"medians": medians, "repeats": [asdict(r) for r in repeats]}, indent=1))
        return
    for workload, found in medians.items():
        print(
            f"{workload}, median of {asked.repeats}: {found['multiple']:.3f}x the floor, "
            f"{found['overhead_ms']:+.0f} ms a client, peak {found['peak_pss_mib']:.0f} MiB PSS"
        )


if __name__ == "__main__":
    sys.exit(main())
