"""Sources of a run, base and data: refused before torch is loaded and before a job is submitted."""

from collections.abc import Iterator
from pathlib import Path

from fedllm.config.models import Config
from fedllm.data.names import require_hub_name
from fedllm.errors import UserError
from fedllm.model.fingerprint import check_model_folder
from fedllm.scheduling.traits import traits_of
from fedllm.storage.hub import is_hub_name
from fedllm.storage.publishing.permissions import only_for_owner, reading_problem
from fedllm.storage.records import PreparedRecord

_EMBEDDED = "embedded"


def check_sources(config: Config) -> None:
    """Refuse a base or data that are not here, or that this user may not read.

    Names that may be of the hub pass.

    Raises:
        ModelError: `model.path` is no model directory.
        DataError: `data.path` is no file or folder, and no name of the hub.
        UserError: a file's mode keeps this user from reading it.
    """
    for name in (config.model.path, config.data.path):
        _refuse_unreadable(Path(name).expanduser())
    base = Path(config.model.path).expanduser()
    if config.model.path != _EMBEDDED and (base.exists() or not is_hub_name(config.model.path)):
        check_model_folder(base)
    if config.data.path != _EMBEDDED and not Path(config.data.path).expanduser().exists():
        require_hub_name(config.data.path)


def check_sources_of(config: Config, prepared: PreparedRecord | None) -> None:
    """Refuse sources of a run that its tasks will not find or may not read.

    Before it is prepared, only where its jobs run on this host: nodes may see other folders. The
    errors are those of `check_sources`.
    """
    if prepared:
        for file in _files_of(prepared):
            _refuse_unreadable(file)
    elif not traits_of(config).jobs_outlive_coordinator:
        check_sources(config)


def private_sources(prepared: PreparedRecord) -> str | None:
    """Say which file of a shared run's sources only its owner can read, and the remedy; or None."""
    private = [path for path in _files_of(prepared) if only_for_owner(path)]
    if not private:
        return None
    return (
        f"storage.group: only its owner may read {private[0]}, so tasks of other members of the "
        f"group would fail: chmod -R g+rX {private[0].parent}"
    )


def _files_of(prepared: PreparedRecord) -> Iterator[Path]:
    for folder in (Path(prepared.model_path), Path(prepared.data_path)):
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.is_file())


def _refuse_unreadable(path: Path) -> None:
    if problem := reading_problem(path):
        raise UserError(problem)
