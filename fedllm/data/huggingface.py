"""Hugging Face data sets, saved in a folder or on the hub; `datasets` is needed here only."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedllm.errors import DataError
from fedllm.storage.folders import publishing_folder
from fedllm.storage.hub import first_line, hub_key, is_hub_name
from fedllm.storage.paths import CachePaths

_MARKS = ("dataset_info.json", "dataset_dict.json")
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "test": "test"}


def is_saved_dataset(folder: Path) -> bool:
    """Say whether `save_to_disk` wrote this folder."""
    return any((folder / mark).is_file() for mark in _MARKS)


def fetch_dataset(name: str, revision: str | None, cache: CachePaths) -> Path:
    """Fetch a data set of the hub into the cache, once, and return its folder.

    What was fetched stays the same; another `data.revision` is another folder.

    Raises:
        DataError: there is no such data set here or on the hub, or the hub cannot be reached.
    """
    folder = cache.data(hub_key(name, revision))
    if folder.is_dir():
        return folder
    _check_hub(name, revision)
    import datasets

    datasets.disable_progress_bars()
    with publishing_folder(folder) as beside:
        datasets.load_dataset(name, revision=revision).save_to_disk(os.fspath(beside))
    return folder


def has_test_split(folder: Path) -> bool:
    """Say whether a folder that `save_to_disk` wrote has a split `test`."""
    mark = folder / "dataset_dict.json"
    return mark.is_file() and "test" in json.loads(mark.read_bytes())["splits"]


def read_saved_dataset(folder: Path) -> dict[str, pa.Table]:
    """Return the tables of a folder that `save_to_disk` wrote, one per split.

    Raises:
        DataError: it cannot be read, or has no split `train`.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        found: Any = datasets.load_from_disk(os.fspath(folder))
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise DataError(f"data.path: {folder} is no whole saved data set ({error})") from error
    splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    named = {_SPLITS[name]: split for name, split in splits.items() if name in _SPLITS}
    if "train" not in named:
        raise DataError(
            f"data.path: {folder} has the splits {', '.join(splits)}; need one named train"
        )
    return {name: _table(split) for name, split in named.items()}


def _table(split: Any) -> pa.Table:
    # rows may be a selection of what the files hold
    return split.flatten_indices().data.table if split._indices is not None else split.data.table


def _check_hub(name: str, revision: str | None) -> None:
    """Ask the hub once: without a network `load_dataset` alone retries for half a minute."""
    if not is_hub_name(name):
        raise DataError(
            f"data.path: {name}: no such file or directory; give a parquet folder, a JSON(L) file, "
            "a saved data set, a hub name or `embedded`"
        )
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, revision=revision, timeout=20)
    except Exception as error:  # the hub's client raises its own, httpx's and OSError
        raise DataError(
            f"data.path: {name}: no such file or directory, and no data set that the Hugging Face "
            f"hub gives us ({first_line(error)}); correct it, or run `fedllm prepare` where the "
            "network is"
        ) from error
