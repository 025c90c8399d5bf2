"""Every family of bases runs a round, and its export gives the same scores in PEFT."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm.cli.execution import start
from fedllm.data.cache import TokenizedClients
from fedllm.server.export import export_adapter, export_model, open_state
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import EvaluationRecord, PreparedRecord
from tests.tiny import Tiny

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
GPT2 = {**SIZES, "n_inner": 48}
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of bases: its kind, small sizes, and targets that are not the default ones."""

    kind: str
    sizes: dict[str, Any]
    targets: Sequence[str] | str = ()
    transposed: bool = field(default=False)
    adapted: frozenset[str] = frozenset({"attention", "mlp"})


FAMILIES = [
    Family(kind="llama", sizes=LLAMA),
    Family(kind="qwen2", sizes=LLAMA),
    Family(kind="qwen3", sizes={**LLAMA, "head_dim": 8}),
    Family(kind="mistral", sizes={**LLAMA, "sliding_window": 32}),
    Family(kind="gemma2", sizes=GEMMA),
    Family(kind="gemma3_text", sizes=GEMMA),
    Family(kind="phi3", sizes=LLAMA, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    Family(kind="gpt2", sizes=GPT2, targets=("c_attn", "c_proj", "c_fc"), transposed=True),
    Family(kind="gpt_neox", sizes={**SIZES, "intermediate_size": 48}, targets=FUSED),
    Family(
        kind="opt",
        sizes={**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    Family(kind="falcon", sizes=SIZES, targets=FUSED),
    Family(kind="bloom", sizes=SIZES, targets=FUSED),
    # the matrices of its experts are joined into one tensor, which no adapter fits
    Family(
        kind="mixtral",
        sizes={**LLAMA, "num_local_experts": 4},
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        adapted=frozenset({"attention"}),
    ),
    Family(kind="qwen3", sizes={**LLAMA, "head_dim": 8}, targets="all-linear"),
    Family(kind="gpt_neox", sizes={**SIZES, "intermediate_size": 48}, targets="all-linear"),
    Family(
        kind="gemma2",
        sizes=GEMMA,
        targets=r".*\.layers\.1\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
    ),
]


def name_of(family: Family) -> str:
    return family.kind + (f", {family.targets}" if isinstance(family.targets, str) else "")


@pytest.fixture(params=FAMILIES, ids=name_of)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


def save_base(family: Family, tiny: Tiny, folder: Path) -> Path:
    shutil.copytree(tiny.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **family.sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # wide enough that attention and the change of a round show in the loss
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def overrides(family: Family, base: Path) -> list[str]:
    targets = f"lora.target_modules={json.dumps(family.targets)}"
    return [
        f"model.path={base}",
        *([targets] if family.targets else []),
        "rounds=1",
        "lora.dropout=0",
        "training.learning_rate=0.01",
        "clients.cohort.count=2",
        "clients.tiers.large.ranks=4",
        "evaluation.rows_per_client=null",
        "evaluation.max_new_tokens=2",
    ]


@torch.no_grad()
def answer_loss(model: torch.nn.Module, data: TokenizedClients, client: str) -> float:
    """Return the loss per answer token of a client's test rows, computed row by row."""
    loss, tokens = 0.0, 0
    for row in data.rows(client, "test"):
        text = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        logits_TV = model(input_ids=text).logits[0, len(row.prompt_ids) - 1 : -1]
        answer = torch.tensor(row.answer_ids)
        loss += functional.cross_entropy(logits_TV.double(), answer, reduction="sum").item()
        tokens += len(answer)
    return loss / tokens


def test_a_round_exports_what_peft_computes_as_the_run_did(
    family: Family, tiny: Tiny, tmp_path: Path
) -> None:
    base = save_base(family, tiny, tmp_path / "base")
    root = start(tiny.config, overrides(family, base), tmp_path / "run")
    run = RunPaths(root=root)
    prepared = PreparedRecord.read(run.prepared)
    assert {m.transposed for m in prepared.modules.values()} == {family.transposed}
    assert {m.kind for m in prepared.modules.values()} == family.adapted
    scores = EvaluationRecord.read(run.round(1).evaluation_record).clients
    assert scores

    state = open_state(run, 1)
    export_adapter(state, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    data = TokenizedClients.open(Path(prepared.data_path))
    before = {each.client: answer_loss(plain, data, each.client) for each in scores}
    # PEFT warns, which is an error here, of keys that it misses and of another layout
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    export_model(state, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for each in scores:
        assert each.at_largest_rank.rows == len(data.rows(each.client, "test"))
        ours = each.at_largest_rank.loss
        assert abs(ours - before[each.client]) > 1e-3
        assert answer_loss(adapted, data, each.client) == pytest.approx(ours, rel=1e-6)
        assert answer_loss(merged, data, each.client) == pytest.approx(ours, rel=1e-5)
