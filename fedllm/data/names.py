"""Names of data sets: files and folders of this host, or of the Hugging Face hub."""

from fedllm.errors import DataError
from fedllm.storage.hub import is_hub_name


def require_hub_name(name: str) -> None:
    """Refuse data that are not here and have not the form of a name of the hub.

    Raises:
        DataError: they are neither.
    """
    if not is_hub_name(name):
        raise DataError(
            f"data.path: {name}: no such file or directory; give a file or folder of rows "
            "(JSON lines, CSV, parquet), a saved data set, a hub name or `embedded`"
        )
