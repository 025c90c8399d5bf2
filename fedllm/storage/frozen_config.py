"""The configuration of a run as the run accepted it: `config.yaml`, checked against `run.json`.

A person may edit `config.yaml` of a run directory. `run.json` holds the fingerprint of all result
keys and the value of every key, so that an edit is found before anything is computed with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config.loading import flatten, read_config, result_fingerprint
from fedllm.config.models import Config
from fedllm.errors import RunDirectoryError
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import Version, version_of
from fedllm.storage.records import OwnCodeRecord, RunRecord


@dataclass(frozen=True, kw_only=True)
class KeyChange:
    """A key whose value changed; `kind` as in `flatten`."""

    key: str
    kind: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = ("null" if v is None else v for v in (self.before, self.after))
        return f"{self.key} ({before} in the run, now {after})"


def key_values(config: Config) -> dict[str, Any]:
    """Return the value of every key, as `run.json` holds them."""
    return {key: value for key, (_, value) in flatten(config).items()}


def new_run_record(
    config: Config,
    *,
    run_id: str,
    versions: dict[str, str],
    own_code: OwnCodeRecord | None = None,
) -> RunRecord:
    """Return the record of a run that begins with `config`."""
    return RunRecord(
        run_id=run_id,
        result_fingerprint=result_fingerprint(config),
        versions=versions,
        config=key_values(config),
        own_code=own_code,
    )


def keep_run_record(paths: RunPaths, record: RunRecord) -> None:
    """Publish the record of a run, and the copy from which a damaged one is made again."""
    record.publish(paths.run)
    record.publish(paths.run_copy)


def mended_run_record(paths: RunPaths) -> bool:
    """Publish `run.json` again from its copy if it is damaged or gone; return whether it was.

    Raises:
        RunDirectoryError: it is damaged, and there is no copy that can be read.
    """
    if RunRecord.glance(paths.run):
        return False
    copy = RunRecord.glance(paths.run_copy)
    if copy is None:
        RunRecord.find(paths.run)
        return False
    copy.publish(paths.run)
    return True


def changes_of(before: Mapping[str, Any], after: Config) -> list[KeyChange]:
    """Return the keys that changed.

    A key that only one side has is of another version, or belongs to a table whose list of names
    changed too.
    """
    return [
        KeyChange(key=key, kind=kind, before=before[key], after=value)
        for key, (kind, value) in flatten(after).items()
        if key in before and before[key] != value
    ]


def frozen_config(paths: RunPaths) -> Config:
    """Return the configuration of a run, which has the result keys that `run.json` recorded.

    Raises:
        ConfigError: it is not a valid configuration.
        RunDirectoryError: somebody changed a result key in `config.yaml`; the message names it.
    """
    config = read_config(paths.config)
    record = RunRecord.find(paths.run)
    if record is not None:
        refuse_edits(paths, record, config)
    return config


class FrozenConfigReader:
    """Reader of runs' frozen configurations; the last is read again only if its file changed."""

    def __init__(self) -> None:
        self._last: tuple[Path, Version, Config] | None = None

    def read(self, run: RunPaths) -> Config:
        """Return the configuration of a run; the errors are those of `frozen_config`."""
        if not run.config.is_file():
            return frozen_config(run)  # raises the right error
        version = version_of(run.config)
        if self._last is None or self._last[:2] != (run.config, version):
            self._last = run.config, version, frozen_config(run)
        return self._last[2]


def refuse_edits(paths: RunPaths, record: RunRecord, config: Config) -> None:
    """Require the result keys that the run was begun with.

    Raises:
        RunDirectoryError: another value, with the key, both values and the remedy.
    """
    if result_fingerprint(config) == record.result_fingerprint:
        return
    frozen = [
        str(change) for change in changes_of(record.config, config) if change.kind == "result"
    ]
    what = ", ".join(frozen) or f"its fingerprint is not that of {paths.run.name}"
    raise RunDirectoryError(
        f"{paths.config}: not the configuration that the run was begun with: {what}; these keys "
        "are frozen: put them back, or begin a new run in another --run-dir"
    )
