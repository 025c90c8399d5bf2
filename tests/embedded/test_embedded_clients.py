"""Embedded clients are the same on every machine, and every row has a right answer."""

import pytest

from fedllm.embedded.embedded_clients import CLIENTS, QUESTIONS, embedded_rows
from fedllm.embedded.words import FACTS
from fedllm.errors import DataError

COUNT = len(CLIENTS)


def test_rows_are_the_same_every_time() -> None:
    assert list(embedded_rows(16, 20)) == list(embedded_rows(16, 20))


def test_a_client_never_has_an_input_twice_and_never_its_input_as_answer() -> None:
    rows = list(embedded_rows(2 * COUNT, 96))
    assert len({row.client for row in rows}) == 2 * COUNT
    assert len({(row.client, row.input) for row in rows}) == len(rows)
    assert not [row for row in rows if not row.output or row.input == row.output]


def test_every_client_asks_four_questions_and_shares_each_with_others() -> None:
    rows = list(embedded_rows(COUNT, 8))
    asked = {(row.client, row.instruction) for row in rows}
    assert len(asked) == 4 * COUNT
    sharing = [sum(question == q for _, q in asked) for question in QUESTIONS.values()]
    assert min(sharing) >= 3


def test_every_word_has_one_answer_under_a_label() -> None:
    assert FACTS.keys() == QUESTIONS.keys()
    for label, facts in FACTS.items():
        assert len({fact.word for fact in facts}) == len(facts) >= 96, label
    answers = {(f.label, f.word): f.answer for facts in FACTS.values() for f in facts}
    assert answers["capital", "Norway"] == "Oslo"
    assert answers["plural", "tooth"] == "teeth"
    assert answers["double", "21"] == "42"


def test_clients_beyond_the_first_ones_have_rows_of_their_own() -> None:
    rows = list(embedded_rows(COUNT + 1, 20))
    first = {row.input for row in rows if row.client == CLIENTS[0].name}
    again = {row.input for row in rows if row.client == f"{CLIENTS[0].name}-2"}
    assert len(again) == 20
    assert first != again


def test_more_rows_than_there_are_words_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.embedded_rows: got 2000, .*has 19. words"):
        list(embedded_rows(COUNT, 2000))
