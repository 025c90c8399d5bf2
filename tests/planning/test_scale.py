"""The scale benchmark in small: real rounds on a simulated Slurm, in virtual time."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import memory, simulate
from benchmarks.simulated.cluster import Running, SimulatedSlurm, Task
from benchmarks.simulated.timeline import Timeline
from fedllm.scheduling.slurm.commands import CommandRefused


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Return the folder of runs: in memory if there is such a folder."""
    return memory() or tmp_path


def test_all_clients_train_once_a_round_and_slots_are_full(scratch: Path) -> None:
    figures = simulate(80, 4, seed=0, scratch=scratch)
    for found in figures.rounds:
        assert found.trained == 80
    assert figures.rounds[-1].utilisation >= 0.95


def test_commands_per_minute_do_not_grow_with_the_clients(scratch: Path) -> None:
    few, many = (simulate(n, 4, seed=0, scratch=scratch).rounds[-1] for n in (40, 240))
    assert many.commands["squeue"] > few.commands["squeue"]
    assert many.squeue_per_minute <= 1.1
    assert many.commands_per_minute <= 1.2 * few.commands_per_minute


def test_short_arrays_and_a_short_queue_make_waves(scratch: Path) -> None:
    figures = simulate(80, 8, seed=0, scratch=scratch, max_array_size=4, max_submit_jobs=6)
    for found in figures.rounds:
        assert found.trained == 80
        assert found.largest_array <= 4
    assert figures.rounds[0].arrays > 1


def _sleeping(_task: Task) -> Running:
    yield 600.0
    return False


def _cluster(tmp_path: Path, **limits: Any) -> tuple[SimulatedSlurm, Path]:
    file = tmp_path / "sleep.sbatch"
    file.write_text(
        f"#SBATCH --array=0-5%2\n#SBATCH --job-name=sleep\n#SBATCH --time=5\n"
        f"#SBATCH --output={tmp_path}/%A_%a.out\nsrun python -u jobs/client.py attempt\n"
    )
    return SimulatedSlurm(timeline=Timeline(), slots=4, program=_sleeping, **limits), file


def test_the_simulated_cluster_throttles_arrays_and_ends_tasks_at_their_limit(
    tmp_path: Path,
) -> None:
    slurm, file = _cluster(tmp_path)
    assert slurm.call(["sbatch", str(file)]) == "Submitted batch job 1\n"
    slurm.sleep(60.0)
    listed = slurm.call(["squeue", "--noheader", "--array", "-o", "%i|%T"]).splitlines()
    assert listed[:3] == ["1_0|RUNNING", "1_1|RUNNING", "1_2|PENDING"]
    slurm.sleep(300.0)
    words = ["squeue", "--noheader", "--array", "-t", "all", "-o", "%i|%T"]
    assert slurm.call(words).splitlines()[0] == "1_0|TIMEOUT"
    slurm.call(["scancel", "--quiet", "1_[2-3]"])
    assert slurm.call(words).splitlines()[2:4] == ["1_2|CANCELLED", "1_3|CANCELLED"]


@pytest.mark.parametrize("limits", [{"max_array_size": 5}, {"max_submit_jobs": 5}])
def test_the_simulated_cluster_refuses_what_is_above_its_limits(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    slurm, file = _cluster(tmp_path, **limits)
    with pytest.raises(CommandRefused, match=r"Invalid job array|AssocMaxSubmitJobLimit"):
        slurm.call(["sbatch", str(file)])


def test_the_simulated_cluster_answers_nothing_that_it_does_not_know(tmp_path: Path) -> None:
    slurm, _ = _cluster(tmp_path)
    with pytest.raises(AssertionError, match="--federation"):
        slurm.call(["squeue", "--federation"])
