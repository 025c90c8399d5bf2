"""The geometry of a round: its jobs, their time and cost, and the files that it writes."""

from collections import Counter
from pathlib import Path

import pytest

from fedllm.config.models import Config
from fedllm.planning.capacity import Capacity
from fedllm.planning.workers import STARTUP_SECONDS
from fedllm.reporting.plan.plan import Geometry, QueueLimits, RealOptions, plan_geometry
from fedllm.reporting.plan.plan_text import describe_plan, flags_text, queue_line
from fedllm.reporting.usage import Options, cpus_of, gpus_of, memory_of, of_task
from fedllm.rounds.dispatch.dry_run import plan_first_round
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import ClientRecord, FittedRecord, PreparedRecord
from tests.planning.federations import client, config_of, prepared_of
from tests.rounds.simulation import Simulation, complete
from tests.rounds.simulation import config_of as simulated_config

PLENTY = Capacity(free_slots=64, max_parallel=64, largest_array=400)
TIERS = "scheduler__sbatch__tiers"


def geometry(
    config: Config,
    capacity: Capacity = PLENTY,
    *,
    clients: int = 100,
    slots: tuple[int, ...] = (),
    room: QueueLimits | None = None,
    options: RealOptions | None = None,
    **recorded: object,
) -> Geometry:
    prepared = prepared_of([heavy(str(n)) for n in range(clients)])
    prepared = prepared.model_copy(update={"model_parameters": 1_000_000_000, **recorded})
    dry_run = plan_first_round(config, prepared, RunPaths(root=Path("/run")), lambda *_: capacity)
    return plan_geometry(
        dry_run.federation,
        dry_run.cohort,
        dry_run.classes,
        dry_run.plan,
        capacities=dry_run.capacities,
        waves=dry_run.waves,
        logs=dry_run.logs,
        scorers=dry_run.scorers,
        slots=slots,
        room=room or QueueLimits(),
        options=options or RealOptions(),
    )


def heavy(id_: str) -> ClientRecord:
    """Return a client of a few hundred seconds with a model of a billion parameters."""
    return client(id_, test=2).model_copy(update={"train_tokens": 1000 + 100 * int(id_)})


def slurm_of(**changes: object) -> Config:
    given: dict[str, object] = {
        "scheduler__kind": "slurm",
        "scheduler__worker_teraflops": 0.1,
        "clients__cohort": {"count": 80},
    }
    return config_of(**(given | changes))


def test_a_class_has_tasks_bundles_clients_time_memory_and_processors() -> None:
    found = geometry(
        slurm_of(
            scheduler__sbatch={
                "client": {"mem": "8G", "cpus_per_task": 4},
                "tiers": {"large": {"gpus": "a100:2", "time": "1:00:00"}},
            }
        )
    )
    by_class = {array.worker_class: array for array in found.arrays}
    assert set(by_class) == {"small", "large"}
    assert sum(array.clients for array in found.arrays) == found.cohort == 80
    assert sum(array.bundles for array in found.arrays) == found.bundles
    assert sum(array.tasks for array in found.arrays) == found.tasks == sum(found.waves)
    large = by_class["large"]
    assert (large.cpus, large.gpus, large.memory, large.requested_minutes) == (4, 2, "8G", 60)
    small = by_class["small"]
    assert small.requested_minutes is not None
    assert small.requested_minutes >= small.work_minutes + STARTUP_SECONDS / 60
    assert found.gpu_hours > 0
    assert found.cpu_hours == pytest.approx(4 * found.worker_hours)


def test_more_slots_shorten_a_round_until_its_longest_client_is_all_there_is() -> None:
    found = geometry(slurm_of(), slots=(1, 4, 16, 64, 10_000))
    minutes = [time.minutes for time in found.times]
    assert minutes == sorted(minutes, reverse=True)
    assert minutes[0] > 3 * minutes[1]
    longest = max(1000 + 100 * n for n in range(100)) * 4e9 / 1e11
    assert minutes[-1] * 60 >= longest
    assert found.times[-1].tasks > found.times[0].tasks


def test_arrays_are_split_and_submitted_in_waves_and_one_line_says_so() -> None:
    tasks = slurm_of(scheduler__clients_per_task=1, clients__cohort={"count": 24})
    split = geometry(
        tasks,
        Capacity(free_slots=64, max_parallel=64, largest_array=10),
        room=QueueLimits(largest_array=10),
    )
    assert (split.tasks, len(split.waves)) == (24, 1)
    # one task is one client; each class has arrays of at most ten
    assert sum(array.arrays for array in split.arrays) == sum(
        -(-array.tasks // 10) for array in split.arrays
    )
    assert queue_line(split).startswith("MaxArraySize 10, no limit on submitted jobs: 24 tasks go")
    waves = geometry(
        tasks,
        Capacity(free_slots=64, max_parallel=64, largest_array=10, free_tasks=5),
        room=QueueLimits(largest_array=10, most_submitted=5, free_tasks=5),
    )
    assert waves.waves == (5, 5, 5, 5, 4)
    assert queue_line(waves) == (
        "MaxArraySize 10, MaxSubmitJobs 5: 24 tasks go out in 5 waves of up to 5"
    )
    fewer = QueueLimits(largest_array=10, most_submitted=5, free_tasks=4)
    assert "MaxSubmitJobs 5 (room for 4 tasks now): " in queue_line(
        geometry(tasks, PLENTY, room=fewer)
    )
    full = Capacity(free_slots=0, max_parallel=64, largest_array=10, free_tasks=0)
    assert queue_line(geometry(tasks, full)).endswith("no room for any of 24 tasks now")
    unknown = QueueLimits(problem="Slurm does not answer here")
    assert queue_line(geometry(tasks, room=unknown)) == (
        "limits unknown (Slurm does not answer here): 24 tasks go out at once, in 1 array"
    )


def test_a_task_for_each_client_starts_each_anew() -> None:
    bundled = geometry(slurm_of())
    single = geometry(slurm_of(scheduler__clients_per_task=1))
    assert single.tasks == 80 > bundled.tasks
    starts = (single.worker_hours - bundled.worker_hours) * 3600 / STARTUP_SECONDS
    assert starts == pytest.approx(80 - sum(array.parallel for array in bundled.arrays))
    assert single.job_starts_per_minute > bundled.job_starts_per_minute


def test_resident_workers_need_no_start() -> None:
    resident = Capacity(free_slots=2, max_parallel=2, largest_array=400, resident=True)
    found = geometry(slurm_of(), resident)
    assert found.startup_minutes == 0
    assert [array.requested_minutes for array in found.arrays] == [None]


def test_files_and_folders_are_those_that_a_round_really_writes(tmp_path: Path) -> None:
    config = simulated_config(rounds=1, scheduler__clients_per_bundle=1)
    complete(tmp_path, Simulation(), config)
    run = RunPaths(root=tmp_path)
    prepared = PreparedRecord.read(run.prepared)
    resident = Capacity(free_slots=1, max_parallel=1, largest_array=400, resident=True)
    dry_run = plan_first_round(config, prepared, run, lambda *_: resident)
    planned = plan_geometry(
        dry_run.federation,
        dry_run.cohort,
        dry_run.classes,
        dry_run.plan,
        capacities=dry_run.capacities,
        waves=dry_run.waves,
        logs=dry_run.logs,
        scorers=dry_run.scorers,
        slots=(),
        room=QueueLimits(),
        options=RealOptions(),
    )
    folders = {folder.folder: folder for folder in planned.folders}
    first = run.round(1)
    for name, place in (
        ("claims", first.attempt(1).claims),
        ("updates", first.updates),
        ("aggregate", first.aggregate),
    ):
        written = [path for path in place.rglob("*") if path.is_file()]
        assert folders[name].files == len(written), name
        most = max(Counter(path.parent for path in written).values())
        assert folders[name].largest_folder == most, name
    bytes_of_updates = sum(path.stat().st_size for path in first.updates.iterdir())
    assert planned.update_bytes < bytes_of_updates
    assert folders["updates"].bytes == pytest.approx(bytes_of_updates, rel=0.5)
    state = first.global_state.stat().st_size
    assert folders["aggregate"].bytes == pytest.approx(state, rel=0.5)


def test_no_folder_of_a_large_round_has_more_than_400_entries() -> None:
    config = slurm_of(scheduler__clients_per_task=1, clients__cohort={"count": 2000})
    found = geometry(config, clients=2000)
    assert found.tasks == 2000
    largest = {folder.folder: folder.largest_folder for folder in found.folders}
    assert {name for name, entries in largest.items() if entries > 401} <= {"checkpoints"}
    assert {folder.folder: folder.files for folder in found.folders}["updates"] == 2000


def test_evaluations_are_counted_and_estimated() -> None:
    found = geometry(slurm_of(rounds=10, evaluation__every=4)).evaluation
    assert (found.times, found.clients, found.rows) == (4, 100, 200)
    assert found.most_new_tokens == 2 * 200 * 128
    assert found.tasks * found.seconds > 2 * 200 * 128 * 2e9 / 1e11
    never = geometry(slurm_of(evaluation__every=0)).evaluation
    assert (never.times, never.clients, never.seconds) == (0, 0, 0.0)


def test_tasks_that_share_an_evaluation_share_its_time() -> None:
    config = slurm_of(rounds=10, evaluation__batch_size=1)
    one = Capacity(free_slots=1, max_parallel=1, largest_array=400)
    alone, shared = geometry(config, one), geometry(config)
    assert (alone.evaluation.tasks, alone.evaluation.rows) == (1, 200)
    # 200 rows in pieces of at most 16
    assert 2 < shared.evaluation.tasks <= 14
    least = alone.evaluation.seconds / shared.evaluation.tasks
    assert least <= shared.evaluation.seconds < 2 * least
    counted = f"in {shared.evaluation.tasks} tasks"
    assert counted in " ".join(describe_plan(shared).split())
    assert shared.job_starts_per_minute > alone.job_starts_per_minute


def test_what_clients_keep_is_a_folder_of_the_plan() -> None:
    kept = {"small": 1000, "large": 50_000}
    plan = geometry(slurm_of(), kept_bytes=kept)
    (folder,) = [each for each in plan.folders if each.folder == "clients"]
    assert folder.files == 80
    # the tiers have equal shares: 40 of each in a cohort, more or less
    large = round((folder.bytes - 80 * 3000) / 49_000)
    assert 25 < large < 55
    assert folder.bytes == 80 * 2000 + large * 50_000 + (80 - large) * 1000
    without = geometry(slurm_of())
    assert "clients" not in [each.folder for each in without.folders]
    assert plan.bytes == without.bytes + folder.bytes


def test_a_plan_shows_the_predicted_peak_of_a_rank_that_was_chosen() -> None:
    fitted = FittedRecord(rank=8, predicted_bytes={2: 1 << 30, 8: 3 << 29})
    text = describe_plan(geometry(slurm_of(), fitted={"large": fitted}))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if " plain " in line}
    assert rows["large"][-2:] == ["1.5", "GiB"]
    assert rows["small"][-1] == "-"


def test_a_plan_shows_all_options_that_are_set() -> None:
    options = RealOptions(
        classes={"small": {"nodes": "1", "requeue": True, "time": "60"}},
        jobs={"aggregate": {"mem": "4G", "time": "20"}},
    )
    text = describe_plan(geometry(slurm_of(), options=options, slots=(8, 64)))
    assert "  small: --nodes=1 --requeue --time=60" in text.splitlines()
    assert "  aggregate: --mem=4G --time=20" in text.splitlines()
    assert text.startswith("3 rounds; each draws 80 of 100 clients and trains about ")
    assert "job starts: " in text and "tasks go out at once" in text
    here = describe_plan(geometry(slurm_of(), slots=(8, 64)))
    assert not [words for words in ("sbatch", "job starts", "go out at once") if words in here]
    assert any(line.split()[:3] == ["aggregate", "4", "20"] for line in text.splitlines())
    assert flags_text({"a": None, "b": False, "cpus_per_task": 2}) == "--cpus-per-task=2"


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ({}, 0),
        ({"gpus": 2}, 2),
        ({"--gpus": "a100:3"}, 3),
        ({"gpus_per_node": 4, "nodes": "2-4"}, 8),
        ({"gpus-per-task": "1", "ntasks": 3}, 3),
        ({"gres": "gpu:a100:2,shard:4"}, 2),
        ({"gres": "gpu"}, 1),
        ({"gres": "license:7"}, 0),
        ({"gpus": "a100:1,h100:2"}, 3),
        ({"gpus": None}, 0),
    ],
)
def test_gpus_are_read_from_whichever_option_asks_for_them(options: Options, gpus: int) -> None:
    assert gpus_of(options) == gpus
    assert of_task(options, 1, 1) == options


def test_cpus_and_memory_are_read_in_their_own_words() -> None:
    assert cpus_of({}) == 1
    assert cpus_of({"cpus_per_task": 4, "ntasks_per_node": 2, "nodes": 2}) == 16
    assert cpus_of({"cpus-per-task": "2", "ntasks": "3"}) == 6
    assert memory_of({"mem": "24G"}) == "24G"
    assert memory_of({"mem-per-cpu": "2G"}) == "2G per CPU"
    assert memory_of({}) == ""


def test_the_share_of_clients_that_train_each_direction_follows_from_the_tiers() -> None:
    tiers = {
        "one": {"ranks": 2},
        "two": {"ranks": {"attention": 4, "mlp": 8}},
        "three": {"ranks": {"attention": 4, "mlp": 16}},
        "four": {"ranks": 8},
    }
    config = config_of(clients__tiers=tiers, clients__distribution="heavy_tail_light")
    found = geometry(config)
    assert [(p.modules, p.first, p.last, round(p.share, 9)) for p in found.directions] == [
        (("q_proj", "k_proj"), 1, 2, 1.0),
        (("q_proj", "k_proj"), 3, 4, 0.2),
        (("q_proj", "k_proj"), 5, 8, 0.1),
        (("up_proj",), 1, 2, 1.0),
        (("up_proj",), 3, 8, 0.2),
        (("up_proj",), 9, 16, 0.05),
    ]
    text = describe_plan(found)
    assert "share of the clients that train each direction, by tier shares" in text
    assert "q_proj,k_proj         3-4    0.200" in text


def test_a_task_of_several_processes_has_what_each_of_them_asks_for() -> None:
    each: Options = {"cpus_per_task": 3, "gpus-per-task": 1}
    assert (cpus_of(of_task(each, 4, 1)), gpus_of(of_task(each, 4, 1))) == (12, 4)
    assert gpus_of(of_task({"gpus": 2}, 4, 2)) == 2
    assert gpus_of(of_task({"gpus-per-node": 2}, 4, 2)) == 4
