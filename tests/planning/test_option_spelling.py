import pytest

from fedllm.planning.option_spelling import by_flag, time_minutes


def test_options_are_named_by_their_long_flags() -> None:
    written = {"cpus_per_task": 2, "--mem-per-cpu": "1G", " t ": 5, "-p": "low", "N": 1}
    assert by_flag(written) == {
        **{"cpus-per-task": 2, "mem-per-cpu": "1G", "time": 5, "partition": "low", "nodes": 1}
    }


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
