"""The place of a run directory: a copy of the directory is another run.

A copy has the run id, the job ids and the lease of the original, and none of what these name.
"""

from pathlib import Path

from fedllm.storage.records import PlaceRecord


def place_of(root: Path) -> PlaceRecord:
    """Return the place of a run directory that exists."""
    return PlaceRecord(path=str(root.resolve()), inode=root.stat().st_ino)


def is_here(recorded: PlaceRecord | None, root: Path) -> bool:
    """Say whether a record was written in this directory, under whatever name it has now.

    A record of an earlier version has no place and counts as written here.
    """
    if recorded is None:
        return True
    try:
        return root.stat().st_ino == recorded.inode and root.samefile(recorded.path)
    except OSError:
        return False  # moved, or a copy from another machine
