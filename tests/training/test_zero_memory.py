"""A process of several reads its part of a base, and clients leave nothing behind in it."""

import json
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import Tiny
from tests.training.processes import run_together
from tests.training.zero_memory import CLIENTS

pytestmark = pytest.mark.slow
SHARD = 30 * 10**6


@pytest.fixture(scope="module")
def found(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    """What each of two processes measured; the base is stored in bfloat16, used in float32."""
    folder = tmp_path_factory.mktemp("memory")
    large = folder / "large"
    shutil.copytree(tiny.model, large, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(large, max_shard_size=SHARD)
    arguments = (tiny.model, large, folder / "found")
    run_together("tests.training.zero_memory", arguments, processes=2, log=folder / "log")
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(2)]


def test_a_process_reads_its_part_and_gathers_three_layers_at_most(
    found: list[Mapping[str, Any]],
) -> None:
    for each in found:
        assert each["part"] > 100 * 10**6
        assert each["part"] * 0.9 < each["loading"] < (each["part"] + SHARD) * 1.2
        assert each["gathered"] < 3 * each["layer"]


def test_clients_one_after_the_other_leave_memory_as_it_is(found: list[Mapping[str, Any]]) -> None:
    for each in found:
        after = each["clients"]
        assert len(after) == CLIENTS // 10
        assert after[-1] - after[0] < 2 * 10**6
