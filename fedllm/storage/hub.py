"""Names of the Hugging Face hub, and the cache keys of fetched repositories."""

import re

from fedllm.storage.fingerprints import fingerprint_values

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# a file of rows, which nobody means as the name of a repository
_FILE = re.compile(r".*\.(jsonl?|jsonlines|ndjson|csv|tsv|parquet)(\.gz|\.zst)?", re.IGNORECASE)


def is_hub_name(name: str) -> bool:
    """Say whether `name` has the form of a hub repository: `name` or `owner/name`, no file's."""
    return _NAME.fullmatch(name) is not None and _FILE.fullmatch(name) is None


def hub_key(name: str, revision: str | None) -> str:
    """Return the cache key of a repository at a revision: readable and unique."""
    return f"hub-{name.replace('/', '--')}-{fingerprint_values(name, revision)[:12]}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
