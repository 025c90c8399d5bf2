"""The base model of several adapters: one, although each names it in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import AdapterError, ModelError
from fedllm.model.adapter_config import AdapterConfig
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
        path = Path(self.name) if self.name else None
        return path if path is not None and path.is_dir() else None


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
    base = _said(said)
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


def _said(name: str) -> CommonBase:
    path = Path(name).expanduser()
    if path.is_dir():
        # the adapter may be read from another folder
        return CommonBase(name=str(path.resolve()))
    if path.exists() or not is_hub_name(name):
        raise AdapterError(f"--base: {name}: no such folder, and no hub name; correct it")
    return CommonBase(name=name)


class _Contents:
    """Fingerprints of the folders that configurations name, each computed once."""

    def __init__(self) -> None:
        self._known: dict[Path, str | None] = {}

    def of(self, name: str | None) -> str | None:
        """Return the fingerprint of a base that lies here, else None."""
        path = Path(name).expanduser() if name else None
        if path is None or not path.is_dir():
            return None
        path = path.resolve()
        if path not in self._known:
            try:
                self._known[path] = fingerprint_model(path)
            except ModelError:  # a folder of that name, but no model in it
                self._known[path] = None
        return self._known[path]

    def same(self, one: AdapterConfig, other: AdapterConfig) -> bool:
        """Say whether both bases lie here and hold the same files."""
        if one.revision != other.revision:
            return False
        found = self.of(one.base_model_name_or_path)
        return found is not None and found == self.of(other.base_model_name_or_path)
