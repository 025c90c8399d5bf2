"""The user's secret, from which all keys derive. It lies in no run directory.

A run directory may be writable by a group, and what is in it may be copied. The secret lies in the
user's own state folder, in a file that only the user can read. Jobs get the folder's path.
"""

import hashlib
import os
import secrets
import stat
from functools import lru_cache
from pathlib import Path

from fedllm.errors import UserError
from fedllm.storage.publishing.publish import make_folder, storage_errors

STATE_VARIABLE = "FEDLLM_STATE"
_BYTES = 32
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def state_folder() -> Path:
    """Return the folder of the user's state: `$FEDLLM_STATE`, else below `$XDG_STATE_HOME`."""
    if own := os.environ.get(STATE_VARIABLE):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser().absolute() / "fedllm"


def user_secret(*, create: bool = False) -> bytes:
    """Return this user's secret.

    Args:
        create: make one if there is none. Coordinators do; a task that made its own could sign
            nothing that its coordinator believes.

    Raises:
        UserError: there is none, or others could have read or written it.
    """
    file = state_folder() / "secret"
    if create and not file.exists():
        _create(file)
    return _read(file)


def secret_digest() -> str:
    """Return a digest by which two hosts tell whether they see the same secret.

    Raises:
        UserError: there is none here, or others could have read or written it.
    """
    return hashlib.sha256(b"digest of " + user_secret()).hexdigest()


def _create(file: Path) -> None:
    with storage_errors(file):
        make_folder(file.parent)
        file.parent.chmod(0o700)
        beside = file.with_name(f".secret.{secrets.token_hex(8)}.part")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as written:  # noqa: PTH123
                written.write(secrets.token_bytes(_BYTES))
                written.flush()
                os.fsync(descriptor)
            # of two processes the first one's stays
            os.link(beside, file)
        except FileExistsError:
            pass
        finally:
            beside.unlink()


@lru_cache
def _read(file: Path) -> bytes:
    try:
        descriptor = os.open(file, _FLAGS)
    except OSError as error:
        raise UserError(
            f"{file}: the secret that signs updates cannot be read here "
            f"({os.strerror(error.errno or 0).lower()}); set {STATE_VARIABLE} to a folder of yours "
            "that all nodes see and nobody else can read, then resume"
        ) from error
    with open(descriptor, "rb") as opened:  # noqa: PTH123
        status = os.fstat(descriptor)
        is_private = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        if not (stat.S_ISREG(status.st_mode) and is_private):
            raise UserError(
                f"{file}: the secret that signs updates must be a file of yours that nobody else "
                "can read; remove it (a new one is made), and resume"
            )
        content = opened.read(_BYTES)
    if len(content) != _BYTES:
        raise UserError(f"{file}: is cut short; remove it (a new one is made), and resume")
    return content
