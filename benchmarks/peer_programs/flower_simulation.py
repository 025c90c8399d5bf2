"""Flower's simulation on Ray, one CPU per client: FedAvg of the factors, or FlexLoRA with --svd."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peer_programs.adapters import adapter_of, flexlora, load_model
from benchmarks.peer_programs.flower_client import app as client_app
from benchmarks.peer_programs.work import Work, read_work, round_done


class GivenCohorts(FedAvg):
    """FedAvg of the cohorts of the work; `svd` takes FlexLoRA's mean instead."""

    def __init__(self, work: Work, svd: bool) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=work.clients)
        self._work, self._svd = work, svd

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Send the adapter to a node for each client of the round."""
        while len(nodes := sorted(grid.get_node_ids())) < self._work.clients:
            time.sleep(0.1)
        for place, _ in enumerate(self._work.rounds[server_round - 1]):
            asked = ConfigRecord({**config, "server-round": server_round, "place": place})
            content = RecordDict({"arrays": arrays, "config": asked})
            yield Message(content, message_type=MessageType.TRAIN, dst_node_id=nodes[place])

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, Any]:
        """Return the new global adapter; stop unless all clients answered."""
        answers = list(replies)
        lost = [answer.error.reason for answer in answers if answer.has_error()]
        if lost or len(answers) != len(self._work.rounds[server_round - 1]):
            raise RuntimeError(f"round {server_round}: {len(answers)} answers, lost {lost[:1]}")
        arrays, metrics = super().aggregate_train(server_round, answers)
        if self._svd:
            arrays = self._flexlora(answers)
        round_done()
        return arrays, metrics

    def _flexlora(self, answers: list[Message]) -> ArrayRecord:
        rows = [answer.content["metrics"]["num-examples"] for answer in answers]
        return ArrayRecord(
            flexlora(
                (count / sum(rows), answer.content["arrays"].to_torch_state_dict())
                for count, answer in zip(rows, answers, strict=True)
            )
        )


def serve(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
    """Run all rounds."""
    work = read_work()
    strategy = GivenCohorts(work, "--svd" in sys.argv)
    first = ArrayRecord(adapter_of(load_model(work.model)))
    strategy.start(grid=grid, initial_arrays=first, num_rounds=len(work.rounds))


def main() -> None:
    """Simulate the work."""
    work = read_work()
    server_app = ServerApp()
    server_app.main()(serve)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=work.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": work.slots},
        },
    )


if __name__ == "__main__":
    main()
