"""Classes: tiers whose options are equal train on the same arrays."""

from fedllm.planning.classes import classes_of, job_options, tier_options
from tests.planning.federations import config_of

SBATCH = {
    "default": {"account": "lab", "time": 60},
    "client": {"gpus": 1},
    "aggregate": {"time": 10},
    "tiers": {"large": {"gpus": 2}, "huge": {"gpus": 2}},
}
TIERS = {name: {"ranks": 1} for name in ("small", "middle", "large", "huge")}
SECTION = config_of(clients__tiers=TIERS, scheduler__sbatch=SBATCH).scheduler.sbatch


def test_tiers_of_equal_options_are_a_class_named_by_the_first() -> None:
    assert classes_of(SECTION, TIERS) == {
        "small": "small",
        "middle": "small",
        "large": "large",
        "huge": "large",
    }


def test_what_is_said_of_a_tier_overrides_what_is_said_of_clients_and_of_all() -> None:
    assert tier_options(SECTION, "small") == {"account": "lab", "time": 60, "gpus": 1}
    assert tier_options(SECTION, "large") == {"account": "lab", "time": 60, "gpus": 2}


def test_a_job_of_one_task_has_options_of_its_own() -> None:
    assert job_options(SECTION, "aggregate") == {"account": "lab", "time": 10}
    assert job_options(SECTION, "evaluate") == {"account": "lab", "time": 60}
