"""The base model of several adapters: one, although each names it in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.adapters.peft_config import AdapterConfig
from fedllm.errors import AdapterError, ModelError
from fedllm.model.fingerprint import fingerprint_model
from fedllm.storage.hub import is_hub_name


@dataclass(frozen=True, kw_only=True)
class CommonBase:
    """A base by the name that PEFT loads; `folder` is where it lies, if it lies here."""

    name: str | None
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder of the base, None where it is not at hand."""
        return folder_of(self.name)


def common_base(
    configs: Sequence[AdapterConfig], folders: Sequence[Path], said: str | None
) -> CommonBase:
    """Return the base of all adapters.

    Names may differ where they are folders of the same content, or where `said` tells which base it
    is; then a folder of other content is still refused.

    Raises:
        AdapterError: the bases differ, or nothing says that they do not.
    """
    first = configs[0]
    if said is None:
        contents = _Contents()
        for config, folder in zip(configs[1:], folders[1:], strict=True):
            if config.base != first.base and not contents.same(config, first):
                names = [c.base or "a base it does not name" for c in (first, config)]
                raise AdapterError(
                    f"{folders[0]} is for {names[0]} and {folder} for {names[1]}: adapters of "
                    "different base models cannot be combined; if it is one model under two names, "
                    "say where it is: --base PATH"
                )
        return CommonBase(name=first.base_model_name_or_path, revision=first.revision)
    base = _said(said, configs, folders)
    contents = _Contents()
    wanted = contents.of(said)
    for config, folder in zip(configs, folders, strict=True):
        found = contents.of(config.base_model_name_or_path)
        if wanted and found and found != wanted:
            raise AdapterError(
                f"--base: {said} is another model than {config.base_model_name_or_path}, which "
                f"{folder} names (their files differ); leave that adapter out, or correct --base"
            )
    return base


def _said(name: str, configs: Sequence[AdapterConfig], folders: Sequence[Path]) -> CommonBase:
    path = folder_of(name)
    if path is not None:
        # the adapter may be read from another folder
        return CommonBase(name=str(path))
    if Path(name).exists() or not is_hub_name(name):
        raise AdapterError(f"--base: {name}: no such folder, and no hub name; correct it")
    revisions = {
        config.revision: folder
        for config, folder in zip(configs, folders, strict=True)
        if config.base_model_name_or_path == name
    }
    if len(revisions) > 1:
        told = ", ".join(f"{folder} for {revision}" for revision, folder in revisions.items())
        raise AdapterError(
            f"--base: adapters are of different revisions of {name} ({told}): adapters of "
            "different base models cannot be combined"
        )
    return CommonBase(name=name, revision=next(iter(revisions), None))


def folder_of(name: str | None) -> Path | None:
    """Return the folder that a base's name means on this machine, resolved, else None."""
    try:
        path = Path(name).expanduser() if name else None
    except RuntimeError:  # `~` and the name of nobody
        return None
    return path.resolve() if path is not None and path.is_dir() else None


def fingerprint_of(folder: Path) -> str | None:
    """Return the fingerprint of the model in a folder, None where there is none."""
    try:
        return fingerprint_model(folder)
    except ModelError:
        return None


class _Contents:
    """Fingerprints of the folders that configurations name, each computed once."""

    def __init__(self) -> None:
        self._known: dict[Path, str | None] = {}

    def of(self, name: str | None) -> str | None:
        """Return the fingerprint of a base that lies here, else None."""
        path = folder_of(name)
        if path is None:
            return None
        if path not in self._known:
            self._known[path] = fingerprint_of(path)
        return self._known[path]

    def same(self, one: AdapterConfig, other: AdapterConfig) -> bool:
        """Say whether both bases lie here and hold the same files."""
        if one.revision != other.revision:
            return False
        found = self.of(one.base_model_name_or_path)
        return found is not None and found == self.of(other.base_model_name_or_path)
