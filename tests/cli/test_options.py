"""What several commands share: help, printed lines, folders."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.cli.options import existing_run, fresh_folder, say, say_json
from fedllm.errors import RunDirectoryError
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RunRecord
from tests.cli.commands import in_process


def test_the_help_of_every_command_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = in_process("--help").stdout
    assert "..." not in text.partition("Commands:")[2]
    assert max(map(len, text.splitlines())) <= 80


def test_lines_and_json_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say("client task/7 ü: done")
    assert capsys.readouterr().out == "client task/7 ü: done\n"
    say_json({"client": "ü", "rounds": [1]})
    text = capsys.readouterr().out
    assert "ü" in text
    assert json.loads(text) == {"client": "ü", "rounds": [1]}


def test_a_terminal_that_lacks_a_letter_does_not_end_a_run() -> None:
    script = "from fedllm.cli.options import say; say('client \\U0001f999 done')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == "client \\U0001f999 done\n"


def test_a_run_is_a_folder_with_a_run_record(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"no run here \(no run.json\); `fedllm run"):
        existing_run(tmp_path)
    RunRecord(run_id="r", result_fingerprint="", versions={}).publish(tmp_path / "run.json")
    assert existing_run(tmp_path / "x" / "..").root == tmp_path


def test_an_output_folder_is_new_or_empty(tmp_path: Path) -> None:
    assert fresh_folder(tmp_path / "new") == tmp_path / "new"
    assert fresh_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunDirectoryError, match="exists and is not empty; choose a new folder"):
            fresh_folder(taken)


@pytest.mark.parametrize("inner", ["rounds/0001/x", "coordinator/x", "logs", "x"])
def test_an_output_folder_lies_not_among_the_records_of_a_run(tmp_path: Path, inner: str) -> None:
    RunPaths(root=tmp_path).run.touch()
    out = tmp_path / inner
    if inner == "x":
        assert fresh_folder(out) == out
        return
    with pytest.raises(RunDirectoryError, match="lies among the records of the run"):
        fresh_folder(out)


def test_lines_may_go_to_a_stream_without_an_encoding() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        say("ü")
    assert stream.getvalue() == "ü\n"
