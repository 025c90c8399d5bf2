"""A process that begins anew: a new program takes its place, under the same id.

This frees all memory, also what libraries never free. The scheduler notices nothing: process id,
pipes, logs and environment stay.
"""

import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import NoReturn

from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import renewal_variables

ANEW = 75  # what a program returns, in place of an exit code, if its process is to begin anew
_FIRST_OF_OURS = 3  # descriptor, after stdin, stdout and stderr


def begin_anew(
    arguments: Sequence[str], *, signals: StopSignals, keep: Collection[int] = ()
) -> NoReturn:
    """Replace this process by a new Python of the same process id.

    Args:
        arguments: the arguments of the Python interpreter.
        signals: that this process has noted; the new one notes them too.
        keep: descriptors that stay open, beside stdin, stdout and stderr.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for name in os.listdir("/dev/fd"):  # noqa: PTH208 - names, as numbers
        descriptor = int(name)
        if descriptor >= _FIRST_OF_OURS:
            # libraries leave sockets open that a new program would have
            with suppress(OSError):
                os.set_inheritable(descriptor, descriptor in keep)
    signals.leave_to_next()
    environment = {**os.environ, **renewal_variables()}
    os.execve(sys.executable, [sys.executable, *arguments], environment)
