"""The choice of clients with short answers: by their rows, the same every time, and pooled."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "evidence" / "short_answers.py"


def write_source(folder: Path) -> None:
    """Twelve clients: 10 answers in sentences, 11 translates, the others answer with a word."""
    folder.mkdir()
    rows = [
        {
            "client_id": number,
            "category": "Translation" if number == 11 else "Sums",
            "instruction": "Add one.",
            "input": str(place),
            "output": "one two three four five" if number == 10 else str(place + 1),
        }
        for number in range(12)
        for place in range(8)
    ]
    for name in ("train", "validation", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def test_clients_with_short_answers_are_chosen_and_may_be_pooled(tmp_path: Path) -> None:
    write_source(tmp_path / "all")
    found = {}
    for name, more in {"some": [], "again": [], "pooled": ["--pooled"]}.items():
        command = [sys.executable, str(PROGRAM), str(tmp_path / "all"), str(tmp_path / name)]
        counts = ["--train", "8", "--held-out", "2"]
        subprocess.run([*command, *counts, *more], check=True, capture_output=True)
        found[name] = pq.read_table(tmp_path / name / "train.parquet").to_pylist()
    assert {row["client_id"] for row in found["some"]} == set(range(10))
    assert found["again"] == found["some"]
    assert {row["client_id"] for row in found["pooled"]} == {0, 4, 9}
    texts = [[row["input"] for row in found[name]] for name in ("some", "pooled")]
    assert texts[0] == texts[1]
