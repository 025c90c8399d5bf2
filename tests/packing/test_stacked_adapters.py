"""Stacked adapters give each client the results that it has alone."""

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from fedllm.errors import AdapterError
from fedllm.lora.factors import Adapter
from fedllm.model.base import Base, load_base
from fedllm.model.targets import find_modules
from fedllm.packing.attention import PARTS_ATTENTION
from fedllm.packing.installed import Installed
from fedllm.packing.losses import packed_losses
from fedllm.packing.row_dropout import Piece
from fedllm.packing.sequences import Packed, pack, shared_prefix, text_of
from fedllm.packing.slots import AdapterSlots
from fedllm.packing.stacked_adapters import StackedPass
from tests.decoders import Row
from tests.packing.test_slots import TARGETS, adapter, sides
from tests.tiny import Tiny

HEADS: tuple[list[int], ...] = (
    [5, 6, 7, 8, 9, 10, 11, 12, 13],
    [20, 21, 22, 23, 24, 25, 26, 27],
    [],
)
RANKS = (2, 3, 4)


@pytest.fixture(scope="module")
def base(tiny: Tiny) -> Base:
    base = load_base(tiny.model, dtype="float32", device="cpu")
    base.model.double()
    base.model.set_attn_implementation(PARTS_ATTENTION)  # type: ignore[operator]
    return base


@pytest.fixture(scope="module")
def slots(base: Base) -> AdapterSlots:
    return AdapterSlots(base, target_modules=TARGETS)


def rows_of(client: int, count: int = 3) -> list[Row]:
    draws = torch.Generator().manual_seed(client)
    lengths = torch.randint(2, 12, (count,), generator=draws).tolist()
    own = [torch.randint(30, 250, (n,), generator=draws).tolist() for n in lengths]
    return [Row([*HEADS[client % 3], *ids[:-2]], [*ids[-2:], 1]) for ids in own]


def pack_of(rows: Sequence[Row]) -> Packed:
    prefix = shared_prefix([text_of(row) for row in rows])
    return pack(rows, range(len(rows)), prefix, loss_on="answer", device="cpu")


def adapters_of(base: Base, ranks: Sequence[int] = RANKS) -> list[Adapter]:
    return [adapter(sides(base), seed=n, rank=rank, scale=1.0 + n) for n, rank in enumerate(ranks)]


def pieces_of(packed: Packed, client: int) -> list[Piece]:
    return [
        Piece(entry=0, start=part.start, stop=part.stop, seed=100 * client + number)
        for number, part in enumerate(packed.parts)
    ]


def alone(
    slots: AdapterSlots, own: Adapter, packed: Packed, client: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and gradients of one client alone."""
    installed = slots.install(own)
    slots.model.double()
    slots.train()
    slots.rows.enter(pieces_of(packed, client))
    loss = packed_losses(slots.model, packed, "parts")
    loss.backward()
    return loss.detach(), gradients(installed)


def together(
    slots: AdapterSlots, adapters: Sequence[Adapter], packs: Sequence[Packed]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the losses and gradients of clients in one pass."""
    members = slots.install_group(adapters)
    for parameter in (p for member in members for p in member.parameters):
        parameter.data = parameter.data.double()
    slots.train()
    stacked = StackedPass.of(packs)
    slots.use_members(members, stacked.lengths)
    slots.rows.enter(stacked.pieces([pieces_of(pack, n) for n, pack in enumerate(packs)]))
    losses = stacked.loss_sums(slots.model, "parts")
    torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses], [gradients(member) for member in members]


def gradients(installed: Installed) -> list[Tensor]:
    found = [parameter.grad for parameter in installed.parameters]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


def assert_as_alone(
    slots: AdapterSlots, adapters: Sequence[Adapter], packs: Sequence[Packed], rtol: float = 1e-6
) -> None:
    losses, found = together(slots, adapters, packs)
    for client, (own, packed) in enumerate(zip(adapters, packs, strict=True)):
        loss, expected = alone(slots, own, packed, client)
        torch.testing.assert_close(losses[client], loss, rtol=rtol, atol=0.0)
        for one, other in zip(found[client], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=rtol * other.abs().max().item())


@pytest.mark.parametrize("ranks", [(2, 3, 4), (3, 3, 3), (4,), (8, 1)])
def test_losses_and_gradients_of_unequal_ranks_and_lengths_are_those_of_each_alone(
    slots: AdapterSlots, base: Base, ranks: tuple[int, ...]
) -> None:
    packs = [pack_of(rows_of(client)) for client in range(len(ranks))]
    assert len(ranks) == 1 or len({pack.computed_tokens for pack in packs}) > 1
    assert_as_alone(slots, adapters_of(base, ranks), packs)


def test_clients_with_equally_many_tokens_need_no_padding(slots: AdapterSlots, base: Base) -> None:
    packs = [pack_of(rows_of(3 * n)) for n in range(2)]
    packs = [packs[0], packs[0]]
    assert_as_alone(slots, adapters_of(base, (2, 4)), packs)


def test_masks_of_dropout_are_those_that_each_client_has_alone(tiny: Tiny) -> None:
    base = load_base(tiny.model, dtype="float32", device="cpu")
    base.model.double()
    base.model.set_attn_implementation(PARTS_ATTENTION)  # type: ignore[operator]
    shapes = adapters_of(base)
    slots = AdapterSlots(base, target_modules=TARGETS, dropout=0.3)
    packs = [pack_of(rows_of(client)) for client in range(3)]
    assert_as_alone(slots, shapes, packs)
    without = AdapterSlots(
        load_base(tiny.model, dtype="float32", device="cpu"), target_modules=TARGETS
    )
    without.model.double().set_attn_implementation(PARTS_ATTENTION)  # type: ignore[operator]
    dropped, kept = (together(each, shapes, packs)[0] for each in (slots, without))
    assert not torch.allclose(torch.stack(dropped), torch.stack(kept), rtol=1e-3)


def test_what_is_not_finite_stays_with_its_client(slots: AdapterSlots, base: Base) -> None:
    adapters = adapters_of(base)
    packs = [pack_of(rows_of(client)) for client in range(3)]
    sound = together(slots, adapters, packs)
    module = min(adapters[1])
    adapters[1][module].b_OR[0, 0] = float("nan")
    adapters[1][module].a_RI[0, 0] = float("inf")
    losses, found = together(slots, adapters, packs)
    assert not losses[1].isfinite()
    for client in (0, 2):
        assert torch.equal(losses[client], sound[0][client])
        assert all(map(torch.equal, found[client], sound[1][client]))


def test_groups_of_any_ranks_share_their_tensors(slots: AdapterSlots, base: Base) -> None:
    def total() -> int:
        pool = slots._groups["factors"].pool if slots._groups else {}
        return sum(a.numel() + b.numel() for a, b in pool.values())

    orders = [(2, 3), (3, 2), (3, 3), (2, 2)]
    for order in orders:
        slots.install_group(adapters_of(base, order))
    first = total()
    assert first
    for order in 3 * orders:
        members = slots.install_group(adapters_of(base, order))
        used = [parameter for member in members for parameter in member.parameters]
        assert len({id(parameter) for parameter in used}) == len(used)
        slots.use_members(members[:1], [1])
        trained = [p for p in slots.model.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in members[0].parameters}
    assert total() == first


def test_a_group_and_a_single_client_take_turns(slots: AdapterSlots, base: Base) -> None:
    packs = [pack_of(rows_of(client)) for client in range(3)]
    adapters = adapters_of(base)
    results: list[list[Tensor]] = []
    for _ in range(2):
        losses, _ = together(slots, adapters, packs)
        loss, _ = alone(slots, adapters[1], packs[1], 1)
        results.append([*losses, loss])
        assert all(p.grad is None for n, p in slots.model.named_parameters() if "lora" not in n)
    for one, other in pairwise(results):
        assert all(map(torch.equal, one, other))


def test_a_member_of_another_model_is_named(slots: AdapterSlots, base: Base) -> None:
    sound, strange = adapters_of(base, (2, 2))
    module = min(strange)
    strange = {module: strange[module], "elsewhere.q_proj": strange[module]}
    with pytest.raises(AdapterError, match=r"elsewhere\.q_proj: not a target module"):
        slots.install_group([sound, strange])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_modules_that_get_their_tokens_in_one_list_train_as_alone(dropout: float) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=258,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
    )
    model = OPTForCausalLM(config).double()
    model.set_attn_implementation(PARTS_ATTENTION)
    targets = ["q_proj", "fc1", "fc2"]
    modules = find_modules(model, targets)
    tokenizer = SimpleNamespace(pad_token_id=0)  # only texts need more of it
    base = Base(model=model, tokenizer=tokenizer, fingerprint="", modules=modules)
    shapes = {name: (m.out_features, m.in_features) for name, m in modules.items()}
    slots = AdapterSlots(base, target_modules=targets, dropout=dropout)
    flat: list[int] = []
    name = next(
        name for name in shapes if name.endswith("fc2")
    )  # after fc1, whose result is then flat too
    model.get_submodule(name).register_forward_hook(lambda _, __, y: flat.append(y.dim()))
    adapters = [adapter(shapes, seed=n, rank=rank) for n, rank in enumerate(RANKS)]
    assert_as_alone(slots, adapters, [pack_of(rows_of(client)) for client in range(3)])
    assert set(flat) == {2}
