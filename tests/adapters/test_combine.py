"""The combined adapter is the weighted mean of what PEFT computes from each input."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.errors import AdapterError, ConfigError, DataError, RunDirectoryError
from fedllm.methods.catalog import METHODS
from fedllm.server.combine import (
    Combined,
    CombineRequest,
    RequestedRank,
    WeightedAdapter,
    combine_adapters,
)
from tests.adapters.peft_folders import (
    deltas,
    make_llama,
    save_adapter,
    unknown_keys,
    weighted_mean,
)

KINDS = ["plain", "rslora", "patterns", "regex", "bfloat16", "float16"]
WEIGHTS = [3.0, 1.0, 0.5, 2.0, 0.0, 4.0]


def combine(
    folders: list[Path],
    out: Path,
    weights: list[float] | None = None,
    *,
    rank: RequestedRank = None,
    method: str = "flexlora",
    dtype: str = "float32",
) -> Combined:
    shares = weights or [1.0] * len(folders)
    adapters = [
        WeightedAdapter(folder=folder, weight=weight)
        for folder, weight in zip(folders, shares, strict=True)
    ]
    return combine_adapters(
        CombineRequest(
            adapters=adapters,
            out=out,
            rank=rank,
            method=method,
            device="cpu",
            dtype=dtype,
            allow_missing=True,
        )
    )


def test_in_full_the_result_is_the_weighted_mean_of_pefts_changes(
    llama: Path, zoo: dict[str, Path], tmp_path: Path
) -> None:
    folders = [zoo[kind] for kind in KINDS]
    combined = combine(folders, tmp_path / "out", WEIGHTS, rank="full")
    expected = weighted_mean([deltas(llama, folder) for folder in folders], WEIGHTS)
    found = deltas(llama, tmp_path / "out")
    assert set(found) == set(expected)
    for module, mean in expected.items():
        torch.testing.assert_close(found[module], mean, rtol=1e-4, atol=1e-4)
    assert combined.energy_kept == pytest.approx(1.0)
    assert unknown_keys(llama, tmp_path / "out") == ([], [])
    stacked = {
        "model.layers.0.self_attn.q_proj": 16,  # 2 + 4 + 5 + 2 + 8, the smaller side is 16
        "model.layers.0.self_attn.v_proj": 8,
        "model.layers.1.self_attn.k_proj": 2,
        "model.layers.0.mlp.gate_proj": 10,
    }
    assert {module: combined.modules[module].rank for module in stacked} == stacked


@pytest.mark.parametrize("rank", [1, 3, 6, 12])
def test_at_a_lower_rank_nothing_could_be_nearer(
    llama: Path, zoo: dict[str, Path], tmp_path: Path, rank: int
) -> None:
    folders = [zoo["plain"], zoo["rslora"], zoo["patterns"]]
    combined = combine(folders, tmp_path / "out", rank=rank)
    expected = weighted_mean([deltas(llama, folder) for folder in folders], [1, 1, 1])
    for module, found in deltas(llama, tmp_path / "out").items():
        s = torch.linalg.svdvals(expected[module])
        least = s[rank:].square().sum().sqrt()
        assert float((found - expected[module]).norm()) == pytest.approx(
            float(least), rel=1e-4, abs=1e-4
        )
        kept = float(s[:rank].square().sum() / s.square().sum())
        assert combined.modules[module].energy_kept == pytest.approx(kept, rel=1e-6)
        assert combined.modules[module].rank == min(rank, len(s))
        assert combined.modules[module].capped == (rank > len(s))


def test_without_a_rank_every_module_gets_the_largest_of_its_inputs(
    zoo: dict[str, Path], tmp_path: Path
) -> None:
    combined = combine([zoo["plain"], zoo["patterns"]], tmp_path / "out")
    assert {module: found.rank for module, found in combined.modules.items()} == {
        "model.layers.0.mlp.gate_proj": 6,
        "model.layers.1.mlp.gate_proj": 6,
        "model.layers.0.self_attn.q_proj": 5,
        "model.layers.1.self_attn.q_proj": 3,
        "model.layers.0.self_attn.v_proj": 2,
        "model.layers.1.self_attn.v_proj": 2,
    }
    assert [entry.missing for entry in combined.inputs] == [
        ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"),
        (),
    ]


def test_one_adapter_comes_out_as_it_was(llama: Path, zoo: dict[str, Path], tmp_path: Path) -> None:
    combine([zoo["patterns"]], tmp_path / "out")
    expected = deltas(llama, zoo["patterns"])
    for module, found in deltas(llama, tmp_path / "out").items():
        torch.testing.assert_close(found, expected[module], rtol=1e-4, atol=1e-4)


def test_no_direction_of_the_result_is_dead(zoo: dict[str, Path], tmp_path: Path) -> None:
    combine([zoo["plain"], zoo["plain"]], tmp_path / "out", rank="full")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        if "lora_A" in name:
            assert tensor.shape[0] == 4
            torch.testing.assert_close(tensor.norm(dim=1), torch.ones(4))


def test_order_and_scale_of_weights_change_nothing(
    llama: Path, zoo: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [(zoo["plain"], 0.3), (zoo["rslora"], 0.1), (zoo["float16"], 0.6)]
    found = []
    for number, order in enumerate(itertools.permutations(pairs)):
        weights = [weight * (number + 1) for _, weight in order]
        out = tmp_path / str(number)
        combined = combine([folder for folder, _ in order], out, weights, rank=4)
        assert sum(entry.share for entry in combined.inputs) == pytest.approx(1.0)
        found.append(deltas(llama, out))
    for other in found[1:]:
        for module, change in found[0].items():
            torch.testing.assert_close(other[module], change, rtol=1e-4, atol=1e-4)


def test_conv1d_bases_combine_too(gpt2: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [
        save_adapter(gpt2, tmp_path / "a", seed=1, r=2, **shared),
        save_adapter(gpt2, tmp_path / "b", seed=2, r=5, use_rslora=True, **shared),
    ]
    combine(folders, tmp_path / "out", [1.0, 3.0], rank="full")
    expected = weighted_mean([deltas(gpt2, folder) for folder in folders], [1.0, 3.0])
    found = deltas(gpt2, tmp_path / "out")
    assert set(found) == set(expected)
    for module, mean in expected.items():
        torch.testing.assert_close(found[module], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_result_is_float32_unless_asked_otherwise(
    llama: Path, zoo: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    folders = [zoo["bfloat16"], zoo["float16"]]
    combine(folders, tmp_path / "out", rank="full", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    expected = weighted_mean([deltas(llama, folder) for folder in folders], [1, 1])
    digits = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}[dtype]
    for module, found in deltas(llama, tmp_path / "out").items():
        assert float((found - expected[module]).norm() / expected[module].norm()) < digits


def test_factor_mean_averages_a_and_b_apart_and_refuses_mixed_ranks(
    llama: Path, zoo: dict[str, Path], tmp_path: Path
) -> None:
    other = save_adapter(llama, tmp_path / "other", seed=9, r=2, lora_alpha=16)
    combine([zoo["plain"], other], tmp_path / "out", [1.0, 3.0], method="factor_mean")
    raw = [load_file(folder / "adapter_model.safetensors") for folder in (zoo["plain"], other)]
    for module, found in deltas(llama, tmp_path / "out").items():
        name = f"base_model.model.{module}.lora_"
        a, b = (
            0.25 * raw[0][f"{name}{part}.weight"].double()
            + 0.75 * raw[1][f"{name}{part}.weight"].double()
            for part in "AB"
        )
        torch.testing.assert_close(found, 8.0 * b @ a, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="factor_mean needs adapters of one shape and rank"):
        combine([zoo["plain"], zoo["rslora"]], tmp_path / "mixed", method="factor_mean")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, entry in METHODS.items()
        if (entry.ranks, entry.base, entry.client_state) == ("any", "stays", "none")
    ],
)
def test_every_method_for_mixed_ranks_combines_adapters_of_any_ranks(
    llama: Path, zoo: dict[str, Path], tmp_path: Path, method: str
) -> None:
    folders = [zoo[kind] for kind in KINDS]
    combined = combine(folders, tmp_path / "out", WEIGHTS, method=method)
    assert all(0 <= module.energy_kept <= 1 for module in combined.modules.values())
    found = deltas(llama, tmp_path / "out")
    assert set(found) == set(combined.modules)
    assert all(bool(change.isfinite().all() and change.any()) for change in found.values())
    # one adapter alone comes out as it is
    combine([zoo["patterns"]], tmp_path / "one", method=method)
    for module, change in deltas(llama, zoo["patterns"]).items():
        one = deltas(llama, tmp_path / "one")[module]
        torch.testing.assert_close(one, change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [n for n, e in METHODS.items() if e.client_state != "none"])
def test_a_method_whose_clients_keep_a_part_makes_no_adapter(
    zoo: dict[str, Path], tmp_path: Path, method: str
) -> None:
    with pytest.raises(AdapterError, match=f"^--method {method}: clients keep a part"):
        combine([zoo["plain"]], tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [n for n, e in METHODS.items() if e.base == "changes"])
def test_a_method_that_changes_the_base_makes_no_adapter(
    zoo: dict[str, Path], tmp_path: Path, method: str
) -> None:
    with pytest.raises(AdapterError, match=f"^--method {method}: changes the base, not only"):
        combine([zoo["plain"]], tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_what_the_inputs_agree_on_is_carried_over(
    llama: Path, zoo: dict[str, Path], tmp_path: Path
) -> None:
    def targets(*folders: Path) -> object:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        combine(list(folders), out)
        assert unknown_keys(llama, out) == ([], [])
        raw = json.loads((out / "adapter_config.json").read_bytes())
        assert raw["base_model_name_or_path"] == str(llama)
        assert raw["task_type"] == "CAUSAL_LM"
        return raw["target_modules"]

    first_layer = save_adapter(llama, tmp_path / "first", layers_to_transform=[0])
    assert targets(zoo["plain"], zoo["bfloat16"]) == ["q_proj", "v_proj"]
    assert targets(zoo["plain"], zoo["rslora"]) == ["gate_proj", "q_proj", "v_proj"]
    assert targets(zoo["regex"]) == r"model\.layers\.1\.(self_attn\.k_proj|mlp\.down_proj)"
    assert targets(first_layer) == ["q_proj", "v_proj"]
    assert targets(first_layer, zoo["regex"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.k_proj",
    ]


def test_the_same_inputs_give_the_same_bytes(zoo: dict[str, Path], tmp_path: Path) -> None:
    for name in "ab":
        combine([zoo["plain"], zoo["patterns"]], tmp_path / name, rank=9)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# --- what is refused, with nothing written


def test_adapters_of_other_bases_are_refused_with_both_names(
    llama: Path, zoo: dict[str, Path], tmp_path: Path
) -> None:
    other = make_llama(tmp_path / "other-base", seed=1)
    foreign = save_adapter(other, tmp_path / "foreign")
    with pytest.raises(AdapterError, match=rf"(?s){llama}.*{other}"):
        combine([zoo["plain"], foreign], tmp_path / "out")
    unnamed = tmp_path / "unnamed"
    shutil.copytree(zoo["plain"], unnamed)
    config = unnamed / "adapter_config.json"
    raw = json.loads(config.read_bytes())
    config.write_text(json.dumps(raw | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="a base it does not name"):
        combine([zoo["plain"], unnamed], tmp_path / "out")
    config.write_text(json.dumps(raw | {"revision": "old"}))
    with pytest.raises(AdapterError, match=r"revision old"):
        combine([zoo["plain"], unnamed], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_both_name_no_base_are_combined(zoo: dict[str, Path], tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(zoo["plain"], folder)
        raw = json.loads((folder / "adapter_config.json").read_bytes())
        raw["base_model_name_or_path"] = None
        (folder / "adapter_config.json").write_text(json.dumps(raw))
    assert combine(folders, tmp_path / "out").base_model is None


def test_one_base_may_be_named_by_two_paths(
    llama: Path, zoo: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(llama)
    other = save_adapter(tmp_path / "link", tmp_path / "other")
    assert len(combine([zoo["plain"], other], tmp_path / "out").inputs) == 2


def test_shapes_that_disagree_are_refused(zoo: dict[str, Path], tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(zoo["plain"], wider)
    path = wider / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.zeros(2, 24)
    save_file(tensors, path)
    words = rf"q_proj.*16x16 in {zoo['plain']} and 16x24 in {wider}"
    with pytest.raises(AdapterError, match=words):
        combine([zoo["plain"], wider], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverged_adapter_is_named_and_takes_the_half_written_result_with_it(
    zoo: dict[str, Path], tmp_path: Path
) -> None:
    diverged = tmp_path / "diverged"
    shutil.copytree(zoo["plain"], diverged)
    path = diverged / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=rf"^{diverged}: {name} holds nan at \[0, 0\]"):
        combine([zoo["plain"], diverged], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="nan"):
        combine([zoo["plain"], diverged], tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(zoo: dict[str, Path], tmp_path: Path, rank: int) -> None:
    with pytest.raises(AdapterError, match=f"--rank: got {rank}, need >= 1"):
        combine([zoo["plain"]], tmp_path / "out", rank=rank)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_names_its_adapter(
    zoo: dict[str, Path], tmp_path: Path, weight: float
) -> None:
    with pytest.raises(AdapterError, match=f"{zoo['plain']}: its weight is {weight:g}"):
        combine([zoo["rslora"], zoo["plain"]], tmp_path / "out", [1.0, weight])


def test_weights_that_sum_to_zero_are_refused(zoo: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="weights are zero"):
        combine([zoo["plain"], zoo["rslora"]], tmp_path / "out", [0.0, 0.0])


@pytest.mark.parametrize("size", [1e-300, 1e200, 1e307])
def test_weights_of_any_size_count_by_their_proportions(
    llama: Path, zoo: dict[str, Path], tmp_path: Path, size: float
) -> None:
    folders = [zoo["plain"], zoo["rslora"]]
    combine(folders, tmp_path / "usual", [1.0, 3.0])
    combined = combine(folders, tmp_path / "out", [size, 3.0 * size])
    assert [entry.share for entry in combined.inputs] == pytest.approx([0.25, 0.75])
    usual = deltas(llama, tmp_path / "usual")
    for module, found in deltas(llama, tmp_path / "out").items():
        torch.testing.assert_close(found, usual[module])


def test_weights_beyond_all_numbers_are_refused(zoo: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sum to more than a number holds"):
        combine([zoo["plain"], zoo["rslora"]], tmp_path / "out", [1.5e308, 1.5e308])


def test_a_method_that_changes_the_base_is_refused(zoo: dict[str, Path], tmp_path: Path) -> None:
    method = "tests.adapters.shifting:Shifting"
    with pytest.raises(AdapterError, match="changes the base"):
        combine([zoo["plain"]], tmp_path / "out", method=method)


def test_names_that_do_not_exist_are_told_with_those_that_do(
    zoo: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="bfloat16"):
        combine([zoo["plain"]], tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="flexlora"):
        combine([zoo["plain"]], tmp_path / "out", method="flexlra")


def test_a_folder_below_a_file_cannot_be_written(zoo: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        combine([zoo["plain"]], tmp_path / "file" / "out")
