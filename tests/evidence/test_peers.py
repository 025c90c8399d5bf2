"""The benchmark of other frameworks: the work that they get, what counts, and what is reported."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.measured.environments import ENVIRONMENTS, NotMeasured, environment
from benchmarks.measured.processes import Usage, measured
from benchmarks.peer_programs import work as peer_work
from benchmarks.peer_programs.adapters import A, B, flexlora
from benchmarks.peer_programs.work import ClientWork, TokenRow, Work
from benchmarks.peers import FLOOR, OURS, PEERS, Turn, main, table
from tests.tiny import Tiny


def turn(system: str, repetition: int, *seconds: float, cpu: float) -> Turn:
    return Turn(
        workload="A",
        system=system,
        repetition=repetition,
        round_seconds=list(seconds),
        cpu_seconds=cpu,
        load=0.0,
    )


def test_a_peer_reads_the_work_and_its_steps_and_rounds_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = [TokenRow(prompt_ids=[1, 2], answer_ids=[3])]
    client = ClientWork(client="7", rows=9, steps=[step, step])
    work = Work(model="base", slots=2, clients=3, rounds=[[client], [client]])
    peer_work.write_work(work, tmp_path)
    monkeypatch.setenv(peer_work.FOLDER, str(tmp_path))
    assert peer_work.read_work() == work
    before = time.time()
    for cohort in work.rounds:
        for one in cohort:
            peer_work.trained(one, len(one.steps))
        peer_work.round_done()
    ends, steps = peer_work.events_of(tmp_path)
    assert before <= ends[0] <= ends[1] <= time.time()
    assert steps == peer_work.num_steps(work.rounds) == 4


def test_a_multiple_is_of_the_floor_of_the_same_repetition() -> None:
    turns = [
        *(turn(FLOOR, 0, 10.0, cpu=20.0), turn(FLOOR, 1, 20.0, cpu=20.0)),
        *(turn("pfl", 0, 30.0, 12.0, 11.0, cpu=22.0), turn("pfl", 1, 24.0, cpu=30.0)),
    ]
    *_, floor, peer = table(turns, "A")
    assert floor == f"| {FLOOR} | 15.00 (10.00-20.00) | 1.00 (1.00-1.00) | " + (
        "20.00 (20.00-20.00) | 1.00 (1.00-1.00) |  |  |"
    )
    # all rounds; the median round of each run over its floor
    assert peer == f"| {PEERS['pfl'].title} | 18.00 (11.00-30.00) | 1.20 (1.20-1.20) | " + (
        "26.00 (22.00-30.00) | 1.30 (1.10-1.50) |  |  |"
    )


def test_an_environment_that_cannot_be_made_says_why_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotMeasured, match=r"^-m venv --clear exited 1: .*") as found:
        environment("pfl", tmp_path / "file")
    assert "\n" not in str(found.value)


def test_an_environment_with_the_same_pins_is_made_once(tmp_path: Path) -> None:
    stamped(tmp_path, "published")
    assert environment("published", tmp_path) == tmp_path / "published/bin/python"


def test_a_users_flexlora_is_the_best_adapter_of_the_weighted_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    updates = [
        {f"q{A}w": torch.randn(2, 12, generator=draw), f"q{B}w": torch.randn(10, 2, generator=draw)}
        for _ in range(3)
    ]
    weights = (0.5, 0.3, 0.2)
    found = flexlora(zip(weights, updates, strict=True))
    mean = sum(w * (u[f"q{B}w"] @ u[f"q{A}w"]) for w, u in zip(weights, updates, strict=True))
    # rank 8 holds a mean of rank 6
    torch.testing.assert_close(found[f"q{B}w"] @ found[f"q{A}w"], mean)


def test_what_a_command_starts_counts_and_ends_with_it(tmp_path: Path) -> None:
    busy = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    code = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", {busy!r}])
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(left.pid)
time.sleep(0.6)
"""
    begin = time.time()
    used = measured([sys.executable, "-c", code], tmp_path / "log", {})
    assert used.returncode == 0
    assert used.cpu_between(begin, time.time()) > 0.25
    assert used.peak_pss_mib > 1  # pages that other processes share count in part
    left = Path(f"/proc/{(tmp_path / 'log').read_text().strip()}/stat")
    deadline = time.time() + 5
    while left.exists() and ") Z" not in left.read_text() and time.time() < deadline:
        time.sleep(0.05)
    assert not left.exists() or ") Z" in left.read_text()


def test_cpu_time_between_samples_lies_on_a_line() -> None:
    used = Usage(returncode=0, peak_pss_mib=1.0, cpu=[(0.0, 1.0), (2.0, 2.0), (4.0, 6.0)])
    assert used.cpu_between(1.0, 3.0) == pytest.approx(2.5)
    assert used.cpu_between(3.0, 9.0) == pytest.approx(2.0)


def stamped(folder: Path, name: str) -> None:
    """Make an environment whose Python is that of the tests."""
    python = folder / name / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (folder / name / "installed.txt").write_text("\n".join(ENVIRONMENTS[name]), encoding="utf-8")


@pytest.fixture
def natural(tmp_path: Path) -> Path:
    """Make rows of 32 clients as the parquet files of Natural Instructions have them."""
    for split, count in (("train", 8), ("test", 1)):
        rows = [
            {"client_id": client, "category": "kind", "instruction": "Add one.", "input": str(n)}
            | {"output": str(n + 1)}
            for client in range(32)
            for n in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    return tmp_path


@pytest.mark.nightly
def test_ours_the_floor_and_the_published_procedure_take_turns(
    tiny: Tiny, natural: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamped(tmp_path / "environments", "published")
    (tmp_path / "environments/pfl").touch()
    words = [f"--model={tiny.model}", f"--data={natural}", "--workloads=B", "--repeats=1"]
    words += ["--rounds=2", f"--environments={tmp_path / 'environments'}"]
    out = tmp_path / "found.json"
    assert main([*words, "--only-ours"]) == 0
    assert "pfl" not in capsys.readouterr().out
    assert main([*words, "--peers", "published", "pfl", f"--out={out}"]) == 1
    printed = capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    systems = [each["system"] for each in found["turns"]]
    assert systems == [OURS, FLOOR, "published"]
    for each in found["turns"]:
        assert min(each["round_seconds"]) > 0 < each["cpu_seconds"]
    assert list(found["not_measured"]) == ["pfl"]
    assert f"{PEERS['pfl'].title}: not measured: " in printed.splitlines()[-1]


def test_no_data_is_an_error_before_anything_is_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", f"--environments={tmp_path / 'none'}"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin"},
        check=False,
    )
    assert done.returncode == 2
    assert "--model and --data (or FEDLLM_MODEL and FEDLLM_DATA) are needed" in done.stderr
    assert not (tmp_path / "none").exists()
