"""The file given to sbatch, and what is said when sbatch refuses it; no Slurm is needed."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.models import SbatchSection, SchedulerSection
from fedllm.errors import ConfigError, RunDirectoryError
from fedllm.scheduling.seam import Job, Program
from fedllm.scheduling.slurm.commands import clean_environment
from fedllm.scheduling.slurm.coordinator_job import coordinator_flags, coordinator_script
from fedllm.scheduling.slurm.executor import SlurmScheduler
from fedllm.scheduling.slurm.sbatch_flags import TASK_DEFAULTS, refusal, sbatch_flags


def text_of(
    options: dict[str, Any],
    *,
    tasks: int = 3,
    parallel: int | None = None,
    program: Program = "client",
    logs: Path = Path("/run/logs/0001"),
    **scheduler: Any,
) -> list[str]:
    section = SchedulerSection(python="/env/bin/python", **scheduler)
    job = Job(
        name="r01-train-fedllm-x-a01-small-0",
        program=program,
        argv=("/run/rounds/0001/attempts/01", "--class", "small"),
        tasks=tasks,
        parallel=parallel,
        log_folder=logs,
        options=options,
    )
    scheduled = SlurmScheduler(section=section, jobs_folder=Path("/jobs"))
    return scheduled.script(job).splitlines()


def test_the_file_runs_our_program_as_a_throttled_array_with_everything_explicit() -> None:
    lines = text_of({"cpus_per_task": 2, "partition": "low"}, max_parallel=2)
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --array=0-2%2",
        "#SBATCH --comment='fedllm client: r01-train-fedllm-x-a01-small-0'",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --job-name=r01-train-fedllm-x-a01-small-0",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks=1",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=/run/logs/0001/%A_%a_0_log.out",
        "#SBATCH --partition=low",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@90",
        "#SBATCH --time=60",
    ]
    command = next(line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in command
    # an allocation may be larger than what was asked for
    assert " --nodes=1 --ntasks=1 --cpus-per-task=2 " in command
    assert command.endswith(
        " /env/bin/python -u /jobs/client.py /run/rounds/0001/attempts/01 --class small"
    )


def test_an_array_has_a_throttle_of_its_own() -> None:
    assert "#SBATCH --array=0-2%2" in text_of({}, parallel=2, max_parallel=40)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [(1, 20), (3, 60), ("4:30", 90), ("00:02:00", 40), (240, 90), (0, 90), ("soon", 90)],
)
def test_a_task_is_warned_well_before_its_end_however_short_it_is(
    time: object, seconds: int
) -> None:
    assert f"#SBATCH --signal=USR2@{seconds}" in text_of({"time": time})


@pytest.mark.parametrize("signal", ["INT@60", "B:USR2@60"])
def test_a_warning_that_a_worker_would_not_hear_is_refused(signal: str) -> None:
    with pytest.raises(ConfigError, match=rf"client.signal: got {signal}; a worker hears USR1"):
        text_of({"signal": signal})
    assert "#SBATCH --signal=SIGUSR1@60" in text_of({"signal": "SIGUSR1@60"})


def exported(lines: list[str], environment: dict[str, str]) -> dict[str, str]:
    """Run what comes before the program; return what the program would find."""
    command = next(number for number, line in enumerate(lines) if line.startswith("srun"))
    script = "\n".join([*lines[1:command], "env -0"])
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


def test_caches_lie_on_the_disk_of_the_node_unless_somebody_decided_otherwise(
    tmp_path: Path,
) -> None:
    there = {"TMPDIR": str(tmp_path), "CUDA_CACHE_PATH": "/mine"}
    setup = ("export TRITON_CACHE_DIR=/by/setup",)
    found = exported(text_of({}, setup=setup), there)
    scratch = tmp_path / f"fedllm-{os.getuid()}"
    assert {name: found[name] for name in ("HF_HOME", "XDG_CACHE_HOME")} == {
        "HF_HOME": f"{scratch}/huggingface",
        "XDG_CACHE_HOME": f"{scratch}/cache",
    }
    assert found["TORCHINDUCTOR_CACHE_DIR"] == f"{scratch}/inductor"
    assert found["TORCH_EXTENSIONS_DIR"] == f"{scratch}/torch_extensions"
    assert found["CUDA_CACHE_PATH"] == "/mine"
    assert found["TRITON_CACHE_DIR"] == "/by/setup"
    assert scratch.stat().st_mode & 0o777 == 0o700
    # what `prepare` fetched before stays of use
    assert "HF_HOME" not in exported(text_of({}, program="prepare"), there)
    job = {"SLURM_TMPDIR": str(tmp_path / "job"), **there}
    (tmp_path / "job").mkdir()
    assert exported(text_of({}), job)["HF_HOME"].startswith(str(tmp_path / "job" / "fedllm-"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_that_somebody_else_made_is_not_used(tmp_path: Path) -> None:
    scratch = tmp_path / "fedllm-0"
    scratch.mkdir()
    os.chown(scratch, 65534, 65534)
    found = exported(text_of({}), {"TMPDIR": str(tmp_path)})["TRITON_CACHE_DIR"]
    assert not found.startswith(str(scratch))
    assert found.startswith(str(tmp_path))


def test_one_task_is_an_array_too() -> None:
    assert "#SBATCH --array=0-0%1" in text_of({}, tasks=1)


def test_any_option_passes_and_null_takes_a_default_away() -> None:
    options = {
        "signal": None,
        "time": "2:00:00",
        "requeue": False,
        "--exclusive": True,
        "wckey": "w",
    }
    lines = text_of(options)
    assert "#SBATCH --exclusive" in lines
    assert "#SBATCH --no-requeue" in lines
    assert "#SBATCH --time=2:00:00" in lines
    assert "#SBATCH --wckey=w" in lines
    assert not any("--signal" in line or "--requeue" in line for line in lines)


def test_what_says_the_same_as_fedllm_changes_nothing() -> None:
    given = {"ntasks": 1, "N": "1", "ntasks_per_node": 1, "open-mode": "append", "nodes": None}
    plain = text_of({})
    assert [line for line in text_of(given) if "ntasks-per-node" not in line] == plain
    assert text_of({"no-requeue": True}) == text_of({"requeue": False})


def test_the_logs_folder_is_taken_as_it_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "lr=50%j of %u's \u00fc (a)"
    lines = text_of({}, logs=folder)
    pattern = f"{str(folder).replace('%', '%%')}/%A_%a_0_log.out"
    assert f"#SBATCH --output={shlex.quote(pattern)}" in lines
    step = next(line for line in lines if line.startswith("srun"))
    assert f"--output={pattern.replace('_0_', '_%t_')}" in shlex.split(step)
    log = exported(lines, {"TMPDIR": str(tmp_path), "SLURM_ARRAY_JOB_ID": "7"})["FEDLLM_LOG"]
    assert Path(log).parent == folder


@pytest.mark.parametrize(
    ("name", "word"), [("a\nb", "a line break"), ("a\\b", "a backslash"), ("\udcf6", "bytes that")]
)
def test_a_path_that_slurm_cannot_be_told_is_refused(name: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(
        RunDirectoryError, match=rf"with {word}.*; take another --run-dir"
    ) as caught:
        text_of({}, logs=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_coordinators_script_knows_what_to_run_whatever_export_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", "/the cache")
    monkeypatch.setenv("FEDLLM_TASK", "7_0")
    section = SchedulerSection(python="/env/bin/python", setup=("echo 'it is'", "true"))
    lines = coordinator_script("chain", section).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("# What a shell"))
    assert max(n for n, line in enumerate(lines) if line.startswith("#SBATCH")) < start
    told = subprocess.run(
        ["bash", "-c", "\n".join([*lines[:start], "env -0"])],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    assert {each for each in told if each.startswith("FEDLLM_")} == {
        "FEDLLM_CACHE=/the cache",
        "FEDLLM_COMMAND=run",
        "FEDLLM_PYTHON=/env/bin/python",
        "FEDLLM_SETUP=echo 'it is'\ntrue",
        f"FEDLLM_STATE={os.environ['FEDLLM_STATE']}",
    }


def test_a_warning_for_workers_does_not_replace_that_of_the_coordinator() -> None:
    sbatch = SbatchSection(default={"signal": "USR1@60", "mem": "1G"})
    flags = coordinator_flags(SchedulerSection(sbatch=sbatch))
    assert (flags["signal"], flags["mem"]) == ("B:USR2@120", "1G")
    own = SbatchSection(coordinator={"signal": "B:USR2@60"})
    assert coordinator_flags(SchedulerSection(sbatch=own))["signal"] == "B:USR2@60"
    deaf = SbatchSection(coordinator={"signal": "USR1@60"})
    with pytest.raises(ConfigError, match=r"^scheduler\.sbatch\.coordinator\.signal: got USR1@60"):
        coordinator_flags(SchedulerSection(sbatch=deaf))


def test_setup_lines_come_before_the_program_and_after_what_they_may_override() -> None:
    lines = text_of({}, setup=("module load cuda",))
    exported = next(i for i, line in enumerate(lines) if line.startswith("export FEDLLM_LOG="))
    command = next(i for i, line in enumerate(lines) if line.startswith("srun"))
    assert exported < lines.index("module load cuda") < command


def test_an_option_that_fedllm_decides_is_refused_with_its_key() -> None:
    sbatch = SbatchSection(tiers={"small": {"job_name": "mine"}})
    told = r"^scheduler\.sbatch\.tiers\.small\.job_name: got mine; fedllm sets it \(names find"
    with pytest.raises(ConfigError, match=told):
        sbatch_flags({"job_name": "mine"}, sbatch=sbatch, program="client", defaults=TASK_DEFAULTS)


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("Invalid --time specification", "default.time: x"),
        (
            "invalid partition specified: nope; Batch job submission failed",
            "client.partition: nope",
        ),
        ("Requested node configuration is not available", "tiers.large.mem: 900G"),
        ("unrecognized option '--frobnicate=1'", "client.frobnicate: 1"),
        ("Job violates accounting/QOS policy", "client.qos: q"),
        ("something new", "client"),
    ],
)
def test_a_refusal_names_the_option_it_is_about_and_its_key(said: str, key: str) -> None:
    sbatch = SbatchSection(
        default={"time": "x", "mem": "1G"},
        client={"partition": "nope", "frobnicate": 1, "qos": "q"},
        tiers={"small": {"mem": "2G"}, "large": {"mem": "900G"}},
    )
    flags: dict[str, Any] = {
        "time": "x",
        "partition": "nope",
        "mem": "900G",
        "frobnicate": 1,
        "qos": "q",
    }
    error = refusal(said, flags, sbatch=sbatch, program="client")
    assert str(error) == f"scheduler.sbatch.{key}: refused by sbatch ({said}); change it"


def test_a_command_inherits_nothing_of_the_job_it_runs_in_but_the_cluster() -> None:
    job = {
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_CPU_BIND": "mask",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "me",
        "SBATCH_PARTITION": "elsewhere",
        "SBATCH_ARRAY_INX": "0-9",
        "SQUEUE_STATES": "RUNNING",
        "FEDLLM_TASK": "1_3",
        "FEDLLM_CACHE": "/cache",
        "RANK": "0",
        "PATH": "/bin",
    }
    assert clean_environment(job, configured={"partition"}) == {
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "me",
        "FEDLLM_CACHE": "/cache",
        "PATH": "/bin",
    }
