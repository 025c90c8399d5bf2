"""A run whose clients train only a core between the factors."""

from pathlib import Path

import pytest
import torch

from fedllm.cli.execution import start
from fedllm.config.loading import load_config
from fedllm.errors import ConfigError
from fedllm.programs.prepare import prepare
from fedllm.server.export import open_state
from fedllm.storage.paths import CachePaths, RunPaths
from tests.tiny import Tiny

OPTIONS = ["method.name=tests.programs.core_only:CoreOnly", "clients.tiers.large.ranks=2"]


def test_the_state_moves_within_the_columns_of_b(tiny: Tiny, tmp_path: Path) -> None:
    few = ["rounds=1", "training.max_steps=2", "training.learning_rate=0.05", "evaluation.every=9"]
    run = RunPaths(root=start(tiny.config, [*OPTIONS, *few], tmp_path / "run"))
    before, after = open_state(run, 0), open_state(run, 1)
    for module in before.ranks:
        begun, ended = before.file.module(module), after.file.module(module)
        assert torch.equal(begun["A"], ended["A"])
        assert not torch.equal(begun["B"], ended["B"])
        core = torch.linalg.lstsq(begun["B"].double(), ended["B"].double()).solution
        got = begun["B"].double() @ core
        torch.testing.assert_close(got, ended["B"].double(), atol=1e-5, rtol=0)


def test_several_processes_cannot_train_a_core(tiny: Tiny) -> None:
    pytest.importorskip("deepspeed")
    config = load_config(tiny.config, [*OPTIONS, "training.engine=zero"])
    with pytest.raises(ConfigError, match=r"^training.engine: zero cannot train a core"):
        prepare(config, CachePaths(root=tiny.cache))
