"""A base that is quantised at load trains, scores and exports what PEFT does with bitsandbytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedllm.cli.execution import start
from fedllm.config.loading import load_config
from fedllm.config.models import TrainingSection
from fedllm.data.cache import TokenizedClients
from fedllm.errors import ConfigError
from fedllm.lora.factors import Adapter
from fedllm.methods.catalog import METHODS, build_method
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.methods.local_task import LocalTask
from fedllm.model.base import load_base
from fedllm.model.quantised import KINDS, Nf4Linear, quantise, quantised_layers
from fedllm.packing.slots import AdapterSlots
from fedllm.planning.federation import base_bytes
from fedllm.programs.prepare import prepare
from fedllm.server.export import export_adapter, export_model, open_state
from fedllm.storage.paths import CachePaths, RunPaths
from fedllm.storage.records import EvaluationRecord, PreparedRecord
from fedllm.training.loop import LocalSettings, train_client
from fedllm.training.step_plan import Draws
from fedllm.training.trainer_protocol import Member
from fedllm.training.trainers import TRAINERS
from tests.inputs.test_families import (
    GPT2,
    LLAMA,
    Family,
    answer_loss,
    drawn_adapter,
    peft_gradients,
    save_base,
)
from tests.rounds.test_method_engines import ENGINES, SHORT
from tests.tiny import Tiny
from tests.training.test_loop import rows_of, with_frozen
from tests.worker.attempts import updates

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# bitsandbytes on CPUs is right for rows of whole blocks only
WIDE = {"hidden_size": 64, "intermediate_size": 128}
FAMILIES = {
    "llama": Family(kind="llama", sizes={**LLAMA, **WIDE}),
    "gpt2": Family(
        kind="gpt2",
        sizes={**GPT2, "hidden_size": 64, "n_inner": 128},
        targets=("c_attn", "c_proj", "c_fc"),
        transposed=True,
    ),
}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
LARGEST_GAP = 0.3038  # between two values of NF4, of which the largest is 1


@pytest.fixture(scope="module")
def bases(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(family, tiny, folder / name) for name, family in FAMILIES.items()}


def by_bitsandbytes(base: Path) -> Any:
    """The base as transformers and PEFT have it with bitsandbytes in 4 bits."""
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.float32)


def in_float32(model: Any) -> Any:
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            # outside training it rounds to bfloat16 on processors that multiply it fast
            layer.training = True
    return model


@pytest.mark.parametrize("shape", [(48, 32), (5, 7), (64, 192), (3, 130)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_farther_from_its_bits_than_half_a_gap(
    kind: str, shape: tuple[int, int]
) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=False)
    model = nn.ModuleList([linear])
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    weight = linear.weight.detach().clone()
    quantise(model, kind, "cpu")
    ((_, layer),) = quantised_layers(model)
    error = (layer.whole_weight() - weight).abs().flatten()
    if kind == "int8":
        scales = weight.abs().amax(dim=1, keepdim=True).expand(shape).flatten() / 127
        # scaled in float16
        assert bool((error <= 0.6 * scales).all())
    else:
        blocks = functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs()
        largest = blocks.amax(dim=1, keepdim=True).expand(-1, 64).flatten()[: weight.numel()]
        # scales in 8 bits are off by a few percent
        assert bool((error <= (LARGEST_GAP / 2 + 0.05) * largest).all())
    assert error.any()


@pytest.mark.parametrize(("name", "kind"), [("llama", "nf4"), ("gpt2", "nf4"), ("llama", "int8")])
def test_a_round_on_a_quantised_base_exports_what_peft_and_the_merged_model_compute(
    name: str, kind: str, bases: dict[str, Path], tiny: Tiny, tmp_path: Path
) -> None:
    base, family = bases[name], FAMILIES[name]
    targets = f"lora.target_modules={json.dumps(family.targets)}"
    options = [
        *(f"model.path={base}", f"model.quantization={kind}", "rounds=1", "lora.dropout=0"),
        *([targets] if family.targets else []),
        *("clients.cohort.count=2", "clients.tiers.large.ranks=4", "training.learning_rate=0.01"),
        *("evaluation.rows_per_client=null", "evaluation.max_new_tokens=2"),
    ]
    run = RunPaths(root=start(tiny.config, options, tmp_path / "run"))
    prepared = PreparedRecord.read(run.prepared)
    data = TokenizedClients.open(Path(prepared.data_path))
    found = {
        each.client: each.at_largest_rank.loss
        for each in EvaluationRecord.read(run.round(1).evaluation_record).clients
    }
    for record, _ in updates(run.round(1)).values():
        assert record.environment["quantisation"].startswith(f"{kind} of bitsandbytes ")

    state = open_state(run, 1)
    export_adapter(state, tmp_path / "adapter")
    export_model(state, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    whole = AutoModelForCausalLM.from_pretrained(base).eval()
    near = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    models = {"merged": (merged, 1e-5), "not quantised": (near, {"nf4": 0.1, "int8": 0.01}[kind])}
    if kind == "nf4":
        adapted = PeftModel.from_pretrained(by_bitsandbytes(base), tmp_path / "adapter")
        assert "Linear4bit" in str(adapted)
        models["PEFT"] = in_float32(adapted), 1e-5
    for model, bound in models.values():
        losses = {client: answer_loss(model, data, client) for client in found}
        assert losses == pytest.approx(found, rel=bound)
    assert {c: answer_loss(near, data, c) for c in found} != pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradients_of_a_packed_step_are_those_of_peft(
    bases: dict[str, Path], *, checkpointing: bool
) -> None:
    base = load_base(bases["llama"], dtype="float32", device="cpu", quantization="nf4")
    slots = AdapterSlots(base, target_modules="all-linear", layout="parts")
    adapter, rows = drawn_adapter(slots.base.modules), rows_of(0, count=4)
    section = {"batch_size": 4, "max_steps": 1, "learning_rate": 1.0, "clip_norm": None}
    section["gradient_checkpointing"] = checkpointing
    settings = LocalSettings(
        training=TrainingSection.model_validate(section), rule=LOCAL_RULES["fedavg"]
    )
    draws = Draws(seed=0, round=1, client="one")
    result = train_client(slots, adapter, rows, settings=settings, draws=draws)
    expected = peft_gradients(
        in_float32(by_bitsandbytes(bases["llama"])), list(adapter), adapter, rows
    )
    for name, factors in adapter.items():
        trained = result.adapter[name]
        pairs = [(factors.a_RI, trained.a_RI), (factors.b_OR, trained.b_OR)]
        for (before, after), gradient in zip(pairs, expected[name], strict=True):
            largest = gradient.abs().max()
            assert largest > 0
            assert (before - after - gradient).abs().max() <= 1e-4 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_learn_what_float32_does_on_a_quantised_base(
    kind: str, bases: dict[str, Path]
) -> None:
    losses = []
    for dtype, name in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        base = load_base(bases["llama"], dtype=dtype, device="cpu", quantization=kind)
        slots = AdapterSlots(base, target_modules="all-linear", layout="parts")
        section = {"max_steps": 4, "epochs": 4, "learning_rate": 0.01, "precision": name}
        settings = LocalSettings(
            training=TrainingSection.model_validate(section), rule=LOCAL_RULES["fedit"]
        )
        draws = Draws(seed=0, round=1, client="one")
        rows = rows_of(0, count=4)
        found = train_client(
            slots, drawn_adapter(slots.base.modules), rows, settings=settings, draws=draws
        )
        losses.append(found.stats.losses)
    exact = losses[0]
    assert exact[-1] < exact[0]
    for others in losses[1:]:
        assert others == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["together", "zero"])
def test_every_engine_trains_alike_on_a_quantised_base(
    engine: str, kind: str, bases: dict[str, Path], tiny: Tiny, tmp_path: Path
) -> None:
    own = [f"model.path={bases['llama']}", f"model.quantization={kind}"]
    sent = []
    for name in ("plain", engine):
        options = [*SHORT, *ENGINES[name], *own]
        run = RunPaths(root=start(tiny.config, options, tmp_path / name))
        sent.append({client: tensors for client, (_, tensors) in updates(run.round(1)).items()})
    plain, found = sent
    assert found.keys() == plain.keys()
    for client, tensors in plain.items():
        for name, tensor in tensors.items():
            assert (found[client][name] - tensor).abs().max() <= 1e-4 * tensor.abs().max()


def tasks() -> list[LocalTask]:
    """What the methods that keep the base ask of training, in odd and even rounds."""
    options = {"hetlora": {"pruning": 0.5, "penalty": 0.5}}
    found: list[LocalTask] = []
    for name in (name for name, entry in METHODS.items() if entry.base == "stays"):
        method = build_method(
            name, seed=0, alpha=8.0, scaling="fixed", options=options.get(name, {})
        )
        own = [method.local_task(round_number) for round_number in (1, 2)]
        found += [task for task in own if task not in found]
    return found


def trained_by(slots: AdapterSlots, engine: str, task: LocalTask, precision: str) -> Adapter:
    """An adapter with frozen columns after two steps of an engine."""
    section = {"batch_size": 2, "max_steps": 2, "learning_rate": 0.05, "precision": precision}
    if engine == "zero":
        section |= {"engine": "zero", "zero": {"stage": 2}}
    settings = LocalSettings(
        training=TrainingSection.model_validate(section), rule=LOCAL_RULES["fedavg"], task=task
    )
    received = with_frozen(drawn_adapter(slots.base.modules), 2)
    member = Member(
        received=lambda: received,
        rows=rows_of(0, count=4),
        draws=Draws(seed=0, round=1, client="one"),
    )
    (result,) = TRAINERS[engine](slots=slots, settings=settings).train([member])
    return result.adapter


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_methods_ask_trains_as_on_the_weights_that_the_bits_stand_for(
    kind: str, precision: str, bases: dict[str, Path]
) -> None:
    quantised = load_base(bases["llama"], dtype="float32", device="cpu", quantization=kind)
    whole = load_base(bases["llama"], dtype="float32", device="cpu")
    for name, layer in quantised_layers(quantised.model):
        whole.model.get_submodule(name).weight.data = layer.whole_weight()
    in_bits, stood_for = (
        AdapterSlots(base, target_modules="all-linear", layout="parts")
        for base in (quantised, whole)
    )
    for task in tasks():
        expected = trained_by(stood_for, "plain", task, precision)
        for engine in TRAINERS:
            found = trained_by(in_bits, engine, task, precision)
            assert found.keys() == expected.keys()
            for name, own in expected.items():
                torch.testing.assert_close(found[name].a_RI, own.a_RI, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(found[name].b_OR, own.b_OR, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_plan_counts_the_bytes_that_a_quantised_base_has(
    kind: str, precision: str, bases: dict[str, Path], tiny: Tiny
) -> None:
    changes = [f"model.path={bases['llama']}", f"model.dtype={precision}"]
    config = load_config(tiny.config, [*changes, f"model.quantization={kind}"])
    prepared = prepare(config, CachePaths(root=tiny.cache))
    base = load_base(bases["llama"], dtype=precision, device="cpu", quantization=kind)
    layers = dict(quantised_layers(base.model))
    assert len(layers) == 14
    own = sum(weight.nbytes for weight in base.model.parameters())
    for layer in layers.values():
        if isinstance(layer, Nf4Linear):
            own += layer._state.absmax.nbytes
    assert base_bytes(config.model, prepared) == own


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ["method.name=fedex", "clients.tiers.large.ranks=2"],
            "but method.name fedex changes the base",
        ),
        (
            ["training={engine: zero, processes: 2}"],
            "but training.zero.stage 3 divides the base weight by weight",
        ),
    ],
)
def test_what_cannot_have_a_quantised_base_is_refused_before_the_run(
    changes: list[str], line: str, tiny: Tiny
) -> None:
    config = load_config(tiny.config, ["model.quantization=nf4", *changes])
    with pytest.raises(ConfigError, match=r"^model\.quantization: got nf4, .* need") as refused:
        prepare(config, CachePaths(root=tiny.cache))
    assert line in str(refused.value)
