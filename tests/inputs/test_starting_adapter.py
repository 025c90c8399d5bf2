"""A run starts from an adapter: the state before training is its change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fedllm.adapters.peft_writer import PeftDescription, write_peft_adapter
from fedllm.cli.execution import start
from fedllm.cli.main import run as fedllm
from fedllm.config.loading import dump_config, read_config, validate
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, base_delta_of, delta
from fedllm.process.session import Session
from fedllm.programs.evaluate import evaluate_adapter, evaluate_state
from fedllm.programs.prepare import prepare_run
from fedllm.server.aggregate import aggregate_round
from fedllm.server.export import export_adapter, open_state
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import AggregateRecord, PreparedRecord
from tests.adapters.peft_folders import deltas, edit_config, rename_tensors, save_adapter
from tests.tiny import Tiny, raw_config

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "own"
    return save_adapter(tiny.model, folder, seed=3, r=3, lora_alpha=1, target_modules=TARGETS)


def begun(root: Path, tiny: Tiny, adapter: Path, **sections: Any) -> RunPaths:
    """Prepare a run and make its state before training."""
    run = RunPaths(root=root)
    raw: dict[str, Any] = raw_config(tiny.model.parent) | sections
    raw["model"] = {**raw["model"], "adapter": str(adapter)}
    publish_bytes(run.config, dump_config(validate(raw)).encode())
    prepare_run(run)
    aggregate_round(run.round(0))
    return run


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for module, change in found.items():
        expected = wanted.get(module, torch.zeros(()))
        assert float((change - expected).norm()) <= 1e-5 * float(expected.norm()), module
    assert set(wanted) <= set(found)


def test_the_state_before_training_is_the_adapter_s_change(
    tiny: Tiny, adapter: Path, tmp_path: Path
) -> None:
    run = begun(tmp_path / "r", tiny, adapter)
    export_adapter(open_state(run, 0), tmp_path / "out")
    wanted = deltas(tiny.model, adapter)
    same(deltas(tiny.model, tmp_path / "out"), wanted)
    recorded = PreparedRecord.read(run.prepared).start
    assert recorded is not None
    assert recorded.path == str(adapter)
    # a client of a small rank gets the best approximation of that rank
    state = open_state(run, 0)
    for module, change in wanted.items():
        parts = state.file.module(module)
        small = delta(state.method.module_adapter(module=module, state=parts, rank=2))
        left = torch.linalg.svdvals(change)[2:].norm()
        assert float((small - change).norm()) == pytest.approx(float(left), rel=1e-4)


@pytest.mark.parametrize("rank", [3, 9])
def test_a_method_that_merges_updates_starts_with_the_adapter_in_its_base(
    tiny: Tiny, tmp_path: Path, rank: int
) -> None:
    # of rank 9 some modules no longer keep it as factors
    adapter = save_adapter(tiny.model, tmp_path / "own", seed=3, r=rank, target_modules=TARGETS)
    state = open_state(begun(tmp_path / "r", tiny, adapter, method={"name": "flora"}), 0)
    found = {}
    for module in deltas(tiny.model, adapter):
        change = state.method.base_delta(state.file.module(module))
        assert change is not None
        found[module] = base_delta_of(change)
    same(found, deltas(tiny.model, adapter))


def test_the_same_adapter_gives_the_same_bits(tiny: Tiny, adapter: Path, tmp_path: Path) -> None:
    runs = [begun(tmp_path / name, tiny, adapter) for name in "ab"]
    first, second = (AggregateRecord.read(run.round(0).aggregate_record).sha256 for run in runs)
    assert first == second
    assert aggregate_round(runs[0].round(0)).sha256 == first


def test_round_0_is_scored_as_the_adapter(
    tiny: Tiny, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["rounds=1", f"model.adapter={adapter}", "training.learning_rate=1e-12"]
    run = RunPaths(root=start(tiny.config, overrides, tmp_path / "run"))
    config, prepared, session = (
        read_config(run.config),
        PreparedRecord.read(run.prepared),
        Session(),
    )
    state = evaluate_state(run, 0, None, session).clients
    alone = evaluate_adapter(adapter, config, prepared, session).clients
    for one, other in zip(state, alone, strict=True):
        assert one.at_largest_rank.loss == pytest.approx(other.as_deployed.loss, rel=1e-4)
    assert any(
        abs(client.as_deployed.loss - client.at_largest_rank.loss) > 1e-6 for client in state
    )
    capsys.readouterr()
    out = tmp_path / "out"
    assert fedllm(["export", str(run.root), "--round", "0", "--out", str(out)]) == 0
    same(deltas(tiny.model, out), deltas(tiny.model, adapter))


def test_what_smaller_ranks_keep_of_the_adapter_is_told(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = save_adapter(tiny.model, tmp_path / "large", r=12, target_modules=TARGETS)
    run = begun(tmp_path / "r", tiny, large)
    energy = kept = 0.0
    for module, change in deltas(tiny.model, large).items():
        s = torch.linalg.svdvals(change).square()
        energy += float(s.sum())
        kept += float(s[: 4 if "q_proj" in module else 8].sum())
    assert f"keep {kept / energy:.2%} of its energy" in capsys.readouterr().err
    export_adapter(open_state(run, 0), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())["r"] == 8


@pytest.mark.parametrize("rank", [3, 4])
def test_a_factor_mean_starts_from_an_adapter_of_its_rank_only(
    tiny: Tiny, adapter: Path, tmp_path: Path, rank: int
) -> None:
    sections = {"method": {"name": "factor_mean"}}
    clients: Any = raw_config(tiny.model.parent)["clients"]
    sections["clients"] = clients | {"tiers": {"one": {"ranks": rank}}}
    if rank != 3:
        with pytest.raises(
            AdapterError, match=r"model\.adapter.*rank 3, from which factor_mean cannot"
        ):
            begun(tmp_path / "r", tiny, adapter, **sections)
        return
    run = begun(tmp_path / "r", tiny, adapter, **sections)
    export_adapter(open_state(run, 0), tmp_path / "out")
    same(deltas(tiny.model, tmp_path / "out"), deltas(tiny.model, adapter))


@pytest.mark.parametrize("method", ["rbla", "hetlora"])
def test_a_state_of_factors_starts_from_an_adapter_that_it_has_room_for(
    tiny: Tiny, adapter: Path, tmp_path: Path, method: str
) -> None:
    clients: Any = raw_config(tiny.model.parent)["clients"]
    sections: dict[str, Any] = {"method": {"name": method}}
    sections["clients"] = clients | {"tiers": {"one": {"ranks": 2}}}
    words = rf"model\.adapter.*rank 3, from which {method} cannot .*give the tiers its rank"
    with pytest.raises(AdapterError, match=words):
        begun(tmp_path / "r", tiny, adapter, **sections)
    assert not (tmp_path / "r/prepared.json").exists()
    sections["clients"] = clients | {"tiers": {"one": {"ranks": 2}, "two": {"ranks": 5}}}
    export_adapter(open_state(begun(tmp_path / "s", tiny, adapter, **sections), 0), tmp_path / "o")
    if method == "rbla":
        same(deltas(tiny.model, tmp_path / "o"), deltas(tiny.model, adapter))


def test_an_adapter_that_does_not_fit_the_run_is_refused(
    tiny: Tiny, adapter: Path, tmp_path: Path
) -> None:
    clients: Any = raw_config(tiny.model.parent)["clients"]
    fewer = {
        "lora": {"target_modules": ["q_proj"]},
        "clients": {**clients, "tiers": {"one": {"ranks": 3}}},
    }
    with pytest.raises(AdapterError, match=r"lora\.target_modules"):
        begun(tmp_path / "a", tiny, adapter, **fewer)
    model = LlamaForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    model.save_pretrained(tmp_path / "other")
    foreign = save_adapter(tmp_path / "other", tmp_path / "foreign", target_modules=TARGETS)
    with pytest.raises(AdapterError, match=f"is for {tmp_path / 'other'}"):
        begun(tmp_path / "b", tiny, foreign)
    with pytest.raises(AdapterError, match=r"model\.adapter: .*no such folder"):
        begun(tmp_path / "c", tiny, tmp_path / "nowhere")


def test_another_adapter_in_the_place_of_the_prepared_one_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    own = save_adapter(tiny.model, tmp_path / "own", target_modules=TARGETS)
    run = begun(tmp_path / "r", tiny, own)
    edit_config(own, lora_alpha=99)
    with pytest.raises(AdapterError, match="not the adapter that was prepared"):
        aggregate_round(run.round(0))


def test_an_adapter_of_a_compiled_model_elsewhere_is_told_and_fits(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = save_adapter(tiny.model, tmp_path / "own", target_modules=TARGETS)
    wanted = deltas(tiny.model, own)
    rename_tensors(own, lambda name: name.replace(".model.model.", ".model._orig_mod.model."))
    edit_config(own, base_model_name_or_path="/away/base")
    run = begun(tmp_path / "r", tiny, own)
    assert "names the base /away/base, which is not here" in capsys.readouterr().err
    export_adapter(open_state(run, 0), tmp_path / "out")
    same(deltas(tiny.model, tmp_path / "out"), wanted)


def test_an_adapter_of_the_head_is_not_scored_without_it(tiny: Tiny, tmp_path: Path) -> None:
    head = Factors(a_RI=torch.ones(1, 32), b_OR=torch.ones(258, 1), scale=2.0)
    about = PeftDescription(base_model=None, targets={"target_modules": ["lm_head"]})
    (tmp_path / "head").mkdir()
    write_peft_adapter(tmp_path / "head", {"lm_head": head}, about=about)
    config = validate(raw_config(tiny.model.parent))
    prepared = PreparedRecord(
        model_fingerprint="",
        model_path=str(tiny.model),
        data_fingerprint="",
        data_path="",
        model_parameters=0,
        modules={},
        clients=[],
    )
    with pytest.raises(AdapterError, match="adapts lm_head, whose LoRA is not computed here"):
        evaluate_adapter(tmp_path / "head", config, prepared, Session())
