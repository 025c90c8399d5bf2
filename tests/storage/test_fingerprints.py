"""Keys of content: equal for equal content in any place, and only for equal content."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fedllm.storage.fingerprints import fingerprint_files, fingerprint_values
from fedllm.storage.hub import first_line, hub_key, is_hub_name

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4)


def folder_of(root: Path, **content: str) -> list[Path]:
    root.mkdir()
    for name, text in content.items():
        (root / name).write_text(text)
    return list(root.iterdir())


def test_the_same_files_have_the_same_fingerprint_in_any_folder_and_order(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", a="1", b="2")
    other = folder_of(tmp_path / "other", b="2", a="1")
    expected = fingerprint_files(one, tmp_path / "one")
    assert fingerprint_files(reversed(one), tmp_path / "one") == expected
    assert fingerprint_files(other, tmp_path / "other") == expected


def test_another_name_or_content_has_another_fingerprint(tmp_path: Path) -> None:
    contents = [{"a": "1", "b": "2"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}, {"a": "1"}]
    found = {
        fingerprint_files(folder_of(tmp_path / str(n), **content), tmp_path / str(n))
        for n, content in enumerate(contents)
    }
    assert len(found) == len(contents)


@given(one=VALUES, other=VALUES)
def test_other_values_have_other_fingerprints(one: object, other: object) -> None:
    same = fingerprint_values(one) == fingerprint_values(other)
    # 1 and True are equal in Python and not in JSON
    assert same == (repr(one) == repr(other))


def test_a_hub_name_is_a_name_or_an_owner_and_a_name() -> None:
    assert is_hub_name("gpt2")
    assert is_hub_name("meta-llama/Llama-3.2-1B")
    for path in ("a/b/c", "./a", "../a", "/a", "a/", "", "a b", "~/a", "rows.jsonl", "a/b.csv.gz"):
        assert not is_hub_name(path)


def test_every_repository_and_revision_has_its_own_key() -> None:
    pairs = [("a/b", None), ("a/b", "v1"), ("a--b", None), ("a-/-b", None)]
    assert len({hub_key(name, revision) for name, revision in pairs}) == len(pairs)
    assert hub_key("a/b", None).startswith("hub-a--b-")


def test_only_the_first_line_of_a_library_error_is_used() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
