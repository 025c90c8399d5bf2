"""Readers of files: a copy of private rows is no more public than the rows."""

import stat
from collections.abc import Iterable
from pathlib import Path

_GROUP, _OTHERS = 0o070, 0o007


def readers_of(files: Iterable[Path], *, group: int) -> int:
    """Return the bits of a mode for the group number `group` and for others: who reads all files.

    A folder above a file that may not be passed hides the file.
    """
    group_reads = others_read = True
    passed: dict[Path, tuple[bool, bool]] = {}
    for file in files:
        path = file.resolve()
        for folder in path.parents:
            if folder not in passed:
                passed[folder] = _allowed(folder, group, stat.S_IXOTH)
        all_may = [_allowed(path, group, stat.S_IROTH), *(passed[f] for f in path.parents)]
        group_reads &= all(by_group for by_group, _ in all_may)
        others_read &= all(by_others for _, by_others in all_may)
    return group_reads * _GROUP | others_read * _OTHERS


def _allowed(path: Path, group: int, bit: int) -> tuple[bool, bool]:
    """Say whether the group and others may read a file, or pass a folder; `bit` is that of others.

    A group that is not the path's own is among the others.
    """
    status = path.stat()
    by_others = bool(status.st_mode & bit)
    by_group = bool(status.st_mode & bit << 3) if status.st_gid == group else by_others
    return by_group, by_others
