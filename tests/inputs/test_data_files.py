"""Files as people have them: every layout gives the same rows, or one line that names the place."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedllm.config.models import DataSection
from fedllm.data.files.quotes import checked_quotes
from fedllm.data.readers import Source, open_source
from fedllm.errors import DataError
from fedllm.storage.paths import CachePaths
from tests.inputs.test_data_values import COLUMNS, read, row, told

ROWS = [row("ana", "première\nligne, “deux” 🦊", "a\tb"), row(2, "zwei", "x;y"), row("ana", "drei")]
PLAIN = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in ROWS)
CSV = 'client_id,input,output\nana,a\tb,"première\nligne, “deux” 🦊"\n2,x;y,zwei\nana,?,drei\n'


def packed(name: str, text: str, tmp_path: Path) -> Path:
    with pa.output_stream(str(tmp_path / name), compression="zstd") as stream:
        stream.write(text.encode())
    return tmp_path / name


def source(path: Path, **section: Any) -> Source:
    given = {"columns": COLUMNS, **section}
    cache = CachePaths(root=path.parent / "cache")
    return open_source(DataSection(path=str(path), **given), cache, split_seed=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines called .json", PLAIN),
        ("list.jsonl", json.dumps(ROWS)),
        ("indented list.jsonl", json.dumps(ROWS, indent=2)),
        ("indented objects.json", "\n".join(json.dumps(each, indent=4) for each in ROWS)),
        ("one after the other.jsonl", "".join(json.dumps(each) for each in ROWS)),
        ("lists of one.ndjson", "\n".join(json.dumps([each]) for each in ROWS)),
        ("mark.jsonl", "\ufeff" + PLAIN),
        ("marks.jsonl", "".join("\ufeff" + line for line in PLAIN.splitlines(keepends=True))),
        ("windows.jsonl", PLAIN.replace("\n", "\r\n")),
        ("ndjson.NDJSON", PLAIN),
        ("table.csv", CSV),
        ("windows.csv", CSV.replace("\n", "\r\n")),
        ("table.TSV", CSV.replace("a\tb", '"a_b"').replace(",", "\t").replace("a_b", "a\tb")),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark"])
def test_every_layout_and_encoding_gives_the_same_rows(
    tmp_path: Path, name: str, content: str, encoding: str
) -> None:
    file = tmp_path / name
    mark = b"" if " " not in encoding else "\ufeff".encode("utf-16-be")
    file.write_bytes(mark + content.encode(encoding.split(" ")[0]))
    train = read(file)["train"]
    assert train["client"].to_pylist() == ["ana", "2", "ana"]
    assert train["input"].to_pylist() == ["a\tb", "x;y", "?"]
    first = "première\nligne, “deux” 🦊".replace(",", "\t" if "TSV" in name else ",")
    found = [
        [text.replace("\r", "") for text in texts] for texts in train["references"].to_pylist()
    ]
    assert found == [[first], ["zwei"], ["drei"]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json.ZST", "rows.csv.gz"])
def test_compressed_files_are_read_whatever_their_name_says(tmp_path: Path, name: str) -> None:
    text = CSV if ".csv" in name else PLAIN
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path / name)["train"]["client"].to_pylist() == ["ana", "2", "ana"]
    packed(name, text, tmp_path)
    assert read(tmp_path / name)["train"]["client"].to_pylist() == ["ana", "2", "ana"]


def test_one_object_alone_is_a_row_with_its_references(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(row("a", ["x", "y"]), indent=1))
    assert read(tmp_path / "one.json")["train"]["references"].to_pylist() == [["x", "y"]]


def test_objects_of_any_length_lie_across_the_pieces_that_are_read(tmp_path: Path) -> None:
    rows = [row(n % 3, "é" * (n * 40_000 + 1)) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    found = read(tmp_path / "rows.jsonl")["train"]["references"].to_pylist()
    assert [len(text) for (text,) in found] == [n * 40_000 + 1 for n in range(40)]


def truncated(text: str) -> bytes:
    whole = gzip.compress(text.encode() * 100)
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", PLAIN.encode() + b'{"client_id": "a", "inp', "line 4 is not JSON"),
        ("a.json", json.dumps(ROWS)[:-1].encode(), "ends within its list"),
        ("a.json", json.dumps(ROWS, indent=1)[:-30].encode(), "is not JSON"),
        ("a.jsonl", b'[{"client_id": 1}\n{"client_id": 2}]', "line 2 is not JSON (a comma"),
        ("a.jsonl", b'{"client_id": 1},\n{"client_id": 2}', "line 1"),
        ("a.jsonl", PLAIN.encode() + b'"text"', "line 4 is not an object"),
        ("a.jsonl", PLAIN.encode() + b'{"client_id": "\xff"}', "line 4 is not UTF-8 (byte 0xff)"),
        ("a.jsonl", '{"client_id": 1}'.encode("utf-16-le"), "line 1 holds a zero byte"),
        ("a.jsonl", b"PAR1\x15\x04\x00\x00", "a.jsonl line 1"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        (
            "a.jsonl",
            PLAIN.encode() + b'{"a": ' + b"1" * 5000 + b"}",
            "line 4 is not JSON (an integer",
        ),
        ("a.jsonl.gz", truncated(PLAIN), "is it whole?"),
        ("a.jsonl", b'{"client_id": 1, "input": {"a": 1}, "output": "x"}', "line 1: `input` holds"),
        ("a.csv", b"client_id,input,output\n1,2,3\n1,2\n", "Row #3"),
        ("a.csv", b'client_id,input,output\n1,2,"3\n1,2,3\n', "row 2 has a field"),
        ("a.csv", b'client_id,input,output\n\n1,2,3\n\n1,"2\n",3\n1,2,"Hi" he\n', "row 4 has a"),
        ("a.csv", b'client_id,input,"output\n' + b"1,2,3\n" * 40_000, "row 1 "),
        ("a.tsv", b'client_id\tinput\toutput\n1\t2\t"a\n1\t2\tb\n1\t2\t"c\n', "row 2 has a"),
        ("a.csv", b"client_id;input;output\n1;2;3\n", "';'"),
        ("a.csv", b"client_id,input,input,output\n1,2,2,3\n", "two columns `input`"),
        ("a.tsv", b"client_id,input,output\n1,2,3\n", "','"),
        ("a.txt", b"x", "convert it"),
    ],
)
def test_a_broken_file_is_told_with_its_place(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    message = told(tmp_path / name)
    assert words in message
    assert name in message


@pytest.mark.parametrize(
    "name",
    [
        "test.jsonl.gz",
        "test.csv",
        "Test.jsonl",
        "TESTING.ndjson",
        "test-00000-of-00001.jsonl",
        "test_0.jsonl",
        "test/part-0.jsonl",
        "data/test-00000.jsonl",
        "data/test/a.jsonl",
    ],
)
def test_a_test_file_is_the_test_split_however_it_is_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "d"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "Train.jsonl").write_text(PLAIN)
    content = CSV if "csv" in name else PLAIN
    raw = content.replace("drei", "test only").encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    found = read(folder, test_fraction=0.5)
    assert found["train"].num_rows == 3
    assert found["test"]["references"].to_pylist()[2] == ["test only"]
    assert f"test {name}" in source(folder).notes[0]


@pytest.mark.parametrize("name", ["dev", "val", "valid", "validation", "eval", "DEV", "Validation"])
def test_the_names_of_validation(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").write_text(PLAIN)
    (tmp_path / f"{name}.jsonl").write_text(PLAIN)
    found = read(tmp_path)
    assert (found["train"].num_rows, found["validation"].num_rows) == (3, 3)
    assert "since there is no test file" in source(tmp_path).notes[0]


@pytest.mark.parametrize(
    "names",
    [
        ("test.jsonl", "test.csv"),
        ("test.jsonl", "Test.jsonl"),
        ("test.jsonl", "test.jsonl.gz"),
        ("test.jsonl", "test-0.jsonl"),
        ("test-0.jsonl", "test-1.csv"),
        ("dev.jsonl", "eval.jsonl"),
        ("test.jsonl", "test/a.jsonl"),
    ],
)
def test_two_files_for_one_split_are_refused_by_name(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in ("train.jsonl", *names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(CSV if name.endswith("csv") else PLAIN)
    message = told(tmp_path)
    assert all(name in message for name in names)


@pytest.mark.parametrize("name", ["test.xlsx", "test.jsonl.bz2", "test.txt", "test/rows.zip"])
def test_a_test_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").write_text(PLAIN)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"something")
    assert f"{name} looks like the split test" in told(tmp_path)


def test_what_else_looks_like_rows_is_told(tmp_path: Path) -> None:
    for name in ("train.jsonl", "my_test.jsonl", "old/train.jsonl", "more.csv", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(PLAIN)
    (tmp_path / ".hidden.jsonl").write_text(PLAIN)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read(tmp_path)["train"].num_rows == 3
    assert source(tmp_path).notes[1] == "data: not read: more.csv, my_test.jsonl, old/train.jsonl"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train-00000-of-00002",), "1 of 2 parts of the split train"),
        (("train-00000-of-00003", "train-00002-of-00003"), "number 1 is missing"),
        (("train-1-of-3", "train-3-of-3"), "number 2 is missing"),
        (("train-00000-of-00002", "train-00001-of-00003"), "more than one source"),
        (("train-00000-of-00001", "train-00001"), "more than one source"),
    ],
)
def test_parts_that_are_not_all_there_are_refused(
    names: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(PLAIN)
    with pytest.raises(DataError, match=words):
        source(tmp_path)


@pytest.mark.parametrize("first", [0, 1])
def test_all_parts_are_read_from_whatever_number_they_count(first: int, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"train_{first + number}_of_3.jsonl").write_text(PLAIN)
    assert read(tmp_path, test_fraction=0.0)["train"].num_rows == 3 * len(ROWS)


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    rows = [{**each, "history": [["a", "b"]], "system": "Be brief."} for each in ROWS]
    text = "".join(json.dumps(each) + "\n" for each in rows)
    (tmp_path / "train.jsonl").write_text(text)
    assert "data: columns that no prompt and no answer has: history, system" in (
        source(tmp_path).notes
    )


def test_a_folder_whose_folders_train_says_which(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "train-00000-of-00001.jsonl").write_text(PLAIN)
    assert "give one of its folders: main" in told(tmp_path)


def no_rows(file: Path) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS[:1]).slice(0, 0), file)
    elif file.suffix == ".csv":
        file.write_text("client_id,input,output\n\n")
    else:
        file.write_text("[]" if file.suffix == ".json" else "\n")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_without_rows_is_as_one_that_is_not_there(
    tmp_path: Path, kind: str, split: str
) -> None:
    (tmp_path / "train.jsonl").write_text(PLAIN)
    no_rows(tmp_path / f"{split}.{kind}")
    found = read(tmp_path, test_fraction=0.5)
    assert {name: table.num_rows for name, table in found.items()} == {"train": 2, "test": 1}
    assert f"data: without rows, left out: {split}.{kind}" in source(tmp_path).notes
    # another fraction is another test split
    assert source(tmp_path).fingerprint != source(tmp_path, test_fraction=0.5).fingerprint


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
def test_a_train_split_without_rows_is_refused(tmp_path: Path, kind: str) -> None:
    no_rows(tmp_path / f"train.{kind}")
    (tmp_path / "test.jsonl").write_text(PLAIN)
    assert f"has no rows to train on (train.{kind} is empty)" in told(tmp_path)


def save(folder: Path, **splits: list[dict[str, Any]]) -> None:
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(folder)


def test_the_splits_of_a_saved_data_set_have_the_same_names(tmp_path: Path) -> None:
    rows = [row("a"), row("b")]
    save(tmp_path / "saved", train=rows, dev=rows, test=rows, more=rows)
    found = read(tmp_path / "saved")
    assert sorted(found) == ["test", "train", "validation"]
    assert source(tmp_path / "saved").notes[1] == "data: not read: more"
    save(tmp_path / "twice", train=rows, dev=rows, validation=rows)
    assert "dev and validation" in told(tmp_path / "twice")


def test_a_saved_split_without_rows_is_as_one_that_is_not_there(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list([row("a"), row("a")])
    splits = {"train": whole, "test": whole.select([])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = read(tmp_path / "saved", test_fraction=0.5)
    assert (found["train"].num_rows, found["test"].num_rows) == (1, 1)


@pytest.mark.parametrize("make", [lambda d: d / "dataset_info.json", lambda d: d / "state.json"])
def test_a_description_beside_the_files_is_no_saved_data_set(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    (tmp_path / "train.jsonl").write_text(PLAIN)
    make(tmp_path).write_text('{"mine": {"file_name": "train.jsonl"}}')
    assert read(tmp_path)["train"].num_rows == 3


def test_a_fraction_of_nothing_gives_no_test_split(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(PLAIN)
    assert list(read(tmp_path / "rows.jsonl", test_fraction=0.0)) == ["train"]


def test_an_optional_column_may_be_in_some_lines_only(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"client_id": 1, "output": "x"}\n' + PLAIN)
    assert read(tmp_path / "rows.jsonl")["train"]["input"].to_pylist()[0] == ""
    with pytest.raises(DataError, match="no column `input`"):
        (tmp_path / "rows.jsonl").write_text('{"client_id": 1, "output": "x"}\n')
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_quotes_within_a_field_are_text(size: int, tmp_path: Path) -> None:
    fields = ['5" pipe', '"say ""hi"""', '""', '"a,\n""b"""', 'x""', '""""', '"\r\n"', '"end"']
    text = "".join(f"{field},1\n\n" for field in fields) + '1,"end"'
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(checked_quotes(pieces, tmp_path, ",")) == text
    with pytest.raises(DataError, match="row 10 has a field"):
        list(checked_quotes([*pieces, "\n", '"', '"', '"'], tmp_path, ","))
    file = tmp_path / "rows.csv"
    file.write_text("output,client_id\n" + "".join(f"{field},1\n" for field in fields))
    columns = COLUMNS.model_copy(update={"input": None})
    expected = ['5" pipe', 'say "hi"', None, 'a,\n"b"', 'x""', '"', "\r\n", "end"]
    found = read(file, columns=columns)["train"]["references"].to_pylist()
    assert found == [[text] if text else [] for text in expected]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_without_a_name_of_their_own_are_left_out(tmp_path: Path, kind: str) -> None:
    names = ["client_id", "input", "output", "", "", "n", "n", "m"]
    values = ["1", "2", "3", "4", "5", "6", "7", "8"]
    file = tmp_path / f"rows.{kind}"

    def save_as(names: list[str]) -> None:
        table = pa.table([pa.array([int(value)]) for value in values], names=names)
        if kind == "parquet":
            pq.write_table(table, file)
        else:
            file.write_text(",".join(names) + "\n" + ",".join(values) + "\n")

    save_as(names)
    train = read(file)["train"]
    assert train["references"].to_pylist() == [["3"]]
    assert "integer.m" in train.column_names
    assert not {"integer.", "integer.n"} & set(train.column_names)
    save_as([*names[:-1], "output"])
    assert "two columns `output`" in told(file)
