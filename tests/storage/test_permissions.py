"""A run directory that a group shares: every file and folder can be written by its members."""

import grp
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from fedllm.storage.publishing.permissions import share_with_group

GROUPS = [grp.getgrgid(number) for number in {os.getegid(), *os.getgroups()}]
# the last group: one that new files do not get by default, if this user has another
GROUP = sorted(GROUPS, key=lambda group: group.gr_gid == os.getegid())[0]
IF_ROOT = next(g for g in grp.getgrall() if g.gr_gid != os.getegid())
SHARED = IF_ROOT if os.geteuid() == 0 else GROUP

PROGRAM = """
import sys
from pathlib import Path
from tests.rounds.simulation import Simulation, complete, config_of
complete(Path(sys.argv[1]), Simulation(), config_of(storage__group=sys.argv[2], rounds=1))
"""


def test_all_that_a_run_writes_belongs_to_the_group_and_to_nobody_else(tmp_path: Path) -> None:
    root = tmp_path / "run"
    # in a process of its own: it changes its umask
    subprocess.run([sys.executable, "-c", PROGRAM, root, SHARED.gr_name], check=True)
    found = [root, *root.rglob("*")]
    assert len(found) > 20
    for path in found:
        status = path.stat()
        assert status.st_gid == SHARED.gr_gid, path
        assert status.st_mode & 0o060 == 0o060, path
        assert not status.st_mode & 0o007, path
        assert path.is_file() or status.st_mode & 0o2070 == 0o2070, path


def test_a_group_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage.group: no group nobody-knows-it"):
        share_with_group(tmp_path / "run", "nobody-knows-it")
    assert not (tmp_path / "run").exists()
