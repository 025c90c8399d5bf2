"""Files that another node wrote, read with retries: shared storage may show them late."""

import time
from collections.abc import Callable
from typing import TypeVar

from fedllm.errors import AdapterError, RunDirectoryError, UserError

T = TypeVar("T")
_RETRY_SECONDS = 1.0


def read_late_file(read: Callable[[], T], seconds: float) -> T:
    """Read a file that another node wrote; try again for `seconds` before raising.

    Raises:
        RunDirectoryError: the file is missing or damaged.
        AdapterError: the file is an update, and is missing or damaged.
    """
    problem: UserError
    deadline = time.monotonic() + seconds
    while True:
        try:
            return read()
        except FileNotFoundError as error:
            problem = RunDirectoryError(f"{error.filename}: missing; resume the run")
            problem.__cause__ = error
        except OSError as error:
            # NFS reports ESTALE for a file that was replaced meanwhile
            reason = (error.strerror or str(error)).lower()
            problem = RunDirectoryError(f"{error.filename}: {reason}; resume the run")
            problem.__cause__ = error
        except (RunDirectoryError, AdapterError) as error:
            problem = error
        if time.monotonic() >= deadline:
            raise problem
        time.sleep(_RETRY_SECONDS)
