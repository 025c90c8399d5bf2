"""The main job through Slurm arrays: real clients, and resources per tier."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.records import CollectionRecord, EvaluationRecord
from tests.cli.commands import fedllm, in_process, one_line
from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ON_CLUSTER, Begun, arrays, each_trained_once, settings

pytestmark = pytest.mark.slurm

CLIENTS, ROWS = 40, 20
SMALL = (
    "rounds=2",
    "clients.cohort.count=24",
    "clients.dev=2",
    "clients.unseen=2",
    "data.cutoff_tokens=128",
    "training.max_steps=1",
    "training.batch_size=2",
    "evaluation.every=2",
    "evaluation.clients=2",
    "evaluation.rows_per_client=1",
    "evaluation.max_new_tokens=8",
    "scheduler.clients_per_bundle=auto",
)


@pytest.fixture
def natural_instructions(shared: Path, tmp_path: Path) -> list[str]:
    """Some rows of the first clients of the real data, and the configuration shipped for them."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (shared / "data" / "natural-instructions").glob("*.parquet"):
        table, seen = pq.read_table(path), Counter[int]()
        kept = []
        for row, client in enumerate(table["client_id"].to_pylist()):
            seen[client] += 1
            if client < CLIENTS and seen[client] <= ROWS:
                kept.append(row)
        pq.write_table(table.take(kept), folder / path.name)
    paths = (f"data.path={folder}", f"model.path={shared / 'models' / 'nano-base'}")
    config = shipped("configs/natural-instructions-small.yaml")
    return [str(config), *settings(*paths, f"storage.cache={tmp_path / 'cache'}")]


def test_an_array_run_of_natural_instructions_clients_gives_the_bits_of_an_inline_run(
    natural_instructions: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    root, inline = tmp_path / "run", tmp_path / "inline"
    on_cluster = settings(*ON_CLUSTER, *SMALL)
    done = fedllm("run", *natural_instructions, "--run-dir", root, *on_cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = settings(*SMALL, "scheduler.kind=inline")
    reference = in_process("run", *natural_instructions, "--run-dir", inline, *here)
    assert reference.returncode == 0, reference.stderr
    assert len(states(root)) == 3
    assert states(root) == states(inline)
    paths = RunPaths(root=root)
    for number in (1, 2):
        updates = CollectionRecord.read(paths.round(number).collection).updates
        assert len(updates) == 24
        assert {update.tier for update in updates} == {"type1", "type2", "type3", "type4"}
        assert not paths.round(number).attempt(2).root.exists()
    assert mean_loss(paths, 2) < mean_loss(paths, 0)
    # prepare, three states, two evaluations, two rounds of one class
    assert len(arrays(cluster, root)) == 8


def mean_loss(paths: RunPaths, number: int) -> float:
    clients = EvaluationRecord.read(paths.round(number).evaluation_record).clients
    return sum(client.as_deployed.loss for client in clients) / len(clients)


def test_tiers_of_other_sbatch_options_train_in_arrays_of_their_own_once_a_wrong_one_is_mended(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.run("run", rounds=1)
    paths = RunPaths(root=root).round(2)
    partition = "scheduler.sbatch.{}.partition={}".format
    refused = one_line(fedllm(*begun.words(root, partition("client", "nope"))))
    assert refused.startswith("fedllm: scheduler.sbatch.client.partition: nope: refused by sbatch")
    assert not arrays(cluster, root)
    # of two classes, one is refused: the other's array is kept
    options = (partition("client", "null"), "scheduler.sbatch.tiers.large.time=20")
    refused = one_line(fedllm(*begun.words(root, *options, partition("tiers.small", "nope"))))
    assert refused.startswith("fedllm: scheduler.sbatch.tiers.small.partition: nope: refused by ")
    assert classes(cluster, root, 1) == {"large": "low|20:00"}
    done = fedllm(*begun.words(root, *options, partition("tiers.small", "high")))
    assert done.returncode == 0, done.stderr
    assert classes(cluster, root, 1) == {"large": "low|20:00"}
    # the least that a worker of measured, short work asks for
    assert classes(cluster, root, 2) == {"small": "high|5:00"}
    assert each_trained_once(paths)
    assert states(root) == undisturbed


def classes(cluster: Cluster, root: Path, attempt: int) -> dict[str, str]:
    """Return partition and time limit of an attempt's arrays, by the class in their names."""
    found = {}
    for name, (id_,) in arrays(cluster, root, f"r0002-a{attempt:02d}-").items():
        asked = cluster.slurm("squeue", "-h", "-t", "all", "-j", id_, "-o", "%P|%l")
        (found[name.split("-")[-2]],) = set(asked.split())
    return found
