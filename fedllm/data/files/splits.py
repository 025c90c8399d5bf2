"""Splits of a folder: which of its files are the rows of which split.

A file belongs to a split if it is named after the split, alone (`Test.jsonl`, `dev.csv.gz`) or
with a part (`train-00000-of-00002.parquet`, `train_1.jsonl`), or if its folder is. All of this may
be inside a folder `data`, as on the hub. Other files that look like rows are reported and never
silently ignored: one may be somebody's test set.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import DataError

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")

SPLIT_NAMES: Mapping[str, str] = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "eval": VALIDATION,
    "test": TEST,
    "testing": TEST,
}

_COMPRESSED = {".gz", ".zst"}
# kinds of files that can hold rows but are not read
_TABLES = {
    ".arrow",
    ".avro",
    ".feather",
    ".h5",
    ".hdf5",
    ".npy",
    ".npz",
    ".orc",
    ".pickle",
    ".pkl",
    ".pt",
    ".sqlite",
    ".tfrecord",
}
_SHEETS = {".ods", ".xls", ".xlsx"}
_ARCHIVES = {".7z", ".bz2", ".gz", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"}
# files of these kinds count only if they have a split's name: most are notes
_NOTES = {".txt", ".xml"}
_OTHER_KINDS = _TABLES | _SHEETS | _ARCHIVES | _NOTES
# files that describe rows but hold none
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_FILE_NAME = re.compile(
    rf"({'|'.join(SPLIT_NAMES)})(-.+|[._ ]?(part|shard)?[-._ ]?[0-9]+([-._ ]?of[-._ ]?[0-9]+)?)?"
)
_PART_NUMBER = re.compile(r".*?([0-9]+)[-._ ]?of[-._ ]?([0-9]+)")
_MAX_DEPTH = 3
_MAX_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """Files of each split, and the files that look like rows but are not read."""

    splits: Mapping[str, Sequence[Path]]
    unread: Sequence[Path]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """File of a split; `part`: it may be one of several; parts of one source have equal groups."""

    file: Path
    split: str
    kind: str
    part: bool
    group: tuple[str, ...]


def kind_of(file: Path) -> str:
    """Return the suffix of a file's name in lower case, without the suffix of a compression."""
    name = Path(file.name.lower())
    return (name.suffix in _COMPRESSED and name.with_suffix("").suffix) or name.suffix


def split_files(folder: Path, kinds: Collection[str]) -> SplitFiles:
    """Find the files of each split in a folder; `kinds` are the suffixes that can be read.

    Raises:
        DataError: there is no train split, or a split has two sources, misses a part or comes in a
            kind of file that is not read.
    """
    found: dict[str, list[_Candidate]] = {split: [] for split in SPLITS}
    unread = []
    for file in _files_below(folder):
        candidate = _candidate(file, folder, kinds)
        if candidate is not None and candidate.kind in kinds:
            found[candidate.split].append(candidate)
        elif candidate is not None or kind_of(file) in {*kinds, *_OTHER_KINDS} - _NOTES:
            unread.append(file)
    for split, candidates in found.items():
        _check_one_source(candidates, folder)
        _check_all_parts(candidates, folder)
        if not candidates:
            _check_readable(split, unread, folder, kinds)
    if not found[TRAIN]:
        raise _no_train_error(folder)
    splits = {split: [c.file for c in candidates] for split, candidates in found.items()}
    return SplitFiles(splits={s: files for s, files in splits.items() if files}, unread=unread)


def shorten_files(files: Sequence[Path], folder: Path) -> str:
    """Return the names of the first few files below a folder as text."""
    names = [str(file.relative_to(folder)) for file in files[:_MAX_SHOWN]]
    return ", ".join(names) + (
        f" and {len(files) - _MAX_SHOWN} more" if len(files) > _MAX_SHOWN else ""
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield files in the order of their paths, without hidden ones, which programs make."""
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        deep = len(here.relative_to(folder).parts) >= _MAX_DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if _is_visible(name))
        visible = (name for name in sorted(names) if _is_visible(name))
        yield from (here / name for name in visible if name not in _DESCRIPTIONS)


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _candidate(file: Path, folder: Path, kinds: Collection[str]) -> _Candidate | None:
    """Return a file as a candidate for the split that its name or folder names; None: for none."""
    kind = kind_of(file)
    if kind not in {*_OTHER_KINDS, *kinds}:
        return None
    match = _SPLIT_FILE_NAME.fullmatch(_stem(file))
    named = SPLIT_NAMES[match[1]] if match else None
    folders = [name.lower() for name in file.relative_to(folder).parts[:-1]]
    folders = folders[1:] if folders[:1] == ["data"] else folders
    within = SPLIT_NAMES.get(folders[0]) if len(folders) == 1 else None
    if folders and (within is None or named not in {None, within}):
        return None
    split = within or named
    if split is None:
        return None
    place = (str(file.parent), kind)
    if within or match is None:
        return _Candidate(file=file, split=split, kind=kind, part=True, group=place)
    group = (*place, match[1])
    return _Candidate(file=file, split=split, kind=kind, part=bool(match[2]), group=group)


def _stem(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
    if kind_of(file) in _OTHER_KINDS:
        # packed once more, as in test.jsonl.zip
        return name.partition(".")[0]
    return name.removesuffix(kind_of(file))


def _check_one_source(candidates: Sequence[_Candidate], folder: Path) -> None:
    """Raise an error if a split exists twice: whole and in parts, or in two places or kinds."""
    stems = {(c.file.parent, _stem(c.file)) for c in candidates}
    whole = any(not c.part for c in candidates)
    groups = {c.group for c in candidates}
    if len(candidates) > 1 and (whole or len(groups) > 1 or len(stems) < len(candidates)):
        raise _two_sources_error(candidates, folder)


def _two_sources_error(candidates: Sequence[_Candidate], folder: Path) -> DataError:
    return DataError(
        f"data.path: {folder} has more than one source of the split {candidates[0].split}: "
        f"{shorten_files([c.file for c in candidates], folder)}; keep one of them there"
    )


def _check_all_parts(candidates: Sequence[_Candidate], folder: Path) -> None:
    """Raise an error if a part is missing; the files' names say how many parts there are."""
    matches = [_PART_NUMBER.fullmatch(_stem(candidate.file)) for candidate in candidates]
    parts = [(int(match[1]), int(match[2])) for match in matches if match]
    if not parts:
        return
    counts = {count for _, count in parts}
    if len(counts) > 1 or len(parts) < len(candidates):
        raise _two_sources_error(candidates, folder)
    (count,) = counts
    first = 0 if any(number == 0 for number, _ in parts) else 1
    missing = sorted({*range(first, first + count)} - {number for number, _ in parts})
    if missing:
        names = shorten_files([c.file for c in candidates], folder)
        raise DataError(
            f"data.path: {folder} has {len(parts)} of {count} parts of the split "
            f"{candidates[0].split} ({names}); number {missing[0]} is missing: fetch it, or "
            "take the count out of the names"
        )


def _check_readable(
    split: str, unread: Sequence[Path], folder: Path, kinds: Collection[str]
) -> None:
    for file in unread:
        candidate = _candidate(file, folder, kinds)
        if candidate is not None and candidate.split == split:
            raise DataError(
                f"data.path: {file} looks like the split {split}, but is not a "
                f"{' or '.join(kinds)} file; convert it, or move it elsewhere"
            )


def _no_train_error(folder: Path) -> DataError:
    here = sorted(file.name for file in folder.iterdir())
    names = ", ".join(here[:_MAX_SHOWN]) + (", ..." if len(here) > _MAX_SHOWN else "") or "nothing"
    within = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and _is_visible(path.name) and any(map(_is_train_file, path.iterdir()))
    )
    remedy = f"; or give one of its folders: {', '.join(within[:_MAX_SHOWN])}" if within else ""
    return DataError(
        f"data.path: {folder} holds {names}; need train.parquet or train.jsonl (and, if there are "
        f"any, validation.* and test.*), or a saved Hugging Face dataset{remedy}"
    )


def _is_train_file(file: Path) -> bool:
    match = _SPLIT_FILE_NAME.fullmatch(file.name.lower().partition(".")[0])
    return match is not None and SPLIT_NAMES[match[1]] == TRAIN
