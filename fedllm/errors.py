"""Errors that a user can meet, as one tree, and how messages write numbers of things.

FedllmError
├── UserError (exit 2): the user must change something
│   ├── ConfigError: a wrong configuration, all problems together
│   ├── DataError: data or a client that is missing or not as the configuration says
│   ├── ModelError: a base model that is missing or unsuitable
│   ├── AdapterError: an adapter that cannot be read or combined
│   │   └── BadUpdate: adapters with values that are not finite; the aggregation can omit them
│   ├── RunDirectoryError: a run directory of another run, or one that cannot be written
│   └── LeaseError: another coordinator holds the run
├── RunFailed (exit 1): the run cannot go on (quorum missed, a job that fails again and again)
│   ├── OutOfMemory: a client's training needs more than there is
│   └── ProcessLost: another process of the same task ended, or does not answer
└── Incomplete (exit 3): `fedllm resume` will go on
    ├── StorageFull: no space or quota left
    └── Stopped: a signal, such as Ctrl-C, stopped the coordinator
"""

from collections.abc import Mapping


class FedllmError(Exception):
    """An error that the user sees as one line, without a traceback."""

    exit_code = 1


class UserError(FedllmError, ValueError):
    """The user must change something; nothing was lost."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration is not valid; the message holds one line per problem."""


class DataError(UserError):
    """The data are missing or not as the configuration describes them."""


class ModelError(UserError):
    """The base model is missing or not suitable."""


class AdapterError(UserError):
    """An adapter cannot be read, or adapters cannot be combined."""


class BadUpdate(AdapterError):
    """Adapters hold values that no aggregation can use; it may go on without these adapters.

    `places` maps the number of each such adapter to what is wrong with it. Adapters are numbered
    in the order of the aggregation; in a round, the number is the client's place in the cohort.
    """

    def __init__(self, message: str, places: Mapping[int, str]) -> None:
        """Store the message and the problem of each adapter."""
        super().__init__(message)
        self.places = dict(places)


class RunDirectoryError(UserError):
    """The run directory belongs to another configuration or cannot be used."""


class LeaseError(UserError):
    """Another coordinator holds this run."""


class RunFailed(FedllmError):
    """The run cannot go on until its circumstances change."""

    exit_code = 1


class OutOfMemory(RunFailed):
    """A client's training needs more memory than there is."""


class ProcessLost(RunFailed):
    """A process lost another process of its task, whose `log` says why; empty: it is unknown."""

    def __init__(self, message: str, log: str = "") -> None:
        """Store the message and the log of the process that was lost."""
        super().__init__(message)
        self.log = log


class Incomplete(FedllmError):
    """The run stopped before its end; resume goes on."""

    exit_code = 3


class StorageFull(Incomplete):
    """No space or quota is left where the run writes."""


class Stopped(Incomplete):
    """A signal stopped the coordinator."""


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, as messages write it: `1 client`, `1,200 clients`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
