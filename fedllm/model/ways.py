"""The ways in which a model computes rows together, and the check that finds one it does right.

Rows share their common prefix where the model lets them: `parts` (its attention is called part by
part), `flex` (FlexAttention with block masks, on a GPU) or `mask` (one boolean mask of all tokens).
Else they are `packed`, one after the other without sharing, or `padded` to a rectangle.

Only a comparison tells what a model does: a class may drop a mask, or ignore positions, without a
word. So a small model of the same class and configuration, in float64, computes some rows every
way, and the first one that agrees with each row by itself is the way.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from fedllm.errors import ConfigError, ModelError
from fedllm.model.attention import PARTS_ATTENTION, SHARED, fitted
from fedllm.model.batches import collate, token_losses
from fedllm.model.losses import forward, packed_losses
from fedllm.model.packing import Packed, length_of, pack, text_of
from fedllm.storage.hub import first_line
from fedllm.storage.records import WayRecord

_CHECKED = ("parts", "mask", "packed", "padded")  # in the order of preference
# largest relative error; transformers computes norms and rotary angles in float32: 1e-8 is seen
_TOLERANCES: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-4}
_LAYERS = 8  # of classes that do not list their kinds of layers
_MOST_PARAMETERS = 1 << 23
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "keep_window_size",
    "index_topk",
)
_SMALL_WINDOW = 5
_SMALL: Mapping[str, int] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "rotary_dim": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "vocab_size": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class _Row:
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


# of very different length, with a common prefix of nine tokens; one row is little more than the
# prefix, and two are the same
_PREFIX = (3, 17, 5, 99, 23, 42, 8, 61, 77)
_ROWS = tuple(
    _Row(_PREFIX, answer)
    for answer in (
        (11, 29, 31, 2, 54, 90, 13, 7, 66, 48, 19, 84, 35, 101, 2),
        (11, 2),
        (70, 6, 93, 28, 15, 2),
        (70, 6, 93, 28, 15, 2),
        (57, 57, 9, 110, 45, 38, 72, 20, 1, 64, 2),
    )
)


def find_way(
    config: Any, *, cutoff_tokens: int, longest_answer: int = 0, rows_apart: bool = False
) -> WayRecord:
    """Return how a model of this configuration computes rows together.

    Args:
        config: of the base, as transformers reads it.
        cutoff_tokens: the longest row.
        longest_answer: tokens that the model itself writes behind a row, at most.
        rows_apart: no row is ever computed beside others, so that none can disturb it.

    Raises:
        ConfigError: rows of that length depend on what is computed beside them.
        ModelError: the model computes a row differently beside others, whichever way.
    """
    _refuse_dynamic_rotary(config.get_text_config(), cutoff_tokens, longest_answer)
    try:
        with _silence():
            model = _small_model(config, cutoff_tokens)
            _alone(model, _ROWS[0])
    # whatever a class raises that cannot be made small: it is not checked then, and this is said
    except Exception as error:
        why = f"a small {type(config).__name__} cannot be made ({first_line(error)})"
        return WayRecord(cpu="padded", cuda="padded", why=why)
    name = type(model).__name__
    with _silence():
        wrong = _wrong_ways(model)
    if "padded" in wrong and not rows_apart:
        if not _is_padded_right(config):
            raise ModelError(
                f"model.path: {name} computes a row differently beside others "
                f"({wrong['padded']}): it ignores attention masks; need "
                "training.micro_batch_size: 1 and evaluation.batch_size: 1"
            )
        name += ", where rows are longer than its window"
    right = [way for way in _CHECKED if way not in wrong] or ["padded"]
    cpu, gpu = right[0], next(way for way in [*right, "padded"] if way != "parts")
    if gpu == "mask" and _has_block_masks(model, config.get_text_config()):
        with _silence():
            problem = _problem(model, "flex")
        if problem:
            wrong["flex"] = problem
        else:
            gpu = "flex"
    why = "; ".join(f"{way}: {problem}" for way, problem in wrong.items())
    return WayRecord.model_validate(
        {"cpu": cpu, "cuda": gpu, "why": f"{name}: {why}" if why else ""}
    )


def still_right(recorded: WayRecord, found: WayRecord) -> bool:
    """Say whether a check that chose `found` found nothing wrong with `recorded`."""
    if recorded.cuda == "flex" and found.cuda != "flex":
        return False  # masks alone are still right
    return _rank(recorded.cpu) >= _rank(found.cpu) and _rank(recorded.cuda) >= _rank(found.cuda)


def set_way(model: nn.Module, way: str) -> None:
    """Make a model ready to compute rows in a way; generation and padded rows keep their bits."""
    causal: Any = model
    if way == "parts":
        causal.set_attn_implementation(PARTS_ATTENTION)
    elif way == "flex":
        causal.set_attn_implementation("flex_attention")


def _rank(way: str) -> int:
    """Return the place of a way in the order of preference; block masks are masks."""
    return _CHECKED.index("mask" if way == "flex" else way)


def _wrong_ways(model: nn.Module) -> dict[str, str]:
    """Return what is wrong with the ways before the first that serves every device."""
    wrong: dict[str, str] = {}
    for way in _CHECKED:
        if way == "padded":
            # eager attention gives NaN for padding in float64: its softmax is in float32
            model.float()
        if problem := _problem(model, way):
            wrong[way] = problem
        elif way != "parts":
            break
    return wrong


def _is_padded_right(config: Any) -> bool:
    """Say whether padded rows agree where windows keep their lengths."""
    with _silence():
        return not _problem(_small_model(config, cutoff_tokens=0).float(), "padded")


def _problem(model: nn.Module, way: str) -> str:
    """Say how a way differs from every row by itself, or nothing."""
    causal: Any = model
    own = causal.config._attn_implementation
    # FlexAttention has no gradient on a CPU, and is compiled on a GPU only
    compute = _loss_only if way == "flex" else _computed
    alone = compute(model, lambda: torch.stack([_alone(model, row) for row in _ROWS]).sum())
    set_way(model, way)
    try:
        found = _difference(alone, compute(model, lambda: _together(model, way)))
        return found or (_cache_problem(model, way, own) if way in SHARED else "")
    # a class that cannot take these inputs raises what it likes: then it is not this way
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        causal.set_attn_implementation(own)


def _alone(model: nn.Module, row: _Row) -> Tensor:
    """Return the loss of a row by itself, of all tokens after its first."""
    text = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
    logits_TV = model(input_ids=text[:, :-1], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits_TV, text[0, 1:], reduction="sum")


def _together(model: nn.Module, way: str) -> Tensor:
    if way == "padded":
        batch = collate(_ROWS, loss_on="all", pad_token=0, device="cpu")
        return token_losses(model, batch).sum()
    return packed_losses(model, _packed(way), way)


def _packed(way: str) -> Packed:
    prefix = len(_PREFIX) if way in SHARED else 0
    return fitted(pack(_ROWS, range(len(_ROWS)), prefix, loss_on="all", device="cpu"), way)


def _cache_problem(model: nn.Module, way: str, own: str) -> str:
    """Say how a step behind the keys and values of shared rows differs, or nothing.

    Evaluation answers so: each row gathers its keys from the cache of a packed pass, and the rows
    are aligned on the right for a step of a token each.
    """
    packed = _packed(way)
    cache = DynamicCache()
    lengths = [length_of(row) for row in _ROWS]
    width = max(lengths)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        forward(model, packed, way, kept=packed.kept_U, use_cache=True, past_key_values=cache)
        steps = DynamicCache()
        gaps_N1 = torch.tensor([[width - length] for length in lengths])
        keys_NW = torch.tensor(_keys(packed, width - 1))
        for number, layer in enumerate(cache.layers):
            keys, values = (x[0][:, keys_NW].transpose(0, 1) for x in (layer.keys, layer.values))
            steps.update(keys, values, number)
        if way == "flex":  # its blocks are for many queries
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
    """Return every row's own places in a packed sequence, behind copies of its first one."""
    found = []
    own = {part.row: part for part in packed.parts}
    for place in range(len(_ROWS)):
        part = own[place]
        keys = [*range(part.prefix_start, part.prefix_stop), *range(part.start, part.stop)]
        found.append(keys[:1] * (width - len(keys)) + keys)
    return found


@contextmanager
def _silence() -> Iterator[None]:
    """Keep to ourselves what transformers says of a model that no one trains."""
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        set_verbosity(verbosity)


def _computed(model: nn.Module, loss: Callable[[], Tensor]) -> Sequence[Tensor]:
    """Return a loss and, in one vector, its gradient by every parameter."""
    model.zero_grad()
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(gradients)


def _loss_only(_model: nn.Module, loss: Callable[[], Tensor]) -> Sequence[Tensor]:
    """Return a loss, without compiling what makes it."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return (loss(),)


def _difference(alone: Sequence[Tensor], together: Sequence[Tensor]) -> str:
    """Say how far apart any of these are, or nothing."""
    if [a.shape for a in alone] != [b.shape for b in together]:
        return "other parameters get gradients"
    errors = [(b - a).norm() / a.norm() for a, b in zip(alone, together, strict=True)]
    error = torch.stack(errors).max().item()  # NaN if one is
    return "" if error <= _TOLERANCES[alone[0].dtype] else f"relative error {error:.0e}"


def _small_model(config: Any, cutoff_tokens: int) -> nn.Module:
    """Return a small model in float64 that masks and places tokens as the configuration says.

    A window that is shorter than the longest row (0: none is) becomes shorter than those of the
    check.

    Raises:
        ValueError: it is still large; and what the class raises for sizes that do not fit it.
    """
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        _make_small(part, cutoff_tokens)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters remain")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # experts that are multiplied in one call have no float64
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.float64, experts_implementation="eager"
        )
        for parameter in model.parameters():
            # as wide as after training: with the small weights of a start, attention hardly
            # depends on positions, and a wrong one would not show
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model.double().eval()


def _make_small(config: Any, cutoff_tokens: int) -> None:
    heads, shared = (_integer(config, f"num_{n}_heads") for n in ("attention", "key_value"))
    layers = _integer(config, "num_hidden_layers")
    for name, size in _SMALL.items():
        derived = isinstance(getattr(type(config), name, None), property)
        if _integer(config, name) is not None and not derived:
            setattr(config, name, size)
    if heads and shared:
        config.num_key_value_heads = 4 // min(4, heads // shared)
    if layers:
        _keep_layers(config, layers)
    for name in _WINDOWS:
        if (window := _integer(config, name)) is not None and window < cutoff_tokens:
            setattr(config, name, _SMALL_WINDOW)
    _fit_rotaries(config)
    _fit_token_ids(config)


def _fit_token_ids(config: Any) -> None:
    """Give special tokens beyond the small vocabulary one that no row has; some classes need it."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        ids = found if isinstance(found, list) else [found]
        if any(token is not None and token >= _SMALL["vocab_size"] for token in ids):
            setattr(config, name, 0)


def _fit_rotaries(config: Any) -> None:
    """Shorten what is given per rotary frequency to the small heads."""
    for rotary in _rotaries(config):
        frequencies = int(_SMALL["head_dim"] * rotary.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if name in rotary:
                rotary[name] = rotary[name][:frequencies]


def _keep_layers(config: Any, layers: int) -> None:
    """Leave one layer of every kind, two at least; the first ones where no kinds are listed."""
    kinds = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == layers
    }
    described = list(zip(*kinds.values(), strict=True)) or [()] * layers
    firsts = sorted({described.index(kind) for kind in described})
    kept = firsts if len(firsts) > 1 else list(range(min(2 if kinds else _LAYERS, layers)))
    for name, value in kinds.items():
        setattr(config, name, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)


def _integer(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _rotaries(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters: one set, or one for every kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    yield from [found] if "rope_type" in found else [v for v in found.values() if v]


def _refuse_dynamic_rotary(config: Any, cutoff_tokens: int, longest_answer: int) -> None:
    for rotary in _rotaries(config):
        kind = rotary["rope_type"]
        if kind not in {"dynamic", "longrope"}:
            continue
        most = rotary.get("original_max_position_embeddings") or config.max_position_embeddings
        if cutoff_tokens + longest_answer > most:
            answers = f" and evaluation.max_new_tokens: {longest_answer}" if longest_answer else ""
            raise ConfigError(
                f"data.cutoff_tokens: got {cutoff_tokens}{answers}, but model.path has {kind} "
                f"rotary scaling: above {most} tokens a row's result depends on the rows computed "
                f"beside it; need at most {most}{' together' if answers else ''}"
            )


def _has_block_masks(model: nn.Module, config: Any) -> bool:
    """Say whether FlexAttention can compute this model's attention."""
    causal: Any = model
    heads = config.num_attention_heads
    head_dim = _integer(config, "head_dim") or config.hidden_size // heads
    return (
        bool(getattr(causal, "_supports_flex_attn", False))
        and head_dim >= 16
        and head_dim.bit_count() == 1
        and not getattr(config, "attention_dropout", 0.0)
    )
