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
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

WORKERS = 2
CLIENTS = 32
COHORT = 16
STEPS = {"A": 10, "B": 1}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, BATCH, CUTOFF, RATE = 8, 16, 4, 128, 1e-3


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


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=os.environ.get("FEDLLM_MODEL"))
    parser.add_argument("--data", type=Path, default=os.environ.get("FEDLLM_DATA"))
    parser.add_argument("--workloads", default="AB", help="A, B or AB (default)")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
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
    config = root / f"{workload}.yaml"
    config.write_text(yaml.safe_dump(configuration(workload, root, asked)), encoding="utf-8")
    peak = run_fedllm(config, run)
    states = [run / "rounds" / f"{n:04d}/aggregate/aggregate.json" for n in range(asked.rounds + 1)]
    ends = [state.stat().st_mtime_ns / 1e9 for state in states]
    seconds = [after - before for before, after in pairwise(ends[1:])]
    floor = floor_seconds(run, range(2, asked.rounds + 1), workload, asked)
    shutil.rmtree(run)
    return Repeat(
        workload=workload, floor_seconds=floor, round_seconds=seconds, peak_pss_mib=peak / 2**20
    )


def run_fedllm(config: Path, run: Path) -> int:
    """Run a configuration to its end; return the peak of the PSS of all its processes, bytes."""
    command = [sys.executable, "-m", "fedllm.cli.main", "run", str(config), "--run-dir", str(run)]
    entry = "import sys; from fedllm.cli.main import main; main()"
    command[1:3] = ["-c", entry]
    log = config.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        peak = Peak(process.pid)
        code = process.wait()
    if code:
        sys.exit(f"fedllm run exited {code}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return peak.stop()


class Peak(threading.Thread):
    """Samples the proportional set size of a process and all that it started."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._peak, self._over = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._over.wait(0.5):
            self._peak = max(self._peak, sum(map(pss, family(self._pid))))

    def stop(self) -> int:
        """Return the largest sum."""
        self._over.set()
        self.join()
        return self._peak


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes, 0 where it ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in text.splitlines() if x.startswith("Pss:")), 0)


def floor_seconds(
    run: Path, rounds: Sequence[int], workload: str, asked: argparse.Namespace
) -> float:
    """Return the mean over `rounds` of the plain loop's step seconds over the slots."""
    cohorts = [
        [
            client["id"]
            for client in json.loads((run / "rounds" / f"{n:04d}/cohort.json").read_text())[
                "clients"
            ]
        ]
        for n in rounds
    ]
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
    total = 0.0
    for process in processes:
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"the floor's process exited {process.returncode}")
        total += json.loads(out)["seconds"]
    return total / WORKERS / len(rounds)


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
    total = 0.0
    # the first steps of a process are slower: one client that does not count
    for turn, (number, client) in enumerate([work[0], *work]):
        rows = data.rows(client, "train")
        random.Random(f"{number} {client}").shuffle(rows)
        batches = [
            plain_batch(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)
        ][: STEPS[asked.workloads]]
        seconds = plain_steps(model, batches)
        total += seconds if turn else 0.0
    print(json.dumps({"seconds": total}))
    return 0


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


def plain_steps(model: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Return the seconds inside the optimizer steps."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    seconds = 0.0
    for batch in batches:
        begun = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - begun
    return seconds


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
