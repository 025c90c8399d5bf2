"""Prepare brings base and data into the cache once and describes them the same every time."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm.config.loading import dump_config, load_config, override_config
from fedllm.config.models import Config
from fedllm.data.cache import TokenizedClients
from fedllm.errors import ConfigError, DataError, ModelError, RunDirectoryError
from fedllm.programs.inspect import describe, inspect_client
from fedllm.programs.inspect_clients import describe_clients, inspect_clients
from fedllm.programs.prepare import describe_layout, prepare, prepare_run
from fedllm.storage.paths import CachePaths, RunPaths
from fedllm.storage.records import CohortRecord, LayoutRecord, PreparedRecord
from tests.tiny import IDS, Tiny

BEST = LayoutRecord(cpu="parts", cuda="mask")  # heads of 8 are too small for block masks


@pytest.fixture
def config(tiny: Tiny) -> Config:
    return load_config(tiny.config)


@pytest.fixture
def cache(tiny: Tiny) -> CachePaths:
    return CachePaths(root=tiny.cache)


def quiet(_line: str) -> None:
    pass


def with_rows(config: Config, path: Path, rows: list[dict[str, object]]) -> Config:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return override_config(config, [f"data.path={path}"])


def test_the_record_is_the_same_to_the_byte_with_and_without_a_cache(
    config: Config, tmp_path: Path
) -> None:
    cache = CachePaths(root=tmp_path / "cache")
    first = prepare(config, cache)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    again = prepare(config, cache)
    assert first.to_bytes() == again.to_bytes()
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    elsewhere = prepare(config, CachePaths(root=tmp_path / "other"))
    assert elsewhere.data_fingerprint == first.data_fingerprint
    assert elsewhere.clients == first.clients


def test_the_record_lists_the_clients_of_the_data(config: Config, cache: CachePaths) -> None:
    prepared = prepare(config, cache)
    assert [client.id for client in prepared.clients] == sorted(IDS)
    assert {client.train_rows + client.test_rows for client in prepared.clients} == {20}
    data = TokenizedClients.open(Path(prepared.data_path))
    for client in prepared.clients:
        rows = data.rows(client.id, "train")
        assert len(rows) == client.train_rows
        tokens = sum(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
        assert tokens == client.train_tokens
        assert len(data.rows(client.id, "test")) == client.test_rows


def test_a_run_gets_its_record(config: Config, tmp_path: Path) -> None:
    run = RunPaths(root=tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(dump_config(config), encoding="utf-8")
    prepared = prepare_run(run)
    assert PreparedRecord.read(run.prepared) == prepared


def begun(config: Config, root: Path, layout: LayoutRecord | None) -> RunPaths:
    """A run whose first round was drawn with a layout."""
    run = RunPaths(root=root)
    run.root.mkdir()
    run.config.write_text(dump_config(config), encoding="utf-8")
    cohort = CohortRecord(
        round=1,
        lease=1,
        base_fingerprint="",
        data_fingerprint="",
        state_sha256="",
        ranks={},
        clients=[],
        layout=layout,
    )
    cohort.publish(run.round(1).cohort)
    return run


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        (None, "rows: padded, as in the rounds of this run so far\n"),
        (LayoutRecord(cpu="mask", cuda="mask"), "rows: mask; they share their common prefix\n"),
    ],
)
def test_a_run_that_has_begun_keeps_its_layout(
    config: Config,
    tmp_path: Path,
    layout: LayoutRecord | None,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare(config, CachePaths(root=tmp_path / "cache")).layout == BEST
    run = begun(config, tmp_path / "run", layout)
    assert prepare_run(run).layout == layout
    assert PreparedRecord.read(run.prepared).layout == layout
    assert capsys.readouterr().err.endswith(line)


def base_of(kind: str, tiny: Tiny, folder: Path, **changes: object) -> Path:
    """A base of another class, with the tiny one's tokenizer."""
    shutil.copytree(tiny.model, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 258}
    model = AutoConfig.for_model(kind, **sizes, **heads, **changes)
    AutoModelForCausalLM.from_config(model).save_pretrained(folder)
    return folder


def test_a_run_that_began_without_a_layout_goes_on_where_a_new_one_is_refused(
    config: Config, tiny: Tiny, tmp_path: Path
) -> None:
    rotary = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    changes = {"rope_parameters": rotary, "max_position_embeddings": 128}
    folder = base_of("llama", tiny, tmp_path / "base", **changes)
    other = override_config(config, [f"model.path={folder}", "data.cutoff_tokens=160"])
    run = begun(other, tmp_path / "run", None)
    assert prepare_run(run).layout is None
    assert PreparedRecord.read(run.prepared).layout is None
    run.round(1).cohort.unlink()
    with pytest.raises(ConfigError, match=r"got 160 and .*_tokens: 4, .* at most 128 together$"):
        prepare_run(run)


def test_a_layout_that_is_computed_wrongly_by_now_is_refused(
    config: Config, tiny: Tiny, tmp_path: Path
) -> None:
    # as if an earlier transformers had let this class compute its parts
    folder = base_of("stablelm", tiny, tmp_path / "base")
    other = override_config(config, [f"model.path={folder}"])
    run = begun(other, tmp_path / "run", BEST)
    with pytest.raises(RunDirectoryError) as refused:
        prepare_run(run)
    assert (
        "compute rows by parts (mask on a GPU), which the installed transformers gets wrong ("
        in (str(refused.value))
    )
    assert str(refused.value).endswith("; install the versions that run.json names")
    assert not run.prepared.exists()


def test_a_layout_without_its_block_masks_is_refused(config: Config, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run", LayoutRecord(cpu="parts", cuda="flex"))
    with pytest.raises(
        RunDirectoryError, match=r"parts \(flex on a GPU\), .* \(no FlexAttention\);"
    ):
        prepare_run(run)


def test_the_record_says_how_rows_are_computed_and_why_not_better(
    config: Config, tiny: Tiny, tmp_path: Path
) -> None:
    folder = base_of("gemma2", tiny, tmp_path / "base", head_dim=8, sliding_window=64)
    other = override_config(config, [f"model.path={folder}"])
    prepared = prepare(other, CachePaths(root=tmp_path / "cache"), quiet)
    assert prepared.layout is not None
    line = describe_layout(prepared.layout)
    assert line.startswith("rows: packed; not better, since Gemma2ForCausalLM: parts: ")
    assert (
        describe_layout(BEST)
        == "rows: parts on a CPU, mask on a GPU; they share their common prefix"
    )


def test_a_budget_below_the_longest_row_is_refused_and_one_that_holds_it_is_not(
    config: Config, cache: CachePaths
) -> None:
    longest = max(prepare(config, cache, quiet).clients, key=lambda client: client.longest_row)
    tokens = longest.longest_row
    data = TokenizedClients.open(Path(prepare(config, cache, quiet).data_path))
    assert tokens == max(
        len(row.prompt_ids) + len(row.answer_ids) for row in data.rows(longest.id, "train")
    )
    # the last token of a row is a target only
    prepare(override_config(config, [f"training.micro_batch_tokens={tokens - 1}"]), cache, quiet)
    below = override_config(config, [f"training.micro_batch_tokens={tokens - 2}"])
    with pytest.raises(ConfigError) as refused:
        prepare(below, cache, quiet)
    assert str(refused.value) == (
        f"training.micro_batch_tokens: got {tokens - 2}, a training row of client {longest.id} has "
        f"{tokens} tokens and computes {tokens - 1} (its last one is a target only); need at least "
        f"{tokens - 1}, or data.cutoff_tokens: {tokens - 1}"
    )
    remedied = override_config(below, [f"data.cutoff_tokens={tokens - 1}"])
    assert prepare(remedied, cache, quiet).layout == BEST


def test_rows_of_clients_that_never_train_need_no_room_in_the_budget(
    config: Config, tmp_path: Path
) -> None:
    row: dict[str, object] = {"category": "", "instruction": "Say it.", "output": "y"}
    inputs = {"short": "x", "long": "x" * 40}
    rows = [{**row, "client_id": id_, "input": text} for id_, text in inputs.items()] * 4
    changed = with_rows(config, tmp_path / "rows.jsonl", rows)
    changed = override_config(changed, ["data.cutoff_tokens=400", "clients.dev=0"])
    cache = CachePaths(root=tmp_path / "cache")
    lengths = {client.id: client.longest_row for client in prepare(changed, cache, quiet).clients}
    assert lengths["long"] == lengths["short"] + 39 < 400
    tight = override_config(changed, [f"training.micro_batch_tokens={lengths['short'] - 1}"])
    prepare(override_config(tight, ["clients.held_out_from=[long]"]), cache, quiet)
    with pytest.raises(ConfigError, match="a training row of client long has "):
        prepare(override_config(tight, ["clients.held_out_from=[short]"]), cache, quiet)


def test_answers_that_were_cut_are_counted_by_themselves(config: Config, tmp_path: Path) -> None:
    row: dict[str, object] = {"client_id": "a", "category": "", "instruction": "Say it."}
    rows = [
        {**row, "input": "x", "output": "y"},
        {**row, "input": "x" * 999, "output": "y"},
        {**row, "input": "", "output": "y" * 999},
    ]
    changed = with_rows(config, tmp_path / "rows.jsonl", rows)
    changed = override_config(changed, ["data.cutoff_tokens=400"])
    (client,) = prepare(changed, CachePaths(root=tmp_path / "cache"), quiet).clients
    assert client.cut_answers == 1
    # the long answer leaves no room for all of its prompt
    assert client.truncated_rows - client.cut_answers == 2
    assert client.longest_row == 400


def test_two_processes_may_prepare_at_once(config: Config, tmp_path: Path) -> None:
    cache = CachePaths(root=tmp_path / "cache")
    arguments = [(config, cache), (config, cache)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.starmap(prepare, arguments)
    assert first == second
    assert [folder.name for folder in (cache.root / "data").iterdir()] == [first.data_fingerprint]


def test_what_decides_the_tokens_decides_the_fingerprint(config: Config, cache: CachePaths) -> None:
    def key(*changes: str) -> str:
        return prepare(override_config(config, changes), cache, quiet).data_fingerprint

    assert key() == key("seed=7", "training.learning_rate=1", "data.loss_on=all")
    changes = ("data.cutoff_tokens=150", "data.test_fraction=0.3", "clients.split_seed=3")
    assert len({key(), *map(key, changes)}) == 4


def test_a_client_without_training_rows_is_listed(config: Config, tmp_path: Path) -> None:
    row = {"category": "", "instruction": "Say it.", "input": "x", "output": "y"}
    folder = tmp_path / "data"
    folder.mkdir()
    for split, clients in {"train": ["a", "b"], "test": ["b", "c"]}.items():
        lines = [json.dumps({"client_id": client, **row}) for client in clients]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    prepared = prepare(
        override_config(config, [f"data.path={folder}"]), CachePaths(root=tmp_path / "cache")
    )
    rows = {client.id: (client.train_rows, client.test_rows) for client in prepared.clients}
    assert rows == {"a": (1, 0), "b": (1, 1), "c": (0, 1)}


def candidates(config: Config, cache: CachePaths, value: str) -> set[str]:
    changed = override_config(config, [f"clients.held_out_from={value}"])
    prepared = prepare(changed, cache, quiet)
    return {client.id for client in prepared.clients if client.held_out_candidate}


def test_held_out_clients_come_from_all_or_from_those_that_are_named(
    config: Config, cache: CachePaths, tmp_path: Path
) -> None:
    listed = tmp_path / "ids.txt"
    listed.write_text("a/b\nwhite space\n", encoding="utf-8")
    assert candidates(config, cache, "all") == set(IDS)
    assert candidates(config, cache, '["../up", "c5"]') == {"../up", "c5"}
    assert candidates(config, cache, str(listed)) == {"a/b", "white space"}


def test_held_out_clients_may_come_from_a_column(config: Config, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"client_id": n % 7, "category": "", "instruction": "", "input": f"{n}", "output": "y"}
        for n in range(70)
    ]
    numbered = with_rows(config, tmp_path / "rows.jsonl", rows)
    cache = CachePaths(root=tmp_path / "cache")
    value = "{column: client_id, modulo: 5, equals: 4}"
    assert candidates(numbered, cache, value) == {"4"}
    value = "{column: client_id, modulo: 5, equals: 1}"
    assert candidates(numbered, cache, value) == {"1", "6"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('["c55"]', r"clients\.held_out_from: client c55: .* nearest: c5"),
        ("nowhere.txt", r"clients\.held_out_from: nowhere\.txt: no such file"),
        (
            "{column: size, modulo: 2, equals: 0}",
            r"clients\.held_out_from\.column: `size` .* such columns: none",
        ),
    ],
)
def test_unknown_held_out_clients_are_refused(
    config: Config, cache: CachePaths, value: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        candidates(config, cache, value)


@pytest.mark.parametrize("change", ["data.path=nowhere.jsonl", "data.columns.output=answer"])
def test_bad_data_leave_nothing_in_the_cache(
    config: Config, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = CachePaths(root=tmp_path / "cache")
    with pytest.raises(DataError):
        prepare(override_config(config, [change]), cache)
    assert not cache.root.exists() or list(cache.root.rglob("*.arrow")) == []
    assert capsys.readouterr().err == ""


def test_an_unknown_target_module_is_refused(config: Config, cache: CachePaths) -> None:
    changed = override_config(config, ["lora.target_modules=[q_proj, c_attn]"])
    with pytest.raises(ModelError, match="c_attn"):
        prepare(changed, cache)


def test_inspect_shows_the_tokens_that_training_uses(config: Config, cache: CachePaths) -> None:
    prepared = prepare(config, cache)
    trained = TokenizedClients.open(Path(prepared.data_path)).rows("a/b", "train")[3]
    found = inspect_client(config, cache, "a/b", 3)
    assert [token.id for token in found.tokens] == trained.prompt_ids + trained.answer_ids
    with_loss = [token.id for token in found.tokens if token.loss]
    assert with_loss == trained.answer_ids
    assert found.references == trained.references
    assert found.prompt.endswith("### Response:\n")
    text = describe(found)
    assert "[</s>]" in text
    assert f"{len(found.tokens)} tokens, {len(with_loss)} with loss" in text


def test_inspect_with_loss_on_all_marks_all_but_the_first(
    config: Config, cache: CachePaths
) -> None:
    changed = override_config(config, ["data.loss_on=all"])
    tokens = inspect_client(changed, cache, "plain").tokens
    assert [token.loss for token in tokens] == [False] + [True] * (len(tokens) - 1)


def test_inspect_shows_all_clients_with_role_tier_rows_and_categories(
    config: Config, cache: CachePaths
) -> None:
    partition = inspect_clients(config, cache)
    clients = {client.client: client for client in partition.clients}
    assert sorted(client.role for client in clients.values()).count("train") == 8
    for client in clients.values():
        assert client.train_rows + client.test_rows == sum(client.categories.values()) == 20
        # of three categories a client has one, which a third of all rows have
        assert len(client.categories) == 1 and 0.5 < client.distance < 0.8
    text = describe_clients(partition)
    assert text.startswith("10 clients (data.partition.kind column): 8 train, ")
    assert len(text.splitlines()) > 18 and "émoji 🦊" in text


def test_inspect_refuses_an_unknown_client_or_row(config: Config, cache: CachePaths) -> None:
    with pytest.raises(DataError, match="nearest: plain"):
        inspect_client(config, cache, "plane")
    with pytest.raises(DataError, match="--row: got 99"):
        inspect_client(config, cache, "plain", 99)


def test_inspect_says_that_a_row_without_an_answer_is_dropped(
    config: Config, tmp_path: Path
) -> None:
    row: dict[str, object] = {"client_id": "a", "category": "", "instruction": "", "input": "x"}
    changed = with_rows(config, tmp_path / "rows.jsonl", [{**row, "output": ""}])
    found = inspect_client(changed, CachePaths(root=tmp_path / "cache"), "a")
    assert found.tokens == []
    assert "dropped" in describe(found)
