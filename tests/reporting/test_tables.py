"""Tables show every name as it is given."""

import pytest

from fedllm.errors import counted
from fedllm.reporting.tables import number, size, text_table

AWKWARD = ["[red]tier", ":smile:", "x" * 300, "名前", "a[/b]"]


def test_names_are_shown_as_they_are() -> None:
    text = text_table("a title", ["tier", "x"], [[name, "1"] for name in AWKWARD])
    title, _, *rows = text.splitlines()
    assert title == "a title"
    assert [row.split()[0] for row in rows] == AWKWARD


def test_columns_are_aligned_text_to_the_left_and_numbers_to_the_right() -> None:
    text = text_table("t", ["tier", "loss"], [["a", "1.5"], ["large", "10.25"]])
    assert text.splitlines() == ["t", "tier    loss", "a        1.5", "large  10.25"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 1024**2, "5.0 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (2048 * 1024**3, "2048.0 GiB"),
    ],
)
def test_a_size_is_in_the_largest_unit_that_leaves_one(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_a_count_has_the_noun_in_singular_or_plural() -> None:
    assert [counted(n, "client") for n in (0, 1, 2, 1613)] == [
        "0 clients",
        "1 client",
        "2 clients",
        "1,613 clients",
    ]


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_a_table_fits_a_narrow_terminal_and_its_words_stay_whole(width: int) -> None:
    header = ["clients", "number", "answer loss", "Rouge-L", "exact match"]
    row = ["training clients", "16", "5.704 -> 2.856", "0.217 -> 0.183", "0.000 -> 0.089"]
    _, *lines = text_table("t", header, [row], width=width).splitlines()
    left_out = [line for line in lines if line.startswith("(too narrow for: ")]
    shown = [line for line in lines if line not in left_out]
    assert all(len(line) <= width for line in shown)
    assert {word for line in shown for word in line.split()} <= set(" ".join(header + row).split())
    assert bool(left_out) == (width == 30)


def test_a_number_has_a_fixed_count_of_digits() -> None:
    assert (number(1.23456), number(2.0, 1)) == ("1.235", "2.0")
