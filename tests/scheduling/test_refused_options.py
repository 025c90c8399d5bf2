"""Options of sbatch that define what a task is: fedllm sets them, users may not."""

import pytest

from fedllm.planning.option_spelling import flag_name
from fedllm.scheduling.slurm.sbatch_flags import refusal_reason


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
