"""The aggregation job: its result, its errors, and its peak memory of a few modules."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedllm.aggregation.groups import blocks_of
from fedllm.aggregation.route_types import Partial, Problem
from fedllm.config.loading import read_config
from fedllm.errors import AdapterError, ConfigError
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.catalog import method_of
from fedllm.methods.protocol import ServerStep
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.planning.federation import plan_federation
from fedllm.process.server_state import read_state
from fedllm.server.aggregate import aggregate_round, groups_of
from fedllm.server.collected_updates import CollectedUpdates
from fedllm.server.pipeline import Pipeline
from fedllm.storage.paths import RoundPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import AggregateRecord, CohortRecord, CollectionRecord, PreparedRecord
from fedllm.storage.tensors import UpdateFile, publish_update
from fedllm.storage.updates import read_records
from tests.anonymous import peak_bytes
from tests.lora.adapters import dense_sum
from tests.server.collection import MODULES, collect, make_round, sent


def mean(pairs: Sequence[tuple[Factors, float]]) -> Tensor:
    total = sum(rows for _, rows in pairs)
    return dense_sum([factors for factors, _ in pairs], [rows / total for _, rows in pairs])


def holds_the_best_of(paths: RoundPaths, module: str, w_OI: Tensor) -> None:
    """Assert that the round's state of a module is the best one of its rank."""
    with read_state(paths) as file:
        state = file.module(module)
    found = (state["U"].double() * state["S"].double()) @ state["Vh"].double()
    rank = len(state["S"])
    s = torch.linalg.svdvals(w_OI)
    torch.testing.assert_close(state["S"].double(), s[:rank], rtol=1e-3, atol=1e-5)
    assert float((w_OI - found).norm()) <= float(s[rank:].norm()) * (1 + 1e-4) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_clients", [1, 3, 32])
def test_the_state_is_the_best_of_the_weighted_mean(
    tmp_path: Path, dtype: torch.dtype, block_clients: int
) -> None:
    paths = make_round(tmp_path / "run", dtype=dtype, block_clients=block_clients)
    record = aggregate_round(paths)
    assert record == AggregateRecord.read(paths.aggregate_record)
    for module in MODULES:
        holds_the_best_of(paths, module, mean(sent(paths, module, dtype)))
    assert list(record.modules) == list(MODULES)
    assert (record.clients, record.device) == (7, "cpu")
    assert set(record.stages) == {"read", "fold", "decompose", "write"}
    assert all(seconds > 0 for seconds in record.stages.values())
    cohort = CohortRecord.read(paths.cohort)
    stacked = sum(cohort.ranks[client.tier]["a.q"] for client in cohort.clients)
    assert record.modules["a.q"].stacked_rank == stacked
    assert record.modules["a.q"].residual_energy >= 0


def test_a_client_that_is_left_out_does_not_count(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run")
    collect(paths, without=[0, 2, 3])  # the whole of a block among them
    assert aggregate_round(paths).clients == 4
    kept = [pair for place, pair in enumerate(sent(paths, "a.up")) if place not in (0, 2, 3)]
    holds_the_best_of(paths, "a.up", mean(kept))


def test_a_clipped_change_counts_less_in_its_module_alone(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run")
    collect(paths, clipped={1: {"a.q": 0.25}})
    aggregate_round(paths)
    pairs = sent(paths, "a.q")
    total = sum(rows for _, rows in pairs)
    weights = [rows / total * (0.25 if place == 1 else 1) for place, (_, rows) in enumerate(pairs)]
    holds_the_best_of(paths, "a.q", dense_sum([factors for factors, _ in pairs], weights))
    holds_the_best_of(paths, "b.q", mean(sent(paths, "b.q")))


def test_a_factor_mean_clips_the_products_scale_and_leaves_a_as_it_is(tmp_path: Path) -> None:
    ranks = {"small": 3, "large": 3}
    paths = make_round(tmp_path / "run", method="factor_mean", ranks=ranks)
    collect(paths, clipped={1: {"a.q": 0.25}})
    aggregate_round(paths)
    method = method_of(read_config(paths.run.config))
    pairs = sent(paths, "a.q")
    total = sum(rows for _, rows in pairs)
    with read_state(paths) as file:
        state = file.module("a.q")
    scale = method.module_adapter(module="a.q", state=state, rank=3).scale
    a_RI = sum(rows / total * sent.a_RI for sent, rows in pairs)
    b_OR = sum(
        (0.25 if place == 1 else 1) * rows / total * sent.scale / scale * sent.b_OR
        for place, (sent, rows) in enumerate(pairs)
    )
    torch.testing.assert_close(state["A"], a_RI)
    torch.testing.assert_close(state["B"], b_OR)


def test_two_devices_give_the_bits_of_one(tmp_path: Path) -> None:
    one = aggregate_round(make_round(tmp_path / "one"))
    two = aggregate_round(make_round(tmp_path / "two", device=["cpu", "cpu"]))
    five = aggregate_round(make_round(tmp_path / "five", device=["cpu"] * 5))
    assert (two.device, five.device) == ("cpu, cpu", "cpu, cpu, cpu, cpu, cpu")
    assert one.sha256 == two.sha256 == five.sha256
    assert one.modules == two.modules == five.modules


@dataclass(frozen=True, kw_only=True)
class Failing(FlexLora):
    """Fails at one group once another group is being summed, which then waits for the failure."""

    damaged: Problem
    begun: threading.Event = field(default_factory=threading.Event)
    failed: threading.Event = field(default_factory=threading.Event)
    summed: list[Problem] = field(default_factory=list)

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        if step.problem is self.damaged:
            assert self.begun.wait(60)
            self.failed.set()
            raise AdapterError("cannot be summed")
        self.summed.append(step.problem)
        self.begun.set()
        assert self.failed.wait(60)
        time.sleep(1.0)
        return super().fold(block, step)


def test_after_a_failure_the_other_devices_take_no_further_block(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run")
    run = paths.run
    config = read_config(run.config)
    cohort = CohortRecord.read(paths.cohort)
    groups = groups_of(plan_federation(config, PreparedRecord.read(run.prepared)), cohort)
    assert len(groups) == 3
    collection = CollectionRecord.read(paths.collection)
    weights = [update.weight for update in collection.updates]
    source = CollectedUpdates.open(paths, collection, cohort, weights)
    method = Failing(damaged=groups[1].problem, **vars(method_of(config)))
    with read_state(run.round(0)) as before, pytest.raises(AdapterError, match="cannot be summed"):
        Pipeline(
            method=method,
            source=source,
            blocks=blocks_of(list(source.updates), 2),
            total=sum(weights),
            before=before.module,
            take=lambda _module, _result: None,
            devices=[torch.device("cpu")] * 2,
            round=1,
        ).run(groups)
    assert method.summed == [groups[0].problem]


def test_groups_are_those_of_the_whole_cohort(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run")
    run = paths.run
    federation = plan_federation(read_config(run.config), PreparedRecord.read(run.prepared))
    groups = groups_of(federation, CohortRecord.read(paths.cohort))
    assert sorted(group.modules for group in groups) == [("a.down",), ("a.q", "b.q"), ("a.up",)]
    assert {len(group.clients) for group in groups} == {7}
    assert {group.received for group in groups} == {(2, 5)}


# --- errors, after which no state is published


def refused(paths: RoundPaths, words: str) -> None:
    with pytest.raises(AdapterError, match=words) as error:
        aggregate_round(paths)
    assert "\n" not in str(error.value)
    assert not paths.aggregate_record.exists()
    assert not paths.global_state.exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu", "cpu"]])
def test_a_value_that_is_not_finite_is_named_with_its_place(
    tmp_path: Path, value: str, part: str, devices: list[str]
) -> None:
    paths = make_round(tmp_path / "run", device=devices)
    file, client = altered(paths, "b.q", part, lambda tensor: spoil(tensor, float(value)))
    words = rf"^{file}: client {client}: b.q {part} holds {value} at \[1, 1\]; leave it out$"
    refused(paths, words)


def spoil(tensor: Tensor, value: float) -> Tensor:
    tensor[1, 1] = value
    return tensor


def test_factors_of_another_shape_are_named_with_the_needed_shape(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "shape")
    _, client = altered(paths, "a.up", "A", lambda tensor: tensor[:, 1:])
    refused(paths, rf"client {client}: a.up A is float32 \(\d, 11\), need .* numbers \(\d, 12\)$")


def test_sums_beyond_float32_name_their_module(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run")
    for part in "AB":
        altered(paths, "a.down", part, lambda tensor: tensor * 1e25)
    refused(paths, "^a.down: the aggregated S does not fit float32")


def test_sums_beyond_float32_name_the_modules_of_an_iterative_route(tmp_path: Path) -> None:
    modules = {"a.q": (512, 512), "b.q": (512, 512), "c.up": (520, 512)}
    paths = make_round(tmp_path / "run", modules=modules, ranks={"small": 40, "large": 40})
    for part in "AB":
        altered(paths, "c.up", part, lambda tensor: tensor * 1e25)
    refused(paths, "^c.up: the sum of the updates' products does not fit float32")
    altered(paths, "c.up", "B", torch.zeros_like)
    for part in "AB":
        altered(paths, "b.q", part, lambda tensor: tensor * 1e25)
    refused(paths, "^a.q or one of 1 like it: the sum of the updates' products does not fit")


def test_a_changed_byte_is_named_by_file_and_client(tmp_path: Path) -> None:
    paths = make_round(tmp_path / "run")
    file = sorted(paths.updates.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    publish_bytes(file, bytes(content))
    refused(paths, f"^{file}: damaged update .client .*checksum")


def test_no_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="empty list"):
        make_round(tmp_path / "run", device=[])


def altered(
    paths: RoundPaths, module: str, part: str, change: Callable[[Tensor], Tensor]
) -> tuple[Path, str]:
    """Publish the first client's update anew, one factor changed; return its file and id."""
    update = CollectionRecord.read(paths.collection).updates[0]
    path = paths.updates / update.file
    file = UpdateFile(path, update.sha256)
    tensors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    records = read_records(path)
    of_client = {record.client: record for record in records}
    for client, record in of_client.items():
        tensors[client] = {}
        for name in record.scales:
            pair = {p: file.view(client, name, p).clone() for p in "AB"}
            if (client, name) == (update.client, module):
                pair[part] = change(pair[part])
                norms = (float(pair["A"].double().norm()), float(pair["B"].double().norm()))
                if all(map(math.isfinite, norms)):
                    of_client[client].norms[name] = norms
            tensors[client][name] = (pair["A"], pair["B"])
    publish_update(path, records, tensors)
    collect(paths)
    return path, update.client


# --- memory


@pytest.mark.slow
def test_peak_memory_is_that_of_a_few_modules_not_of_the_cohort(tmp_path: Path) -> None:
    modules = {f"{layer}.q": (512, 512) for layer in range(4)}
    paths = make_round(
        tmp_path / "run",
        clients=800,
        modules=modules,
        ranks={"small": 8, "large": 64},
        clients_per_file=50,
        block_clients=4,
    )
    total = sum(file.stat().st_size for file in paths.updates.glob("*.safetensors"))
    peak = peak_bytes(
        "import torch; from fedllm.server.aggregate import aggregate_round; "
        "from fedllm.storage.paths import RoundPaths",
        f"aggregate_round(RoundPaths(root=Path({str(paths.root)!r})))",
    )
    assert total > 400 << 20
    assert peak < 128 << 20, f"{peak >> 20} MiB of {total >> 20}"
    assert AggregateRecord.read(paths.aggregate_record).clients == 800
