"""A small federation of Natural Instructions: clients with short answers in English.

    python benchmarks/evidence/short_answers.py NATURAL_INSTRUCTIONS FOLDER

Reads train.parquet, validation.parquet and test.parquet and writes the same files with fewer
clients: Latin letters throughout, answers of at most four words on average, at most 600 characters
of instruction and input, at least eight test rows, no translation. Of these the draw of a fixed
seed takes 64 clients to train, and 48 whose number leaves 4 when divided by 5: the base `nano-base`
has never seen those. A client keeps at most 128 rows to train on and 16 of each other file. With
--pooled the clients that train are one client, number 0: the centralised reference.
"""

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FILES = {"train": 128, "validation": 16, "test": 16}
MODULO, EQUALS = 5, 4
MAX_WORDS, MAX_LETTERS, MIN_TEST_ROWS = 4.0, 600.0, 8
ASCII_SHARE = 0.995


@dataclass(kw_only=True)
class Seen:
    """What is known of a client's rows."""

    category: str
    rows: int = 0
    words: int = 0
    letters: int = 0
    ascii_letters: int = 0
    prompt_letters: int = 0
    places: Mapping[str, list[int]] = field(default_factory=lambda: {name: [] for name in FILES})

    def note(self, row: Mapping[str, str]) -> None:
        """Count a training row."""
        text = row["input"] + row["output"]
        self.rows += 1
        self.words += len(row["output"].split())
        self.letters += len(text)
        self.ascii_letters += sum(map(str.isascii, text))
        self.prompt_letters += len(row["instruction"]) + len(row["input"])

    def is_suitable(self) -> bool:
        """Return whether the client's answers are short, and its rows English."""
        return (
            self.rows > 0
            and self.words <= MAX_WORDS * self.rows
            and self.prompt_letters < MAX_LETTERS * self.rows
            and self.ascii_letters > ASCII_SHARE * self.letters
            and len(self.places["test"]) >= MIN_TEST_ROWS
            and "Translation" not in self.category
        )


def rows_of(table: pa.Table) -> Iterator[Mapping[str, str]]:
    """Yield the rows of a table, a batch at a time."""
    for batch in table.to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()


def observe(tables: Mapping[str, pa.Table]) -> dict[int, Seen]:
    """Return what is known of every client."""
    clients: dict[int, Seen] = {}
    for name, table in tables.items():
        for place, row in enumerate(rows_of(table)):
            client = clients.setdefault(int(row["client_id"]), Seen(category=row["category"]))
            client.places[name].append(place)
            if name == "train":
                client.note(row)
    return clients


def choose(clients: Mapping[int, Seen], train: int, held_out: int, seed: int) -> list[int]:
    """Return the clients that are written, sorted."""
    suitable = sorted(number for number, seen in clients.items() if seen.is_suitable())
    pools = (
        ([n for n in suitable if n % MODULO != EQUALS], train),
        ([n for n in suitable if n % MODULO == EQUALS], held_out),
    )
    draw = random.Random(seed)
    chosen: list[int] = []
    for pool, count in pools:
        if len(pool) < count:
            raise SystemExit(f"short_answers: {len(pool)} suitable clients, need {count}")
        chosen += draw.sample(pool, count)
    return sorted(chosen)


def first_rows(clients: Sequence[Seen], name: str, seed: int) -> list[int]:
    """Return the rows of one file that are written: a draw of every client's."""
    draw = random.Random(f"{seed} {name}")
    kept: list[int] = []
    for client in clients:
        places = client.places[name]
        kept += sorted(draw.sample(places, min(len(places), FILES[name])))
    return kept


def pooled(table: pa.Table) -> pa.Table:
    """Return the rows with one client, 0, instead of all clients that are not held out."""
    ids = table["client_id"].to_pylist()
    place = table.schema.get_field_index("client_id")
    owners = [number if number % MODULO == EQUALS else 0 for number in ids]
    return table.set_column(place, "client_id", pa.array(owners, table["client_id"].type))


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--pooled", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tables = {name: pq.read_table(given.source / f"{name}.parquet") for name in FILES}
    clients = observe(tables)
    chosen = choose(clients, given.train, given.held_out, given.seed)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        rows = first_rows([clients[number] for number in chosen], name, given.seed)
        taken = table.take(rows)
        written = pooled(taken) if given.pooled else taken
        pq.write_table(written, given.folder / f"{name}.parquet", compression="zstd")
    categories = len({clients[number].category for number in chosen})
    print(f"wrote {given.folder}: {len(chosen)} clients of {categories} categories")


if __name__ == "__main__":
    main()
