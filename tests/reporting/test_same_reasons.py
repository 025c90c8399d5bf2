"""Clients that failed for the same reason are one line."""

from fedllm.reporting.status.same_reasons import reason_line, same_reasons


def test_reasons_that_differ_in_numbers_and_the_client_only_are_the_same() -> None:
    failed = {f"c{n}": f"client c{n}: the loss of step {n} is nan" for n in range(12)}
    failed["other"] = "no rows"
    found = same_reasons(failed)
    assert [reason_line(*item) for item in found.items()] == [
        "12 clients (c0, c1, c2, ...): client c0: the loss of step 0 is nan",
        "other: no rows",
    ]


def test_the_most_frequent_reason_comes_first() -> None:
    failed = {"a": "no rows", "b": "no memory", "c": "no memory"}
    assert same_reasons(failed) == {"no memory": ["b", "c"], "no rows": ["a"]}
