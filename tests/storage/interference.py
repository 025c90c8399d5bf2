"""Interference: an action on the file system just before one of our own system calls."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_waiting: list[tuple[str, Callable[..., object]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for waiting in list(_waiting):
        name, action = waiting
        if event == name:
            # before the action, which may do the same
            _waiting.remove(waiting)
            action(*arguments)


sys.addaudithook(_hook)


@contextmanager
def just_before(event: str, action: Callable[..., object]) -> Iterator[None]:
    """Run `action` once, when Python is about to do `event` (an audit event, as `os.link`)."""
    waiting = (event, action)
    _waiting.append(waiting)
    try:
        yield
        assert waiting not in _waiting, f"{event} did not happen"
    finally:
        if waiting in _waiting:
            _waiting.remove(waiting)
