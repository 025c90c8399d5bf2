"""A process that begins anew keeps its id, its pipes and its signals, and nothing else."""

import subprocess
import sys

PROGRAM = """
import os, signal, socket, sys, threading, time
from fedllm.process.renewal import begin_anew
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskEnvironment

renewed = TaskEnvironment().identity.renewed_at is not None
if renewed:
    time.sleep(0.1)  # the signals wait until they are noted
with StopSignals() as signals:
    kept, closed = map(int, sys.argv[1:]) if renewed else (os.dup(1), os.dup(1))
    print(os.getpid(), renewed, signals.name, signals.only_warned, flush=True)
    if renewed:
        os.write(kept, b"kept\\n")
        try:
            os.write(closed, b"not closed")
        except OSError:
            sys.exit(7)
    # a signal to the process may be taken by any thread
    threading.Thread(target=time.sleep, args=[60], daemon=True).start()
    os.set_inheritable(closed, True)
    os.kill(os.getpid(), signal.SIGUSR2)
    begin_anew(["-c", PROGRAM, str(kept), str(closed)], signals=signals, keep=[kept])
"""


def test_a_process_that_begins_anew_keeps_its_id_its_pipes_and_its_signals() -> None:
    program = f"PROGRAM = {PROGRAM!r}\n" + "exec(PROGRAM)"
    program = program.replace('["-c", PROGRAM', '["-c", "PROGRAM = " + repr(PROGRAM) + PROGRAM')
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    said, _ = started.communicate(timeout=60)
    assert said.splitlines() == [
        f"{started.pid} False none False",
        f"{started.pid} True SIGUSR2 True",
        "kept",
    ]
    assert started.returncode == 7
