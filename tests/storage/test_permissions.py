"""A run directory that a group shares: every file and folder can be written by its members."""

import errno
import grp
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedllm.errors import ConfigError, UserError
from fedllm.scheduling.patience import Patience
from fedllm.storage.publishing.permissions import only_for_owner, reading_problem, share_with_group

GROUPS = [grp.getgrgid(number) for number in {os.getegid(), *os.getgroups()}]
# the last group: one that new files do not get by default, if this user has another
GROUP = sorted(GROUPS, key=lambda group: group.gr_gid == os.getegid())[0]
IF_ROOT = next(g for g in grp.getgrall() if g.gr_gid != os.getegid())
SHARED = IF_ROOT if os.geteuid() == 0 else GROUP

PROGRAM = """
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def as_nobody() -> Iterator[None]:
    """Act as a user that is not root, whom modes do not concern."""
    if os.geteuid():
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.mark.parametrize("closed", ["base/model.safetensors", "base"])
def test_a_file_that_its_mode_closes_is_named_at_once_with_the_remedy(closed: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        file = Path(root) / "base/model.safetensors"
        file.parent.mkdir()
        file.touch()
        with as_nobody():
            assert reading_problem(file) is None
            assert not only_for_owner(file)
        target = Path(root) / closed
        target.chmod(0)
        waited: list[float] = []
        patience = Patience(seconds=90, say=lambda _line: None, wait=waited.append)

        def read() -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))

        with as_nobody(), pytest.raises(UserError) as raised:
            patience.retry(read)
        letters = "r" if target == file else "x"
        assert f"({target} is of " in str(raised.value)
        # its group is none of nobody's
        whose = "u" if os.geteuid() else f"GROUP {target} && chmod g"
        assert "mode 0000); its owner has to say: ch" in str(raised.value)
        assert f"{whose}+{letters} {target}" in str(raised.value)
        assert not waited
        target.chmod(0o755)
