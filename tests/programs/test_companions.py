"""Processes that a command starts on its host are one task with it."""

import sys
from pathlib import Path

from fedllm.programs.companions import companions

TELL = """
import sys
from fedllm.scheduling.environment import TaskEnvironment
own = TaskEnvironment().identity
with open(sys.argv[1], "w") as out:
    out.write(f"{own.task}\\n{own.rank} of {own.num_processes}\\n{own.rendezvous}")
"""


def test_processes_that_a_command_starts_are_of_its_task_and_know_where_to_meet(
    tmp_path: Path,
) -> None:
    with companions(2, [sys.executable, "-c", TELL, str(tmp_path / "out")]) as own:
        pass
    assert (own.rank, own.num_processes) == (0, 2)
    said = (tmp_path / "out").read_text().splitlines()
    assert said == [own.task, "1 of 2", own.rendezvous]
