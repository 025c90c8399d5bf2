"""Reading what another node wrote: shared storage may show it late."""

import time
from collections.abc import Callable
from typing import TypeVar

from fedllm.errors import AdapterError, RunDirectoryError, UserError

T = TypeVar("T")
_RETRY_SECONDS = 1.0


def patiently(read: Callable[[], T], seconds: float) -> T:
    """Read what another node wrote; only after `seconds` is it missing or damaged.

    Raises:
        RunDirectoryError: it is.
        AdapterError: it is an update, and is.
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
            # ESTALE is what NFS says of a file that was replaced meanwhile
            what = (error.strerror or str(error)).lower()
            problem = RunDirectoryError(f"{error.filename}: {what}; resume the run")
            problem.__cause__ = error
        except (RunDirectoryError, AdapterError) as error:
            problem = error
        if time.monotonic() >= deadline:
            raise problem
        time.sleep(_RETRY_SECONDS)
