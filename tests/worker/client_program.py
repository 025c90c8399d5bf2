"""A program that trains a client of a round; it can be killed, or run out of memory.

`client_program.py ATTEMPT CLIENT OUT`: the record and the factors are pickled to OUT.
"""

import argparse
import os
import pickle
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from fedllm.errors import FedllmError
from fedllm.process.log import say
from fedllm.process.session import Session
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths
from fedllm.worker.client_training import ClientRound, Save, Trained


@dataclass(frozen=True)
class Row:
    """A row of tokens."""

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: Sequence[int] = ()


class LongRows(Session):
    """A session of eight rows whose activations need more memory than all the rest."""

    def data(self, path: str) -> SimpleNamespace:  # type: ignore[override]
        """Return the same rows for every client."""
        del path
        draws = torch.Generator().manual_seed(0)
        texts = torch.randint(2, 250, (8, 3000), generator=draws).tolist()
        rows = [Row(ids[: 100 + n], ids[100 + n :]) for n, ids in enumerate(texts)]
        return SimpleNamespace(rows=lambda _client, _split: rows)


def main() -> int:
    """Train the client that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("attempt", type=Path)
    parser.add_argument("client")
    parser.add_argument("out", type=Path)
    parser.add_argument("--die-at", type=int, help="save before this step, then be killed")
    parser.add_argument("--long-rows", action="store_true")
    parser.add_argument("--more-mib", type=int, help="memory to be had beside the loaded base")
    arguments = parser.parse_args()
    attempt = AttemptPaths(root=arguments.attempt, number=1)
    opened = ClientRound.open(attempt, LongRows() if arguments.long_rows else Session())
    opened.received(arguments.client)
    assert opened.trainer_of(arguments.client).num_processes == 1
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    if arguments.more_mib is not None:
        limit_memory(arguments.more_mib)
    try:
        (trained,) = opened.train(
            [arguments.client],
            attempt=1,
            bundle=0,
            identity=TaskIdentity(task="9_1", node="n", log=""),
            before_step=lambda step, save: die(save) if step == arguments.die_at else None,
        )
    except FedllmError as error:
        say(f"{type(error).__name__}: {error}")
        return error.exit_code
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    arguments.out.write_bytes(pickle.dumps(as_plain(trained)))
    return 0


def die(save: Save) -> None:
    """Save, then be killed as by `kill -9`."""
    save()
    os.kill(os.getpid(), signal.SIGKILL)


def limit_memory(more_mib: int) -> None:
    """Limit the memory of this process to what it has and `more_mib` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (more_mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def as_plain(trained: Trained) -> tuple[dict[str, object], dict[str, list[object]]]:
    """Return a record and its factors as what compares with `==`."""
    factors = {
        module: [f.a_RI.tolist(), f.b_OR.tolist(), f.scale] for module, f in trained.adapter.items()
    }
    return trained.record.model_dump(), factors


if __name__ == "__main__":
    raise SystemExit(main())
