"""Packed sequences have each row's tokens, positions and targets, and see the right tokens."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import DataError
from fedllm.packing.attention import boolean_mask
from fedllm.packing.sequences import (
    MIN_SHARED,
    PADDING,
    PREFIX,
    Packed,
    RowGroup,
    common_prefix,
    pack,
    pack_groups,
    padded_to,
    plan_packs,
    shared_prefix,
    text_of,
)
from tests.decoders import Row

TOKENS = st.integers(2, 5)
ROWS = st.lists(
    st.builds(Row, st.lists(TOKENS, max_size=6), st.lists(TOKENS, min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
)
LOSS_ON = st.sampled_from(["answer", "all"])


def behind(prefix: list[int], rows: list[Row]) -> list[Row]:
    return [Row([*prefix, *row.prompt_ids], row.answer_ids) for row in rows]


def context(packed: Packed, index: int) -> list[int]:
    """Return the tokens that the token at `index` sees, in the order of their positions."""
    seen_T = boolean_mask(packed.parts, packed.computed_tokens)[0, 0, index]
    indices = seen_T.nonzero().squeeze(1)
    positions = packed.positions_1T[0, indices]
    assert positions.sort().values.tolist() == list(range(len(indices))), "a text without gaps"
    order = positions.argsort()
    tokens: list[int] = packed.tokens_1T[0, indices[order]].tolist()
    return tokens


def expected_targets(rows: list[Row], loss_on: str) -> Counter[tuple[tuple[int, ...], int]]:
    """Return each target with all tokens before it."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for row in rows:
        text = text_of(row)
        first = max(1, len(row.prompt_ids)) if loss_on == "answer" else 1
        found.update((tuple(text[:n]), text[n]) for n in range(first, len(text)))
    return found


@given(ROWS, st.lists(TOKENS, max_size=10), LOSS_ON, st.data())
def test_every_target_sees_all_before_it_in_its_row_and_nothing_else(
    rows: list[Row], head: list[int], loss_on: str, data: st.DataObject
) -> None:
    rows = behind(head, rows)
    prefix = data.draw(st.integers(0, common_prefix([text_of(row) for row in rows])))
    packed = pack(rows, range(len(rows)), prefix, loss_on=loss_on, device="cpu")  # type: ignore[arg-type]
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    triples = zip(packed.inverse_K, packed.targets_K, packed.weights_K, strict=True)
    for inverse, target, weight in triples:
        sight = tuple(context(packed, int(packed.kept_U[inverse])))
        found[sight, int(target)] += int(weight)
    assert found == expected_targets(rows, loss_on)
    assert packed.num_targets == found.total()
    assert packed.num_tokens == sum(len(text_of(row)) for row in rows)
    assert packed.inverse_K.tolist() == sorted(packed.inverse_K.tolist())
    assert packed.kept_U.tolist() == sorted(set(packed.kept_U.tolist()))


@given(ROWS, st.lists(TOKENS, max_size=10), LOSS_ON, st.data())
def test_packs_of_a_step_are_the_step(
    rows: list[Row], head: list[int], loss_on: str, data: st.DataObject
) -> None:
    rows = behind(head, rows)
    lengths = [len(text_of(row)) for row in rows]
    prefix = data.draw(st.integers(0, common_prefix([text_of(row) for row in rows])))
    max_tokens = data.draw(st.none() | st.integers(max(lengths), 80))
    max_rows = data.draw(st.none() | st.integers(1, 5))
    plan = plan_packs(lengths, prefix, max_rows=max_rows, max_tokens=max_tokens)
    assert [place for places in plan for place in places] == list(range(len(rows)))
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for places in plan:
        packed = pack(rows, places, prefix, loss_on=loss_on, device="cpu")  # type: ignore[arg-type]
        assert max_rows is None or len(places) <= max_rows
        assert max_tokens is None or packed.computed_tokens <= max_tokens
        for inverse, target, weight in zip(
            packed.inverse_K, packed.targets_K, packed.weights_K, strict=True
        ):
            sight = tuple(context(packed, int(packed.kept_U[inverse])))
            found[sight, int(target)] += int(weight)
    assert found == expected_targets(rows, loss_on)


def test_packs_are_full_before_the_next_begins() -> None:
    lengths = [11, 11, 11, 11]  # 6 of a prefix of 4 each
    assert plan_packs(lengths, 4, max_rows=None, max_tokens=16) == [[0, 1], [2, 3]]
    assert plan_packs(lengths, 4, max_rows=None, max_tokens=15) == [[0], [1], [2], [3]]
    assert plan_packs(lengths, 4, max_rows=3, max_tokens=None) == [[0, 1, 2], [3]]
    assert plan_packs(lengths, 4, max_rows=None, max_tokens=None) == [[0, 1, 2, 3]]


def test_a_row_over_the_budget_is_named_with_its_length_and_the_remedy() -> None:
    assert plan_packs([9, 12], 4, max_rows=None, max_tokens=11) == [[0], [1]]
    with pytest.raises(DataError) as caught:
        plan_packs([9, 13], 4, max_rows=None, max_tokens=11)
    assert str(caught.value) == (
        "training.micro_batch_tokens: got 11, a training row of 13 tokens computes 12 (its last "
        "one is a target only); need at least 12, or data.cutoff_tokens: 12"
    )
    # a row of that many tokens fits
    assert plan_packs([12], 4, max_rows=None, max_tokens=11) == [[0]]


@pytest.mark.parametrize(
    ("texts", "prefix"),
    [
        ([[1, 2, 3, 4], [1, 2, 5]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # the last token is a target only
        ([[1, 2, 3], [1, 2, 4], [1, 2]], 1),
        ([[1, 2], [3, 4]], 0),
        ([[1], [1, 2, 3]], 0),
        ([[1, 2, 3, 4]], 3),
    ],
)
def test_the_common_prefix_leaves_the_last_token_of_every_row(
    texts: list[list[int]], prefix: int
) -> None:
    assert common_prefix(texts) == prefix


def test_a_short_prefix_and_that_of_one_row_are_not_shared() -> None:
    text = list(range(MIN_SHARED))
    assert shared_prefix([[*text, 90, 1], [*text, 91, 1]]) == MIN_SHARED
    assert shared_prefix([[*text[1:], 90, 1], [*text[1:], 91, 1]]) == 0
    assert shared_prefix([[*text, 90, 1]]) == 0


def test_rows_share_the_targets_in_their_prefix() -> None:
    rows = [Row([2, 3, 4], [5, 1]), Row([2, 3, 4], [6, 1])]
    packed = pack(rows, [0, 1], 3, loss_on="all", device="cpu")
    assert packed.tokens_1T.tolist() == [[2, 3, 4, 5, 6]]
    assert packed.positions_1T.tolist() == [[0, 1, 2, 3, 3]]
    assert [part.row for part in packed.parts] == [PREFIX, 0, 1]
    targets = zip(packed.inverse_K, packed.targets_K, packed.weights_K, strict=True)
    assert [(int(i), int(t), int(w)) for i, t, w in targets] == [
        (0, 3, 2), (1, 4, 2), (2, 5, 1), (2, 6, 1), (3, 1, 1), (4, 1, 1),
    ]  # fmt: skip


def test_targets_that_are_not_merged_have_their_rows() -> None:
    rows = [Row([2, 3], [5, 1])] * 2
    packed = pack(rows, [0, 1], 3, loss_on="answer", device="cpu", merge_targets=False)
    assert packed.rows_K is not None
    assert packed.rows_K.tolist() == [0, 1, 0, 1]
    assert packed.targets_K.tolist() == [5, 5, 1, 1]
    assert packed.weights_K.tolist() == [1, 1, 1, 1]


def test_groups_follow_each_other_with_prefixes_of_their_own() -> None:
    rows = [Row([2, 3, 4], [1]), Row([2, 3, 5], [1]), Row([6, 7, 8], [1]), Row([6, 7], [9, 1])]
    groups = [
        RowGroup(rows=rows, places=[0, 1], prefix=2),
        RowGroup(rows=rows, places=[2, 3], prefix=2),
    ]
    packed = pack_groups(groups, loss_on="answer", device="cpu", merge_targets=False)
    assert packed.tokens_1T.tolist() == [[2, 3, 4, 5, 6, 7, 8, 9]]
    assert packed.rows_K is not None
    sights = {
        (row, int(target)): context(packed, int(packed.kept_U[inverse]))
        for row, target, inverse in zip(
            packed.rows_K.tolist(), packed.targets_K, packed.inverse_K, strict=True
        )
    }
    assert sights == {(0, 1): [2, 3, 4], (1, 1): [2, 3, 5], (2, 1): [6, 7, 8], (3, 9): [6, 7],
                      (3, 1): [6, 7, 9]}  # fmt: skip


def test_padding_sees_itself_and_carries_no_loss() -> None:
    packed = pack([Row([2, 3], [1])], [0], 0, loss_on="answer", device="cpu")
    longer = padded_to(packed, 5)
    assert longer.parts[-1].row == PADDING
    assert context(longer, 4) == [0, 0, 0]
    assert context(longer, 1) == [2, 3]
    assert torch.equal(longer.kept_U, packed.kept_U)
    assert longer.num_tokens == packed.num_tokens
    assert padded_to(packed, 2) is packed


def test_a_pack_of_nothing_computes_one_token_without_a_target() -> None:
    packed = pack([Row([], [7])], [0], 0, loss_on="answer", device="cpu")
    assert packed.computed_tokens == 1
    assert [part.row for part in packed.parts] == [PADDING]
    assert packed.num_targets == 0
    assert packed.num_tokens == 1
