"""Two processes train a client, and the second one has little memory.

`short_memory.py ATTEMPT CLIENT OUT`, once for each process: the record is written to OUT.
"""

import resource
import sys
from pathlib import Path

from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths
from fedllm.worker.client_training import ClientRound, Save
from fedllm.worker.process_group import connected
from tests.training.processes import place
from tests.worker.client_program import LongRows, limit_memory


def main(attempt: Path, client: str, out: Path) -> None:
    rank, processes, port = place()
    opened = ClientRound.open(AttemptPaths(root=attempt, number=1), LongRows())
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    identity = TaskIdentity(
        task="9_1",
        node="n",
        log="",
        rank=rank,
        num_processes=processes,
        rendezvous=f"127.0.0.1:{port}",
    )

    def before_step(step: int, _save: Save) -> None:
        # everything is loaded by now
        if rank == 1 and step == 0 and resource.getrlimit(resource.RLIMIT_AS) == unlimited:
            limit_memory(60)

    with connected(identity, wait_minutes=2) as group:
        if rank:
            order = group.receive()
            assert not isinstance(order, int)
            opened.take_part(order, identity=identity, before_step=before_step)
            return
        (trained,) = opened.train(
            [client],
            attempt=1,
            bundle=0,
            identity=identity,
            processes=group,
            before_step=before_step,
        )
    out.write_text(trained.record.model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
