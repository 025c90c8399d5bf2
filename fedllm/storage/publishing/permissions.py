"""Permissions of run directories that a group shares: every member can continue a run."""

import grp
import os
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.storage.publishing.publish import make_folder, storage_errors

_FOR_GROUP = 0o2770  # set-group-id: new files below belong to the group too
_NOT_FOR_OTHERS = 0o007


def let_group_write() -> None:
    """Let only this user and the group read and write what this process makes from now on."""
    os.umask(_NOT_FOR_OTHERS)


def group_number(group: str) -> int:
    """Return the number of a group that this user is in.

    Raises:
        ConfigError: there is no such group, or this user is not in it.
    """
    try:
        number = grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ConfigError(f"storage.group: no group {group} on this machine; see `id`") from error
    if os.geteuid() != 0 and number not in {*os.getgroups(), os.getegid()}:
        raise ConfigError(f"storage.group: you are not in group {group}; see `id`")
    return number


def share_with_group(root: Path, group: str) -> None:
    """Give a run directory to a group, with everything that this process makes in it later.

    Raises:
        ConfigError: there is no such group, or this user is not in it.
        RunDirectoryError: the directory belongs to somebody else and is not shared.
    """
    number = group_number(group)
    let_group_write()
    with storage_errors(root):
        make_folder(root)
        status = root.stat()
        if (status.st_gid, status.st_mode & _FOR_GROUP) != (number, _FOR_GROUP):
            os.chown(root, -1, number)
            root.chmod(status.st_mode | _FOR_GROUP)
