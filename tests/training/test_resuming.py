"""A training that was interrupted, anywhere and however often, ends in the same bits."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.config.models import TrainingSection
from fedllm.methods.local_rules import LocalRule
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.storage.checkpoint_header import CheckpointIdentity, CheckpointRecord
from fedllm.storage.tensors import Checkpoint, publish_checkpoint, read_checkpoint
from fedllm.training.loop import LocalSettings, Snapshot, TrainResult, train_client
from fedllm.training.progress import Progress
from fedllm.training.step_plan import Draws
from tests.tiny import Tiny
from tests.training.test_loop import TARGETS, rows_of, start

SGD, MOMENTUM, ADAMW = (
    LocalRule(optimizer="sgd"),
    LocalRule(optimizer="sgd", momentum=0.9),
    LocalRule(optimizer="adamw"),
)
IDENTITY = CheckpointIdentity(
    run_id="run",
    result_fingerprint="f",
    round=3,
    client="a/b é",
    base_fingerprint="base",
    data_fingerprint="data",
    state_sha256="state",
)
STEPS = 8


class Interrupted(Exception):
    """The training ended before its end, and left its progress."""


@pytest.fixture(scope="module", params=["parts", "padded"])
def processes(tiny: Tiny, request: pytest.FixtureRequest) -> list[AdapterSlots]:
    """Base models that have nothing in common, as those of several processes."""
    bases = [load_base(tiny.model, dtype="float32", device="cpu") for _ in range(2)]
    options = {"target_modules": TARGETS, "dropout": 0.2, "layout": request.param}
    return [AdapterSlots(base, **options) for base in bases]


def train(
    slots: AdapterSlots,
    rule: LocalRule,
    training: TrainingSection,
    *,
    progress: Progress | None = None,
    before_step: Callable[[int, Snapshot], None] = lambda _step, _snapshot: None,
) -> TrainResult:
    return train_client(
        slots,
        start(slots),
        rows_of(1, 10),
        settings=LocalSettings(training=training, rule=rule),
        draws=Draws(seed=5, round=3, client="a/b é"),
        progress=progress,
        before_step=before_step,
    )


def section(**changes: object) -> TrainingSection:
    # the second epoch ends with what is left of a batch, and so does a micro-batch
    keys = {"batch_size": 3, "epochs": 2, "micro_batch_size": 2, "learning_rate": 0.01, **changes}
    return TrainingSection.model_validate(keys)


def through_a_file(progress: Progress, path: Path) -> Progress:
    record = CheckpointRecord(
        identity=IDENTITY,
        micro_batch_size=2,
        resumed_at=[],
        environments=[],
        **dict(progress.stats),
    )
    publish_checkpoint(path, Checkpoint(record=record, tensors=progress.tensors))
    read = read_checkpoint(path)
    assert read.record == record
    return replace(progress, tensors=read.tensors)


def interrupted(
    processes: Iterable[AdapterSlots],
    rule: LocalRule,
    training: TrainingSection,
    stops: Iterable[int],
    path: Path,
) -> TrainResult:
    """Train in turn in each of `processes`, with an interruption before each step of `stops`."""
    progress = None
    turns = itertools.cycle(processes)
    for stop in sorted(stops):

        def leave(step: int, snapshot: Snapshot, stop: int = stop) -> None:
            if step == stop:
                raise Interrupted(through_a_file(snapshot(), path))

        with pytest.raises(Interrupted) as left:
            train(next(turns), rule, training, progress=progress, before_step=leave)
        (progress,) = left.value.args
        # nothing that lies in memory belongs to the training
        torch.manual_seed(0)
        train(next(turns), rule, training, before_step=lambda _step, _snapshot: None)
    return train(next(turns), rule, training, progress=progress)


def assert_same(found: TrainResult, expected: TrainResult) -> None:
    assert found.stats.losses == expected.stats.losses
    assert found.norms == expected.norms
    assert found.scales == expected.scales
    for key in ("rows", "steps", "tokens", "loss_tokens"):
        assert getattr(found.stats, key) == getattr(expected.stats, key)
    assert found.reason == expected.reason
    assert found.stats.gradient_norms == expected.stats.gradient_norms
    assert found.adapter.keys() == expected.adapter.keys()
    for module, factors in expected.adapter.items():
        assert torch.equal(found.adapter[module].a_RI, factors.a_RI)
        assert torch.equal(found.adapter[module].b_OR, factors.b_OR)


@pytest.mark.parametrize("stop", range(STEPS))
@pytest.mark.parametrize("rule", [SGD, MOMENTUM, ADAMW], ids=["sgd", "momentum", "adamw"])
def test_a_training_goes_on_from_every_step_to_the_same_bits(
    processes: list[AdapterSlots], rule: LocalRule, stop: int, tmp_path: Path
) -> None:
    training = section(weight_decay=0.1)
    expected = train(processes[0], rule, training)
    assert expected.stats.steps == STEPS
    found = interrupted(processes, rule, training, [stop], tmp_path / "c.safetensors")
    assert_same(found, expected)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.sets(st.integers(0, STEPS - 1), max_size=4),
    rule=st.sampled_from([SGD, MOMENTUM, ADAMW]),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    changes=st.fixed_dictionaries(
        {
            "warmup_steps": st.sampled_from([0, 3]),
            "micro_batch_size": st.sampled_from([None, 1, 2]),
            "micro_batch_tokens": st.sampled_from([None, 30, 60]),
            "precision": st.sampled_from(["float32", "bfloat16"]),
            "clip_norm": st.sampled_from([None, 0.5]),
        }
    ),
)
def test_however_often_and_however_it_is_trained(
    processes: list[AdapterSlots],
    tmp_path: Path,
    stops: set[int],
    rule: LocalRule,
    schedule: str,
    changes: dict[str, object],
) -> None:
    training = section(schedule=schedule, **changes)
    expected = train(processes[0], rule, training)
    found = interrupted(processes, rule, training, stops, tmp_path / "c.safetensors")
    assert_same(found, expected)


def test_a_forgotten_optimizer_would_show(processes: list[AdapterSlots], tmp_path: Path) -> None:
    """The law above can fail: without AdamW's moments the factors are others."""

    def forget(step: int, snapshot: Snapshot) -> None:
        if step == 4:
            raise Interrupted(snapshot())

    with pytest.raises(Interrupted) as left:
        train(processes[0], ADAMW, section(), before_step=forget)
    (progress,) = left.value.args
    assert {name.rpartition("|")[2] for name in progress.tensors} == {
        *("A", "B", "step", "exp_avg", "exp_avg_sq")
    }
    kept = {name: tensor for name, tensor in progress.tensors.items() if name[-2:] in {"|A", "|B"}}
    bare = through_a_file(replace(progress, tensors=kept), tmp_path / "c.safetensors")
    found = train(processes[0], ADAMW, section(), progress=bare)
    assert found.stats.losses[:5] == train(processes[0], ADAMW, section()).stats.losses[:5]
    with pytest.raises(AssertionError):
        assert_same(found, train(processes[0], ADAMW, section()))


def test_time_and_memory_spent_before_count(processes: list[AdapterSlots], tmp_path: Path) -> None:
    def stop(step: int, snapshot: Snapshot) -> None:
        if step == 4:
            raise Interrupted(through_a_file(snapshot(), tmp_path / "c.safetensors"))

    with pytest.raises(Interrupted) as left:
        train(processes[0], ADAMW, section(), before_step=stop)
    (progress,) = left.value.args
    assert 0 < progress.stats.step_seconds < progress.stats.seconds < 60
    earlier = {"seconds": 1000.0, "step_seconds": 900.0, "peak_memory_bytes": 1 << 60}
    before = replace(progress, stats=progress.stats.model_copy(update=earlier))
    found = train(processes[0], ADAMW, section(), progress=before)
    assert 1000 < found.stats.seconds < 1060
    assert 900 < found.stats.step_seconds < 960
    assert found.stats.peak_memory_bytes == 1 << 60
