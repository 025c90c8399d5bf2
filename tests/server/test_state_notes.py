"""The JSON part of the server state, and parts of other number formats, through the aggregation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedllm.aggregation.route_types import Partial
from fedllm.errors import ConfigError
from fedllm.lora.factors import ModuleShape
from fedllm.methods.protocol import (
    ModuleAggregate,
    ModuleState,
    ServerStep,
    StateNotes,
    StatePart,
    UsedClients,
)
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.process.server_state import notes_of, read_state
from fedllm.server.aggregate import aggregate_round
from tests.server.collection import collect, make_round

COUNTS = StatePart(shape=(2,), dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class Counting(FlexLora):
    """FlexLoRA that counts its rounds, in JSON and in a tensor, and notes its clients."""

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, StatePart]:
        return {**super().parts(shape, rank), "counts": COUNTS}

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        state = super().start_module(module=module, shape=shape, rank=rank)
        return {**state, "counts": torch.zeros(COUNTS.shape, dtype=COUNTS.dtype)}

    def start_notes(self) -> StateNotes:
        return {"rounds": 0}

    def next_notes(self, before: StateNotes, used: UsedClients) -> StateNotes:
        weights = dict(zip(used.clients, used.weights, strict=True))
        return {"rounds": before["rounds"] + 1, "weights": weights}

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        counts = torch.tensor([step.round, step.notes["rounds"]])
        return [
            replace(result, state={**result.state, "counts": before["counts"] + counts})
            for result, before in zip(super().finish(partials, step), step.before, strict=True)
        ]


def test_a_method_carries_json_and_integers_between_rounds(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run", method=f"{__name__}:Counting")
    with read_state(paths.run.round(0)) as start:
        assert notes_of(start) == {"rounds": 0}
    first = aggregate_round(paths)
    with read_state(paths) as state:
        notes = notes_of(state)
        assert state.get("a.q.counts").tolist() == [1, 1]
    assert notes["rounds"] == 1
    assert sorted(notes["weights"]) == [f"client/{n}" for n in range(7)]
    assert aggregate_round(paths).sha256 == first.sha256
    collect(paths, without=[2])
    aggregate_round(paths)
    with read_state(paths) as state:
        assert "client/2" not in notes_of(state)["weights"]


def test_a_method_without_notes_leaves_none_in_its_file(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run")
    aggregate_round(paths)
    with read_state(paths) as state:
        assert state.metadata == {"method": "flexlora"}
        assert notes_of(state) == {}


def test_a_change_of_the_base_that_the_class_does_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a base_delta, but its class does not say so"):
        make_round(tmp_path / "run", method="tests.adapters.shifting:Shifting")
