"""The contract of a trainer, which every home passes with as many clients as it takes at once."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fedllm.config.models import TrainingSection
from fedllm.errors import ConfigError
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.planning.engines import engine_of
from fedllm.training.loop import TrainResult, train_client
from fedllm.training.progress import Progress
from fedllm.training.provenance import environment
from fedllm.training.trainer_protocol import Member, Snapshots, Trainer
from fedllm.training.trainers import TRAINERS, require_installed
from tests.tiny import Tiny
from tests.training.test_loop import TARGETS, same
from tests.training.test_together import copied, members_of, settings

# `test_zero.py` has the trainer of several processes
CLIENTS = {"plain": 1, "together": 3}


class Stop(Exception):
    """Enough."""


@pytest.fixture(scope="module")
def slots(tiny: Tiny) -> AdapterSlots:
    base = load_base(tiny.model, dtype="float32", device="cpu")
    return AdapterSlots(base, target_modules=TARGETS, dropout=0.2, layout="parts")


@pytest.fixture(params=sorted(CLIENTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(name: str, slots: AdapterSlots, **changes: object) -> Trainer:
    return TRAINERS[name](slots=slots, settings=settings(**changes))  # type: ignore[arg-type]


def members(name: str, slots: AdapterSlots) -> list[Member]:
    return members_of(slots)[: CLIENTS[name]]


def states_of(
    trainer: Trainer, group: Sequence[Member]
) -> tuple[list[TrainResult], list[list[Progress]]]:
    """The results, and what every member had come to before each step."""
    states: list[list[Progress]] = []

    def note(step: int, snapshots: Snapshots) -> None:
        assert step == len(states)
        states.append([copied(progress) for progress in snapshots()])

    return trainer.train(group, before_step=note), states


@pytest.mark.parametrize("clients", [1, 3])
def test_the_engine_of_a_configuration_is_a_trainer_that_takes_so_many_clients(
    clients: int,
) -> None:
    engine = engine_of(TrainingSection(clients_per_batch=clients))
    assert engine.clients_at_once == CLIENTS[engine.name] == clients
    assert engine.name in TRAINERS


def test_an_engine_of_several_processes_is_one_trainer() -> None:
    engine = engine_of(TrainingSection(engine="zero", processes=2))
    assert (engine.processes, engine.clients_at_once) == (2, 1)
    assert engine.name in TRAINERS
    require_installed(engine)
    missing = r"training\.engine: zero needs no_such_package, .* pip install"
    with pytest.raises(ConfigError, match=missing):
        require_installed(replace(engine, package="no_such_package"))


def test_one_client_has_the_bits_of_the_local_loop(name: str, slots: AdapterSlots) -> None:
    member = members_of(slots)[1]
    (found,) = opened(name, slots).train([member])
    expected = train_client(
        slots, member.received(), member.rows, settings=settings(), draws=member.draws
    )
    assert same(found, expected)


def test_a_result_of_every_member_and_its_progress_before_every_step(
    name: str, slots: AdapterSlots
) -> None:
    group = members(name, slots)
    results, states = states_of(opened(name, slots), group)
    assert len(results) == len(group)
    ends = [result.stats.steps for result in results]
    assert len(states) == max(ends)
    for step, found in enumerate(states):
        assert [progress.step for progress in found] == [min(step, end) for end in ends]
    for result, received in zip(results, (member.received() for member in group), strict=True):
        assert result.adapter.keys() == received.keys()
        assert not result.reason


def test_what_the_hook_raises_ends_the_training_and_any_step_goes_on_to_the_same_bits(
    name: str, slots: AdapterSlots
) -> None:
    trainer, group = opened(name, slots), members(name, slots)
    expected, states = states_of(trainer, group)

    for stop in range(1, len(states)):
        left: list[list[Progress]] = []

        def leave(
            step: int, snapshots: Snapshots, stop: int = stop, left: list[list[Progress]] = left
        ) -> None:
            if step == stop:
                left.append([copied(progress) for progress in snapshots()])
                raise Stop

        with pytest.raises(Stop):
            trainer.train(group, before_step=leave)
        trainer.let_go()
        torch.manual_seed(0)
        (found,) = left
        again = [replace(m, progress=p) for m, p in zip(group, found, strict=True)]
        assert all(map(same, opened(name, slots).train(again), expected))


def test_smaller_micro_batches_have_the_bits_of_a_run_that_asks_for_them(
    name: str, slots: AdapterSlots
) -> None:
    group = members(name, slots)
    whole = opened(name, slots).train(group)
    smaller = opened(name, slots).train(group, micro_batch_size=1)
    assert all(map(same, smaller, opened(name, slots, micro_batch_size=1).train(group)))
    assert not all(map(same, smaller, whole))
    as_asked = opened(name, slots).train(group, micro_batch_size=2)
    assert all(map(same, as_asked, whole))


def test_a_trainer_names_its_processes_and_its_environment(name: str, slots: AdapterSlots) -> None:
    trainer = opened(name, slots)
    assert trainer.num_processes == 1
    assert trainer.environment == environment(settings().training, "cpu")


def test_remedies_name_keys_and_fewer_clients_first(name: str, slots: AdapterSlots) -> None:
    trainer = opened(name, slots)
    assert "smaller_micro_batch" in trainer.remedies(1, 4)[0]
    assert "gradient_checkpointing" in trainer.remedies(1, 1)[0]
    fewer = "clients_per_batch" in trainer.remedies(CLIENTS[name], 4)[0]
    assert fewer is (CLIENTS[name] > 1)
