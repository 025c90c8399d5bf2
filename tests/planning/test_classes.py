"""Classes: tiers whose options are equal train on the same arrays."""

from fedllm.config.models import SbatchSection
from fedllm.planning.classes import classes_of, job_options, tier_options
from fedllm.planning.engines import engines_of
from tests.planning.federations import config_of

SBATCH = {
    "default": {"account": "lab", "time": 60},
    "client": {"gpus": 1},
    "aggregate": {"time": 10},
    "tiers": {"large": {"gpus": 2}, "huge": {"gpus": 2}},
}
TIERS = {name: {"ranks": 1} for name in ("small", "middle", "large", "huge")}
CONFIG = config_of(clients__tiers=TIERS, scheduler__sbatch=SBATCH)
SECTION = CONFIG.scheduler.sbatch


def test_tiers_of_equal_options_are_a_class_named_by_the_first() -> None:
    assert classes_of(SECTION, engines_of(CONFIG)) == {
        "small": "small",
        "middle": "small",
        "large": "large",
        "huge": "large",
    }


def test_workers_of_a_class_have_one_engine_processes_and_nodes() -> None:
    tiers = {
        "phone": {"ranks": 1},
        "server": {"ranks": 1, "engine": "zero", "processes": 4},
        "rack": {"ranks": 1, "engine": "zero", "processes": 4, "nodes": 2},
        "other": {"ranks": 2, "engine": "zero", "processes": 4, "nodes": 2},
    }
    config = config_of(clients__tiers=tiers)
    assert classes_of(config.scheduler.sbatch, engines_of(config)) == {
        "phone": "phone",
        "server": "server",
        "rack": "rack",
        "other": "rack",
    }


def test_options_of_a_tier_override_those_of_clients_and_the_default() -> None:
    assert tier_options(SECTION, "small") == {"account": "lab", "time": 60, "gpus": 1}
    assert tier_options(SECTION, "large") == {"account": "lab", "time": 60, "gpus": 2}


def test_a_job_of_one_task_has_options_of_its_own() -> None:
    assert job_options(SECTION, "aggregate") == {"account": "lab", "time": 10}
    assert job_options(SECTION, "evaluate") == {"account": "lab", "time": 60}


def test_the_most_specific_spelling_of_an_option_counts() -> None:
    section = SbatchSection(
        default={"cpus-per-task": 2, "t": 600},
        client={"c": 4, "time": 60},
        tiers={"big": {"cpus_per_task": 16, "t": 1200}},
        aggregate={"c": 8},
    )
    assert tier_options(section, "big") == {"cpus-per-task": 16, "time": 1200}
    assert tier_options(section, "small") == {"cpus-per-task": 4, "time": 60}
    assert job_options(section, "aggregate") == {"cpus-per-task": 8, "time": 600}
