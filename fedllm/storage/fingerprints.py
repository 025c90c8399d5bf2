"""Fingerprints of content: the same files give the same key in any folder."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def fingerprint_files(files: Iterable[Path], root: Path) -> str:
    """Return the SHA-256 over the files' names below `root` and their content."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\n{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def fingerprint_values(*values: Any) -> str:
    """Return the SHA-256 of values that JSON can represent."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
