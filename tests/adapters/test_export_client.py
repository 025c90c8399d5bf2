"""The adapter of one client, as it trained it: what the server averaged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedllm.adapters.peft_files import read_peft_adapter
from fedllm.cli.main import run as fedllm
from fedllm.errors import AdapterError
from fedllm.lora.factors import delta
from fedllm.server.client_export import export_client
from fedllm.server.export import export_adapter, open_state
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CollectionRecord


def change(folder: Path) -> Tensor:
    """Return the change of the first module, an MLP's, that an adapter folder holds."""
    factors = read_peft_adapter(folder).factors
    return delta(factors[min(factors)]).double()


def test_the_state_is_the_best_approximation_of_the_mean_of_the_clients_adapters(
    finished: Path, tmp_path: Path
) -> None:
    run = RunPaths(root=finished)
    updates = CollectionRecord.read(run.round(2).collection).updates
    mean = torch.zeros(())
    for place, update in enumerate(updates):
        exported = export_client(run, 2, update.client, tmp_path / str(place))
        assert exported.round == 2
        mean = mean + update.weight * change(tmp_path / str(place))
    mean = mean / sum(update.weight for update in updates)
    export_adapter(open_state(run, 2), tmp_path / "state")
    u_OR, s_R, vh_RI = torch.linalg.svd(mean)
    best = u_OR[:, :8] * s_R[:8] @ vh_RI[:8]
    torch.testing.assert_close(change(tmp_path / "state"), best, rtol=1e-4, atol=1e-7)


def test_a_client_without_an_update_is_named(finished: Path, tmp_path: Path) -> None:
    run = RunPaths(root=finished)
    with pytest.raises(AdapterError, match="nobody has no update in round 2; its clients: "):
        export_client(run, None, "nobody", tmp_path / "out")
    client = CollectionRecord.read(run.round(1).collection).updates[0].client
    with pytest.raises(AdapterError, match="updates of round 1 were removed"):
        export_client(run, 1, client, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    words = ["export", str(finished), "--client", client, "--merge", "--out", str(tmp_path / "o")]
    assert fedllm(words) == 2
