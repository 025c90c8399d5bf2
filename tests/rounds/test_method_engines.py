"""What a method makes of a round does not depend on the engine that trains its clients."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from fedllm.cli.execution import start
from fedllm.methods.catalog import METHODS
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord
from tests.tiny import Tiny
from tests.worker.attempts import updates

# SGD: at its usual eps AdamW makes of rounding what it makes of gradients
SHORT = [
    *("rounds=1", "training.max_steps=2", "clients.cohort.count=2", "evaluation.every=0"),
    *("method.local=fedavg", "training.learning_rate=0.1", "clients.tiers.large.ranks=2"),
]
ENGINES = {
    "plain": [],
    "together": ["training.clients_per_batch=2"],
    "zero": ["training.engine=zero", "training.zero.stage=2"],
}


def sent(tiny: Tiny, folder: Path, method: str, engine: str) -> Mapping[str, Mapping[str, Tensor]]:
    """What every client of a round sent: its tensors by name."""
    options = [*SHORT, *ENGINES[engine], f"method.name={method}"]
    run = RunPaths(root=start(tiny.config, options, folder / engine))
    assert AggregateRecord.find(run.round(1).aggregate_record)
    return {client: tensors for client, (_, tensors) in updates(run.round(1)).items()}


# DeepSpeed warns of itself when it is imported
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_alike_on_every_engine(tiny: Tiny, tmp_path: Path, method: str) -> None:
    plain = sent(tiny, tmp_path, method, "plain")
    assert len(plain) == 2
    for engine in ("together", "zero"):
        found = sent(tiny, tmp_path, method, engine)
        assert found.keys() == plain.keys()
        for client, tensors in plain.items():
            # clients of a method without a federation send zeros
            learns = METHODS[method].client_state != "all"
            assert any(tensor.any() for tensor in tensors.values()) == learns
            assert found[client].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert (found[client][name] - tensor).abs().max() <= 1e-4 * tensor.abs().max()
