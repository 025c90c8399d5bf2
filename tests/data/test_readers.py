"""Every source of data gives the same canonical rows; missing columns are named with their keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedllm.config.models import ColumnsSection, DataSection
from fedllm.data.readers import Tables, open_source
from fedllm.errors import DataError
from fedllm.storage.hub import hub_key
from fedllm.storage.paths import CachePaths

ROWS: list[dict[str, Any]] = [
    {
        "client_id": number % 3,
        "category": f"kind {number % 3}",
        "instruction": "Say it.",
        "input": f"input {number}",
        "output": f"answer {number}",
    }
    for number in range(30)
]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def tables(path: Path | str, tmp_path: Path, **section: Any) -> Tables:
    given = DataSection(path=str(path), **section)
    return open_source(given, CachePaths(root=tmp_path / "cache"), split_seed=0).read()


def fingerprint(path: Path | str, split_seed: int = 0, **section: Any) -> str:
    given = DataSection(path=str(path), **section)
    return open_source(given, CachePaths(root=Path("unused")), split_seed).fingerprint


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.parquet", write_parquet),
        ("rows.jsonl", write_json_lines),
        ("rows.json", write_json),
    ],
)
def test_every_format_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    write(tmp_path / name, ROWS)
    train = tables(tmp_path / name, tmp_path, test_fraction=0.0)["train"]
    assert train.num_rows == 30
    assert train["client"].to_pylist()[:4] == ["0", "1", "2", "0"]
    assert train["references"].to_pylist()[7] == ["answer 7"]
    assert train["integer.client_id"].to_pylist()[:4] == [0, 1, 2, 0]


def test_existing_splits_stay_as_they_are(tmp_path: Path) -> None:
    for split, rows in {"train": ROWS[:20], "validation": ROWS[20:25], "test": ROWS[25:]}.items():
        write_parquet(tmp_path / f"{split}.parquet", rows)
    found = tables(tmp_path, tmp_path)
    assert {split: table.num_rows for split, table in found.items()} == {
        "train": 20,
        "validation": 5,
        "test": 5,
    }
    assert fingerprint(tmp_path, split_seed=0) == fingerprint(tmp_path, split_seed=1)


def test_parts_of_a_split_are_one_split(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train-00000-of-00002.jsonl", ROWS[:11])
    write_json_lines(tmp_path / "train-00001-of-00002.jsonl", ROWS[11:])
    assert tables(tmp_path, tmp_path, test_fraction=0.0)["train"].num_rows == 30


def test_without_a_test_split_every_client_gives_a_seeded_fraction(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "rows.jsonl", ROWS)
    found = tables(tmp_path / "rows.jsonl", tmp_path, test_fraction=0.2)
    assert sorted(found["test"]["client"].to_pylist()) == ["0", "0", "1", "1", "2", "2"]
    inputs = found["train"]["input"].to_pylist() + found["test"]["input"].to_pylist()
    assert sorted(inputs) == sorted(row["input"] for row in ROWS)
    again = tables(tmp_path / "rows.jsonl", tmp_path, test_fraction=0.2)
    assert again["test"].equals(found["test"])


def test_a_client_with_one_row_trains_on_it(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "rows.jsonl", ROWS[:1])
    found = tables(tmp_path / "rows.jsonl", tmp_path, test_fraction=0.5)
    assert {split: table.num_rows for split, table in found.items()} == {"train": 1}


def test_a_saved_data_set_is_read_with_its_splits_and_selections(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    splits = {"train": whole.select(range(0, 30, 2)), "test": whole.select(range(1, 30, 2))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = tables(tmp_path / "saved", tmp_path)
    assert found["train"]["input"].to_pylist() == [row["input"] for row in ROWS[::2]]
    assert found["test"].num_rows == 15


def test_a_saved_data_set_without_splits_is_split(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    found = tables(tmp_path / "saved", tmp_path, test_fraction=0.5)
    assert (found["train"].num_rows, found["test"].num_rows) == (15, 15)


def test_several_references_numbers_and_nulls_become_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"who": "a", "text": 1.5, "answers": ["x", "y"]},
        {"who": 7, "text": None, "answers": []},
        {"who": "émoji 🦊", "text": True, "answers": "z"},
    ]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    columns = ColumnsSection(
        client="who", category=None, instruction=None, input="text", output="answers"
    )
    train = tables(tmp_path / "rows.jsonl", tmp_path, columns=columns, test_fraction=0)["train"]
    assert train["client"].to_pylist() == ["a", "7", "émoji 🦊"]
    assert train["input"].to_pylist() == ["1.5", "", "true"]
    assert train["references"].to_pylist() == [["x", "y"], [], ["z"]]
    assert train["instruction"].to_pylist() == ["", "", ""]


def test_the_fingerprint_follows_content_and_columns_but_not_the_place(tmp_path: Path) -> None:
    for name in ("here", "there", "changed"):
        (tmp_path / name).mkdir()
        write_json_lines(tmp_path / name / "train.jsonl", ROWS if name != "changed" else ROWS[1:])
    here = fingerprint(tmp_path / "here")
    assert here == fingerprint(tmp_path / "there")
    assert here != fingerprint(tmp_path / "changed")
    assert here != fingerprint(tmp_path / "here", columns=ColumnsSection(input="instruction"))
    assert here != fingerprint(tmp_path / "here", test_fraction=0.3)
    assert here != fingerprint(tmp_path / "here", split_seed=1)


def message_of(path: Path | str, tmp_path: Path, **section: Any) -> str:
    with pytest.raises(DataError) as raised:
        tables(path, tmp_path, **section)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_missing_column_is_reported_with_its_key_and_all_columns(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "rows.jsonl", ROWS)
    columns = ColumnsSection(client="owner", category="kind")
    message = message_of(tmp_path / "rows.jsonl", tmp_path, columns=columns)
    assert "data.columns.client: no column `owner`" in message
    assert "data.columns.category=null" in message
    assert "client_id, category, instruction, input, output" in message


@pytest.mark.parametrize("path", ["nowhere/at/all.jsonl", "./nowhere", "nowhere-at-all"])
def test_a_missing_path_is_reported_with_the_remedy(tmp_path: Path, path: str) -> None:
    message = message_of(path, tmp_path)
    assert message.startswith(f"data.path: {path}: no such file or directory")


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    message = message_of(tmp_path, tmp_path)
    assert "notes.txt" in message
    assert "train.parquet" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"client_id": 1}\n{"client_id": ', "line 2 is not JSON"),
        ("[1]\n", "line 1 is not an object"),
        ("", "has no rows"),
        ('{"client_id": {"a": 1}}\n', "need text or numbers"),
        ('{"client_id": null, "output": "x"}\n', "data.columns.client"),
    ],
)
def test_broken_json_lines_are_reported_with_their_place(
    tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    columns = ColumnsSection(category=None, instruction=None, input=None)
    if "output" not in content:
        columns = columns.model_copy(update={"output": "client_id"})
    assert words in message_of(tmp_path / "rows.jsonl", tmp_path, columns=columns)


def test_bytes_that_are_not_text_are_reported(tmp_path: Path) -> None:
    line = json.dumps(ROWS[0]).replace("Say it.", "Sag's höflich")
    (tmp_path / "rows.jsonl").write_bytes(line.encode("unicode_escape").replace(b"\\xf6", b"\xf6"))
    assert "UTF-8" in message_of(tmp_path / "rows.jsonl", tmp_path)


def test_a_file_that_is_not_parquet_is_reported(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("no parquet")
    assert "cannot be read as parquet" in message_of(tmp_path, tmp_path)


def test_natural_instructions_are_read_whole(shared: Path, tmp_path: Path) -> None:
    found = tables(shared / "data" / "natural-instructions", tmp_path)
    rows = {split: table.num_rows for split, table in found.items()}
    assert rows == {"train": 403_149, "validation": 49_793, "test": 36_098}


def test_a_fetched_data_set_needs_no_network_again(tmp_path: Path) -> None:
    folder = CachePaths(root=tmp_path / "cache").data(hub_key("someone/tasks", None))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
    found = tables("someone/tasks", tmp_path, test_fraction=0.1)
    assert (found["train"].num_rows, found["test"].num_rows) == (27, 3)
    with pytest.raises(DataError, match="someone/tasks"):
        tables("someone/tasks", tmp_path, revision="another")
