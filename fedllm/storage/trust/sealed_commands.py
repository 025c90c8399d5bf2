"""Commands in a run directory: keys that run code with the rights of whoever resumes the run.

Members of a group may write a shared run directory. What one of them writes there must not run as
another one without a word: a user seals the commands that this user gave or accepted.
"""

import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedllm.config.models import Config
from fedllm.errors import RunDirectoryError
from fedllm.storage.frozen_config import key_values
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import OwnCodeRecord, RunRecord
from fedllm.storage.trust.owners import user_name
from fedllm.storage.trust.secret import user_secret
from fedllm.storage.trust.signatures import is_sealed, seal_of
from fedllm.storage.updates import update_files

OWN_CODE = "method.name"
_SIGNER = "updates"
_KEYS = ("scheduler.setup", "scheduler.python")


def commands_of(config: Config, own_code: OwnCodeRecord | None) -> dict[str, Any]:
    """Return the keys of a run that hold commands, with their values; those without are left out.

    A method of the user's own counts with its source and the folders that it is imported from.
    """
    values = key_values(config)
    commands = {key: values[key] for key in _KEYS if values[key]}
    return commands | ({OWN_CODE: own_code.model_dump()} if own_code else {})


def seals_of(name: str, commands: Mapping[str, Any]) -> dict[str, str]:
    """Return this user's seals of commands, and the one that says who signs the updates."""
    secret, sealed = user_secret(create=True), {**commands, _SIGNER: None}
    return {key: seal_of(secret, name, [key, value]) for key, value in sealed.items()}


def other_signer(paths: RunPaths, record: RunRecord) -> str | None:
    """Say which updates this user cannot check, since another user's tasks signed them; or None."""
    seal = record.seals.get(_SIGNER, "")
    if not seal or is_sealed(user_secret(create=True), record.run_id, [_SIGNER, None], seal):
        return None
    rounds = [each for each in paths.existing_rounds() if not each.collection.exists()]
    count = sum(len(update_files(each)) for each in rounds)
    if not count:
        return None
    owner = user_name(paths.run.stat().st_uid)
    return (
        f"{paths.root}: opened last with another secret than yours (run.json is of {owner}): "
        f"{count} update files of round {rounds[-1].number} cannot be "
        "checked with your key, so their clients train again"
    )


def require_accepted(
    root: Path,
    name: str,
    seals: Mapping[str, str],
    commands: Mapping[str, Any],
    *,
    given: Collection[str] | None = (),
) -> None:
    """Refuse commands that another member of the group may have written.

    Args:
        root: the directory of the run or sweep.
        name: the run's id, or what else `seals_of` was called with.
        seals: those in its record.
        commands: see `commands_of`.
        given: the keys that this user gives now; None: all.

    Raises:
        RunDirectoryError: it shows the commands that this user neither gave nor accepted before.
    """
    secret = user_secret(create=True)
    # a directory without seals is of an earlier version; a copy of another user's has theirs
    is_mine = not seals or is_sealed(secret, name, [_SIGNER, None], seals.get(_SIGNER, ""))
    if given is None or (is_mine and _is_private(root)):
        return
    foreign = [
        f"{key}: {value}"
        for key, value in commands.items()
        if key not in given and not is_sealed(secret, name, [key, value], seals.get(key, ""))
    ]
    if foreign:
        raise RunDirectoryError(
            f"{root}: others wrote, or could write here, and these keys run commands with your "
            f"rights: {'; '.join(foreign)}; if you trust them, resume with --accept-changes"
        )


def refuse_open_folder(root: Path) -> None:
    """Refuse a run directory that anybody may write.

    Raises:
        RunDirectoryError: it is writable by others than its owner and group.
    """
    if root.stat().st_mode & stat.S_IWOTH:
        raise RunDirectoryError(
            f"{root}: every user of this machine may write there, and so change the run: "
            f"chmod -R o-w {root}; storage.group shares a run with a group"
        )


def _is_private(root: Path) -> bool:
    """Return whether nobody but this user could have written the directory."""
    status = root.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
