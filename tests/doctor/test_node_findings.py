"""Findings about a compute node, and their text."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.doctor.findings import Finding, describe_findings
from fedllm.doctor.node_findings import NodeRequirements, node_findings
from fedllm.doctor.trials import NodeRecord, ProbeResult

RUNS = Path("/shared/runs")
HERE = {"fedllm": "1.0", "torch": "2.9"}


def judged(
    result: dict[str, Any] | None = None, requirements: dict[str, Any] | None = None, **node: Any
) -> dict[str, Finding]:
    record: dict[str, Any] = {
        "node": "n7",
        "host": "n7.big",
        "clock": 0.0,
        "python": "3.11.7 (/env/bin/python)",
        "versions": HERE,
        "broken": {},
        "gpus": [],
        "cpus": 4,
        "memory_bytes": 2**30,
        "refused": {},
        "absent": [],
        "storage_problem": "",
        "local_bytes": None,
        "local_problem": "",
        "secret": "ab",
    }
    times: dict[str, Any] = {"clock_seconds": 0.2, "seen_here": 0.1, "seen_there": 0.3}
    needs: dict[str, Any] = {
        "key": "scheduler.sbatch.client",
        "cpus": 1,
        "gpus": False,
        "versions": HERE,
        "visibility_seconds": 90.0,
        "node_local": None,
        "submits": False,
        "secret": "ab",
    }
    found = node_findings(
        "client",
        ProbeResult(node=NodeRecord(**(record | node)), **(times | (result or {}))),
        NodeRequirements(**(needs | (requirements or {}))),
        RUNS,
    )
    return {finding.check.removeprefix("node n7 (client): "): finding for finding in found}


def test_a_good_node_has_nothing_to_change_and_what_was_not_asked_for_is_not_done() -> None:
    found = judged()
    assert [f.level for f in found.values()] == ["ok"] * 4 + ["not done", "ok", "ok"]
    assert found["storage.node_local"].level == "not done"
    assert not any(f.change for f in found.values())


@pytest.mark.parametrize(
    ("result", "node", "level", "words"),
    [
        ({}, {"storage_problem": "/shared is not there"}, "fail", "/shared is not there"),
        ({}, {"absent": ["/cache"]}, "fail", "does not have /cache"),
        ({"seen_here": None}, {}, "fail", "not seen here within 90 s"),
        ({"seen_there": None}, {}, "fail", "not seen there within 90 s"),
        ({"seen_there": 60.0}, {}, "warn", "there after 60.0 s"),
        ({"clock_seconds": -400.0}, {}, "ok", "400.0 s behind"),
    ],
)
def test_what_a_node_sees_of_the_shared_storage(
    result: dict[str, Any], node: dict[str, Any], level: str, words: str
) -> None:
    finding = judged(result, **node)[f"sees {RUNS}"]
    assert finding.level == level
    assert words in finding.found
    assert bool(finding.change) is (level != "ok")


def test_packages_that_differ_or_do_not_load_fail_with_their_names() -> None:
    other = judged(versions={"fedllm": "1.0", "torch": "2.8"})["packages"]
    assert (other.level, "torch 2.8 (here 2.9)" in other.found) == ("fail", True)
    broken = judged(broken={"peft": "No module named 'peft'"})["packages"]
    assert (broken.level, "No module named 'peft'" in broken.found) == ("fail", True)
    assert "scheduler.python" in broken.change


def test_a_gpu_that_was_asked_for_has_to_be_seen() -> None:
    assert judged(requirements={"gpus": True})["GPUs"].level == "fail"
    seen = judged(requirements={"gpus": True}, gpus=["H100", "H100"])["GPUs"]
    assert (seen.level, seen.found) == ("ok", "2 x H100")


def test_fewer_processors_than_a_task_asks_for_are_a_warning() -> None:
    assert judged(requirements={"cpus": 8})["processors"].level == "warn"


def test_the_nodes_own_folder_has_to_be_writable_where_it_is_used() -> None:
    requirements = {"node_local": "$TMPDIR"}
    assert judged(requirements=requirements, local_bytes=2**31)["storage.node_local"].level == "ok"
    refused = judged(requirements=requirements, local_problem="no TMPDIR")["storage.node_local"]
    assert (refused.level, refused.found) == ("fail", "no TMPDIR")


def test_commands_matter_only_where_the_coordinator_may_run() -> None:
    refused = {"sbatch": "not found"}
    assert judged(refused=refused)["Slurm's commands"].level == "ok"
    coordinator = judged(requirements={"submits": True}, refused=refused)["Slurm's commands"]
    assert (coordinator.level, "fedllm advance" in coordinator.change) == ("warn", True)


def test_findings_are_lines_with_what_to_change_below_and_a_sum() -> None:
    text = describe_findings(
        [
            Finding(check="slurm", level="ok", found="there"),
            Finding(check="runs", level="fail", found="unseen", change="--run-dir"),
        ]
    )
    assert text.splitlines() == [
        "ok    slurm: there",
        "fail  runs: unseen",
        "      -> --run-dir",
        "",
        "1 ok, 0 warn, 1 fail, 0 not done",
    ]


def test_a_node_that_does_not_read_the_same_secret_is_told_what_to_set() -> None:
    for secret, problem in (("cd", ""), ("", "no such file")):
        told = judged(secret=secret, secret_problem=problem)["FEDLLM_STATE"]
        assert told.level == "fail"
        assert told.change is not None
        assert told.change.startswith("FEDLLM_STATE: a folder of yours that all nodes see")
    assert judged(requirements={"secret": ""})["FEDLLM_STATE"].level == "not done"
