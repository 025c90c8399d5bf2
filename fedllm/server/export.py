"""Export of a server state for other programs: in PEFT's format, or merged into a model."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedllm.adapters.peft_config import CONFIG
from fedllm.adapters.peft_files import dtype_of
from fedllm.adapters.peft_writer import PeftDescription, write_peft_adapter
from fedllm.config.models import Config
from fedllm.config.target_modules import is_target
from fedllm.errors import AdapterError, ModelError, RunDirectoryError
from fedllm.lora.factors import base_delta_of, delta
from fedllm.methods.protocol import Method
from fedllm.planning.roles import split_roles
from fedllm.process.run_method import method_of_run
from fedllm.process.server_state import read_state
from fedllm.process.state_adapters import adapter_of
from fedllm.reporting.method_words import method_words
from fedllm.server.model_card import CARD, CardFacts, model_card
from fedllm.storage.frozen_config import frozen_config
from fedllm.storage.hub import hub_key
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.outputs import filling_folder
from fedllm.storage.records import AggregateRecord, EvaluationRecord, PreparedRecord
from fedllm.storage.tensors import TensorFile

_MODEL_CONFIG = "config.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The opened server state of a round, which its method reads module by module."""

    round: int
    config: Config
    prepared: PreparedRecord
    method: Method
    file: TensorFile
    ranks: Mapping[str, int]
    base_scores: EvaluationRecord | None = None
    scores: EvaluationRecord | None = None

    @property
    def base_model(self) -> str:
        """The base model's name for PEFT: a hub name, or the folder."""
        path, section = self.prepared.model_path, self.config.model
        # from another working directory a relative folder looks like a hub name
        fetched = Path(path).name == hub_key(section.path, section.revision)
        return section.path if fetched else path


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported adapter: its round, the rank of every module, and the base."""

    round: int
    ranks: Mapping[str, int]
    base_model: str


@dataclass(frozen=True, kw_only=True)
class Merged(Exported):
    """An exported model: its number format, and how much of the change rounding left."""

    dtype: str
    survived: float
    unchanged_share: float


def newest_state(run: RunPaths) -> int:
    """Return the number of the newest aggregated round; 0 is the state before training.

    Raises:
        RunDirectoryError: no round is aggregated yet.
    """
    newest = run.newest_state()
    if newest is None:
        raise RunDirectoryError(f"{run.root}: no round is aggregated yet; resume the run")
    return newest.number


def open_state(run: RunPaths, round_number: int | None) -> ServerState:
    """Open a round's server state; None is the newest.

    Raises:
        RunDirectoryError: it is missing, pruned or damaged.
    """
    number = newest_state(run) if round_number is None else round_number
    paths = run.round(number)
    file = read_state(paths)
    config = frozen_config(run)
    return ServerState(
        round=number,
        config=config,
        prepared=PreparedRecord.read(run.prepared),
        method=method_of_run(run, config),
        file=file,
        ranks=AggregateRecord.read(paths.aggregate_record).rank,
        base_scores=EvaluationRecord.find(run.round(0).evaluation_record) if number else None,
        scores=EvaluationRecord.find(paths.evaluation_record),
    )


def export_adapter(state: ServerState, out: Path, *, rank: int | None = None) -> Exported:
    """Write a state's adapter in PEFT's format, with the tokenizer and a model card.

    Args:
        state: an opened server state.
        out: a new or empty folder.
        rank: the maximum rank of any module; None is all that the state holds.

    Raises:
        AdapterError: the state does not hold this rank, or the method changes the base.
    """
    ranks = _ranks(state, rank)
    if any(state.method.base_delta(state.file.module(module)) is not None for module in ranks):
        raise AdapterError(
            f"{state.config.method.name} changes the base too, which an adapter cannot hold; "
            "use --merge"
        )
    with filling_folder(out, last=CONFIG) as folder:
        adapter = adapter_of(state.method, state.file, ranks)
        write_peft_adapter(folder, adapter, about=describe(state, ranks))
        _copy_tokenizer(Path(state.prepared.model_path), folder)
        _write_card(state, folder, ranks, merged=False)
    return Exported(round=state.round, ranks=ranks, base_model=state.base_model)


def describe(state: ServerState, ranks: Mapping[str, int]) -> PeftDescription:
    """Return what PEFT's configuration says of an adapter of these modules."""
    return PeftDescription(
        base_model=state.base_model,
        revision=state.config.model.revision,
        targets={"target_modules": _target_modules(state.config, list(ranks))},
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(state.prepared.modules[module].transposed for module in ranks),
        dropout=state.config.lora.dropout,
    )


def export_model(
    state: ServerState, out: Path, *, rank: int | None = None, dtype: str | None = None
) -> Merged:
    """Write the base with a state's adapter merged into it, its tokenizer and a model card.

    Args:
        state: an opened server state.
        out: a new or empty folder.
        rank: the maximum rank of any module; None is all that the state holds.
        dtype: the number format of the weights, one of `DTYPES`; None is that of the run's base.

    Raises:
        AdapterError: the state does not hold this rank, or `dtype` is unknown.
        ModelError: the base is missing or another one, or a weight does not fit.
    """
    # transformers takes seconds to import: an adapter is written without it
    from fedllm.adapters.merging import Rounding, merge, narrow, plain_lines_in_a_log, save_model
    from fedllm.model.base import load_base
    from fedllm.model.quantised import dequantise

    plain_lines_in_a_log()
    ranks = _ranks(state, rank)
    name = dtype or state.config.model.dtype
    stored = dtype_of(name)
    path = Path(state.prepared.model_path)
    rounding = Rounding()
    with filling_folder(out, last=_MODEL_CONFIG) as folder:
        section = state.config.model
        base = load_base(path, dtype=section.dtype, device="cpu", quantization=section.quantization)
        if base.fingerprint != state.prepared.model_fingerprint:
            raise ModelError(f"{path}: not the model that the run trained on; restore it")
        # the adapter was trained beside the weights that the bits stand for
        dequantise(base.model)
        for module, change in _changes(state, ranks):
            rounding += merge(base.model, module, change, dtype=stored)
        narrow(base.model, stored)
        save_model(base, folder)
        _write_card(state, folder, ranks, merged=True)
    return Merged(
        round=state.round,
        ranks=ranks,
        base_model=state.base_model,
        dtype=name,
        survived=rounding.survived,
        unchanged_share=rounding.unchanged_share,
    )


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _write_card(
    state: ServerState, folder: Path, ranks: Mapping[str, int], *, merged: bool
) -> None:
    train = set(split_roles(state.config.clients, state.prepared.clients).train)
    trainable = [client for client in state.prepared.clients if client.id in train]
    facts = CardFacts(
        base_model=state.base_model,
        method=method_words(state.config),
        round=state.round,
        ranks=ranks,
        clients=len(trainable),
        rows=sum(client.train_rows for client in trainable),
        merged=merged,
        base=state.base_scores,
        scores=state.scores,
    )
    (folder / CARD).write_text(model_card(facts), encoding="utf-8")


def _ranks(state: ServerState, requested: int | None) -> dict[str, int]:
    if state.method.keeps_at_clients:
        raise AdapterError(
            f"{state.config.method.name}: every client keeps a part of its adapter, there is none "
            "for all to export; use a method without a client state"
        )
    largest = max(state.ranks.values())
    if requested is not None and not 1 <= requested <= largest:
        raise AdapterError(f"--rank: got {requested}, the state holds ranks 1 to {largest}")
    return {module: min(rank, requested or rank) for module, rank in state.ranks.items()}


def _target_modules(config: Config, modules: Sequence[str]) -> list[str]:
    """Return the configured names that match a module; the modules' own names if they miss one.

    A configured expression gives the modules' own names: only PEFT reads expressions.
    """
    targets = config.lora.target_modules
    if isinstance(targets, str):
        return list(modules)
    names = [name for name in targets if any(is_target((name,), module) for module in modules)]
    covered = all(is_target(names, module) for module in modules)
    return names if covered else list(modules)


def _changes(state: ServerState, ranks: Mapping[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    for module, rank in ranks.items():
        parts = state.file.module(module)
        factors = state.method.module_adapter(module=module, state=parts, rank=rank)
        change = delta(factors)
        of_base = state.method.base_delta(parts)
        if of_base is not None:
            change += base_delta_of(of_base)
        yield module, change
