"""The layouts of rows in a forward pass, and the check that finds one that a model computes right.

Rows share their common prefix where the model allows it: `parts` (one attention call per part),
`flex` (FlexAttention with block masks, on a GPU) or `mask` (one boolean mask of all tokens).
Otherwise they are `packed`, one after the other without sharing, or `padded` to a rectangle.

Only a comparison shows what a model does: a class may drop a mask or ignore positions without any
warning. So a small model of the same class and configuration, in float64, computes some rows in
every layout. The layout is the first in which they agree with each row computed alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fedllm.errors import ConfigError, ModelError
from fedllm.model.small import integer, rotaries, silence, small_model
from fedllm.packing.attention import PARTS_ATTENTION, SHARED, fitted
from fedllm.packing.batches import collate, token_losses
from fedllm.packing.losses import forward, packed_losses
from fedllm.packing.sequences import Packed, length_of, pack, text_of
from fedllm.storage.hub import first_line
from fedllm.storage.records import LayoutRecord

_CHECKED = ("parts", "mask", "packed", "padded")  # in the order of preference
# largest relative error; 1e-8 is measured: transformers has norms and rotary angles in float32
_TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True, kw_only=True)
class _Row:
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    prompt_targets: Sequence[int] = ()


# rows of very different lengths with a common prefix of nine tokens; one row is hardly longer than
# the prefix, and two are the same
_PREFIX = (3, 17, 5, 99, 23, 42, 8, 61, 77)
_ROWS = tuple(
    _Row(prompt_ids=_PREFIX, answer_ids=answer)
    for answer in (
        (11, 29, 31, 2, 54, 90, 13, 7, 66, 48, 19, 84, 35, 101, 2),
        (11, 2),
        (70, 6, 93, 28, 15, 2),
        (70, 6, 93, 28, 15, 2),
        (57, 57, 9, 110, 45, 38, 72, 20, 1, 64, 2),
    )
)


def find_layout(
    config: Any, *, cutoff_tokens: int, longest_answer: int = 0, rows_apart: bool = False
) -> LayoutRecord:
    """Return the best layout that a model of this configuration computes right.

    Args:
        config: the base's configuration, as transformers reads it.
        cutoff_tokens: tokens of the longest row.
        longest_answer: max tokens that the model generates after a row.
        rows_apart: every row is computed alone, so that no other row can change it.

    Raises:
        ConfigError: the result of a row of that length depends on the rows beside it.
        ModelError: in every layout, the model computes a row differently beside others.
    """
    _refuse_dynamic_rotary(config.get_text_config(), cutoff_tokens, longest_answer)
    try:
        with silence():
            model = small_model(config, cutoff_tokens)
            _alone(model, _ROWS[0])
    # a class that cannot be made small may raise anything: it is not checked, and `why` says so
    except Exception as error:
        why = f"a small {type(config).__name__} cannot be made ({first_line(error)})"
        return LayoutRecord(cpu="padded", cuda="padded", why=why)
    name = type(model).__name__
    with silence():
        wrong = _wrong_layouts(model)
    if "padded" in wrong and not rows_apart:
        if not _is_padded_right(config):
            raise ModelError(
                f"model.path: {name} computes a row differently beside others "
                f"({wrong['padded']}): it ignores attention masks; need "
                "training.micro_batch_size: 1 and evaluation.batch_size: 1"
            )
        name += ", where rows are longer than its window"
    right = [layout for layout in _CHECKED if layout not in wrong] or ["padded"]
    cpu, gpu = right[0], next(layout for layout in [*right, "padded"] if layout != "parts")
    if gpu == "mask" and _has_block_masks(model, config.get_text_config()):
        with silence():
            problem = _problem(model, "flex")
        if problem:
            wrong["flex"] = problem
        else:
            gpu = "flex"
    why = "; ".join(f"{layout}: {problem}" for layout, problem in wrong.items())
    return LayoutRecord.model_validate(
        {"cpu": cpu, "cuda": gpu, "why": f"{name}: {why}" if why else ""}
    )


def is_still_valid(recorded: LayoutRecord, best: LayoutRecord) -> bool:
    """Say whether the recorded layout passed the check that chose `best`."""
    if recorded.cuda == "flex" and best.cuda != "flex":
        return False  # `mask` may still pass
    return _rank(recorded.cpu) >= _rank(best.cpu) and _rank(recorded.cuda) >= _rank(best.cuda)


def set_layout(model: nn.Module, layout: str) -> None:
    """Set a model's attention for a layout; generation and padded rows keep their bits."""
    causal: Any = model
    if layout == "parts":
        causal.set_attn_implementation(PARTS_ATTENTION)
    elif layout == "flex":
        causal.set_attn_implementation("flex_attention")


def _rank(layout: str) -> int:
    """Return the place of a layout in the order of preference; `flex` counts as `mask`."""
    return _CHECKED.index("mask" if layout == "flex" else layout)


def _wrong_layouts(model: nn.Module) -> dict[str, str]:
    """Return the problems of the layouts before the first that is right on every device."""
    wrong: dict[str, str] = {}
    for layout in _CHECKED:
        if layout == "padded":
            # eager attention gives NaN for padding in float64: its softmax is in float32
            model.float()
        if problem := _problem(model, layout):
            wrong[layout] = problem
        elif layout != "parts":
            break
    return wrong


def _is_padded_right(config: Any) -> bool:
    """Say whether padded rows are right if windows keep their lengths."""
    with silence():
        return not _problem(small_model(config, cutoff_tokens=0).float(), "padded")


def _problem(model: nn.Module, layout: str) -> str:
    """Return how a layout differs from rows computed alone; empty if it does not."""
    causal: Any = model
    own = causal.config._attn_implementation
    # FlexAttention has no gradient on a CPU, and is compiled only on a GPU
    compute = _loss_only if layout == "flex" else _computed
    alone = compute(model, lambda: torch.stack([_alone(model, row) for row in _ROWS]).sum())
    set_layout(model, layout)
    try:
        difference = _difference(alone, compute(model, lambda: _together(model, layout)))
        return difference or (_cache_problem(model, layout, own) if layout in SHARED else "")
    # a class that does not support these inputs may raise anything: the layout is wrong for it
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        causal.set_attn_implementation(own)


def _alone(model: nn.Module, row: _Row) -> Tensor:
    """Return the loss of a row computed alone, summed over all tokens after its first."""
    text = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
    logits_TV = model(input_ids=text[:, :-1], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits_TV, text[0, 1:], reduction="sum")


def _together(model: nn.Module, layout: str) -> Tensor:
    if layout == "padded":
        batch = collate(_ROWS, loss_on="all", pad_token=0, device="cpu")
        return token_losses(model, batch).sum()
    return packed_losses(model, _packed(layout), layout)


def _packed(layout: str) -> Packed:
    prefix = len(_PREFIX) if layout in SHARED else 0
    return fitted(pack(_ROWS, range(len(_ROWS)), prefix, loss_on="all", device="cpu"), layout)


def _cache_problem(model: nn.Module, layout: str, own: str) -> str:
    """Return how a decoding step after the cache of shared rows differs; empty if it does not.

    Evaluation decodes so: each row gathers its keys from the cache of a packed pass, and the rows
    are aligned on the right for a step of one token each.
    """
    packed = _packed(layout)
    cache = DynamicCache()
    lengths = [length_of(row) for row in _ROWS]
    width = max(lengths)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        forward(model, packed, layout, kept=packed.kept_U, use_cache=True, past_key_values=cache)
        steps = DynamicCache()
        gaps_N1 = torch.tensor([[width - length] for length in lengths])
        keys_NW = torch.tensor(_keys(packed, width - 1))
        for number, layer in enumerate(cache.layers):
            keys, values = (x[0][:, keys_NW].transpose(0, 1) for x in (layer.keys, layer.values))
            steps.update(keys, values, number)
        if layout == "flex":  # FlexAttention needs many queries
            cast(Any, model).set_attn_implementation(own)
        together_NV = model(
            input_ids=torch.tensor([text_of(row)[-1:] for row in _ROWS]),
            attention_mask=(torch.arange(width) >= gaps_N1).long(),
            position_ids=width - 1 - gaps_N1,
            past_key_values=steps,
            use_cache=True,
        ).logits[:, -1]
        texts = [torch.tensor([text_of(row)]) for row in _ROWS]
        alone = [model(input_ids=text, use_cache=False).logits[0, -1] for text in texts]
    problem = _difference(alone, together_NV.unbind())
    return f"answers behind its cache: {problem}" if problem else ""


def _keys(packed: Packed, width: int) -> list[list[int]]:
    """Return the places of each row's keys in a packed sequence, after copies of its first."""
    padded = []
    parts = {part.row: part for part in packed.parts}
    for place in range(len(_ROWS)):
        part = parts[place]
        keys = [*range(part.prefix_start, part.prefix_stop), *range(part.start, part.stop)]
        padded.append(keys[:1] * (width - len(keys)) + keys)
    return padded


def _computed(model: nn.Module, loss: Callable[[], Tensor]) -> Sequence[Tensor]:
    """Return a loss and its gradient by all parameters, in one vector."""
    model.zero_grad()
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(gradients)


def _loss_only(_model: nn.Module, loss: Callable[[], Tensor]) -> Sequence[Tensor]:
    """Return a loss, computed without compilation."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return (loss(),)


def _difference(alone: Sequence[Tensor], together: Sequence[Tensor]) -> str:
    """Return the largest relative error, as text; empty if it is within the tolerance."""
    if [a.shape for a in alone] != [b.shape for b in together]:
        return "other parameters get gradients"
    errors = [(b - a).norm() / a.norm() for a, b in zip(alone, together, strict=True)]
    error = torch.stack(errors).max().item()  # NaN if one is
    return "" if error <= _TOLERANCES[alone[0].dtype] else f"relative error {error:.0e}"


def _refuse_dynamic_rotary(config: Any, cutoff_tokens: int, longest_answer: int) -> None:
    for rotary in rotaries(config):
        kind = rotary["rope_type"]
        if kind not in {"dynamic", "longrope"}:
            continue
        limit = rotary.get("original_max_position_embeddings") or config.max_position_embeddings
        if cutoff_tokens + longest_answer > limit:
            answers = f" and evaluation.max_new_tokens: {longest_answer}" if longest_answer else ""
            raise ConfigError(
                f"data.cutoff_tokens: got {cutoff_tokens}{answers}, but model.path has {kind} "
                f"rotary scaling: above {limit} tokens a row's result depends on the rows computed "
                f"beside it; need at most {limit}{' together' if answers else ''}"
            )


def _has_block_masks(model: nn.Module, config: Any) -> bool:
    """Say whether FlexAttention can compute this model's attention."""
    causal: Any = model
    heads = config.num_attention_heads
    head_dim = integer(config, "head_dim") or config.hidden_size // heads
    return (
        bool(getattr(causal, "_supports_flex_attn", False))
        and head_dim >= 16
        and head_dim.bit_count() == 1
        and not getattr(config, "attention_dropout", 0.0)
    )
