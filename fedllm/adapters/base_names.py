"""The common base model of several adapters, which may name it differently."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.adapters.peft_config import AdapterConfig
from fedllm.errors import AdapterError, ModelError
from fedllm.model.fingerprint import fingerprint_model
from fedllm.storage.hub import is_hub_name


@dataclass(frozen=True, kw_only=True)
class CommonBase:
    """The common base of adapters, by the name that PEFT loads."""

    name: str | None
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder of the base; None if it is not on this machine."""
        return folder_of(self.name)


def common_base(
    configs: Sequence[AdapterConfig], folders: Sequence[Path], given: str | None
) -> CommonBase:
    """Return the common base of all adapters.

    Their names for it may differ if these are folders of the same content, or if `given` names the
    base. With `given`, a folder of other content is still refused.

    Args:
        configs: the configurations of the adapters.
        folders: the folders of the adapters.
        given: the base that `--base` names, or None.

    Raises:
        AdapterError: the bases differ, or it is not known whether they do.
    """
    first = configs[0]
    if given is None:
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
    base = _given_base(given, configs, folders)
    contents = _Contents()
    expected = contents.of(given)
    for config, folder in zip(configs, folders, strict=True):
        content = contents.of(config.base_model_name_or_path)
        if expected and content and content != expected:
            raise AdapterError(
                f"--base: {given} is another model than {config.base_model_name_or_path}, which "
                f"{folder} names (their files differ); leave that adapter out, or correct --base"
            )
    return base


def _given_base(name: str, configs: Sequence[AdapterConfig], folders: Sequence[Path]) -> CommonBase:
    path = folder_of(name)
    if path is not None:
        # a resolved path: the adapter may be read from another folder
        return CommonBase(name=str(path))
    if Path(name).exists() or not is_hub_name(name):
        raise AdapterError(f"--base: {name}: no such folder, and no hub name; correct it")
    revisions = {
        config.revision: folder
        for config, folder in zip(configs, folders, strict=True)
        if config.base_model_name_or_path == name
    }
    if len(revisions) > 1:
        revision_list = ", ".join(
            f"{folder} for {revision}" for revision, folder in revisions.items()
        )
        raise AdapterError(
            f"--base: adapters are of different revisions of {name} ({revision_list}): adapters of "
            "different base models cannot be combined; combine those of one revision"
        )
    return CommonBase(name=name, revision=next(iter(revisions), None))


def folder_of(name: str | None) -> Path | None:
    """Return the resolved folder of a base's name on this machine; None if there is none."""
    try:
        path = Path(name).expanduser() if name else None
    except RuntimeError:  # `~name` of no user
        return None
    return path.resolve() if path is not None and path.is_dir() else None


def fingerprint_of(folder: Path) -> str | None:
    """Return the fingerprint of the model in a folder; None if there is no model."""
    try:
        return fingerprint_model(folder)
    except ModelError:
        return None


class _Contents:
    """Fingerprints of the folders that configurations name; each is computed once."""

    def __init__(self) -> None:
        self._known: dict[Path, str | None] = {}

    def of(self, name: str | None) -> str | None:
        """Return the fingerprint of a base on this machine; None if it is not here."""
        path = folder_of(name)
        if path is None:
            return None
        if path not in self._known:
            self._known[path] = fingerprint_of(path)
        return self._known[path]

    def same(self, one: AdapterConfig, other: AdapterConfig) -> bool:
        """Say whether both bases are on this machine and have the same files."""
        if one.revision != other.revision:
            return False
        content = self.of(one.base_model_name_or_path)
        return content is not None and content == self.of(other.base_model_name_or_path)
