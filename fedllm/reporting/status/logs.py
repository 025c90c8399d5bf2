"""Logs of a run: finding and showing them."""

from pathlib import Path

from fedllm.errors import DataError
from fedllm.storage.paths import RoundPaths, RunPaths, attempts_of
from fedllm.storage.records import ClaimRecord, SubmissionRecord
from fedllm.storage.trust.regular_files import ForeignFileError, open_regular

_TAIL_BYTES = 1 << 16


def newest_logs(paths: RunPaths) -> list[Path]:
    """Return the logs of the newest round that has any."""
    folders = sorted(path for path in paths.all_logs.glob("*") if path.is_dir())
    for folder in reversed(folders):
        logs = sorted(path for path in folder.rglob("*") if path.suffix in {".log", ".out"})
        if logs:
            return logs
    return sorted(paths.all_logs.glob("*.log"))


def client_log(paths: RunPaths, rounds: int, client: str) -> Path | None:
    """Return the log of the task that claimed a client last."""
    for number in range(rounds, 0, -1):
        log = _newest_log(paths.round(number), client)
        if log:
            return log
    return None


def _newest_log(paths: RoundPaths, client: str) -> Path | None:
    newest: Path | None = None
    for attempt in attempts_of(paths.attempt):
        bundles = SubmissionRecord.read(attempt.submission).bundles
        for bundle in (bundle for bundle in bundles if client in bundle.clients):
            claim = ClaimRecord.find(attempt.claim(bundle.number))
            if claim and claim.log:
                newest = _own_log(paths.run, claim.log)
    return newest


def _own_log(run: RunPaths, named: str) -> Path:
    """Return the log that a claim names; it must be one of this run's.

    Raises:
        DataError: it is elsewhere, for whatever reason whoever wrote the claim names it.
    """
    folder, log = run.all_logs.resolve(), Path(named)
    parts = log.parts
    # claims of a run that was copied or moved name its earlier place
    places = [n for n, part in enumerate(parts) if part == folder.name]
    here = [folder.joinpath(*parts[places[-1] + 1 :])] if places else []
    for path in (log, *here):
        if path.resolve().is_relative_to(folder):
            return path
    raise DataError(
        f"{log}: a claim of the run names this log, which is outside {folder}; open it yourself if "
        "you trust it"
    )


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a log."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return "(no longer there)"
    except ForeignFileError as error:
        return f"({error})"
    return "\n".join(text.splitlines()[-lines:])
