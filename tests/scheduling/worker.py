"""A local worker without a compute stack: `argv` says what a task does and how it ends."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Run tasks by the protocol of `fedllm.programs.serve`."""
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for line in sys.stdin:
        message = json.loads(line)
        log = Path(message["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {message['id']}\n")
        action, *arguments = message["argv"]
        code = do(action, message["environment"], log)
        answer = json.dumps(
            {"id": message["id"], "exit": int(arguments[0]) if code is None else code}
        )
        # an answer may arrive in pieces
        for piece in (answer[:5], answer[5:] + "\n"):
            sys.stdout.write(piece)
            sys.stdout.flush()
            time.sleep(0.01)
        if action == "deaf":
            os.close(0)
            time.sleep(60)


def do(action: str, environment: dict[str, str], log: Path) -> int | None:
    """Run a task; return its exit code, or None: the one in its arguments."""
    if action == "tell":
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(environment) + "\n")
    elif action == "last fails" and environment["FEDLLM_RANK"] == "1":
        return 4
    elif action == "last fails":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        time.sleep(60)
    elif action == "sleep":
        time.sleep(60)
    elif action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    return None


if __name__ == "__main__":
    main()
