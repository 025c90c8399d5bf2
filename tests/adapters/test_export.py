"""Exported adapters compute the change of the run's state in other programs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm.adapters.merging import merge
from fedllm.cli.main import run as fedllm
from fedllm.config.loading import dump_config, read_config, result_fingerprint, validate
from fedllm.errors import AdapterError, ModelError, RunDirectoryError
from fedllm.lora.factors import Factors, delta
from fedllm.methods.catalog import method_of
from fedllm.model.base import describe_base
from fedllm.server.export import export_adapter, export_model, newest_state, open_state
from fedllm.storage.hub import hub_key
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import AggregateRecord, PreparedRecord, RunRecord
from fedllm.storage.tensors import write_tensors
from tests.adapters.mounting import mounted
from tests.adapters.peft_folders import deltas, unknown_keys
from tests.methods import aggregating
from tests.tiny import Tiny, raw_config

RANKS = {"attention": 4, "mlp": 6, "other": 4}
SCALINGS = ["fixed", "proportional", "rslora"]


def make_run(
    root: Path,
    tiny: Tiny,
    *,
    scaling: str = "fixed",
    method: str = "flexlora",
    dtype: str = "float32",
    size: float = 1.0,
) -> RunPaths:
    """Make a run whose first round trained: rank 4 in attention, 6 in the MLPs."""
    paths = RunPaths(root=root)
    raw: dict[str, Any] = raw_config(tiny.model.parent)
    raw["lora"] = {"scaling": scaling, "alpha": 10.0, "dropout": 0.1}
    raw["method"] = {"name": method}
    raw["model"]["dtype"] = dtype
    raw["clients"] |= {"dev": 0, "unseen": 0}  # it has no clients
    config = validate(raw)
    publish_bytes(paths.config, dump_config(config).encode())
    RunRecord(run_id="r", result_fingerprint=result_fingerprint(config), versions={}).publish(
        paths.run
    )
    described = describe_base(tiny.model, config.lora.target_modules)
    prepared = PreparedRecord(
        model_fingerprint=described.fingerprint,
        model_path=str(described.path),
        data_fingerprint="",
        data_path="",
        model_parameters=described.parameters,
        modules=described.modules,
        clients=[],
    )
    prepared.publish(paths.prepared)
    for number in (0, 1):
        aggregate(paths, prepared, number, size=size)
    return paths


def aggregate(paths: RunPaths, prepared: PreparedRecord, number: int, *, size: float) -> None:
    """Publish the state of two clients; the state of round 0 is the same times zero."""
    method = method_of(read_config(paths.config))
    ranks = {module: RANKS[record.kind] for module, record in prepared.modules.items()}
    draws = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for module, record in prepared.modules.items():
        rank = ranks[module]
        updates = [
            Factors(
                a_RI=torch.randn(rank, record.in_features, generator=draws),
                b_OR=0.1 * torch.randn(record.out_features, rank, generator=draws),
                scale=size * number,
            )
            for _ in range(2)
        ]
        state = aggregating.aggregate(method, updates, [0.25, 0.75], [rank]).state
        tensors |= {f"{module}.{part}": tensor for part, tensor in state.items()}
    home = paths.round(number)
    AggregateRecord(
        round=number,
        method="flexlora",
        rank=ranks,
        sha256=write_tensors(home.global_state, tensors, {}),
        seconds=0.0,
        clients=2,
        device="cpu",
    ).publish(home.aggregate_record)


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return make_run(tmp_path_factory.mktemp("run") / "r", tiny)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(30)[None]).logits


def expected(run: RunPaths, rank: int) -> dict[str, Tensor]:
    """Return the changes that a client of `rank` would receive."""
    state = open_state(run, None)
    return {
        module: delta(
            state.method.module_adapter(
                module=module, state=state.file.module(module), rank=min(rank, held)
            )
        )
        for module, held in state.ranks.items()
    }


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rank", [None, 1, 5, 6])
def test_peft_computes_the_change_that_the_state_holds_at_a_rank(
    tiny: Tiny, tmp_path: Path, scaling: str, rank: int | None
) -> None:
    run = make_run(tmp_path / "r", tiny, scaling=scaling)
    exported = export_adapter(open_state(run, None), tmp_path / "out", rank=rank)
    assert exported.round == 1
    assert set(exported.ranks.values()) == {min(rank or 6, 4), min(rank or 6, 6)}
    found, wanted = deltas(tiny.model, tmp_path / "out"), expected(run, rank or 6)
    assert set(found) == set(wanted)
    for module, change in wanted.items():
        torch.testing.assert_close(found[module], change, rtol=1e-4, atol=1e-5)
    assert unknown_keys(tiny.model, tmp_path / "out") == ([], [])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_module_has_one_rank_and_one_scale(tiny: Tiny, tmp_path: Path, scaling: str) -> None:
    run = make_run(tmp_path / "r", tiny, scaling=scaling)
    export_adapter(open_state(run, None), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (6, 12, False)
    assert raw["rank_pattern"] == raw["alpha_pattern"] == {}
    assert raw["base_model_name_or_path"] == str(tiny.model)
    assert raw["lora_dropout"] == 0.1


def test_a_merged_model_answers_as_the_base_with_the_adapter(
    tiny: Tiny, run: RunPaths, tmp_path: Path
) -> None:
    export_adapter(open_state(run, None), tmp_path / "adapter", rank=3)
    export_model(open_state(run, None), tmp_path / "merged", rank=3)
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    alone = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert float((merged - alone).abs().max()) > 0.01
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("red cat").input_ids
    assert ids == AutoTokenizer.from_pretrained(tiny.model)("red cat").input_ids


def test_the_state_before_training_changes_nothing(
    tiny: Tiny, run: RunPaths, tmp_path: Path
) -> None:
    assert export_adapter(open_state(run, 0), tmp_path / "out").round == 0
    for change in deltas(tiny.model, tmp_path / "out").values():
        assert not change.any()


def test_a_factor_mean_has_one_rank(tiny: Tiny, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", tiny, method="factor_mean")
    export_adapter(open_state(run, None), tmp_path / "out")
    found = deltas(tiny.model, tmp_path / "out")
    for module, change in expected(run, 6).items():
        torch.testing.assert_close(found[module], change, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="ask for 4"):
        export_adapter(open_state(run, None), tmp_path / "low", rank=2)
    assert not (tmp_path / "low").exists()


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_a_rank_that_the_state_does_not_hold_is_one_line(
    run: RunPaths, tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert fedllm(["export", str(run.root), "--out", str(out), "--rank", str(rank)]) == 2
    assert capsys.readouterr().err == (
        f"fedllm: --rank: got {rank}, the state holds ranks 1 to 6\n"
    )
    assert not out.exists()


def test_a_round_without_a_state_is_one_line(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert fedllm(["export", str(run.root), "--out", str(out), "--round", "7"]) == 2
    assert "0007: the round has no server state yet" in capsys.readouterr().err
    with pytest.raises(RunDirectoryError, match="no round is aggregated yet"):
        newest_state(RunPaths(root=tmp_path))


def test_the_command_says_what_it_wrote(
    tiny: Tiny, run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert fedllm(["export", str(run.root), "--out", str(out)]) == 0
    line = f"{out}: PEFT adapter, of round 1, ranks 4 to 6 in 14 modules of {tiny.model}\n"
    assert capsys.readouterr().out == line
    merged = tmp_path / "merged"
    assert fedllm(["export", str(run.root), "--out", str(merged), "--merge", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["merged"]
    assert said.err == ""


def test_a_change_of_the_base_is_merged_and_not_lost_in_an_adapter(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "r", tiny, method="tests.adapters.shifting:Shifting")
    state = open_state(run, None)
    with pytest.raises(AdapterError, match="use --merge"):
        export_adapter(state, tmp_path / "adapter")
    export_model(state, tmp_path / "merged")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (tiny.model, tmp_path / "merged")
    )
    for module, change in expected(run, 6).items():
        found = after.get_submodule(module).weight - before.get_submodule(module).weight
        torch.testing.assert_close(found.double(), change + 0.01, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_model_that_does_not_fit_the_disk_leaves_nothing(run: RunPaths, tmp_path: Path) -> None:
    place = tmp_path / "full"
    done = mounted("size=16k", place, "export", run.root, "--merge", "--out", place / "out")
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"fedllm: {place / 'out'}: no space left")
    assert done.stdout == ""


def test_another_base_in_the_same_place_is_not_merged_into(tiny: Tiny, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", tiny)
    prepared = PreparedRecord.read(run.prepared)
    prepared.model_copy(update={"model_fingerprint": "another"}).publish(run.prepared)
    with pytest.raises(ModelError, match="not the model that the run trained on"):
        export_model(open_state(run, None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_of_two_names_is_not_merged_into(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    with pytest.raises(ModelError, match=r"lm_head\.weight, model\.embed_tokens\.weight"):
        merge(model, "lm_head", torch.zeros(258, 32))


def test_a_base_from_the_hub_is_named_as_on_the_hub(tiny: Tiny, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", tiny)
    config = read_config(run.config)
    section = config.model.model_copy(update={"path": "owner/name"})
    config = config.model_copy(update={"model": section})
    publish_bytes(run.config, dump_config(config).encode())
    prepared = PreparedRecord.read(run.prepared)
    assert open_state(run, None).base_model == str(tiny.model)
    fetched = str(tmp_path / hub_key("owner/name", None))
    prepared.model_copy(update={"model_path": fetched}).publish(run.prepared)
    assert open_state(run, None).base_model == "owner/name"
