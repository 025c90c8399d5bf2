"""Time rounds of other frameworks on the work of `benchmarks/rounds.py`, in turn with fedllm's.

    python benchmarks/peers.py --model BASE --data NATURAL_INSTRUCTIONS --out peers.json

Measures Flower's simulation (base loaded for every call, or kept; mean of factors, or FlexLoRA by a
full SVD), pfl-research (mean of factors) and the published FlexLoRA procedure. Each is installed
from the package index, with pinned versions, into an environment of its own below --environments.
All train the clients, rows and steps of the same cohorts, given as token ids, with AdamW and
gradients clipped at 1, on 2 slots of one thread (the published procedure: a process of 2 threads).

In a repetition every system and the floor run once; every second repetition has the opposite
order. A round counts from one new global adapter to the next, the first round of a run left out; of
a run its median round counts. CPU seconds are those of all processes of a system between the same
moments, a round. The floor is the steps of a plain padded loop (`benchmarks/rounds.py`).

A peer that cannot be installed or fails is named, and the exit status is 1. --only-ours is the one
way to leave all peers out.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import rounds
from benchmarks.measured.environments import ENVIRONMENTS, NotMeasured, environment
from benchmarks.measured.processes import Usage, measured
from benchmarks.peer_programs.work import (
    FOLDER,
    ClientWork,
    TokenRow,
    Work,
    events_of,
    num_steps,
    write_work,
)
from benchmarks.rounds import CLIENTS, COHORT, WORKERS

if TYPE_CHECKING:
    from fedllm.data.cache import TokenizedClients

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = "benchmarks.peer_programs"
OURS, FLOOR = "fedllm, FlexLoRA", "floor: bare steps of the plain loop"
ROUNDS = {"A": 3, "B": 6}
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # its default, 15, would give way to all else that runs on the machine
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a peer is started: what its environment's Python runs, with how many threads."""

    title: str
    environment: str
    words: tuple[str, ...]
    threads: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)


_FLOWER = ("-m", f"{PROGRAMS}.flower_simulation")
_KEEP = {"FEDLLM_PEER_KEEP": "1"}
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORKERS}")
PEERS = {
    "pfl": Peer(
        title="pfl-research, factor mean",
        environment="pfl",
        words=(*_TORCHRUN, "-m", f"{PROGRAMS}.pfl_simulation"),
    ),
    "flower-kept": Peer(
        title="Flower, base kept, factor mean",
        environment="flower",
        words=_FLOWER,
        settings=_KEEP,
    ),
    "flower-kept-svd": Peer(
        title="Flower, base kept, FlexLoRA",
        environment="flower",
        words=(*_FLOWER, "--svd"),
        settings=_KEEP,
    ),
    "flower": Peer(
        title="Flower, base loaded for every call, factor mean",
        environment="flower",
        words=_FLOWER,
    ),
    "published": Peer(
        title="FlexLoRA as published, one process",
        environment="published",
        words=("-m", f"{PROGRAMS}.published_flexlora"),
        threads=WORKERS,
        # a thread that waits for another gives up its core, which others on the machine may have
        settings={"OMP_WAIT_POLICY": "PASSIVE"},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run of a system: its steady rounds, CPU seconds of such a round, and what ran beside it.

    `first_seconds` is from the start of the command to the end of its first round; the floor has
    none. `load` is the load average of the last minute when the run ended.
    """

    workload: str
    system: str
    repetition: int
    round_seconds: list[float]
    cpu_seconds: float
    first_seconds: float | None = None
    peak_pss_mib: float | None = None
    load: float

    @property
    def seconds(self) -> float:
        """The median of the steady rounds."""
        return statistics.median(self.round_seconds)


@dataclass(kw_only=True)
class Bench:
    """What is measured, all turns so far, and why a peer has none."""

    asked: argparse.Namespace
    root: Path
    pythons: dict[str, Path] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the environments; run ours once, which tokenises and draws: it does not count."""
        for name in dict.fromkeys(PEERS[peer].environment for peer in self.asked.peers):
            print(f"environment {name}: {' '.join(ENVIRONMENTS[name])}", flush=True)
            try:
                self.pythons[name] = environment(name, self.asked.environments.resolve())
            except NotMeasured as problem:
                self._note({p: str(problem) for p, x in PEERS.items() if x.environment == name})
        rounds.first_clients(self.asked.data, self.root / "data")
        for workload in self.asked.workloads:
            rounds.run_workload(workload, self._reference(workload), self._options(workload))
            self.work[workload] = self._given(workload)

    def repetition(self, workload: str, number: int) -> None:
        """Run every system and the floor once; every second time in the opposite order."""
        systems = [OURS, FLOOR, *(name for name in self.asked.peers if name not in self.failures)]
        for name in systems[:: -1 if number % 2 else 1]:
            try:
                turn = self._turn(name, workload, number)
            except NotMeasured as problem:
                self._note({name: str(problem)})
                continue
            self.turns.append(turn)
            print(line(turn), flush=True)

    def _turn(self, name: str, workload: str, number: int) -> Turn:
        load = os.getloadavg()[0]
        if name == FLOOR:
            run, options = self._reference(workload), self._options(workload)
            steps = rounds.floor_of(run, range(2, options.rounds + 1), workload, options)
            return Turn(
                workload=workload,
                system=name,
                repetition=number,
                round_seconds=[steps.seconds],
                cpu_seconds=steps.cpu_seconds,
                load=load,
            )
        folder = self.root / f"{workload}{number}-{name}"
        ends, used = (
            self._ours(folder, workload) if name == OURS else self._peer(name, folder, workload)
        )
        return Turn(
            workload=workload,
            system=name,
            repetition=number,
            round_seconds=[after - before for before, after in pairwise(ends)],
            cpu_seconds=used.cpu_between(ends[0], ends[-1]) / (len(ends) - 1),
            first_seconds=ends[0] - used.cpu[0][0],
            peak_pss_mib=used.peak_pss_mib,
            load=load,
        )

    def _ours(self, folder: Path, workload: str) -> tuple[list[float], Usage]:
        options = self._options(workload)
        used = rounds.run_workload(workload, folder, options)
        return rounds.round_ends(folder, options.rounds), used

    def _peer(self, name: str, folder: Path, workload: str) -> tuple[list[float], Usage]:
        peer, work, log = PEERS[name], self.work[workload], folder / "log"
        folder.mkdir()
        write_work(work, folder)
        settings = {
            **os.environ,
            **_QUIET,
            **peer.settings,
            FOLDER: str(folder),
            "OMP_NUM_THREADS": str(peer.threads),
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.root),
        }
        command = [str(self.pythons[peer.environment]), *peer.words]
        used = measured(command, log, settings)
        ends, steps = events_of(folder)
        wanted = (0, len(work.rounds), num_steps(work.rounds))
        if (used.returncode, len(ends), steps) != wanted:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["-"]
            raise NotMeasured(
                f"exited {used.returncode} after {len(ends)} of {wanted[1]} rounds and {steps} of "
                f"{wanted[2]} steps: {said[-1][-200:]}"
            )
        return ends, used

    def _given(self, workload: str) -> Work:
        """Return the rows of the cohorts that ours drew."""
        from fedllm.data.cache import TokenizedClients

        run = self._reference(workload)
        prepared = json.loads((run / "prepared.json").read_text(encoding="utf-8"))
        data = TokenizedClients.open(Path(prepared["data_path"]))
        numbers = range(1, self._options(workload).rounds + 1)
        return Work(
            model=prepared["model_path"],
            slots=WORKERS,
            clients=CLIENTS,
            rounds=[
                [client_work(data, number, client, workload) for client in cohort]
                for number, cohort in zip(numbers, rounds.cohorts_of(run, numbers), strict=True)
            ],
        )

    def _reference(self, workload: str) -> Path:
        return self.root / f"{workload}-reference"

    def _options(self, workload: str) -> argparse.Namespace:
        return argparse.Namespace(**vars(self.asked) | {"rounds": self.asked.rounds[workload]})

    def _note(self, problems: Mapping[str, str]) -> None:
        for name in self.asked.peers:
            if name in problems:
                self.failures[name] = problems[name]
                print(f"{PEERS[name].title}: not measured: {problems[name]}", flush=True)


def client_work(data: "TokenizedClients", number: int, client: str, workload: str) -> ClientWork:
    """Return the rows of a client's steps in a round."""
    return ClientWork(
        client=client,
        rows=len(data.rows(client, "train")),
        steps=[
            [TokenRow(prompt_ids=[*row.prompt_ids], answer_ids=[*row.answer_ids]) for row in step]
            for step in rounds.rows_of(data, number, client, workload)
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a peer was not measured."""
    asked = parsed(argv)
    if asked.scratch:
        asked.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.scratch, prefix="peers") as scratch:
        bench = Bench(asked=asked, root=Path(scratch))
        bench.prepare()
        for number in range(asked.repeats):
            for workload in asked.workloads:
                bench.repetition(workload, number)
                # what is stopped keeps what it measured
                if asked.out:
                    asked.out.write_text(
                        json.dumps(found(bench), indent=1) + "\n", encoding="utf-8"
                    )
    for workload in asked.workloads:
        print("\n".join(["", *table(bench.turns, workload)]))
    for name, why in bench.failures.items():
        print(f"{PEERS[name].title}: not measured: {why}")
    return 1 if bench.failures else 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = rounds.workload_parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, help=f"of a run, 2 or more (default: {ROUNDS['A']}; B: {ROUNDS['B']})"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--only-ours", action="store_true", help="fedllm and the floor, no peer")
    parser.add_argument("--environments", type=Path, default=Path("build/peers"))
    parser.add_argument("--scratch", type=Path, help="where the runs go (a short path, for Ray)")
    parser.add_argument("--out", type=Path, help="write all turns as JSON")
    asked = parser.parse_args(argv)
    if not (asked.model and asked.data):
        parser.error("--model and --data (or FEDLLM_MODEL and FEDLLM_DATA) are needed")
    asked.rounds = {workload: asked.rounds or most for workload, most in ROUNDS.items()}
    asked.peers = [] if asked.only_ours else asked.peers
    asked.dropout = 0.0
    return asked


def line(turn: Turn) -> str:
    """Return a turn as a line."""
    seconds = " ".join(f"{one:.2f}" for one in turn.round_seconds)
    return (
        f"{turn.workload}{turn.repetition} {title(turn.system)}: rounds {seconds} s, "
        f"CPU {turn.cpu_seconds:.2f} s a round, load before {turn.load:.1f}"
    )


def title(system: str) -> str:
    """Return a system's name in the table."""
    return PEERS[system].title if system in PEERS else system


def table(turns: Sequence[Turn], workload: str) -> list[str]:
    """Return the lines of a workload's table: medians, ranges in brackets.

    They are of all steady rounds in the first column, else of repetitions.
    """
    here = [turn for turn in turns if turn.workload == workload]
    floors = {turn.repetition: turn for turn in here if turn.system == FLOOR}
    rows = [
        f"| {workload} | round, s | times the floor | CPU of a round, s | times the floor's CPU "
        "| to the end of the first round, s | peak PSS, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in dict.fromkeys(turn.system for turn in here):
        of = [turn for turn in here if turn.system == system]
        pairs = [(turn, floors[turn.repetition]) for turn in of if turn.repetition in floors]
        cells = [
            spread([seconds for turn in of for seconds in turn.round_seconds]),
            spread([turn.seconds / floor.seconds for turn, floor in pairs]),
            spread([turn.cpu_seconds for turn in of]),
            spread([turn.cpu_seconds / floor.cpu_seconds for turn, floor in pairs]),
            spread([turn.first_seconds for turn in of if turn.first_seconds is not None], 1),
            spread([turn.peak_pss_mib for turn in of if turn.peak_pss_mib is not None], 0),
        ]
        rows.append(f"| {title(system)} | {' | '.join(cells)} |")
    return rows


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, and the range of several values."""
    if not values:
        return ""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def found(bench: Bench) -> dict[str, object]:
    """Return all turns and what they were measured with."""
    ours = ("torch", "transformers", "peft", "fedllm")
    return {
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "versions": {"fedllm": {name: version(name) for name in ours}} | ENVIRONMENTS,
        "workloads": {w: {"rounds": bench.asked.rounds[w]} for w in bench.asked.workloads},
        "cohort": COHORT,
        "not_measured": bench.failures,
        "turns": [asdict(turn) for turn in bench.turns],
    }


if __name__ == "__main__":
    sys.exit(main())
