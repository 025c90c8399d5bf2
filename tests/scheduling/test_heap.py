"""Freed memory is used again, with the settings that workers start with."""

import os
import subprocess
import sys

from fedllm.scheduling.heap import SETTINGS, VARIABLE, shell_line, with_heap_settings

# Growth of a process during forward passes, over the bytes that the last pass keeps.
PASSES = """
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from fedllm.lora.factors import Factors
from fedllm.model.base import Base
from fedllm.packing.slots import AdapterSlots
from fedllm.packing.row_dropout import Piece
def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=64, hidden_size=288, intermediate_size=768, num_hidden_layers=20,
                     num_attention_heads=4)
model = LlamaForCausalLM(config).bfloat16()
base = Base(model=model, tokenizer=None, fingerprint="", modules={})
slots = AdapterSlots(base, target_modules="all-linear", dropout=0.05)
slots.install({
    name: Factors(a_RI=torch.randn(60, m.in_features), b_OR=torch.zeros(m.out_features, 60),
                  scale=1.0)
    for name, m in slots._modules.items()
})
slots.train()
tokens = torch.randint(64, (1, 600))
slots.rows.enter([Piece(entry=0, start=0, stop=600, seed=0)])
own = {p.untyped_storage().data_ptr() for p in model.parameters()}
kept = {}
def pack(x):
    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x
with torch.no_grad():
    model(input_ids=tokens)
before = peak_mib()
with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
    loss = model(input_ids=tokens, labels=tokens).loss
print((peak_mib() - before) * 2**20 / sum(n for place, n in kept.items() if place not in own))
"""


def growth(environment: dict[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PASSES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return float(done.stdout)


def test_a_forward_pass_takes_little_more_than_what_it_keeps() -> None:
    bare = {name: value for name, value in os.environ.items() if name != VARIABLE}
    assert growth(with_heap_settings(bare)) < 1.3


def test_a_shell_sets_what_a_process_does() -> None:
    for own in ({}, {VARIABLE: "glibc.malloc.check=0"}):
        bare = {name: value for name, value in os.environ.items() if name != VARIABLE}
        script = f'{shell_line()}\nprintf %s "${VARIABLE}"'
        done = subprocess.run(
            ["sh", "-c", script], env=bare | own, capture_output=True, text=True, check=True
        )
        assert done.stdout == with_heap_settings(own)[VARIABLE]
        assert done.stdout.startswith(SETTINGS)
