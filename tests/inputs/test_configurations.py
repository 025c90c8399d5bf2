"""Configurations and lists as people's editors and tools write them."""

import codecs
from pathlib import Path

import pytest

from fedllm.config.loading import (
    dump_config,
    load_config,
    override_config,
    read_config,
)
from fedllm.config.models import Config
from fedllm.data.cache import IndexedClient
from fedllm.errors import ConfigError, DataError
from fedllm.programs.prepare import held_out_candidates

TEXT = """model: {path: embedded}
data: {path: embedded}
clients:
  tiers:
    small: {ranks: 2}
    größer: {ranks: 8}
"""

# ids that YAML 1.1 or 1.2 takes for booleans, numbers, dates, times or nothing
ODD = [
    *("no", "Yes", "on", "OFF", "true", "False", "y"),
    *(
        "1e3",
        "1.0",
        "1.10",
        "-0",
        "007",
        "010",
        "0x1F",
        "0o17",
        "1_000",
        "+5",
        ".5",
        ".inf",
        ".nan",
    ),
    *("12:30", "12:30:00", "2024-01-01", "2024-01-01 12:30:00", "null", "~", "Null", "123"),
]


def loaded(folder: Path, given: bytes | str, *overrides: str) -> Config:
    file = folder / "config.yaml"
    file.write_bytes(given if isinstance(given, bytes) else given.encode())
    return load_config(file, overrides)


def refusal(folder: Path, given: bytes | str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, given)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert message.startswith(str(folder / "config.yaml"))
    return message


# --- bytes


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_marks_encodings_and_ends_of_lines_change_nothing(
    tmp_path: Path, mark: bytes, encoding: str, ends: str
) -> None:
    given = mark + TEXT.replace("\n", ends).encode(encoding)
    assert loaded(tmp_path, given) == loaded(tmp_path, TEXT)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be"])
def test_another_encoding_is_one_line_with_the_remedy(tmp_path: Path, encoding: str) -> None:
    assert "save it as UTF-8" in refusal(tmp_path, TEXT.encode(encoding))


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace(": ", ":\t"),
        TEXT.replace("\n", "\t\n"),
        TEXT.replace("\n", "\n\t\n \t \n"),
        TEXT.replace("\n", "\t# a comment\n"),
        TEXT.replace("{", "{\t").replace("}", "\n\t\t}"),
        TEXT + "\t# the end\n",
    ],
)
def test_tabs_that_do_not_indent_are_blanks(tmp_path: Path, text: str) -> None:
    assert loaded(tmp_path, text) == loaded(tmp_path, TEXT)


def test_tabs_within_a_text_stay(tmp_path: Path) -> None:
    config = loaded(tmp_path, TEXT + 'scheduler:\n  setup: ["a\tb"]\n')
    assert config.scheduler.setup == ("a\tb",)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TEXT.replace("\n    small", "\n\t\tsmall"), 5),
        (TEXT.replace("\n  tiers", "\n\ttiers"), 4),
        (TEXT.replace("\n    größer", "\n  \tgrößer"), 6),
        (TEXT.replace("\n", "\r\n").replace("\n    small", "\n\tsmall"), 5),
        ("\t" + TEXT, 1),
    ],
)
def test_a_tab_that_indents_is_one_line_with_its_number(
    tmp_path: Path, text: str, line: int
) -> None:
    said = refusal(tmp_path, text)
    assert f"line {line} is not YAML (a tab" in said
    assert said.endswith("indent it with blanks")


# --- spellings


def odd(name: str, quote: str) -> str:
    return f"{quote}{name}{quote}"


@pytest.mark.parametrize("quote", ["", '"', "'"])
@pytest.mark.parametrize("way", ["file", "--set"])
def test_ids_and_names_keep_their_spelling(tmp_path: Path, quote: str, way: str) -> None:
    names = [odd(name, quote) for name in ODD]
    tiers = "{" + ", ".join(f"{name}: {{ranks: 2}}" for name in names) + "}"
    assign = "{" + ", ".join(f"{name}: {name}" for name in names) + "}"
    listed = "[" + ", ".join(names) + "]"
    head = "model: {path: embedded}\ndata: {path: embedded}\n"
    if way == "file":
        text = f"{head}clients: {{tiers: {tiers}, assign: {assign}, held_out_from: {listed}}}\n"
        config = loaded(tmp_path, text)
    else:
        config = loaded(
            tmp_path,
            head,
            f"clients.tiers={tiers}",
            f"clients.assign={assign}",
            f"clients.held_out_from={listed}",
        )
    assert list(config.clients.tiers) == ODD
    assert dict(config.clients.assign) == {name: name for name in ODD}
    assert config.clients.held_out_from == tuple(ODD)
    # and so they are in the run directory, and after a change
    kept = tmp_path / "kept.yaml"
    kept.write_text(dump_config(config), encoding="utf-8")
    assert read_config(kept) == config
    assert override_config(read_config(kept), ["seed=1", "seed=0"]) == config


@pytest.mark.parametrize("name", [name for name in ODD if "." not in name])  # it parts keys
def test_a_key_that_is_set_keeps_its_spelling(tmp_path: Path, name: str) -> None:
    config = loaded(tmp_path, TEXT, f"clients.tiers.{name}.ranks=4", f"clients.assign.c={name}")
    assert config.clients.assign == {"c": name}
    assert config.clients.tiers[name].ranks == 4


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("model.revision", "7213e04", "7213e04"),
        ("model.revision", "1e3", "1e3"),
        ("model.revision", "null", None),
        ("model.path", "0123", "0123"),
        ("model.path", "1.10", "1.10"),
        ("data.columns.client", "no", "no"),
        ("data.columns.input", "~", None),
        ("storage.group", "on", "on"),
        ("lora.target_modules", "[0, on]", ("0", "on")),
        ("training.max_steps", "0x10", 16),
        ("training.gradient_checkpointing", "yes", True),
        ("training.learning_rate", "1e-3", 1e-3),
        ("clients.cohort.count", "", None),
    ],
)
def test_what_a_key_expects_decides(tmp_path: Path, key: str, given: str, value: object) -> None:
    extra = ["clients.cohort.fraction=0.5"] if "cohort" in key else []
    found: object = loaded(tmp_path, TEXT, *extra, f"{key}={given}")
    for name in key.split("."):
        found = getattr(found, name)
    assert (type(found), found) == (type(value), value)


def test_sbatch_gets_what_is_written(tmp_path: Path) -> None:
    written = {
        "time": "12:30:00",
        "begin": "2024-01-01",
        "account": "0123",
        "mem": "010",
        "qos": "1e3",
        "partition": "on",
        "--job_name": "no",
        "nodelist": "0x1F",
        "constraint": "1.10",
        "gres": "gpu:1",
        "deadline": "1-00:00:00",
    }
    lines = [f"    default: {{{', '.join(f'{key}: {value}' for key, value in written.items())},"]
    lines.append("      nodes: 2, requeue: yes, exclusive: true, overcommit: no, mail-type: null}")
    config = loaded(tmp_path, TEXT + "scheduler:\n  sbatch:\n" + "\n".join(lines) + "\n")
    others = {"nodes": 2, "requeue": True, "exclusive": True, "overcommit": False}
    assert config.scheduler.sbatch.default == {**written, **others, "mail-type": None}
    kept = tmp_path / "kept.yaml"
    kept.write_text(dump_config(config), encoding="utf-8")
    assert read_config(kept) == config


def test_a_name_that_is_left_out_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clients\.held_out_from\.0: got None, need a text"):
        loaded(tmp_path, TEXT + "  held_out_from:\n    -\n    - a\n")


# --- lists of clients


def clients(*ids: str) -> list[IndexedClient]:
    empty = IndexedClient.model_construct
    return [empty(id=each, category=None, integers={}) for each in ids]


def held_out(folder: Path, given: bytes, *ids: str) -> set[str]:
    file = folder / "held out.txt"
    file.write_bytes(given)
    config = loaded(folder, TEXT, f"clients.held_out_from='{file}'")
    return held_out_candidates(config.clients, clients(*ids))


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r", " \t\r\n", "\r\n\r\n  \n"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")],
)
def test_a_list_may_come_from_any_editor(
    tmp_path: Path, mark: bytes, encoding: str, ends: str
) -> None:
    given = mark + f"no{ends}007{ends}müller{ends}".encode(encoding)
    assert held_out(tmp_path, given, "no", "007", "müller", "other") == {"no", "007", "müller"}
    assert held_out(tmp_path, mark, "no") == set()


def test_an_id_may_have_blanks_and_unusual_characters_of_its_own(tmp_path: Path) -> None:
    ids = ["a ", " b", "c\u2028d", "e\x0cf", "g\x85h"]
    assert held_out(tmp_path, "\n".join(ids).encode(), *ids) == set(ids)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("müller\n".encode("cp1252"), "byte 2 is not utf-8: save it as UTF-8"),
        ("no\n".encode("utf-16-le"), "save it as UTF-8"),
        (b"nobody\r\n", "client nobody: not among the 2 clients of the data"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(tmp_path: Path, given: bytes, words: str) -> None:
    with pytest.raises(DataError) as caught:
        held_out(tmp_path, given, "no", "yes")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1" * 5000, "cannot be read as int"),
        ("!!int abc", "`abc` cannot be read as int"),
        ("!!float abc", "`abc` cannot be read as float"),
        ("!!bool abc", "`abc` cannot be read as bool"),
        ("!!timestamp abc", "`abc` cannot be read as timestamp"),
        ("&a [*a]", "recursive"),
        ("&a {b: *a}", "recursive"),
        ("[" * 2000 + "]" * 2000, "nested too deeply"),
        ("# " + "x" * 600_000, "is longer than 512 KiB"),
    ],
)
def test_a_value_that_cannot_be_made_is_told_with_its_line(
    tmp_path: Path, value: str, words: str
) -> None:
    message = refusal(tmp_path, TEXT + f"rounds: {value}\n")
    assert words in message
    assert "config.yaml" in message
    assert "line 7" in message or "KiB" in message
