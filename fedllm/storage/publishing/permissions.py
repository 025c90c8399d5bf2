"""Permissions of run directories that a group shares: every member can continue a run."""

import contextlib
import errno
import grp
import os
import stat
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.storage.publishing.publish import make_folder, storage_errors
from fedllm.storage.trust.owners import user_name

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


def reading_problem(path: Path) -> str | None:
    """Say why the modes of a file or of a folder above it keep this user from reading it.

    None: they do not, or it cannot be told, or there is no such file.
    """
    path = path.absolute()
    for each in (*reversed(path.parents), path):
        try:
            status = each.stat()
        except OSError:
            return None
        wanted = stat.S_IROTH if each == path else 0
        wanted |= stat.S_IXOTH if stat.S_ISDIR(status.st_mode) else 0
        if _refuses(status, wanted) and not _has_access_list(each):
            letters = stat.filemode(wanted)[-3:].replace("-", "")
            mode = stat.S_IMODE(status.st_mode)
            own = status.st_uid == os.geteuid()
            remedy = f"chmod {'u' if own else 'g'}+{letters} {each}"
            if not (own or _is_of_my_group(status)):
                remedy = f"chgrp GROUP {each} && {remedy}, with a group that you are in"
            return (
                f"{path}: its mode or that of a folder above keeps you from reading it ({each} is "
                f"of {user_name(status.st_uid)}, mode {mode:04o}); its owner has to say: {remedy}"
            )
    return None


def denied(error: BaseException) -> str | None:
    """Say why a file was refused, if its mode is the reason: then no wait helps."""
    for each in (error, error.__cause__):
        if isinstance(each, PermissionError) and each.errno == errno.EACCES and each.filename:
            return reading_problem(Path(os.fsdecode(each.filename)))
    return None


def only_for_owner(path: Path) -> bool:
    """Say whether the mode of a file lets nobody but its owner read it."""
    return not path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)


def _refuses(status: os.stat_result, wanted: int) -> bool:
    """Say whether a mode refuses this user the rights `wanted`, given as those of others."""
    if os.geteuid() == 0:
        return False  # no mode does
    if os.geteuid() == status.st_uid:
        wanted <<= 6
    elif _is_of_my_group(status):
        wanted <<= 3
    return status.st_mode & wanted != wanted


def _is_of_my_group(status: os.stat_result) -> bool:
    return status.st_gid in {*os.getgroups(), os.getegid()}


def _has_access_list(path: Path) -> bool:
    """Say whether a list of its own, not the mode, says who may read a file."""
    with contextlib.suppress(OSError):
        return "system.posix_acl_access" in os.listxattr(path)
    return False
