"""The Python interface: frames of a run, a run from a program, adapters combined in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

import fedllm
from fedllm.errors import AdapterError, ConfigError, RunDirectoryError, UserError
from tests.adapters.peft_folders import deltas, make_llama, save_adapter
from tests.reporting.sweeps import sweep_of
from tests.tiny import Tiny


@pytest.fixture
def run(finished: Path) -> fedllm.LoadedRun:
    return fedllm.load_run(finished)


def test_all_public_names_are_there() -> None:
    assert {*fedllm.__all__} <= {*dir(fedllm)}
    assert all(getattr(fedllm, name) for name in fedllm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedllm.nothing


def test_frames_hold_what_the_run_recorded(run: fedllm.LoadedRun) -> None:
    assert repr(run).endswith("2 of 2 rounds)")
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert list(run.rounds["round"]) == [0, 1, 2]
    assert run.rounds["training_loss"].iloc[2] == json.loads(lines[2])["training_loss"]
    trained = run.clients[run.clients["steps"].notna()]
    assert trained.groupby("round").size().to_dict() == {1: 4, 2: 4}
    assert set(trained["tier"]) == {"small", "large"}
    assert trained["peak_memory_bytes"].min() > 0
    by_hand = run.clients[run.clients["round"] == 2].groupby("group")["test_loss"].mean()
    groups = run.groups[run.groups["round"] == 2].set_index("group")["test_loss"]
    assert by_hand.to_dict() == pytest.approx(groups.to_dict())
    assert set(run.categories["category"]) == {"kind 0", "kind 1", "kind 2"}
    assert len(run.modules) == 2 * 14
    assert {"energy_kept_rank_2", "overlap", "spectrum"} <= set(run.modules.columns)
    assert set(run.partitions["first"]) >= {1, 3}
    assert set(run.tasks["kind"]) == {"client", "aggregate", "evaluate"}
    assert len(run.answers) == 3 * 10
    assert len(run.tiers) == len(run.tiers.drop_duplicates(["round", "group", "tier"]))


def test_a_run_that_has_just_begun_has_empty_frames(finished: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    run = fedllm.load_run(tmp_path)
    assert run.rounds_done == 0
    assert run.rounds.empty
    assert run.clients.empty
    with pytest.raises(RunDirectoryError, match="no run here"):
        fedllm.load_run(tmp_path / "nowhere")


def test_a_sweep_joins_the_frames_of_its_runs(tmp_path: Path) -> None:
    sweep_of(tmp_path, {"a": [1.0, 2.0], "b": [3.0, None]})
    sweep = fedllm.load_sweep(tmp_path)
    assert repr(sweep).endswith("4 runs)")
    last = sweep.groups[(sweep.groups["round"] == 1) & (sweep.groups["group"] == "train")]
    found = last.set_index(["arm", "seed"])["test_loss"].to_dict()
    assert found == pytest.approx({("a", 0): 1.15, ("a", 1): 2.15, ("b", 0): 3.15})
    assert list(sweep.clients.columns[:3]) == ["arm", "seed", "round"]
    with pytest.raises(RunDirectoryError, match="no sweep here"):
        fedllm.load_sweep(tmp_path / "nowhere")


def test_a_program_runs_a_mapping_and_goes_on_with_a_run(
    tiny: Tiny, finished: Path, tmp_path: Path
) -> None:
    raw = yaml.safe_load(tiny.config.read_text(encoding="utf-8"))
    assert fedllm.run(tiny.config, run_dir=finished).rounds_done == 2
    assert fedllm.run(raw, run_dir=finished).rounds_done == 2
    with pytest.raises(UserError, match="run_dir"):
        fedllm.run(raw)
    with pytest.raises(ConfigError, match="rounds"):
        fedllm.run({**raw, "rounds": 0}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_of_any_form_and_rank_are_combined_in_memory(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    folder = save_adapter(base, tmp_path / "a", r=2, seed=1)
    config = LoraConfig.from_pretrained(str(save_adapter(base, tmp_path / "b", r=4, seed=2)))
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(str(tmp_path / "model"))
    pair = (config, get_peft_model_state_dict(model))
    whole = fedllm.aggregate([folder, model, pair], weights=[2, 1, 1], rank="full", base=str(base))
    whole.save(tmp_path / "out")
    expected, other = deltas(base, folder), deltas(base, tmp_path / "model")
    for module, delta in deltas(base, tmp_path / "out").items():
        mean = (expected[module] + other[module]) / 2
        torch.testing.assert_close(delta, mean, atol=1e-4, rtol=1e-4)
    small = fedllm.aggregate([folder, model], rank=1, base=str(base))
    assert small.config.r == 1
    assert small.report.energy_kept < 1
    on = small.on(AutoModelForCausalLM.from_pretrained(base))
    assert get_peft_model_state_dict(on).keys() == small.tensors.keys()
    with pytest.raises(AdapterError, match="0 adapters"):
        fedllm.aggregate([])
    with pytest.raises(AdapterError, match="2 weights"):
        fedllm.aggregate([folder], weights=[1, 2])
