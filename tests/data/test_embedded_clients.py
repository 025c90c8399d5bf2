"""Embedded clients are the same on every machine, and every row has a sensible answer."""

import pytest

from fedllm.data.embedded_clients import TASKS, embedded_rows
from fedllm.errors import DataError


def test_there_are_enough_tasks_with_names_of_their_own() -> None:
    assert len(TASKS) >= 16
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert len({task.instruction for task in TASKS}) == len(TASKS)


def test_rows_are_the_same_every_time() -> None:
    assert list(embedded_rows(16, 20)) == list(embedded_rows(16, 20))


def test_a_client_never_has_an_input_twice_and_always_an_answer() -> None:
    rows = list(embedded_rows(2 * len(TASKS), 60))
    assert len({(row.client, row.input) for row in rows}) == len(rows)
    assert all(row.output for row in rows)
    assert len({row.client for row in rows}) == 2 * len(TASKS)


def test_no_answer_is_a_mere_copy_of_most_inputs() -> None:
    rows = list(embedded_rows(len(TASKS), 60))
    for task in TASKS:
        own = [row for row in rows if row.client == task.name]
        assert sum(row.input == row.output for row in own) < len(own) / 10, task.name


def test_clients_beyond_the_tasks_have_rows_of_their_own() -> None:
    rows = list(embedded_rows(len(TASKS) + 1, 20))
    first = {row.input for row in rows if row.client == TASKS[0].name}
    again = {row.input for row in rows if row.client == f"{TASKS[0].name}-2"}
    assert len(again) == 20
    assert first != again


def test_more_rows_than_there_are_inputs_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.embedded_rows"):
        list(embedded_rows(len(TASKS), 2000))
