"""Outliers of a round: kept, clipped or rejected, and named."""

from pathlib import Path

import pytest

from fedllm.config.models import Config
from fedllm.errors import RunFailed
from fedllm.rounds.collecting import collect
from fedllm.rounds.coordinate import coordinate
from fedllm.rounds.retries import scan_updates
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import (
    CohortRecord,
    CollectionRecord,
    PreparedRecord,
    UpdateRecord,
)
from tests.rounds.simulation import MODULES, Simulation, complete, config_of, opened, states


def config(outliers: str, **changes: object) -> Config:
    return config_of(aggregation__outliers=outliers, **changes)


def drawn(folder: Path) -> list[str]:
    """Return the clients of the first round."""
    probe = Simulation()
    complete(folder / "probe", probe, config_of(rounds=1))
    return sorted(client for _, client in probe.trained)


def collection(root: Path) -> CollectionRecord:
    return CollectionRecord.read(RunPaths(root=root).round(1).collection)


def with_loud(client: str, factor: float = 1e3) -> tuple[Simulation, list[str]]:
    said = list[str]()
    simulation = Simulation(log=said.append)
    simulation.loud = {client: factor}
    return simulation, said


def damage_first(simulation: Simulation) -> None:
    """Simulation that empties the first update file once it is collected."""

    def damage(program: str, target: Path) -> None:
        victim = next(iter(sorted(target.glob("updates/01-000-00.safetensors"))), None)
        if program == "aggregate" and victim:
            victim.write_bytes(b"")
            simulation.before = lambda _program, _target: None

    simulation.before = damage


def test_kept_outliers_are_neither_clipped_nor_left_out(tmp_path: Path) -> None:
    simulation, _ = with_loud(drawn(tmp_path)[1])
    complete(tmp_path / "run", simulation, config("keep", rounds=1))
    found = collection(tmp_path / "run")
    assert not found.failed
    assert [update.clipped for update in found.updates] == [{}, {}, {}, {}]


def test_without_an_outlier_keep_clip_and_reject_give_the_same_state(tmp_path: Path) -> None:
    for outliers in ("keep", "clip", "reject"):
        complete(tmp_path / outliers, Simulation(), config(outliers))
    assert states(tmp_path / "clip") == states(tmp_path / "keep") == states(tmp_path / "reject")


def test_a_clipped_client_counts_in_every_module_as_much_as_the_limit(tmp_path: Path) -> None:
    client = drawn(tmp_path)[1]
    simulation, said = with_loud(client)
    complete(tmp_path / "run", simulation, config("clip", rounds=1))
    found = collection(tmp_path / "run")
    clips = {update.client: update.clipped for update in found.updates}
    assert not found.failed
    assert [name for name, factors in clips.items() if factors] == [client]
    assert set(clips[client]) == set(MODULES)
    assert all(0 < factor < 0.1 for factor in clips[client].values())
    (line,) = [line for line in said if "scaled down" in line]
    assert line.startswith(f"round 1: {client} is scaled down: layer.")
    assert "need at most" in line
    assert "times the median" in line
    assert line.endswith("and 1 other module")
    # a thousand times as large, scaled down a thousand times as much: the same change
    louder, _ = with_loud(client, 1024e3)
    complete(tmp_path / "louder", louder, config("clip", rounds=1))
    for module, factor in clips[client].items():
        again = {u.client: u.clipped for u in collection(tmp_path / "louder").updates}
        assert again[client][module] == pytest.approx(factor / 1024, rel=1e-6)


def test_a_factor_that_nobody_exceeds_changes_nothing(tmp_path: Path) -> None:
    simulation, _ = with_loud(drawn(tmp_path)[1])
    complete(tmp_path / "run", simulation, config("clip", aggregation__outlier_factor=1e6))
    assert not any(update.clipped for update in collection(tmp_path / "run").updates)


def test_a_rejected_client_is_named_with_module_value_limit_and_median(tmp_path: Path) -> None:
    client = drawn(tmp_path)[1]
    simulation, said = with_loud(client)
    complete(tmp_path / "run", simulation, config("reject", rounds=1, clients__quorum=0.75))
    found = collection(tmp_path / "run")
    assert client not in {update.client for update in found.updates}
    assert len(found.updates) == 3
    (why,) = found.failed.values()
    assert list(found.failed) == [client]
    assert why.startswith("layer.")
    for words in ("changes by up to", "need at most", "times the median"):
        assert words in why
    assert f"round 1: {client} is left out: {why}" in said


def test_rejections_count_against_the_quorum(tmp_path: Path) -> None:
    client = drawn(tmp_path)[1]
    simulation, _ = with_loud(client)
    words = rf"3 valid updates of 4 clients.*{client}: layer\..* need at most"
    with pytest.raises(RunFailed, match=words):
        complete(tmp_path / "run", simulation, config("reject"))


@pytest.mark.parametrize("outliers", ["clip", "reject"])
def test_a_collection_that_is_replaced_takes_and_clips_the_same_clients(
    tmp_path: Path, outliers: str
) -> None:
    client = drawn(tmp_path)[1]
    changes = {"rounds": 1, "clients__quorum": 0.75}
    undisturbed, _ = with_loud(client)
    complete(tmp_path / "undisturbed", undisturbed, config(outliers, **changes))
    damaged, _ = with_loud(client)
    damage_first(damaged)
    complete(tmp_path / "damaged", damaged, config(outliers, **changes))
    assert len(damaged.trained) > len(undisturbed.trained)
    before, after = collection(tmp_path / "undisturbed"), collection(tmp_path / "damaged")
    assert after.replaces == 1
    assert after.failed == before.failed
    for was, now in zip(before.updates, after.updates, strict=True):
        assert (now.client, now.clipped, now.weight) == (was.client, was.clipped, was.weight)
    assert states(tmp_path / "damaged") == states(tmp_path / "undisturbed")


def test_many_clipped_clients_are_counted_in_the_log_and_listed_in_the_record(
    tmp_path: Path,
) -> None:
    said = list[str]()
    simulation = Simulation(log=said.append)
    changes: dict[str, object] = {"clients__cohort__count": 8, "clients__dev": 0, "rounds": 1}
    probe = Simulation()
    complete(tmp_path / "probe", probe, config_of(**changes))
    clients = [client for _, client in probe.trained]
    loud = dict(zip(clients, [*["layer.q_proj"] * 3, *["layer.up_proj"] * 3], strict=False))
    simulation.loud = {client: {module: 1e3} for client, module in loud.items()}
    complete(tmp_path / "run", simulation, config("clip", **changes))
    updates = collection(tmp_path / "run").updates
    clips = {update.client: list(update.clipped) for update in updates if update.clipped}
    assert clips == {client: [module] for client, module in loud.items()}
    assert len([line for line in said if "is scaled down" in line]) == 5
    assert "round 1: 1 other clients are scaled down; collection.json lists them" in said


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        ({}, "layer.q_proj has no norms of A and B in its record"),
        (
            {"layer.q_proj": (1.0, float("nan")), "layer.up_proj": (1.0, 1.0)},
            "layer.q_proj has the norms (1.0, nan) of A and B, need finite numbers >= 0",
        ),
    ],
)
def test_an_update_without_usable_norms_is_named_and_its_client_trains_again(
    tmp_path: Path, norms: dict[str, tuple[float, float]], words: str
) -> None:
    said = list[str]()
    simulation = Simulation(log=said.append)

    def spoil(record: UpdateRecord) -> UpdateRecord:
        simulation.spoil = lambda untouched: untouched
        return record.model_copy(update={"norms": norms})

    simulation.spoil = spoil
    complete(tmp_path / "run", simulation, config("clip", rounds=1))
    spoiled = simulation.trained[0][1]
    assert any(f"client {spoiled}: {words}; set aside" in line for line in said)
    assert [client for _, client in simulation.trained].count(spoiled) == 2
    assert len(collection(tmp_path / "run").updates) == 4


@pytest.mark.parametrize("outliers", ["keep", "clip", "reject"])
def test_a_client_that_records_other_norms_than_its_own_is_left_out_by_name(
    tmp_path: Path, outliers: str
) -> None:
    liar = drawn(tmp_path)[1]
    simulation, said = with_loud(liar, 1e6)

    def spoil(record: UpdateRecord) -> UpdateRecord:
        if record.client != liar:
            return record
        return record.model_copy(update={"norms": dict.fromkeys(MODULES, (1.0, 1.0))})

    simulation.spoil = spoil
    complete(tmp_path / "run", simulation, config(outliers, rounds=1, clients__quorum=0.5))
    (why,) = [why for client, why in collection(tmp_path / "run").failed.items() if client == liar]
    assert "but the client recorded 1" in why
    assert liar not in {update.client for update in collection(tmp_path / "run").updates}
    assert any(liar in line and "but the client recorded 1" in line for line in said)


def killed_before_aggregation(program: str, target: Path) -> None:
    if program == "aggregate" and target.name == "0001":
        raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["emptied", "removed", "another"])
def test_a_file_that_changes_between_scan_and_collection_is_scanned_again(
    tmp_path: Path, change: str
) -> None:
    complete(tmp_path / "undisturbed", Simulation(), config("clip", rounds=1))
    said = list[str]()
    simulation = Simulation(log=said.append)
    simulation.before = killed_before_aggregation
    root = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        complete(root, simulation, config("clip", rounds=1))
    simulation.before = lambda _program, _target: None
    run = opened(root, simulation, config("clip", rounds=1))
    paths = run.paths.round(1)
    paths.collection.unlink()
    cohort = CohortRecord.read(paths.cohort)
    scan = scan_updates(
        run, run.known_records.federation(PreparedRecord.read(run.paths.prepared)), cohort
    )
    assert len(scan.published) == 4
    victim, other = sorted(paths.updates.iterdir())[:2]
    content = {"emptied": b"", "another": other.read_bytes()}
    if change == "removed":
        victim.unlink()
    else:
        victim.write_bytes(content[change])
    assert collect(run, cohort, scan) is None
    assert not paths.collection.exists()
    assert any(line.startswith(f"round 1: {victim.name}: ") for line in said)
    coordinate(run)
    assert states(root) == states(tmp_path / "undisturbed")
