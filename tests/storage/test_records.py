"""Records are read back as they were written, or the error names what is wrong with them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import RunDirectoryError
from fedllm.storage.records import (
    ClaimRecord,
    CohortRecord,
    LayoutRecord,
    PreparedRecord,
    RoundRecord,
    Scores,
    UpdateRecord,
)
from tests.storage.samples import record_of

CLAIM = ClaimRecord(bundle=7, task="12_3", node="node1")
_LAYOUT = """ "way": {
  "cpu": "parts",
  "cuda": "flex",
  "why": ""
 }"""
# as earlier versions wrote them, whose field had this name in Python too
_WITH_LAYOUT = {
    PreparedRecord: f"""{{
 "model_fingerprint": "m",
 "model_path": "/m",
 "data_fingerprint": "d",
 "data_path": "/d",
 "model_parameters": 7,
 "modules": {{}},
 "clients": [],
{_LAYOUT},
 "notes": [],
 "start": null
}}
""",
    CohortRecord: f"""{{
 "round": 1,
 "lease": 1,
 "base_fingerprint": "b",
 "data_fingerprint": "d",
 "state_sha256": "s",
 "ranks": {{}},
 "clients": [],
 "enough": null,
{_LAYOUT}
}}
""",
}


def test_a_record_is_read_as_it_was_published(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "007.json"
    assert ClaimRecord.find(path) is None
    CLAIM.publish(path)
    assert ClaimRecord.read(path) == ClaimRecord.find(path) == CLAIM
    assert path.read_text().endswith("}\n")


def test_only_the_first_record_takes_a_name(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "007.json"
    assert CLAIM.publish_once(path)
    assert not ClaimRecord(bundle=7, task="other", node="node2").publish_once(path)
    assert ClaimRecord.read(path) == CLAIM


@given(value=st.floats())
def test_any_number_is_read_back_even_if_json_has_no_word_for_it(value: float) -> None:
    scores = Scores(rows=1, loss=value, rouge_l=0.0, exact_match=1.0)
    assert repr(Scores.model_validate_json(scores.to_bytes())) == repr(scores)
    update = record_of("a", losses=[value], norms={"m": (value, 0.0)})
    assert repr(UpdateRecord.model_validate_json(update.to_bytes())) == repr(update)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON"),
        (CLAIM.to_bytes()[:-8], "JSON"),
        (b"\xff", "JSON"),
        (b'{"bundle": 7}', "task: Field required"),
        (b'{"bundle": "x", "task": "t", "node": "n"}', "bundle: "),
        (b"[]", "JSON"),
    ],
)
def test_a_damaged_record_is_named_with_what_to_do(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "007.json"
    path.write_bytes(content)
    for read in (ClaimRecord.read, ClaimRecord.find):
        with pytest.raises(
            RunDirectoryError, match="restore it from a backup; `fedllm verify RUN`"
        ) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: damaged record")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [PreparedRecord, CohortRecord])
def test_the_layout_keeps_its_name_in_json(kind: type[PreparedRecord | CohortRecord]) -> None:
    content = _WITH_LAYOUT[kind]
    record = kind.model_validate_json(content)
    assert record.layout == LayoutRecord(cpu="parts", cuda="flex")
    # later versions add fields, with their defaults
    assert json.loads(content).items() <= json.loads(record.to_bytes()).items()


def test_keys_of_a_later_version_are_ignored() -> None:
    later = b'{"bundle": 7, "task": "12_3", "node": "node1", "colour": "red"}'
    assert ClaimRecord.model_validate_json(later) == CLAIM


def test_time_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        RoundRecord(round=1, lease=1, state_sha256="", clients=1, busy_seconds=-1.0)
