"""Real file systems that are full or read-only, mounted where only one command sees them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def python_on_tmpfs(folder: Path, options: str, script: str) -> str:
    """Run a script with a tmpfs mounted on `folder` and return what it prints.

    Root passes over permissions, so only a mount makes a folder full or read-only.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root: a full or read-only file system is mounted for it")
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))}"
    run = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{mount} && {run}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
