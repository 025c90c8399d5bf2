"""A resident worker answers job by job, writes to the jobs' logs, and ends with its parent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVE = [sys.executable, "-m", "fedllm.programs.serve"]


@pytest.fixture
def server() -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(SERVE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    with process:
        assert json.loads(process.stdout.readline()) == {"ready": True}
        yield process
        process.kill()


def answer_to(server: "subprocess.Popen[str]", **message: object) -> dict[str, object]:
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps({"environment": {}, **message}) + "\n")
    server.stdin.flush()
    answer: dict[str, object] = json.loads(server.stdout.readline())
    return answer


def test_it_answers_every_job_logs_it_and_ends_with_stdin(
    server: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    log = tmp_path / "logs" / "worker.log"
    log.parent.mkdir()
    log.write_text("before\n")
    job = tmp_path / "job"
    for number in (1, 2):
        found = answer_to(
            server,
            id=f"t{number}",
            program="aggregate",
            argv=[str(tmp_path / "rounds" / "0001"), "--job", str(job)],
            log=str(log),
        )
        assert found == {"id": f"t{number}", "exit": 2}
    lines = log.read_text().splitlines()
    assert lines[0] == "before"
    assert [line for line in lines if "not a run directory" in line] == lines[1:]
    error = json.loads((job / "error.json").read_text())
    assert (error["exit_code"], error["log"]) == (2, str(log))
    assert server.stdin
    server.stdin.close()
    assert server.wait(10) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_it_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen({SERVE!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
            "child.stdout.readline()\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # an orphan that nobody reaps is as good as gone
    return " Z " not in Path(f"/proc/{pid}/stat").read_text()
