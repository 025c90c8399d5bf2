"""The cache returns the rows of every client in their order; it is published whole or not."""

import errno
import json
import os
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config.models import ColumnsSection
from fedllm.data.blocks import RowBlock, row_number
from fedllm.data.cache import TokenizedClients, digests_of
from fedllm.data.columns import canonical_block
from fedllm.data.row_formats import ALPACA, row_columns
from fedllm.data.tokenize import RowEncoder
from fedllm.data.turns import TextRow
from fedllm.data.writer import write_clients
from fedllm.errors import DataError, StorageFull
from fedllm.storage.publishing.folders import publishing_folder
from tests.data.test_tokenize import BYTES

ENCODER = RowEncoder(BYTES, template="alpaca", cutoff_tokens=300)
COLUMNS = ColumnsSection(client="client", category="kind")


def table(rows: list[dict[str, object]]) -> pa.Table:
    raw_rows = pa.Table.from_pylist(rows)
    names = tuple(raw_rows.column_names)
    block = RowBlock(table=raw_rows, names=names, where="rows", place=row_number)
    return canonical_block(block, row_columns(ALPACA, COLUMNS))


def raw(client: object, number: int, output: str = "") -> dict[str, object]:
    return {
        "client": client,
        "kind": f"kind of {client}",
        "instruction": "Say it.",
        "input": f"{client} {number}",
        "output": output or f"answer {number}",
        "group": len(str(client)),
    }


def written(folder: Path, **splits: list[dict[str, object]]) -> TokenizedClients:
    tables = {split: table(rows) for split, rows in splits.items()}
    write_clients(folder, tables, ENCODER)
    return TokenizedClients.open(folder)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["10", "9", "a/b", "..", "é 🦊", "~"]), min_size=1, max_size=30))
def test_every_client_has_its_rows_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, owners: list[str]
) -> None:
    rows = [raw(owner, number) for number, owner in enumerate(owners)]
    data = written(tmp_path_factory.mktemp("cache") / "key", train=rows)
    assert list(data.clients) == sorted(set(owners))
    for owner in set(owners):
        own = [n for n, client in enumerate(owners) if client == owner]
        texts = [
            TextRow(instruction="Say it.", input=f"{owner} {n}", references=[f"answer {n}"])
            for n in own
        ]
        found = data.rows(owner, "train")
        assert [row.references for row in found] == [[f"answer {n}"] for n in own]
        assert [(r.prompt_ids, r.answer_ids) for r in found] == [
            (row.prompt_ids, row.answer_ids) for row in ENCODER.encode(texts)
        ]
        assert data.client(owner).category == f"kind of {owner}"
        assert data.client(owner).integers == {"group": len(owner)}


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [raw("a", 0), raw("a", 1), raw("b", 2)]
    rows[0]["output"] = rows[2]["output"] = ""
    data = written(tmp_path / "key", train=rows, test=[raw("b", 3)])
    assert [row.references for row in data.rows("a", "train")] == [["answer 1"]]
    assert data.client("a").dropped_rows == 1
    assert data.rows("b", "train") == []
    assert data.client("b").num_rows("train") == 0
    assert len(data.rows("b", "test")) == 1


def test_cut_prompts_and_answers_are_counted(tmp_path: Path) -> None:
    long_input, long_answer = raw("a", 0), raw("a", 1, output="x" * 400)
    long_input["input"] = "y" * 400
    client = written(tmp_path / "key", train=[long_input, long_answer, raw("a", 2)]).client("a")
    assert (client.cut_prompts, client.cut_answers) == (2, 1)
    assert client.train_tokens > 600


def test_the_longest_row_of_a_client_is_found(tmp_path: Path) -> None:
    rows = [raw("a", n, output="x" * (9 * n + 1)) for n in range(4)] + [raw("b", 9, output="y")]
    data = written(tmp_path / "key", train=rows, test=[raw("c", 1)])
    for owner in "ab":
        lengths = [len(r.prompt_ids) + len(r.answer_ids) for r in data.rows(owner, "train")]
        assert data.longest_row(owner, "train") == max(lengths)
    assert data.longest_row("c", "train") == 0
    with pytest.raises(DataError, match="client d"):
        data.longest_row("d", "train")


def test_an_integer_column_with_two_values_in_a_client_is_not_its_property(tmp_path: Path) -> None:
    rows = [raw("a", 0), raw("a", 1), raw("b", 2)]
    rows[0]["group"] = 7
    data = written(tmp_path / "key", train=rows)
    assert data.client("a").integers == {}
    assert data.client("b").integers == {"group": 1}


def test_a_client_that_is_in_one_split_only_has_no_rows_in_the_others(tmp_path: Path) -> None:
    data = written(tmp_path / "key", train=[raw("a", 0)], test=[raw("b", 1)])
    assert data.rows("a", "test") == []
    assert data.rows("b", "train") == []
    assert data.rows("a", "validation") == []


def test_an_unknown_client_is_reported_with_the_nearest_ids(tmp_path: Path) -> None:
    data = written(tmp_path / "key", train=[raw("task-17", 0), raw("other", 1)])
    with pytest.raises(DataError, match=r"client task-71: .*nearest: task-17"):
        data.rows("task-71", "train")


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fedllm prepare"):
        TokenizedClients.open(tmp_path / "nothing")


def test_of_two_concurrent_prepares_one_publishes_and_both_read(tmp_path: Path) -> None:
    rows = [raw("a", 0), raw("b", 1)]
    meet = threading.Barrier(2, timeout=20)

    def prepare() -> None:
        with publishing_folder(tmp_path / "key") as beside:
            (beside / "index.json").write_text(json.dumps(rows))
            meet.wait()

    threads = [threading.Thread(target=prepare) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert json.loads((tmp_path / "key" / "index.json").read_text()) == rows


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), publishing_folder(tmp_path / "key") as beside:
        (beside / "half").write_text("")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_fault_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match="make space"), publishing_folder(tmp_path / "key"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_an_earlier_version_has_no_earlier_answers(tmp_path: Path) -> None:
    data = written(tmp_path / "key", train=[raw("a", 0)])
    (expected,) = data.rows("a", "train")
    old = pa.ipc.open_file(tmp_path / "key" / "train.arrow").read_all().drop_columns(["targets"])
    with pa.ipc.new_file(str(tmp_path / "train.arrow"), old.schema) as writer:
        writer.write_table(old)
    (tmp_path / "train.arrow").replace(tmp_path / "key" / "train.arrow")
    index = json.loads((tmp_path / "key" / "index.json").read_text())
    del index["answer_form"]
    (tmp_path / "key" / "index.json").write_text(json.dumps(index))
    found = TokenizedClients.open(tmp_path / "key")
    assert found.answer_form.ends == ()
    (row,) = found.rows("a", "train")
    assert (row.prompt_ids, row.answer_ids) == (expected.prompt_ids, expected.answer_ids)
    assert list(row.prompt_targets) == []


def test_rows_that_are_not_the_prepared_ones_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    written(folder, train=[raw("a", 0), raw("b", 1)], test=[raw("a", 2)])
    digests = digests_of(folder)
    assert TokenizedClients.open(folder, digests).rows("a", "train")
    written(tmp_path / "other", train=[raw("a", 0), raw("b", 7)])
    (tmp_path / "other" / "train.arrow").replace(folder / "train.arrow")
    data = TokenizedClients.open(folder, digests)
    assert data.rows("a", "test"), "a file that is not read is not hashed"
    with pytest.raises(DataError, match=r"train\.arrow: damaged, or replaced.*prepared again"):
        data.rows("a", "train")
    (tmp_path / "other" / "index.json").replace(folder / "index.json")
    with pytest.raises(DataError, match=r"index\.json: damaged"):
        TokenizedClients.open(folder, digests)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    data = written(folder, train=[raw("a", 0)])
    os.truncate(folder / "train.arrow", 300)
    with pytest.raises(DataError, match=r"train\.arrow: damaged"):
        data.rows("a", "train")


@pytest.mark.parametrize(
    ("above", "mode", "expected"),
    [(0o755, 0o644, 0o644), (0o755, 0o640, 0o640), (0o755, 0o600, 0o600), (0o700, 0o644, 0o600)],
)
def test_a_copy_of_private_rows_is_private(
    tmp_path: Path, above: int, mode: int, expected: int
) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o777 == 0o700:
            folder.chmod(0o755)  # pytest makes its own private, one more for each worker
    source = tmp_path / "mine" / "rows.jsonl"
    source.parent.mkdir(mode=above)
    source.touch(mode=mode)
    write_clients(tmp_path / "key", {"train": table([raw("a", 0)])}, ENCODER, sources=[source])
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "key").iterdir()}
    assert modes == {expected}
    assert (tmp_path / "key").stat().st_mode & 0o777 & ~0o111 == expected
