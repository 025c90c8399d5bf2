"""Row dropout depends on the row and the position, not on the batch."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedllm.errors import ModelError
from fedllm.packing.adapter_product import LeanFactor
from fedllm.packing.micro_batches import PACKERS, Cut
from fedllm.packing.row_dropout import Piece, RowDropout, RowSeeds
from tests.decoders import Row, in_layout, make_decoder


def dropped(
    x: Tensor, *, seeds: list[int], starts: list[int], rate: float = 0.3, module: str = "m"
) -> Tensor:
    rows = RowSeeds()
    pieces = zip(seeds, starts, strict=True)
    rows.enter(
        [Piece(entry=n, start=at, stop=x.shape[1], seed=s) for n, (s, at) in enumerate(pieces)]
    )
    result: Tensor = RowDropout(rate, module=module, rows=rows)(x)
    return result


def test_a_row_has_its_mask_in_any_batch_and_behind_any_padding() -> None:
    x = torch.ones(2, 9, 7)
    together = dropped(x, seeds=[11, 12], starts=[0, 4])
    assert torch.equal(together[0], dropped(x[:1], seeds=[11], starts=[0])[0])
    assert torch.equal(together[1, 4:], dropped(x[:1, 4:], seeds=[12], starts=[0])[0])


def test_rows_and_modules_have_masks_of_their_own() -> None:
    x = torch.ones(2, 9, 7)
    both = dropped(x, seeds=[11, 12], starts=[0, 0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, dropped(x, seeds=[11, 12], starts=[0, 0], module="other"))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_rate_is_met_and_the_mean_kept(rate: float) -> None:
    y = dropped(torch.ones(4, 64, 256), seeds=[1, 2, 3, 4], starts=[0] * 4, rate=rate)
    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)


def test_evaluation_drops_nothing() -> None:
    x = torch.randn(1, 3, 5)
    assert RowDropout(0.5, module="m", rows=RowSeeds()).eval()(x) is x


STEP = [Row([*range(5, 14), n], [*range(20, 20 + 3 * n), 1]) for n in (3, 5, 8)]


@pytest.mark.parametrize("layout", ["parts", "packed", "padded"])
def test_tokens_in_one_list_have_the_masks_of_their_rows(layout: str) -> None:
    model, rows = in_layout(make_decoder("opt"), layout), RowSeeds()
    outputs: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            dropout = module.lora_dropout["c0"] = RowDropout(0.3, module=path, rows=rows)
            dropout.register_forward_hook(lambda _, __, y, path=path: outputs.update({path: y}))
    cut = Cut(loss_on="answer", pad_token=0, device="cpu")
    for one in PACKERS[layout](STEP, cut):
        pieces = one.pieces(lambda place: 100 + place, 7)
        rows.enter(pieces)
        one.loss_sum(model)
        for layer in ("model.decoder.layers.0", "model.decoder.layers.1"):
            apart, flat = (outputs[f"{layer}.{leaf}"] for leaf in ("self_attn.q_proj", "fc1"))
            assert (apart.dim(), flat.dim()) == (3, 2)
            for path, y in ((f"{layer}.self_attn.q_proj", apart), (f"{layer}.fc1", flat)):
                expected = RowDropout(0.3, module=path, rows=rows)(torch.ones(apart.shape))
                found = y.view(apart.shape) == 0
                assert torch.equal(found, expected == 0)
                own = torch.cat([found[p.entry, p.start : p.stop].flatten() for p in pieces])
                assert own.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_padding_behind_one_list_of_tokens_changes_no_mask() -> None:
    rows = RowSeeds()
    rows.enter(
        [Piece(entry=0, start=0, stop=50, seed=1), Piece(entry=0, start=50, stop=71, seed=2)]
    )
    dropout = RowDropout(0.3, module="m", rows=rows)
    expected = dropout(torch.ones(1, 128, 7))[0]
    assert (expected[:71] == 0).any()
    assert torch.equal(dropout(torch.ones(128, 7)), expected)
    assert torch.equal(dropout(torch.ones(71, 7)), expected[:71])


@pytest.mark.parametrize("shape", [(17, 7), (27, 7), (2, 8, 7), (3, 9, 7)])
def test_tokens_that_are_not_those_of_the_rows_are_refused(shape: tuple[int, ...]) -> None:
    rows = RowSeeds()
    rows.enter([Piece(entry=n, start=0, stop=9, seed=n) for n in range(2)])
    tokens = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    with pytest.raises(ModelError, match=f"lora.dropout: mlp.up gets {tokens} of the 18 tokens"):
        RowDropout(0.3, module="mlp.up", rows=rows)(torch.ones(shape))


def test_fewer_tokens_than_a_sequence_has_are_refused() -> None:
    rows = RowSeeds()
    rows.enter([Piece(entry=0, start=0, stop=9, seed=1)])
    with pytest.raises(ModelError, match="gets 8 of the 9 tokens"):
        RowDropout(0.3, module="m", rows=rows)(torch.ones(8, 7))


@pytest.mark.parametrize("shape", [(1, 37, 32), (2, 9, 48), (5, 16)])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_with_its_dropout_saves_little_and_changes_no_bit(
    shape: tuple[int, ...], needs_grad: bool
) -> None:
    """Return value and gradients of dropout followed by the product, by autograd."""
    torch.manual_seed(0)
    rows = RowSeeds()
    width = shape[-2]
    entries = shape[0] if len(shape) == 3 else 1
    rows.enter([Piece(entry=n, start=0, stop=width, seed=n) for n in range(entries)])
    dropout = RowDropout(0.3, module="m", rows=rows)
    factor = nn.Linear(shape[-1], 4, bias=False)
    x = torch.randn(shape, requires_grad=needs_grad)
    upstream = torch.randn(*shape[:-1], 4)

    def outcome(h: Tensor) -> list[Tensor | None]:
        h.backward(upstream)
        found = [h.detach(), x.grad, factor.weight.grad]
        x.grad = factor.weight.grad = None
        return found

    apart = outcome(factor(dropout(x)))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = LeanFactor(factor, dropout)(x)
    for one, other in zip(outcome(h), apart, strict=True):
        assert one is other is None or (
            one is not None and other is not None and torch.equal(one, other)
        )
    own = [each for each in kept if each.data_ptr() not in {x.data_ptr(), factor.weight.data_ptr()}]
    assert [(each.dtype, each.shape) for each in own] == [(torch.bool, x.shape)]
