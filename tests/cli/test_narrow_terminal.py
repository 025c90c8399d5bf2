"""What every command shows on a terminal of 60 columns that wants no colours."""

import re
from pathlib import Path

import pytest

from tests.cli.test_live_run import shown_on_terminal
from tests.tiny import Tiny

_COLUMNS = 60
_EACH = """
import sys, typer
from fedllm.cli.main import app, run
commands = [words.split() for words in sys.argv[1:]]
names = [name for name in typer.main.get_command(app).commands]
for words in [*commands, ["--help"], *([name, "--help"] for name in names)]:
    print("\\x1e" + " ".join(words), flush=True)
    print("exit code", run(words), flush=True)
"""


@pytest.fixture(scope="module")
def shown(tiny: Tiny, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what every command showed."""
    out = tmp_path_factory.mktemp("out")
    lines = f"""
        status {finished}
        status {finished} --spectra
        compare a={finished} b={finished}
        plan {tiny.config}
        inspect {tiny.config} --client c5
        inspect {tiny.config} --clients
        methods
        logs {finished}
        export {finished} --out {out}/adapter
        verify {finished}
        prune {finished} --dry-run
        init {out}/mine.yaml --data embedded --model embedded --where here
        sweep --example
        run {tiny.config} --run-dir {finished}
        run {out}/none.yaml
    """
    commands = [line.strip() for line in lines.strip().split("\n")]
    text = shown_on_terminal(_COLUMNS, _EACH, *commands, NO_COLOR="1")
    _, *parts = text.replace("\r\n", "\n").split("\x1e")
    return dict(part.split("\n", 1) for part in parts)


def test_no_command_shows_a_line_that_is_wider_than_the_terminal(shown: dict[str, str]) -> None:
    assert len(shown) > 35
    for command, text in shown.items():
        plain = re.sub("\x1b\\[[^A-Za-z]*[A-Za-z]", "\r", text)
        for line in re.split("[\r\n]", plain):
            # a path has no blank where it could fold
            assert len(line) <= _COLUMNS or " " not in line.strip(), (command, line)


def test_no_command_shows_colours_to_who_wants_none(shown: dict[str, str]) -> None:
    coloured = {name for name, text in shown.items() if re.search("\x1b\\[[0-9;]*3[0-9]m", text)}
    assert not coloured
    # only what is being counted is drawn again
    assert "\x1b" not in shown[next(name for name in shown if name.startswith("status"))]
