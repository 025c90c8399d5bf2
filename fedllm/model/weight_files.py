"""The files of a model directory that hold its weights: exactly those that transformers loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import ModelError
from fedllm.storage.hub import first_line

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_PICKLED = "*.bin"
_NO_WEIGHTS = "training_args.bin"  # what transformers' trainer writes beside them


def weight_shards(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads; none if there are none.

    Raises:
        ModelError: files that transformers does not load, or that it would unpickle, or an index
            that names a file which is missing or lies outside the directory.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        return _indexed(folder / _INDEX)
    found = {file.name for pattern in ("*.safetensors", _PICKLED) for file in folder.glob(pattern)}
    found.discard(_NO_WEIGHTS)
    pickled = sorted(name for name in found if name.endswith(".bin"))
    if pickled:
        raise ModelError(
            f"model.path: {folder} holds pickled weights ({pickled[0]}), and code may run when "
            "they are read; convert them if you trust them, and give NEW: python -c 'from "
            "transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f'[kind.from_pretrained("{folder}").save_pretrained("NEW") for kind in (M, T)]\''
        )
    if found:
        raise ModelError(
            f"model.path: {folder} holds {', '.join(sorted(found))}, but neither {_WEIGHTS} nor "
            f"its index ({_INDEX}); give a directory as save_pretrained writes it"
        )
    return []


def weight_files(folder: Path) -> list[Path]:
    """Return the files of `weight_shards`, and the index that names them.

    Raises:
        ModelError: as `weight_shards`.
    """
    shards = weight_shards(folder)
    is_indexed = shards and shards != [folder / _WEIGHTS]
    return [folder / _INDEX, *shards] if is_indexed else shards


def read_json(file: Path) -> Mapping[str, Any]:
    """Read a JSON file of a model directory.

    Raises:
        ModelError: it cannot be read, or holds no keys and values.
    """
    try:
        raw = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"model.path: {file} cannot be read ({first_line(error)}); copy it again"
        ) from error
    if not isinstance(raw, dict):
        raise ModelError(
            f"model.path: {file} holds a {type(raw).__name__}, need keys and values; copy it again"
        )
    return raw


def _indexed(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"model.path: {index} has no weight_map; copy the file again")
    names = [str(name) for name in dict.fromkeys(places.values())]
    outside = next((name for name in names if Path(name).name != name), None)
    if outside is not None:
        raise ModelError(
            f"model.path: {index} names {outside}, which is not a file of {index.parent}; copy the "
            "file into the directory and name it there"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"model.path: {index.parent} lacks {missing[0]}, {len(missing)} of the {len(names)} "
            f"files that {index.name} names; copy them too"
        )
    return [index.parent / name for name in names]
