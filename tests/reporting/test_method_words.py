"""The method of a run in words."""

from fedllm.reporting.method_words import method_words
from tests.rounds.simulation import config_of


def test_a_run_is_named_by_all_that_it_uses_and_no_more() -> None:
    assert method_words(config_of()) == "flexlora + fedit"
    config = config_of(
        method={
            "options": {"truncated": "keep"},
            "local": "fedprox",
            "local_options": {"mu": 0.1},
            "server": "fedavgm",
            "server_options": {"momentum": 0.5},
        },
        privacy={"clip_norm": 0.5},
        aggregation={"weights": "uniform"},
    )
    assert method_words(config) == (
        "flexlora truncated=keep + fedprox mu=0.1 + fedavgm momentum=0.5 + "
        "privacy clip_norm=0.5 noise_multiplier=1.0"
    )
