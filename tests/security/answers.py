"""What every command line has to answer, whatever it reads."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.commands import in_process

MAX_SECONDS = 5.0
# done, the run failed, change something, incomplete
CODES = {0, 1, 2, 3}


def answer(*words: object) -> int:
    """Run a command line; require a short answer without a traceback; return its exit code."""
    began = time.process_time()
    with warnings.catch_warnings():
        # of libraries, about values that no user has
        warnings.simplefilter("ignore")
        done = in_process(*words)
    said = done.stdout + done.stderr
    assert time.process_time() - began < MAX_SECONDS, said[-500:]
    assert "(a bug?" not in said, said[-2000:]
    assert "Traceback" not in said, said[-2000:]
    assert done.returncode in CODES, said[-500:]
    if done.returncode == 2:
        # what was read so far may be said before
        assert "\nfedllm: " in f"\n{done.stderr}" or done.stdout, said[-500:]
        assert len(done.stderr) < 20_000, done.stderr[:500]
    return done.returncode


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Require that the block leaves the files of a folder as they were."""

    def files() -> dict[Path, tuple[int, int]]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    before = files()
    yield
    assert files() == before


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Let a file have another content for the block."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)
