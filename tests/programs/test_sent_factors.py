"""What does not train is not sent."""

from pathlib import Path

import torch

from fedllm.cli.execution import start
from fedllm.process.server_state import read_state
from fedllm.storage.kept_records import ClientsRecord
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord
from tests.tiny import Tiny

OPTIONS = [
    *("method.name=rolora", "clients.tiers.large.ranks=2", "clients.cohort.count=2"),
    *("training.max_steps=1", "evaluation.every=0", "rounds=2", "training.learning_rate=0.05"),
]


def test_clients_send_the_factor_that_trains_and_the_other_stays(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = RunPaths(root=start(tiny.config, OPTIONS, tmp_path / "run"))
    modules = PreparedRecord.read(run.prepared).modules
    states = []
    for number in (0, 1, 2):
        with read_state(run.round(number)) as file:
            states.append({name: dict(file.module(name)) for name in modules})
    for number, trained, kept in ((1, "B", "A"), (2, "A", "B")):
        paths = run.round(number)
        assert CohortRecord.read(paths.cohort).sent == trained
        sides = {"A": [m.in_features for m in modules.values()]}
        sides["B"] = [m.out_features for m in modules.values()]
        for client in ClientsRecord.read(paths.clients).clients:
            assert client.values_up == 2 * sum(sides[trained])
            assert client.bytes_up < 4 * client.values_down
        for name in modules:
            before, after = states[number - 1][name], states[number][name]
            torch.testing.assert_close(after[kept], before[kept], rtol=1e-6, atol=0)
            assert not torch.equal(after[trained], before[trained])
