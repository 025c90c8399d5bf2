"""Client-level differential privacy: what one client can change, the noise, the accountant."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.config.loading import dump_config, read_config, result_fingerprint, validate
from fedllm.errors import ConfigError
from fedllm.lora.factors import Factors, delta
from fedllm.methods.catalog import METHODS, method_of
from fedllm.methods.options import FlexLoraOptions
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.process.server_state import read_state
from fedllm.server.aggregate import aggregate_round
from fedllm.server.clipping import factor_energy, product_energy
from fedllm.server.epsilon import privacy_after
from fedllm.storage.paths import RoundPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import AggregateRecord, CohortRecord, CollectionRecord, RunRecord
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate
from tests.server.collection import MODULES, RANKS, make_round, sent

CLIENTS = 7
PRIVATE = [name for name, entry in METHODS.items() if entry.private]


def private_round(
    root: Path, method: str, *, clip_norm: float, noise: float, seed: int = 0, **more: Any
) -> RoundPaths:
    """Make a collected round of private clients."""
    ranks = RANKS if METHODS[method].ranks == "any" else dict.fromkeys(RANKS, 3)
    paths = make_round(root, method=method, ranks=ranks, **more)
    raw = read_config(paths.run.config).model_dump(mode="json")
    raw |= {"seed": seed, "privacy": {"clip_norm": clip_norm, "noise_multiplier": noise}}
    raw["aggregation"]["weights"] = "uniform"
    raw["method"]["options"] = {"truncated": "keep"} if method == "flexlora" else {}
    config = validate(raw)
    publish_bytes(paths.run.config, dump_config(config).encode())
    fingerprint = result_fingerprint(config)
    record = RunRecord.read(paths.run.run)
    record.model_copy(update={"result_fingerprint": fingerprint}).publish(paths.run.run)
    return paths


def change(paths: RoundPaths, module: str) -> torch.Tensor:
    """Return the round's change of a module, at the largest rank."""
    method = method_of(read_config(paths.run.config))
    with read_state(paths) as file:
        state = file.module(module)
    rank = (state["S"] if "S" in state else state["A"]).shape[0]
    return delta(method.module_adapter(module=module, state=state, rank=rank))


@pytest.mark.parametrize("method", PRIVATE)
def test_without_clipping_and_noise_it_is_the_uniform_mean(tmp_path: Path, method: str) -> None:
    private = private_round(tmp_path / "a", method, clip_norm=1e6, noise=1e-12)
    plain = private_round(tmp_path / "b", method, clip_norm=1e6, noise=1e-12)
    raw = read_config(plain.run.config).model_dump(mode="json") | {"privacy": {}}
    config = validate(raw)
    publish_bytes(plain.run.config, dump_config(config).encode())
    record = RunRecord.read(plain.run.run)
    record.model_copy(update={"result_fingerprint": result_fingerprint(config)}).publish(
        plain.run.run
    )
    aggregate_round(private)
    record_of_plain = aggregate_round(plain)
    assert record_of_plain.privacy is None
    for module in MODULES:
        torch.testing.assert_close(
            change(private, module), change(plain, module), rtol=1e-4, atol=1e-4
        )


def test_a_clients_change_over_all_modules_has_at_most_the_clipping_norm(tmp_path: Path) -> None:
    # state zero: a client's change is its whole product; all are far above the norm
    paths = private_round(tmp_path / "a", "flexlora", clip_norm=0.5, noise=1e-9)
    aggregate_round(paths)
    products = {m: [delta(factors) for factors, _ in sent(paths, m)] for m in MODULES}
    norms = [
        math.sqrt(sum(float(products[m][place].square().sum()) for m in MODULES))
        for place in range(CLIENTS)
    ]
    assert min(norms) > 0.5
    for module in MODULES:
        mean = (
            sum(
                (0.5 / norm * w for norm, w in zip(norms, products[module], strict=True)),
                torch.zeros_like(products[module][0]),
            )
            / CLIENTS
        )
        u, s, vh = torch.linalg.svd(mean)
        best = (u[:, :5] * s[:5]) @ vh[:5]
        torch.testing.assert_close(change(paths, module), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", PRIVATE)
def test_a_cohort_without_clients_moves_the_state_by_the_noise(tmp_path: Path, method: str) -> None:
    paths = private_round(tmp_path / "a", method, clip_norm=1.0, noise=0.5)
    aggregate_round(paths)
    CohortRecord.read(paths.cohort).model_copy(update={"clients": []}).publish(paths.cohort)
    CollectionRecord(round=1, lease=1, updates=[]).publish(paths.collection)
    record = aggregate_round(paths)
    assert (record.clients, record.privacy is None) == (0, False)
    found = change(paths, "a.q")
    assert found.any() and torch.isfinite(found).all()
    if method == "flexlora":
        for module, (out, in_) in MODULES.items():
            expected = out * in_ * (0.5 / CLIENTS) ** 2  # of normal numbers of that deviation
            assert record.modules[module].total_energy == pytest.approx(expected, rel=0.5)


def test_the_norm_of_a_change_of_two_by_hand() -> None:
    # 2 [3; 0] [1, 0] - 1 [0; 2] [0, 1] = [[6, 0], [0, -2]]
    one = Factors(a_RI=torch.tensor([[1.0, 0.0]]), b_OR=torch.tensor([[3.0], [0.0]]), scale=2.0)
    two = Factors(a_RI=torch.tensor([[0.0, 1.0]]), b_OR=torch.tensor([[0.0], [2.0]]), scale=1.0)
    assert product_energy(one, two, "AB") == pytest.approx(40.0)
    # A: (1, -1), B: (3, -2)
    assert factor_energy(one, two, "AB") == pytest.approx(2.0 + 13.0)
    assert factor_energy(one, two, "B") == pytest.approx(13.0)
    big = random_factors(1, out=11, in_=9, rank=4, scale=2.0)
    near = Factors(a_RI=big.a_RI, b_OR=big.b_OR * (1 + 1e-3), scale=2.0)
    exact = float((delta(near) - delta(big)).square().sum())
    assert product_energy(near, big, "AB") == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("method", ["flexlora", "factor_mean"])
def test_the_noise_has_its_deviation_and_is_the_same_again(tmp_path: Path, method: str) -> None:
    made: dict[str, Any] = {"modules": {"a.q": (40, 40)}}
    still = private_round(tmp_path / "still", method, clip_norm=2.0, noise=1e-12, **made)
    noisy = private_round(tmp_path / "noisy", method, clip_norm=2.0, noise=3.0, **made)
    again = private_round(tmp_path / "again", method, clip_norm=2.0, noise=3.0, **made)
    other = private_round(tmp_path / "other", method, clip_norm=2.0, noise=3.0, seed=1, **made)
    records = [aggregate_round(paths) for paths in (still, noisy, again, other)]
    assert records[1].sha256 == records[2].sha256 != records[3].sha256
    expected = 3.0 * 2.0 / CLIENTS
    if method == "factor_mean":
        for part in "AB":
            states = []
            for paths in (still, noisy):
                with read_state(paths) as file:
                    states.append(file.module("a.q")[part].clone())
            found = float((states[1] - states[0]).std())
            assert found == pytest.approx(expected, rel=0.25), part
    else:
        # the leading directions of 40 x 40 normal noise: the largest is near 2 sqrt(40)
        s = torch.linalg.svdvals(change(noisy, "a.q"))
        assert float(s[0]) == pytest.approx(expected * 2 * math.sqrt(40), rel=0.25)
    privacy = AggregateRecord.read(noisy.aggregate_record).privacy
    assert privacy is not None
    assert (privacy.cohort, privacy.clients, privacy.sampling) == (CLIENTS, CLIENTS, "fixed")


def test_a_factor_that_does_not_train_gets_no_noise_and_counts_for_no_norm(tmp_path: Path) -> None:
    paths = private_round(tmp_path / "a", "ffa", clip_norm=2.0, noise=3.0)
    assert method_of(read_config(paths.run.config)).local_task(1).trained == "B"
    aggregate_round(paths)
    clients = {module: [factors for factors, _ in sent(paths, module)] for module in MODULES}
    norms = [
        math.sqrt(sum(float(clients[m][place].b_OR.double().square().sum()) for m in MODULES))
        for place in range(CLIENTS)
    ]
    counts = [min(1.0, 2.0 / norm) for norm in norms]
    with read_state(paths) as file, read_state(paths.run.round(0)) as first:
        for module, each in clients.items():
            before = first.module(module)["A"].double()
            moved = sum(
                (c * (f.a_RI.double() - before) for c, f in zip(counts, each, strict=True)),
                torch.zeros_like(before),
            )
            # a real client of ffa sends the A that it received
            found = file.module(module)["A"].double()
            torch.testing.assert_close(found, before + moved / CLIENTS, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [[2, 5, 3], [5, 5, 5]])
def test_a_round_adds_clipped_changes_to_the_state(ranks: list[int]) -> None:
    method = FlexLora(seed=1, alpha=16.0, options=FlexLoraOptions(truncated="keep"))
    u, s, vh = torch.linalg.svd(torch.randn(11, 9, generator=torch.Generator().manual_seed(1)))
    before = {"U": u[:, :5].contiguous(), "S": s[:5], "Vh": vh[:5].contiguous()}
    clients = [
        random_factors(n, out=11, in_=9, rank=rank, scale=16.0 / rank)
        for n, rank in enumerate(ranks)
    ]
    counts = [0.25, 1.0, 0.5]
    state = aggregate(
        method, clients, counts, sorted(set(ranks)), before=before, total=3.0, noise_std=1e-12
    ).state
    w = (before["U"] * before["S"]).double() @ before["Vh"].double()
    wanted = w.clone()
    for count, client in zip(counts, clients, strict=True):
        received = method.module_adapter(module="m", state=before, rank=client.rank)
        wanted += count / 3.0 * (delta(client) - delta(received))
    u, s, vh = torch.linalg.svd(wanted)
    found = (state["U"] * state["S"]).double() @ state["Vh"].double()
    torch.testing.assert_close(found, (u[:, :5] * s[:5]) @ vh[:5], rtol=1e-4, atol=1e-4)


def private_config(**sections: Any) -> Any:
    raw: dict[str, Any] = {
        "model": {"path": "nowhere"},
        "data": {"path": "nowhere"},
        "clients": {"tiers": {"one": {"ranks": 2}}, "cohort": {"count": 80}},
        "aggregation": {"weights": "uniform"},
        "method": {"options": {"truncated": "keep"}},
        "privacy": {"clip_norm": 1.0},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return validate(raw)


def test_epsilon_grows_with_rounds_and_falls_with_noise() -> None:
    fixed = [privacy_after(private_config(), 1613, rounds).epsilon for rounds in (1, 10, 50)]
    assert fixed == sorted(fixed)
    less = private_config(privacy={"clip_norm": 1.0, "noise_multiplier": 2.0})
    assert privacy_after(less, 1613, 50).epsilon < fixed[-1]
    poisson = private_config(clients={"cohort": {"count": 80, "sampling": "poisson"}})
    # half the sensitivity: a client that takes part against one that does not
    assert privacy_after(poisson, 1613, 50).epsilon < fixed[-1]


def test_epsilon_of_all_clients_is_that_of_the_gaussian_mechanism() -> None:
    config = private_config(privacy={"clip_norm": 1.0, "noise_multiplier": 10.0, "delta": 1e-5})
    # Canonne, Kamath, Steinke (arXiv 2004.00010), proposition 12, with the Renyi divergence
    # alpha / (2 z^2) of one round, z = 5: the norm of the difference is twice the clipping norm
    found = privacy_after(config, 80, 4).epsilon
    best = min(
        4 * a / (2 * 25) + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1)
        for a in (1.1 + 0.01 * n for n in range(6000))
    )
    assert found == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"aggregation": {"weights": "rows"}}, "aggregation.weights: got rows; with privacy"),
        (
            {"aggregation": {"weights": "uniform", "outliers": "clip"}},
            "aggregation.outliers: got clip; with privacy.clip_norm it has to be keep",
        ),
        ({"clients": {"quorum": 3}}, "clients.quorum: got 3; .* it has to be all"),
        ({"clients": {"over_sample": 0.5}}, "clients.over_sample: got 0.5; .* it has to be 0.0"),
        ({"clients": {"deadline_minutes": 5}}, "deadline_minutes: got 5.0; .* has to be null"),
    ],
)
def test_keys_with_which_other_clients_decide_are_refused(sections: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^.*{words}") as refused:
        private_config(**sections)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(PRIVATE)))
def test_methods_without_a_bound_are_refused(method: str) -> None:
    config = private_config(method={"name": method, "options": {}})
    words = f"method.name {method} cannot bound what one client changes; need one of flexlora"
    with pytest.raises(ConfigError, match=words):
        method_of(config)


def test_flexlora_has_to_keep_what_a_client_does_not_receive() -> None:
    with pytest.raises(ConfigError, match=r"method\.options\.truncated: has to be keep"):
        method_of(private_config(method={"options": {"truncated": "drop"}}))
