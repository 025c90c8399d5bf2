"""Costs: tokens of a client, seconds of a token, and calibration by measured rounds."""

import pytest

from fedllm.planning.costs import (
    SECONDS_PER_CLIENT,
    CostModel,
    ProcessMemory,
    calibrate,
    process_memory,
    seed_costs,
    training_cost,
)
from fedllm.storage.records import CohortClient, TierMix
from tests.planning.federations import MODULES, client, config_of

Q_PROJ = MODULES["model.layers.0.self_attn.q_proj"]


def test_the_cost_of_a_client_is_the_tokens_it_will_compute() -> None:
    ten_rows = client("a", train=10)
    assert ten_rows.train_tokens == 70
    assert training_cost(ten_rows, config_of(training__epochs=2).training) == 140
    limited = config_of(training__max_steps=2, training__batch_size=3).training
    assert training_cost(ten_rows, limited) == 42
    unlimited = config_of(training__max_steps=200, training__batch_size=3).training
    assert training_cost(ten_rows, unlimited) == 70
    assert training_cost(client("silent", train=0), limited) == 0


def seeded(**teraflops: float) -> CostModel:
    ranks = {tier: dict.fromkeys(MODULES, rank) for tier, rank in (("small", 2), ("large", 8))}
    speeds = {"small": 1e-6, "large": 1e-6, **teraflops}
    return seed_costs(model_parameters=1000, modules=MODULES, ranks=ranks, teraflops=speeds)


def test_a_token_takes_four_operations_a_weight_and_six_an_adapter_weight() -> None:
    sides = (16 + 16) + (8 + 16) + (40 + 16)
    assert seeded().seconds_per_token == {
        "small": pytest.approx((4000 + 6 * 2 * sides) / 1e6),
        "large": pytest.approx((4000 + 6 * 8 * sides) / 1e6),
    }
    fast = seeded(large=1e-3)
    assert fast.seconds_per_token["large"] == pytest.approx(
        seeded().seconds_per_token["large"] / 1e3
    )
    assert not seeded().calibrated


def test_measured_seconds_replace_the_seed_and_scale_tiers_that_were_not_measured() -> None:
    mix = TierMix(drawn=3, used=2, tokens=500.0, seconds=10.0 + 2 * SECONDS_PER_CLIENT)
    found = calibrate(
        seeded(), {"small": mix, "large": TierMix(drawn=1, used=0, tokens=0, seconds=0)}
    )
    assert found.calibrated
    assert found.seconds_per_token["small"] == pytest.approx(0.02)
    slower = 0.02 / seeded().seconds_per_token["small"]
    assert found.seconds_per_token["large"] == pytest.approx(
        slower * seeded().seconds_per_token["large"]
    )
    of_500 = CohortClient(id="a", tier="small", cost=500.0)
    assert found.seconds(of_500) == pytest.approx(10.0 + SECONDS_PER_CLIENT)


def test_nothing_measured_leaves_the_seed() -> None:
    assert calibrate(seeded(), {}) == seeded()
    nobody = TierMix(drawn=2, used=0, tokens=0.0, seconds=0.0)
    assert calibrate(seeded(), {"small": nobody, "gone": nobody}) == seeded()


def test_the_memory_of_a_process_follows_from_engine_stage_and_processes() -> None:
    def memory(**more: int) -> ProcessMemory:
        return process_memory(
            base_bytes=2000,
            modules={f"model.layers.{n}.q_proj": Q_PROJ for n in range(10)},
            ranks={f"model.layers.{n}.q_proj": 1 for n in range(10)},
            **more,
        )

    numbers = 10 * (Q_PROJ.out_features + Q_PROJ.in_features)
    alone = memory()
    assert (alone.weights, alone.adapter, alone.gradients) == (2000, 4 * numbers, 4 * numbers)
    assert alone.optimizer == 2 * 4 * numbers
    assert alone.total == 2000 + 4 * 4 * numbers
    two = memory(stage=2, processes=4)
    assert (two.weights, two.optimizer) == (2000, 3 * 4 * numbers / 4)
    # its quarter, and two of ten layers
    assert memory(stage=3, processes=4).weights == 500 + 400
    assert memory(stage=3, processes=1).weights == 2000
