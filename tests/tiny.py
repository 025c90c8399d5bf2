"""A base model and clients small enough for a test: real formats, real loading, no download."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("red", "green", "blue", "one", "two", "three", "four", "five", "cat", "dog", "bird")
IDS = ["plain", "../up", "a/b", "white space", "émoji 🦊", "c5", "c6", "c7", "c8", "c9"]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Paths of a small federation."""

    model: Path
    data: Path
    config: Path
    cache: Path


def make_tiny(root: Path) -> Tiny:
    """Make a base model, a JSONL file of ten clients and a configuration that uses them."""
    root.mkdir(parents=True, exist_ok=True)
    make_model(root / "base")
    make_rows(root / "clients.jsonl")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump(raw_config(root)), encoding="utf-8")
    return Tiny(
        model=root / "base", data=root / "clients.jsonl", config=config, cache=root / "cache"
    )


def make_model(folder: Path) -> None:
    """Save a Llama of hidden size 32 and a byte-level tokenizer without a pad token."""
    torch.manual_seed(0)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: n + 2 for n, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_rows(path: Path) -> None:
    """Write ten clients whose ids are as users have them; each repeats or counts words."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number, client in enumerate(IDS):
            for _ in range(20):
                words = draw.choices(WORDS, k=3)
                output = words[0] if number % 2 else " ".join(reversed(words))
                row = {
                    "client_id": client,
                    "category": f"kind {number % 3}",
                    "instruction": "First word." if number % 2 else "Reverse.",
                    "input": " ".join(words),
                    "output": output,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def raw_config(root: Path) -> dict[str, object]:
    """Return a configuration of two rounds of four clients."""
    return {
        "seed": 0,
        "rounds": 2,
        "model": {"path": str(root / "base")},
        "data": {"path": str(root / "clients.jsonl"), "cutoff_tokens": 160},
        "lora": {"dropout": 0.1},
        "clients": {
            "tiers": {"small": {"ranks": 2}, "large": {"ranks": {"attention": 4, "mlp": 8}}},
            "cohort": {"count": 4},
            "dev": 1,
            "unseen": 1,
        },
        "training": {"max_steps": 3, "learning_rate": 1e-3, "batch_size": 2},
        "evaluation": {"rows_per_client": 1, "max_new_tokens": 4, "complete_at_end": False},
        "scheduler": {"kind": "inline", "workers": 2, "poll_seconds": 0.2},
        "storage": {"cache": str(root / "cache")},
    }
