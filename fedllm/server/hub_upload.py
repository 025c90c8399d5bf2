"""Upload of an exported folder to the Hugging Face hub."""

from pathlib import Path

from fedllm.errors import ConfigError, FedllmError, RunFailed
from fedllm.storage.hub import first_line, is_hub_name


def require_repository(name: str) -> None:
    """Refuse a name that is not `OWNER/NAME`, before anything is written.

    Raises:
        ConfigError: it names what was given.
    """
    if "/" not in name or not is_hub_name(name):
        raise ConfigError(f"--push-to-hub: got {name}, need OWNER/NAME")


def push_folder(name: str, folder: Path) -> str:
    """Upload a folder to a repository, made private if it is new; return its address.

    Raises:
        RunFailed: the hub cannot be reached, or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder)
    except Exception as error:  # the hub's client raises its own errors, httpx's and OSError
        raise _refused(name, folder, error) from error
    return str(repository)


def _refused(name: str, folder: Path, error: Exception) -> FedllmError:
    return RunFailed(
        f"--push-to-hub: {name}: {first_line(error)}; {folder} is complete; once the hub "
        f"answers and you have logged in (`hf auth login`): hf upload {name} {folder}"
    )
