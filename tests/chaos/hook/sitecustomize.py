"""Stops or kills a process of a chaos run at a moment that a wire names.

Python imports this module at its start from PYTHONPATH: the product has no fault points of its
own. What a run publishes, claims and submits raises audit events; the first process that comes to
the event of a wire trips it, says so in a file, and stops (SIGSTOP) or dies (SIGKILL) right there.
"""

import json
import os
import signal
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path

FOLDER = os.environ.get("FEDLLM_CHAOS_WIRES")
# event -> which of its arguments says what it is about
EVENTS = {"open": 0, "os.rename": 1, "os.link": 1, "subprocess.Popen": 1}
# a record that never changes is published by a link, others by a rename
SAME_AS = {"os.link": "os.rename"}


def subject(event: str, arguments: tuple[object, ...]) -> str:
    """Return the path or the command line that an event is about."""
    told = arguments[EVENTS[event]]
    if isinstance(told, list | tuple):
        return " ".join(map(str, told))
    return os.fsdecode(told) if isinstance(told, str | bytes | os.PathLike) else ""


def watch(folder: Path) -> None:
    """Come to a wire's event and be stopped or killed there, each wire once."""
    wires = json.loads((folder / "wires.json").read_text(encoding="utf-8"))

    def trip(wire: dict[str, str], about: str) -> None:
        told = {"pid": os.getpid(), "about": about, "task": os.environ.get("FEDLLM_TASK", "")}
        told["node"] = os.environ.get("SLURMD_NODENAME", "")
        mine = folder / f".{wire['id']}-{os.getpid()}"
        mine.write_text(json.dumps(told), encoding="utf-8")
        try:
            os.link(mine, folder / f"{wire['id']}.tripped")
        except FileExistsError:
            return
        # to this thread: a signal to the process may let it go on for a moment
        number = signal.SIGKILL if wire["act"] == "kill" else signal.SIGSTOP
        signal.pthread_kill(threading.get_ident(), number)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS:
            return
        about = subject(event, arguments)
        # where it was stopped for one wire it may be stopped for the next: some moments come once
        for wire in wires:
            if wire["event"] == SAME_AS.get(event, event) and fnmatch(about, wire["pattern"]):
                trip(wire, about)

    sys.addaudithook(hook)


if FOLDER:
    watch(Path(FOLDER))
