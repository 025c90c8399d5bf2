"""Rows that share a prefix get the same answers and scores as each row alone."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.evaluation.decoding import RowAnswer, answer_clients
from fedllm.evaluation.reading import answer_losses, padded_losses, plan_passes
from fedllm.model.base import Base
from fedllm.packing.micro_batches import DENSE_TOKENS, PARTS_TOKENS
from fedllm.packing.sequences import MIN_SHARED, RowGroup, pack_groups, shared_prefix, text_of
from fedllm.packing.slots import AdapterSlots
from tests.decoders import DECODERS, Row, in_layout, make_decoder

HEAD = [5, 6, 7, 8, 9, 10, 11, 12, 13]
DIFFERENT = [
    Row([*HEAD, 20], [21, 1]),
    Row([*HEAD, *range(30, 60)], [30, 31, 1]),
    Row([*HEAD, 40, 41, 42, 43, 44], [50, 51, 52, 53, 54, 55, 1]),
]
CLIENTS = {
    "very different lengths": DIFFERENT,
    "nothing in common": [Row([20, 21, 22], [23, 1]), Row([30, 31], [32, 1])],
    "one row": [Row([*HEAD, 50, 51], [52, 1])],
    "no row": [],
    "identical prompts": [
        Row([*HEAD, 20, 21], [22, 1]),
        Row([*HEAD, 20, 21], [23, 24, 1]),
        Row([*HEAD, 20, 21], [22, 1]),
    ],
    "prompts that are all prefix": [Row(HEAD, [20, 1]), Row(HEAD, [20, 22, 1])],
    "a prefix that reaches into answers": [Row([*HEAD, 20], [21, 22, 1]), Row(HEAD, [20, 21, 9])],
    "a prompt of one token": [Row([20], [21, 1]), Row([20], [22, 1])],
}
ROWS = [row for client in CLIENTS.values() for row in client]
MAX_TOKENS = 7


def slots_of(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> AdapterSlots:
    model = make_decoder(name, dtype, **changes)
    tokenizer = SimpleNamespace(pad_token_id=0)  # only texts need more of it
    base = Base(model=model, tokenizer=tokenizer, fingerprint="", modules={})
    return AdapterSlots(base, target_modules=[])


@pytest.fixture(scope="module")
def llama() -> AdapterSlots:
    return slots_of("llama")


def greedy(
    slots: AdapterSlots, row: Row, ends: Collection[int] = (), max_tokens: int = MAX_TOKENS
) -> list[int]:
    """Return the greedy answer, computed token by token without a cache or a batch."""
    slots.evaluate()
    model = in_layout(slots.model, "padded")
    ids = list(row.prompt_ids)
    for _ in range(max_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(row.prompt_ids) :]


def answer(
    slots: AdapterSlots,
    clients: Sequence[Sequence[Row]],
    *,
    layout: str = "parts",
    batch_size: int = 16,
    max_tokens: int = MAX_TOKENS,
    ends: Collection[int] = (),
) -> list[RowAnswer]:
    in_layout(slots.model, layout)
    return answer_clients(
        slots, clients, layout=layout, batch_size=batch_size, max_tokens=max_tokens, ends=ends
    )


def tokens_of(answered: Sequence[RowAnswer]) -> list[list[int]]:
    return [list(row.tokens) for row in answered]


@contextmanager
def passes_of(slots: AdapterSlots) -> Iterator[list[torch.Size]]:
    """Record the shapes of the token batches that the model embeds."""
    shapes: list[torch.Size] = []
    embedding = slots.model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def ends(llama: AdapterSlots) -> set[int]:
    """Return end tokens at which some rows end at once, some later and some never."""
    alone = [greedy(llama, row) for row in ROWS]
    ends = {alone[0][0], alone[2][3]}
    lengths = {len(greedy(llama, row, ends)) for row in ROWS}
    assert {1, MAX_TOKENS} < lengths
    return ends


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("layout", ["parts", "mask"])
def test_answers_and_losses_are_those_of_single_rows(
    llama: AdapterSlots, ends: set[int], layout: str, batch_size: int
) -> None:
    clients = list(CLIENTS.values())
    found = answer(llama, clients, layout=layout, batch_size=batch_size, ends=ends)
    assert tokens_of(found) == [greedy(llama, row, ends) for row in ROWS]
    expected = padded_losses(llama, ROWS, 4)
    assert [row.loss for row in found] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_is_answered_alone(llama: AdapterSlots, client: str) -> None:
    found = answer(llama, [CLIENTS[client]])
    assert tokens_of(found) == [greedy(llama, row) for row in CLIENTS[client]]


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_answers_greedily(name: str) -> None:
    slots = slots_of(name)
    found = answer(slots, list(CLIENTS.values()), batch_size=4)
    assert tokens_of(found) == [greedy(slots, row) for row in ROWS]
    expected = padded_losses(slots, ROWS, 4)
    assert [row.loss for row in found] == pytest.approx(expected, rel=1e-6)


def test_a_window_shorter_than_a_prompt_moves_on_with_the_answer() -> None:
    windows, without = slots_of("mistral, windows"), slots_of("mistral, windows", sliding_window=99)
    assert all(len(row.prompt_ids) > 5 for row in DIFFERENT)
    found = tokens_of(answer(windows, [DIFFERENT], max_tokens=20))
    assert found == [greedy(windows, row, max_tokens=20) for row in DIFFERENT]
    assert found != tokens_of(answer(without, [DIFFERENT], max_tokens=20))


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)
def test_prompts_computed_by_flex_attention_are_answered_by_sdpa() -> None:
    slots = slots_of("llama", head_dim=16)
    expected = [greedy(slots, row) for row in ROWS]
    model: Any = slots.model
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        found = answer_clients(
            slots,
            list(CLIENTS.values()),
            layout="flex",
            batch_size=4,
            max_tokens=MAX_TOKENS,
            ends=(),
        )
    assert tokens_of(found) == expected
    assert model.config._attn_implementation == "flex_attention"


def test_a_model_in_train_mode_is_set_to_evaluate(llama: AdapterSlots) -> None:
    llama.train()
    answer(llama, [DIFFERENT])
    assert not llama.model.training


def test_a_prefix_is_computed_once_and_no_token_needlessly(
    llama: AdapterSlots, ends: set[int]
) -> None:
    clients = [DIFFERENT, CLIENTS["identical prompts"]]
    with passes_of(llama) as shapes:
        found = answer(llama, clients, ends=ends)
    read = sum(
        (prefix := shared_prefix([text_of(row) for row in client]))
        + sum(len(text_of(row)) - 1 - prefix for row in client)
        for client in clients
    )
    assert shared_prefix([text_of(row) for row in DIFFERENT]) == len(HEAD) >= MIN_SHARED
    assert shapes[0] == (1, read)
    # an answer's last token is never computed
    assert sum(n for n, _ in shapes[1:]) == sum(len(row.tokens) - 1 for row in found)


def test_a_row_joins_when_another_ends(llama: AdapterSlots) -> None:
    rows = [Row([n, n + 1], [1]) for n in range(10, 40)]
    alone = [greedy(llama, row, max_tokens=12) for row in rows]
    ends = {tokens[1] for tokens in alone[:8]}
    lengths = [len(greedy(llama, row, ends, max_tokens=12)) for row in rows]
    with passes_of(llama) as shapes:
        found = answer(llama, [rows], batch_size=4, max_tokens=12, ends=ends)
    assert [len(row.tokens) for row in found] == lengths
    steps = [n for n, width in shapes if width == 1]
    assert max(steps) == 4
    last_joined = len(steps) - max(lengths)
    assert set(steps[: max(1, last_joined)]) == {4}


def test_rows_that_end_at_once_take_no_step(llama: AdapterSlots) -> None:
    firsts = {greedy(llama, row, max_tokens=1)[0] for row in ROWS}
    with passes_of(llama) as shapes:
        found = answer(llama, list(CLIENTS.values()), ends=firsts)
        assert [len(row.tokens) for row in found] == [1] * len(ROWS)
        answer(llama, list(CLIENTS.values()), max_tokens=1)
    assert all(n == 1 and width > 1 for n, width in shapes)


def test_a_row_without_a_prompt_gets_no_answer(llama: AdapterSlots) -> None:
    rows = [Row([], [20, 21, 1]), Row([30, 31], [32, 1])]
    found = answer(llama, [rows])
    assert tokens_of(found) == [[], greedy(llama, rows[1])]
    assert [row.loss for row in found] == pytest.approx(padded_losses(llama, rows, 2), rel=1e-6)


def test_a_row_of_one_token_has_no_loss(llama: AdapterSlots) -> None:
    assert answer(llama, [[Row([], [20])]]) == [RowAnswer(loss=0.0, tokens=())]


@pytest.mark.parametrize("layout", ["parts", "mask", "packed"])
def test_losses_do_not_depend_on_batch_and_grouping(layout: str) -> None:
    slots = slots_of("llama", torch.float32)
    in_layout(slots.model, layout)
    expected = padded_losses(slots, ROWS, 16)
    for clients in (list(CLIENTS.values()), [ROWS], [[row] for row in ROWS]):
        for batch_size in (1, 3, 16):
            found = answer_losses(slots, clients, layout=layout, batch_size=batch_size)
            assert found == pytest.approx(expected, abs=1e-4)


def test_the_same_rows_give_the_same_bits_again(llama: AdapterSlots) -> None:
    clients = list(CLIENTS.values())
    assert answer(llama, clients, batch_size=3) == answer(llama, clients, batch_size=3)


LENGTHS = st.lists(st.lists(st.integers(1, 700), max_size=6), max_size=6)


MAX_AT_ONCE = {"parts": PARTS_TOKENS, "mask": DENSE_TOKENS, "packed": DENSE_TOKENS}


def tokens_at_once(groups: Sequence[RowGroup]) -> int:
    return pack_groups(groups, loss_on="answer", device="cpu").computed_tokens


@given(lengths=LENGTHS, batch_size=st.integers(1, 8), layout=st.sampled_from(list(MAX_AT_ONCE)))
def test_passes_hold_every_row_once_within_their_bounds(
    lengths: list[list[int]], batch_size: int, layout: str
) -> None:
    clients = [[Row([7] * length, [1]) for length in client] for client in lengths]
    passes = plan_passes(clients, layout=layout, batch_size=batch_size)
    places = [[place for group in groups for place in group.places] for groups in passes]
    assert sorted(chain(*places)) == list(range(sum(map(len, clients))))
    assert all(1 <= len(of_pass) <= batch_size for of_pass in places)
    longest = max(chain(*lengths), default=0) + 1
    max_tokens = max(2048, 4 * longest) if layout == "parts" else 1024
    assert all(tokens_at_once(groups) <= max_tokens for groups in passes)


@pytest.mark.parametrize(("layout", "max_tokens"), MAX_AT_ONCE.items())
@pytest.mark.parametrize("per_client", [1, 40])
def test_passes_are_as_full_as_their_bound_lets_them(
    layout: str, max_tokens: int, per_client: int
) -> None:
    rows = [Row([n, *[7] * 100], [1]) for n in range(2, 42)]
    clients = [rows[start : start + per_client] for start in range(0, 40, per_client)]
    computed = [
        tokens_at_once(groups) for groups in plan_passes(clients, layout=layout, batch_size=64)
    ]
    assert sum(computed) == 40 * 101
    assert max_tokens - 101 < max(computed) <= max_tokens


@pytest.mark.parametrize(("layout", "rows"), [("parts", 4), ("mask", 1), ("packed", 1)])
def test_rows_over_the_bound_are_computed_a_few_at_once(layout: str, rows: int) -> None:
    clients = [[Row([n, *[7] * 3000], [1]) for n in range(2, 10)]]
    passes = plan_passes(clients, layout=layout, batch_size=64)
    assert [sum(len(group.places) for group in groups) for groups in passes] == [rows] * (8 // rows)


@given(sizes=st.lists(st.integers(1, 5), max_size=8))
def test_rows_of_a_client_stay_together_where_they_fit(sizes: list[int]) -> None:
    clients = [[Row([*HEAD, n], [1])] * size for n, size in enumerate(sizes)]
    passes = plan_passes(clients, layout="parts", batch_size=5)
    assert sum(map(len, passes)) == len(sizes)
