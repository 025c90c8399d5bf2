"""Cross entropy in float32 and in chunks is the textbook one; rows and clients stay apart."""

import pytest
import torch
from torch import Tensor, nn

from fedllm.errors import ModelError
from fedllm.packing.losses import cross_entropies, packed_losses, target_losses
from fedllm.packing.sequences import pack
from tests.decoders import AllLogits, Row, in_layout, make_decoder

HEAD = [5, 6, 7, 8, 9, 10, 11, 12, 13]
ROWS = [
    Row([*HEAD, 20], [21, 1]),
    Row([*HEAD, 30, 31, 32, 33], [34, 35, 36, 1]),
    Row(HEAD, [21, 40, 1]),
]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make_decoder("llama")


@pytest.mark.parametrize("num_logits", [1, 7, 1 << 22])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)]
)
def test_chunks_give_the_loss_and_the_gradient_of_the_whole(
    dtype: torch.dtype, bound: float, num_logits: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    logits_UV = (4 * torch.randn(9, 5, generator=draw)).to(dtype).requires_grad_()
    inverse_K = torch.tensor([0, 0, 0, 2, 3, 4, 4, 8])  # some twice, some never
    targets_K = torch.tensor([1, 2, 2, 0, 4, 3, 0, 1])
    weights_K = torch.rand(8, generator=draw)

    computed_UV = logits_UV.clone()  # its gradient takes its place
    found_K = cross_entropies(computed_UV, inverse_K, targets_K, chunk_logits=num_logits)
    (found_grad,) = torch.autograd.grad((found_K * weights_K).sum(), logits_UV)
    exact_UV = logits_UV.detach().double().requires_grad_()
    exact_K = nn.functional.cross_entropy(exact_UV[inverse_K], targets_K, reduction="none")
    (exact_grad,) = torch.autograd.grad((exact_K * weights_K).sum(), exact_UV)

    wide = torch.promote_types(dtype, torch.float32)
    assert found_K.dtype == wide
    torch.testing.assert_close(
        found_K.double(), exact_K, rtol=0, atol=1e-5 if wide == torch.float32 else 1e-12
    )
    torch.testing.assert_close(found_grad.double(), exact_grad, rtol=bound, atol=bound)


def test_no_targets_have_no_loss() -> None:
    logits_UV = torch.randn(0, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    total = cross_entropies(logits_UV, none, none).sum()
    total.backward()
    assert total.item() == 0.0


def alone(model: nn.Module, row: Row) -> Tensor:
    """Return the losses of a row's answer alone, without code of fedllm."""
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    first = len(row.prompt_ids)
    return nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")


@pytest.mark.parametrize("layout", ["parts", "mask"])
def test_every_row_has_the_loss_it_has_alone(llama: nn.Module, layout: str) -> None:
    rows = [*ROWS, ROWS[0]]
    packed = pack(rows, range(4), 9, loss_on="answer", device="cpu", merge_targets=False)
    with torch.no_grad():
        losses_K = target_losses(in_layout(llama, layout), packed, layout)
        expected = torch.stack([alone(in_layout(llama, "padded"), row) for row in rows])
    assert packed.rows_K is not None
    found = torch.zeros(4, dtype=torch.float64).index_add_(0, packed.rows_K, losses_K)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_model_that_computes_all_logits_gives_the_same(llama: nn.Module) -> None:
    model = in_layout(llama, "parts")
    packed = pack(ROWS, range(3), 9, loss_on="answer", device="cpu")
    every = AllLogits(model)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_losses(every, packed, "parts"), packed_losses(model, packed, "parts")
        )


def test_a_model_that_attends_elsewhere_is_refused(llama: nn.Module) -> None:
    packed = pack(ROWS, range(3), 9, loss_on="answer", device="cpu")
    with pytest.raises(ModelError, match="does not go through transformers' attention interface"):
        packed_losses(in_layout(llama, "mask"), packed, "parts")
