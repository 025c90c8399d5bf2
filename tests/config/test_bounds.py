"""Bad configurations of every size are refused quickly, in a few lines."""

import itertools
import time
from pathlib import Path

import pytest

from fedllm.config.loading import load_config, read_config
from fedllm.errors import ConfigError

TIERS = "model: {path: embedded}\ndata: {path: embedded}\nclients: {tiers: {a: {ranks: 4}}}\n"
NAMES = "abcdefgh"
ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, name in itertools.pairwise(NAMES)
)
MERGES = "m0: &m0 {k: 1}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 4)}]}}\n" for n in range(1, 14)
)
UNKNOWN = "".join(f"key{n}: 1\n" for n in range(20_000))
SECONDS = 1.0
MAX_LINES = 41


def refusal(tmp_path: Path, text: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert time.process_time() - began < SECONDS
    assert str(caught.value).count("\n") < MAX_LINES
    return str(caught.value)


@pytest.mark.parametrize(
    ("bomb", "said"),
    [
        (ALIASES, "more than 20,000 values"),
        (MERGES, "more than 20,000 values"),
        (UNKNOWN, "more than 10,000 keys"),
    ],
    ids=["aliases", "merges", "keys"],
)
def test_bombs_are_refused_before_they_unfold(bomb: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, f"{TIERS}{bomb}")


def test_many_unknown_keys_are_counted_behind_the_first(tmp_path: Path) -> None:
    said = refusal(tmp_path, TIERS + "".join(f"key{n}: 1\n" for n in range(5_000)))
    assert said.splitlines()[-1] == "... and 4,960 more problems"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rounds: 1000000000", "rounds: got 1000000000, need <= 100000"),
        ("rounds: true", "rounds: got True, need a number"),
        ("seed: no", "seed: got False, need a number"),
        ("training: {learning_rate: yes}", "training.learning_rate: got True, need a number"),
        ("training: {device: 'tpu:9'}", "training.device: got 'tpu:9'; need auto, cpu, cuda"),
        ("training: {cut_rounds: [true]}", "training.cut_rounds: got [True], need a number"),
        ("scheduler: {worker_teraflops: 1e-320}", "worker_teraflops: got 1e-320, need >= 1e-06"),
        ("rounds: !!int abc", "line 4 is not YAML (`abc` cannot be read as int)"),
        ('storage: {cache: "a\\0b"}', "storage.cache: got 'a\\x00b', need text without zero"),
        ('storage: {cache: "\\ud800"}', "storage.cache: got '\\ud800', need text without zero"),
        ("scheduler: {workers: 1000000}", "scheduler.workers: got 1000000, need <= 10000"),
    ],
)
def test_values_that_cannot_be_are_named_with_what_is_needed(
    line: str, said: str, tmp_path: Path
) -> None:
    assert said in refusal(tmp_path, f"{TIERS}{line}\n")


def test_as_many_clients_as_nobody_has_are_refused(tmp_path: Path) -> None:
    text = TIERS.replace("data: {path: embedded}", "data: {embedded_clients: 1000000}")
    assert "data.embedded_clients: got 1000000, need <= 100000" in refusal(tmp_path, text)
    text = TIERS.replace("tiers:", "over_sample: 1.0e308, tiers:")
    assert "clients.over_sample: got 1e+308, need <= 100" in refusal(tmp_path, text)
    text = TIERS.replace("tiers:", "cohort: {count: 1000000000}, tiers:")
    assert "clients.cohort.count: got 1000000000, need <= 10000000" in refusal(tmp_path, text)


def test_a_rank_above_the_width_of_any_module_is_refused(tmp_path: Path) -> None:
    text = TIERS.replace("ranks: 4", "ranks: 1000000000")
    assert "clients.tiers.a.ranks: got 1000000000, need <= 65536" in refusal(tmp_path, text)


def test_a_configuration_of_a_run_is_named_with_its_problem(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("rounds: 1")
    with pytest.raises(ConfigError, match=r"config\.yaml: clients: missing"):
        read_config(file)


def test_a_wrong_value_is_shown_in_a_length_that_people_read(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, f"{TIERS}rounds: '{'x' * 10_000}'\n")) < 300
