"""The embedded base: a small Llama, pre-trained in about a minute on facts about words.

The number of steps is fixed, never the time: the same machine, versions and threads give the same
weights. Muon (https://kellerjordan.github.io/posts/muon) trains the matrices.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fedllm.embedded.embedded_text import build_tokenizer, document
from fedllm.model.saving import save_pretrained
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.kept_records import Count, uncounted
from fedllm.storage.paths import CachePaths
from fedllm.storage.publishing.folders import publishing_folder

Report = Callable[[str], None]
_SAMPLE_DOCUMENTS = 200


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of the embedded base, beside its text."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    intermediate: int = 384
    positions: int = 1024
    # rotates fast enough to separate neighbours in a prompt of a hundred tokens
    rope_theta: float = 100.0
    steps: int = 400
    rows: int = 18
    window: int = 96
    matrix_rate: float = 0.02
    other_rate: float = 8e-3
    warmup_steps: int = 20
    clip_norm: float = 1.0
    # one: two threads on one busy core wait for each other and are about fifty times slower
    threads: int = 1
    seed: int = 0


def embedded_base(
    cache: CachePaths,
    report: Report,
    recipe: Recipe | None = None,
    *,
    count: Count = uncounted,
) -> Path:
    """Return the folder of the embedded base; pre-train it if the cache has none."""
    recipe = recipe or Recipe()
    folder = cache.model(f"embedded-{_fingerprint(recipe)[:16]}")
    if not folder.is_dir():
        report("embedded base: pre-training it, about a minute, once")
        logging.disable_progress_bar()
        with publishing_folder(folder) as beside:
            tokenizer = build_tokenizer()
            save_pretrained(pretrain(recipe, tokenizer, count), tokenizer, beside)
    return folder


def pretrain(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, count: Count = uncounted
) -> LlamaForCausalLM:
    """Return the pre-trained base; on one machine it depends only on the recipe."""
    with _isolated(recipe):
        model = LlamaForCausalLM(_config(recipe, tokenizer))
        optimizers = _optimizers(model, recipe)
        schedules = [LambdaLR(o, lambda step: _rate_factor(step, recipe)) for o in optimizers]
        for step, (ids_NT, has_loss_NT) in enumerate(_batches(recipe, tokenizer)):
            loss = _loss(model, ids_NT, has_loss_NT)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad()
            count("steps of the embedded base", step + 1, recipe.steps)
    return model.eval()


def _fingerprint(recipe: Recipe) -> str:
    draw = random.Random(recipe.seed)
    sample = [document(draw) for _ in range(_SAMPLE_DOCUMENTS)]
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return fingerprint_values(dataclasses.asdict(recipe), sample, versions)


@contextmanager
def _isolated(recipe: Recipe) -> Iterator[None]:
    """Restore the process's number of threads and random state after the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(recipe.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` batches (rows, window + 1), and which tokens have a loss.

    A row begins with a whole document.
    """
    draw = random.Random(recipe.seed)
    for _ in range(recipe.steps):
        rows = [_row(draw, recipe, tokenizer) for _ in range(recipe.rows)]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([has for _, has in rows])


def _row(
    draw: random.Random, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    has_loss: list[bool] = []
    while len(ids) <= recipe.window:
        given, wanted = (tokenizer.backend_tokenizer.encode(text).ids for text in document(draw))
        ids += [*given, *wanted, tokenizer.eos_token_id]
        has_loss += [False] * len(given) + [True] * (len(wanted) + 1)
    return ids[: recipe.window + 1], has_loss[: recipe.window + 1]


def _loss(model: LlamaForCausalLM, ids_NT: Tensor, has_loss_NT: Tensor) -> Tensor:
    hidden_NTH = model.model(input_ids=ids_NT[:, :-1], use_cache=False).last_hidden_state
    kept_NT = has_loss_NT[:, 1:]
    logits_KV = model.lm_head(hidden_NTH[kept_NT])
    return nn.functional.cross_entropy(logits_KV, ids_NT[:, 1:][kept_NT])


def _rate_factor(step: int, recipe: Recipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * max(0.02, 1 - max(0, step - recipe.warmup_steps) / recipe.steps)


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for embeddings and norms."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in layers}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(layers, recipe.matrix_rate, weight_decay=0.0),
        torch.optim.AdamW(others, recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
