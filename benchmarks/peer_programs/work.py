"""The work of a peer: the same clients, rows and steps as those of `fedllm run`, in the same order.

`benchmarks/peers.py` writes it into the peer's folder, as token ids: no system tokenises in a
round. The folder is in the environment, because processes that a framework starts read it too. A
peer appends a line to `events.jsonl` when it holds the new global adapter of a round.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "FEDLLM_PEER_FOLDER"


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row of a client."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class ClientWork:
    """What a client does in a round: a step for each group of rows; `rows` is its weight."""

    client: str
    rows: int
    steps: list[list[TokenRow]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of all rounds; `slots` clients train at once, of a population of `clients`."""

    model: str
    slots: int
    clients: int
    rounds: list[list[ClientWork]]


def write_work(work: Work, folder: Path) -> None:
    """Write the work into a peer's folder."""
    (folder / "work.json").write_text(json.dumps(asdict(work)), encoding="utf-8")


def read_work() -> Work:
    """Return the work of this peer."""
    raw = json.loads((peer_folder() / "work.json").read_text(encoding="utf-8"))
    return Work(**raw | {"rounds": [[_client(one) for one in cohort] for cohort in raw["rounds"]]})


def _client(raw: dict[str, Any]) -> ClientWork:
    return ClientWork(**raw | {"steps": [[TokenRow(**row) for row in s] for s in raw["steps"]]})


def peer_folder() -> Path:
    """Return the folder of this peer's run."""
    return Path(os.environ[FOLDER])


def trained(client: ClientWork, steps: int) -> None:
    """Note that a client took its steps."""
    _note({"client": client.client, "steps": steps})


def round_done() -> None:
    """Note that the server holds the new global adapter."""
    _note({"round_end": time.time()})


def _note(event: dict[str, Any]) -> None:
    # one write: lines of several processes do not mix
    with (peer_folder() / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def events_of(folder: Path) -> tuple[list[float], int]:
    """Return when each round ended, and the optimizer steps of all clients together."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    ends = [event["round_end"] for event in events if "round_end" in event]
    return ends, sum(event.get("steps", 0) for event in events)


def num_steps(rounds: Sequence[Sequence[ClientWork]]) -> int:
    """Return the optimizer steps of some rounds."""
    return sum(len(client.steps) for cohort in rounds for client in cohort)
