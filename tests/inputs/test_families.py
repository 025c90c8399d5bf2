"""Every family of bases runs a round and trains as in PEFT, and PEFT gives its export's scores."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedllm.cli.execution import start
from fedllm.config.models import TrainingSection
from fedllm.config.target_modules import Targets
from fedllm.data.cache import TokenizedClients
from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import load_base
from fedllm.model.targets import find_modules
from fedllm.packing.layout_check import find_layout
from fedllm.packing.slots import AdapterSlots
from fedllm.server.export import export_adapter, export_model, open_state
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import EvaluationRecord, ModuleRecord, PreparedRecord
from fedllm.training.loop import LocalSettings, train_client
from fedllm.training.step_plan import Draws
from tests.tiny import Tiny
from tests.training.test_loop import Row, rows_of

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


KINDS = {family.kind: family for family in FAMILIES if not isinstance(family.targets, str)}
KINDS |= {family.kind: family for family in FAMILIES if not family.targets}
# of the base itself, which PyTorch draws
WITHOUT_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
# modules of the second layer, of all families
EXPRESSION = r".*\.1\..*\.(\w+_proj|c_attn|c_fc|fc\d|query_key_value|dense\w*)"


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


def drawn_adapter(modules: Mapping[str, ModuleRecord], rank: int = 3) -> Adapter:
    """An adapter of random factors, whose scale is 1."""
    draws = torch.Generator().manual_seed(0)
    return {
        name: Factors(
            a_RI=torch.randn(rank, module.in_features, generator=draws) / 8,
            b_OR=torch.randn(module.out_features, rank, generator=draws) / 8,
            scale=1.0,
        )
        for name, module in modules.items()
    }


def peft_gradients(
    model: Any, targets: Targets, adapter: Adapter, rows: Sequence[Row]
) -> dict[str, list[Tensor]]:
    """Gradients of A and B by module, of the mean loss of rows in PEFT's model."""
    is_transposed = any(isinstance(layer, Conv1D) for layer in model.modules())
    named = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(target_modules=named, r=3, lora_alpha=3, fan_in_fan_out=is_transposed)
    # for a Mixtral's experts, which get no adapter here, PEFT exchanges the targets by rules
    model.config.model_type = "another"
    adapted: Any = inject_adapter_in_model(config, model, "default")
    layers: dict[str, Any] = {
        name: layer for name, layer in adapted.named_modules() if hasattr(layer, "lora_A")
    }
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data = adapter[name].a_RI.clone()
        layer.lora_B["default"].weight.data = adapter[name].b_OR.clone()
    total, count = torch.zeros(()), sum(len(row.answer_ids) for row in rows)
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        logits_TV = adapted(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        total = total + functional.cross_entropy(
            logits_TV, torch.tensor(row.answer_ids), reduction="sum"
        )
    (total / count).backward()
    return {
        name: [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        for name, layer in layers.items()
    }


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


@pytest.mark.parametrize("targets", ["all-linear", EXPRESSION])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_named_as_in_peft_are_those_of_peft_and_get_its_gradients(
    kind: str, targets: str, tiny: Tiny, tmp_path: Path
) -> None:
    sizes = {**KINDS[kind].sizes, **WITHOUT_DROPOUT.get(kind, {})}
    folder = save_base(replace(KINDS[kind], sizes=sizes), tiny, tmp_path / "base")
    base = load_base(folder, dtype="float32", device="cpu")
    modules = find_modules(base.model, targets)
    layout = find_layout(base.model.config, cutoff_tokens=64).cpu
    slots = AdapterSlots(base, target_modules=targets, layout=layout)
    adapter, rows = drawn_adapter(modules), rows_of(0, count=4)
    section = {"batch_size": 4, "max_steps": 1, "learning_rate": 1.0, "clip_norm": None}
    settings = LocalSettings(
        training=TrainingSection.model_validate(section), rule=LOCAL_RULES["fedavg"]
    )
    draws = Draws(seed=0, round=1, client="one")
    result = train_client(slots, adapter, rows, settings=settings, draws=draws)

    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = peft_gradients(model, targets, adapter, rows)
    assert expected.keys() == modules.keys()
    for name, gradients in expected.items():
        before, after = adapter[name], result.adapter[name]
        steps = (before.a_RI - after.a_RI, before.b_OR - after.b_OR)
        for step, gradient in zip(steps, gradients, strict=True):
            largest = gradient.abs().max()
            assert largest > 0
            assert (step - gradient).abs().max() <= 1e-4 * largest, name
