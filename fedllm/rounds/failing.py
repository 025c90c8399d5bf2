"""Record of the error that ends a coordinator: on a cluster nobody sees its output."""

import contextlib
from collections.abc import Iterator

from fedllm.errors import FedllmError, LeaseError, Stopped
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import SchedulerFull, SchedulerUnreachable
from fedllm.storage.kept_records import FailureRecord

# the scheduler answers, or has room, later
ASKED_AGAIN = (SchedulerFull, SchedulerUnreachable)
# another coordinator goes on, or this one asks again later
_NO_FAILURE = (LeaseError, *ASKED_AGAIN)


@contextlib.contextmanager
def recorded_failure(run: Run) -> Iterator[None]:
    """Record the error of this block for `fedllm status`, and raise it again."""
    try:
        yield
    except (Stopped, *_NO_FAILURE):
        raise
    except Exception as error:
        step, number = run.observations.step
        known = isinstance(error, FedllmError)
        record = FailureRecord(
            lease=run.lease.number,
            round=number,
            step=step,
            kind=type(error).__name__,
            message=str(error) if known else f"{type(error).__name__}: {error}",
            exit_code=error.exit_code if isinstance(error, FedllmError) else FedllmError.exit_code,
        )
        # a full disk may take no record; the error itself is the one to raise
        with contextlib.suppress(FedllmError, OSError):
            record.publish(run.paths.failure(run.lease.number))
        raise
