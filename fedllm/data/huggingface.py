"""Hugging Face data sets, saved in a folder or on the hub; only this file uses `datasets`."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedllm.data.files.splits import SPLIT_NAMES, TRAIN
from fedllm.data.names import require_hub_name
from fedllm.errors import DataError
from fedllm.storage.hub import first_line, hub_key
from fedllm.storage.paths import CachePaths
from fedllm.storage.publishing.folders import publishing_folder


@dataclass(frozen=True, kw_only=True)
class SavedSplits:
    """Splits of a saved data set that are read, and the names of those that are not."""

    tables: Mapping[str, pa.Table]
    unread: Sequence[str]


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder.

    `dataset_info.json` alone does not prove it: other programs write that file too.
    """
    one = all((folder / mark).is_file() for mark in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


def fetch_dataset(name: str, revision: str | None, cache: CachePaths) -> Path:
    """Fetch a data set of the hub into the cache, once, and return its folder.

    A fetched data set never changes; another `data.revision` has another folder.

    Raises:
        DataError: there is no such data set here or on the hub, or the hub cannot be reached.
    """
    folder = cache.data(hub_key(name, revision))
    if folder.is_dir():
        return folder
    _check_hub(name, revision)
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, revision=revision)
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # for example: it needs the name of a configuration, or its own script
        raise DataError(
            f"data.path: {name}: datasets cannot load it as it is ({first_line(error)}); save what "
            "you need with save_to_disk and give that folder"
        ) from error
    with publishing_folder(folder) as beside:
        dataset.save_to_disk(os.fspath(beside))
    return folder


def read_saved_dataset(folder: Path) -> SavedSplits:
    """Return the tables of a folder that `save_to_disk` wrote, mapped into memory.

    Raises:
        DataError: it cannot be read, has no split `train`, or has a split under two names.
    """
    try:
        splits = _folders_of_splits(folder)
        named = _names_by_split(list(splits), folder)
        tables = {split: _saved_table(splits[name]) for split, name in named.items()}
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"data.path: {folder} is not a complete saved data set ({error}); save it again"
        ) from error
    unread = [name for name in splits if name not in named.values()]
    return SavedSplits(tables=tables, unread=unread)


def _folders_of_splits(folder: Path) -> dict[str, Path]:
    mark = folder / "dataset_dict.json"
    if not mark.is_file():
        return {TRAIN: folder}
    return {name: folder / name for name in json.loads(mark.read_bytes())["splits"]}


def _names_by_split(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the name that the data set gives to every split that is read."""
    named: dict[str, str] = {}
    for name in names:
        split = SPLIT_NAMES.get(name.lower())
        if split in named:
            raise DataError(
                f"data.path: {folder} has the splits {named[split]} and {name}, both for {split}; "
                "save it with one of them"
            )
        if split is not None:
            named[split] = name
    if TRAIN not in named:
        raise DataError(
            f"data.path: {folder} has the splits {', '.join(names)}; need one named train"
        )
    return named


def _saved_table(folder: Path) -> pa.Table:
    if not json.loads((folder / "state.json").read_bytes())["_data_files"]:
        # `datasets` can write a split without rows, but cannot read it
        return pa.table({})
    import datasets

    datasets.disable_progress_bars()
    return _table(datasets.load_from_disk(os.fspath(folder)))


def _table(split: Any) -> pa.Table:
    # the rows may be a selection from the files
    return split.flatten_indices().data.table if split._indices is not None else split.data.table


def _check_hub(name: str, revision: str | None) -> None:
    """Query the hub once: without a network, `load_dataset` retries for half a minute."""
    require_hub_name(name)
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, revision=revision, timeout=20)
    except Exception as error:  # the hub's client raises its own, httpx's and OSError
        raise DataError(
            f"data.path: {name}: no such file or directory, and no data set that the Hugging Face "
            f"hub gives us ({first_line(error)}); correct it, or run `fedllm prepare` where the "
            "network is"
        ) from error
