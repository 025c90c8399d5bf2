import pytest

from fedllm.planning.sbatch_spelling import by_flag, flag_name, refusal_reason, time_minutes


def test_options_are_named_by_their_long_flags() -> None:
    written = {"cpus_per_task": 2, "--mem-per-cpu": "1G", " t ": 5, "-p": "low", "N": 1}
    assert by_flag(written) == {
        **{"cpus-per-task": 2, "mem-per-cpu": "1G", "time": 5, "partition": "low", "nodes": 1}
    }


@pytest.mark.parametrize(
    "written",
    [
        *("ntasks", "ntasks_per_node", "--ntasks-per-socket", "n", "-n", "ntasks-per-gpu"),
        *("clusters", "M", "-M", "clus", "array", "a", "wrap", "parsable", "quiet", "Q", "nodes"),
        *("N", "test-only", "wait", "W", "output", "o", "error", "e", "open_mode", "job-name"),
        *("J", "job_na", "dependency", "d", "chdir", "-D", "uid", "gid", "input", "version"),
    ],
)
def test_options_that_change_what_a_task_is_are_refused(written: str) -> None:
    name = flag_name(written)
    for value in (3, "3", True):
        reason = refusal_reason(name, value) or ""
        assert reason.startswith(f"got {value}; fedllm sets it (")
        assert reason.endswith("); remove it")
    assert refusal_reason(name, None) is refusal_reason(name, False) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ntasks", 1), ("ntasks", "1"), ("ntasks-per-node", 1), ("nodes", 1), ("nodes", "1-1")),
        *(("open-mode", "append"), ("requeue", True), ("signal", "USR1@60"), ("exclusive", True)),
        *(("gpus-per-task", 1), ("export", "NONE"), ("wait-all-nodes", 1), ("hold", True)),
    ],
)
def test_options_that_keep_a_task_one_process_are_allowed(name: str, value: object) -> None:
    assert refusal_reason(name, value) is None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *((name, True, "not the name") for name in ("ntasks=3", "n 3", "", "comment=a --wrap")),
        ("comment", "a\n#SBATCH --ntasks=3", "an option is one line"),
    ],
)
def test_an_option_that_hides_another_is_refused(name: str, value: object, reason: str) -> None:
    assert (refusal_reason(name, value) or "").startswith(reason)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        (90, 90.0),
        ("90", 90.0),
        ("90:30", 90.5),
        ("2:00:00", 120.0),
        ("1-0", 1440.0),
        ("1-12", 2160.0),
        ("1-12:30", 2190.0),
        ("7-00:00:30", 10080.5),
        (0, None),
        ("UNLIMITED", None),
        ("infinite", None),
        ("", None),
        (None, None),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: object, minutes: float | None) -> None:
    assert time_minutes(time) == minutes


@pytest.mark.parametrize("time", ["soon", "1:2:3:4", "1-", "1.5", "True"])
def test_a_time_of_another_form_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match=r"not a time limit|invalid literal"):
        time_minutes(time)
