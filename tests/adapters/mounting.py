"""Command lines, run with a folder that is a small or read-only file system."""

import subprocess
import sys
from pathlib import Path

_PROGRAM = "import sys; from fedllm.cli.main import run; sys.exit(run(sys.argv[1:]))"
_SCRIPT = 'mount -t tmpfs -o "$2" tmpfs "$1" && "${@:3}"; code=$?; ls -A "$1"; exit $code'


def mounted(options: str, place: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a command line with a tmpfs at `place`; print the names in it at the end."""
    place.mkdir()
    program = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", _SCRIPT, "mounted", place, options, *program],
        capture_output=True,
        text=True,
        check=False,
    )
