"""A second plan: it reads what the first prepared, until something that decides it has changed."""

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.commands import in_process
from tests.tiny import Tiny, make_rows

_COUNTED = """
import sys
from fedllm.cli.main import run
code = run(sys.argv[1:])
loaded = {"torch", "transformers", "pyarrow", "numpy", "tokenizers"} & set(sys.modules)
sys.exit(f"loaded {loaded}" if loaded else code)
"""


def own(tiny: Tiny, folder: Path) -> tuple[str, ...]:
    """Return overrides for a cache and a file of rows of one's own."""
    make_rows(folder / "rows.jsonl")
    words = (f"storage.cache={folder / 'cache'}", f"data.path={folder / 'rows.jsonl'}")
    return ("plan", str(tiny.config), *(part for word in words for part in ("--set", word)))


def kept_plans(folder: Path) -> list[Path]:
    return list((folder / "cache").glob("plans/*/*"))


def test_a_second_plan_loads_no_base_no_rows_and_no_torch(tiny: Tiny, tmp_path: Path) -> None:
    words = (*own(tiny, tmp_path), "--set", "scheduler.kind=local")
    first = in_process(*words)
    assert first.returncode == 0, first.stderr
    again = subprocess.run(
        [sys.executable, "-c", _COUNTED, *words], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    # the words about the data are said again, not the rows that were tokenised
    assert (again.stdout, again.stderr) == (first.stdout, first.stderr.splitlines(True)[-1])


def test_only_what_decides_a_preparation_has_it_made_anew(tiny: Tiny, tmp_path: Path) -> None:
    words = own(tiny, tmp_path)

    def clients(*more: str) -> int:
        shown = in_process(*words, "--json", *more)
        return int(json.loads(shown.stdout)["trainable_clients"])

    before = clients()
    varied = ("rounds=9", "clients.cohort.count=3", "training.learning_rate=0.1")
    assert clients(*(part for word in varied for part in ("--set", word))) == before
    assert len(kept_plans(tmp_path)) == 1
    row = {"client_id": "new", "instruction": "First word.", "input": "red", "output": "red"}
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(f"{json.dumps(row)}\n" * 20)
    assert clients() == before + 1
    assert len(kept_plans(tmp_path)) == 2


def test_what_a_plan_keeps_of_private_rows_is_private(tiny: Tiny, tmp_path: Path) -> None:
    words = own(tiny, tmp_path)
    (tmp_path / "rows.jsonl").chmod(0o600)
    assert in_process(*words).returncode == 0
    (kept,) = kept_plans(tmp_path)
    assert kept.stat().st_mode & 0o077 == kept.parent.stat().st_mode & 0o077 == 0
