"""Steps, seeds and rates follow from the client's identity."""

import pytest

from fedllm.config.models import TrainingSection
from fedllm.training.step_plan import Draws, plan_steps, rate_factor, training_at

DRAWS = Draws(seed=0, round=1, client="a/b é")


def training(**changes: object) -> TrainingSection:
    return TrainingSection.model_validate({"batch_size": 4, **changes})


def test_an_epoch_visits_every_row_once_in_its_own_order() -> None:
    steps = plan_steps(10, training(epochs=2), DRAWS)
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = ([row for step in half for row in step] for half in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_max_steps_ends_the_training_earlier() -> None:
    whole = plan_steps(10, training(epochs=3), DRAWS)
    assert plan_steps(10, training(epochs=3, max_steps=4), DRAWS) == whole[:4]
    assert plan_steps(10, training(max_steps=99), DRAWS) == whole[:3]


def test_the_rate_is_cut_from_its_rounds_on() -> None:
    section = training(learning_rate=0.8, cut_rounds=[3, 5], cut_factor=0.5)
    rates = [training_at(section, number).learning_rate for number in (1, 2, 3, 4, 5, 9)]
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert training_at(training(learning_rate=0.8), 9).learning_rate == 0.8


@pytest.mark.parametrize(
    "other",
    [
        Draws(seed=1, round=1, client="a/b é"),
        Draws(seed=0, round=2, client="a/b é"),
        Draws(seed=0, round=1, client="b"),
    ],
)
def test_the_order_is_a_function_of_seed_round_and_client(other: Draws) -> None:
    assert plan_steps(50, training(), DRAWS) == plan_steps(50, training(), DRAWS)
    assert plan_steps(50, training(), DRAWS) != plan_steps(50, training(), other)
    assert DRAWS.row(0, 1) != DRAWS.row(1, 0)


def factors(num_steps: int, **changes: object) -> list[float]:
    return [rate_factor(n, num_steps, training(**changes)) for n in range(num_steps)]


def test_schedules_run_over_the_clients_own_steps() -> None:
    assert factors(4, schedule="constant") == [1, 1, 1, 1]
    assert factors(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert factors(4, schedule="cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466])


def test_warm_up_rises_to_the_full_rate() -> None:
    assert factors(5, schedule="linear", warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 0.5]
    assert factors(2, schedule="cosine", warmup_steps=3) == [0.25, 0.5]
