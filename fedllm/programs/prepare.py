"""The prepare job: fetch the base, tokenise the data, index the clients. Later jobs run offline."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from fedllm.config.models import ClientsSection, Config, DataSection, HeldOutSection
from fedllm.config.yaml_text import decode_text
from fedllm.data.cache import IndexedClient, TokenizedClients, digests_of, unknown_client
from fedllm.data.chat import TEMPLATE_DATE
from fedllm.data.readers import open_source
from fedllm.data.tokenize import RowEncoder
from fedllm.data.writer import FORMAT, write_clients
from fedllm.errors import ConfigError, DataError, RunDirectoryError, counted
from fedllm.methods.catalog import method_of
from fedllm.methods.protocol import Method
from fedllm.model.base import BaseDescription, describe_base, load_tokenizer, locate_base
from fedllm.model.fingerprint import fingerprint_tokenizer
from fedllm.model.memory import give_back_freed
from fedllm.model.quantised import require_quantiser
from fedllm.model.vocabulary import check_rows, check_tokens, tokens_beyond
from fedllm.packing.attention import SHARED
from fedllm.packing.layout_check import find_layout, is_still_valid
from fedllm.planning.engines import engines_of
from fedllm.planning.federation import plan_federation, tier_ranks
from fedllm.planning.roles import split_roles
from fedllm.planning.tiers import resolve_ranks
from fedllm.process.log import say
from fedllm.process.run_method import method_of_run
from fedllm.programs.memory_trial import first_adapter, fit_ranks
from fedllm.scheduling.traits import cache_for
from fedllm.server.epsilon import require_accountant
from fedllm.server.starting_adapter import describe_start, refuse_ranks
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.frozen_config import frozen_config
from fedllm.storage.kept_records import Count, uncounted
from fedllm.storage.paths import CachePaths, RunPaths
from fedllm.storage.records import (
    ClientRecord,
    CohortRecord,
    FittedRecord,
    LayoutRecord,
    PreparedRecord,
)
from fedllm.training.trainers import require_installed

Report = Callable[[str], None]

_LINE_END = re.compile(r"\r\n|\r|\n")


def prepare_run(run: RunPaths, count: Count = uncounted) -> PreparedRecord:
    """Prepare what a run's configuration names and publish `prepared.json`.

    A run that has begun keeps its layout of rows.

    Raises:
        ConfigError: configuration, model, data and method do not fit together.
        RunDirectoryError: the installed libraries compute the run's layout wrongly.
    """
    config = frozen_config(run)
    first = CohortRecord.find(run.round(1).cohort)
    cache = cache_for(config, run.root)
    method = method_of_run(run, config)
    base, prepared = _describe(config, method, cache, say, count, begun=first is not None)
    layout = (
        _best_layout(config, base) if first is None else _begun_layout(first, config, base, run)
    )
    _check_engine(config, method, layout)
    prepared = prepared.model_copy(update={"layout": layout})
    prepared = _with_fitted_ranks(config, prepared, first)
    ranks = plan_federation(config, prepared).ranks
    _refuse_ranks(config, method, prepared, list(ranks.values()))
    prepared = _with_exchange(method, prepared, ranks)
    say(describe_layout(layout))
    prepared.publish(run.prepared)
    return prepared


def prepare(
    config: Config, cache: CachePaths, report: Report = say, count: Count = uncounted
) -> PreparedRecord:
    """Prepare base and data: bring them into the cache if they are not there, and describe them.

    The same configuration, data and cache give the same record, to the byte.

    Raises:
        ConfigError: the method cannot be made, or cannot work with the ranks of the tiers; rows
            are too long for the base, or for the token budget; or clients cannot train together on
            it.
        ModelError: the base is missing or unsuitable.
        DataError: the data are missing or not as described.
    """
    method = method_of(config)
    base, prepared = _describe(config, method, cache, report, count)
    layout = _best_layout(config, base)
    _check_engine(config, method, layout)
    prepared = _with_fitted_ranks(config, prepared.model_copy(update={"layout": layout}), None)
    ranks = tier_ranks(config, prepared)
    _refuse_ranks(config, method, prepared, list(ranks.values()))
    return _with_exchange(method, prepared, ranks)


def describe_layout(layout: LayoutRecord | None) -> str:
    """Return the layout of rows as a line of text, with the reason why there is no better one."""
    if layout is None:
        return "rows: padded, as in the rounds of this run so far"
    cpu, cuda = layout.cpu, layout.cuda
    names = cpu if cpu == cuda else f"{cpu} on a CPU, {cuda} on a GPU"
    prefix = "they share their common prefix" if {cpu, cuda} <= SHARED else ""
    reason = layout.why and f"not better, since {layout.why}"
    return f"rows: {'; '.join(filter(None, (names, prefix, reason)))}"


def _describe(
    config: Config,
    method: Method,
    cache: CachePaths,
    report: Report,
    count: Count,
    *,
    begun: bool = False,
) -> tuple[BaseDescription, PreparedRecord]:
    """Describe base and data; the record has no layout of rows yet."""
    path = locate_base(config.model, cache, report, count)
    notes: list[str] = []
    base = describe_base(path, config.lora.target_modules, say=notes.append, begun=begun)
    # what needs the base alone, before the data are tokenised
    if not config.clients.fitted_tiers:
        _refuse_mix(method, list(resolve_ranks(config, base.modules).values()))
    tokenizer, rows = load_tokenizer(path), base.embedded_tokens
    beyond = check_tokens(path, tokenizer, rows, begun=begun)
    folder = _tokenise(config, base.path, cache, report, count)
    data = TokenizedClients.open(folder)
    if tokens_beyond(tokenizer, rows):
        check_rows(path, tokenizer, rows, data.largest_token())
    notes += [beyond] if beyond else []
    for note in notes:
        report(note)
    clients = list(data.clients.values())
    candidates = held_out_candidates(config.clients, clients)
    records = [_record(client, data, client.id in candidates) for client in clients]
    notes += _require_rows(config, records, report)
    _check_budget(config, records)
    prepared = PreparedRecord(
        model_fingerprint=base.fingerprint,
        model_path=str(base.path),
        tokenizer_fingerprint=fingerprint_tokenizer(base.path),
        data_fingerprint=folder.name,
        data_path=str(folder),
        data_sha256=digests_of(folder),
        model_parameters=base.parameters,
        linear_parameters=base.linear_parameters,
        modules=base.modules,
        clients=records,
        notes=notes,
    )
    start = describe_start(config, base.path, prepared)
    return base, prepared.model_copy(update={"start": start})


def _require_rows(config: Config, records: Sequence[ClientRecord], report: Report) -> Sequence[str]:
    """Refuse data without a row to train; return a note if a single client trains.

    Raises:
        DataError: it names the column of the answers.
    """
    trainable = sum(record.train_rows > 0 for record in records)
    if not trainable:
        dropped = sum(record.dropped_rows for record in records)
        raise DataError(
            f"data.path: {config.data.path}: no row to train; "
            f"{counted(dropped, 'row')} without an answer; data.columns.output is "
            f"{config.data.columns.output!r}, name the column of the answers"
        )
    if trainable > 1:
        return ()
    note = "one client trains: its update is the new state, so nothing is federated"
    report(note)
    return (note,)


def _with_fitted_ranks(
    config: Config, prepared: PreparedRecord, first: CohortRecord | None
) -> PreparedRecord:
    """Return the record with the ranks that fit into memory; those of a run that has begun stay."""
    if not config.clients.fitted_tiers:
        return prepared
    if first is None:
        say("clients.ranks: fit: measuring the memory of a training")
        found = fit_ranks(config, prepared)
    else:
        kept = {tier: max(first.ranks[tier].values()) for tier in config.clients.fitted_tiers}
        found = {tier: FittedRecord(rank=rank) for tier, rank in kept.items()}
    for tier, record in found.items():
        say(f"tier {tier}: rank {record.rank}")
    return prepared.model_copy(update={"fitted": found})


def _with_exchange(
    method: Method, prepared: PreparedRecord, ranks: Mapping[str, Mapping[str, int]]
) -> PreparedRecord:
    """Return the record with what clients send in the first round, and keep after it."""
    prepared = prepared.model_copy(update={"sent": method.sent_factors(1)})
    if not method.keeps_at_clients:
        return prepared
    found = {}
    for tier, of_modules in ranks.items():
        kept = [
            method.kept(module=module, trained=first_adapter(method, module, record, rank))
            for module, rank in of_modules.items()
            for record in [prepared.modules[module]]
        ]
        found[tier] = sum(part.nbytes for parts in kept for part in parts.values())
    return prepared.model_copy(update={"kept_bytes": found})


def _refuse_ranks(
    config: Config,
    method: Method,
    prepared: PreparedRecord,
    ranks: Sequence[Mapping[str, int]],
) -> None:
    _refuse_mix(method, ranks)
    refuse_ranks(method, prepared, ranks, config.aggregation)


def _refuse_mix(method: Method, ranks: Sequence[Mapping[str, int]]) -> None:
    if refusal := method.refuse(ranks):
        raise ConfigError(refusal)


def _best_layout(config: Config, base: BaseDescription) -> LayoutRecord:
    return find_layout(
        base.config,
        cutoff_tokens=config.data.cutoff_tokens,
        longest_answer=config.evaluation.max_new_tokens,
        rows_apart=_rows_apart(config),
    )


def _begun_layout(
    first: CohortRecord, config: Config, base: BaseDescription, run: RunPaths
) -> LayoutRecord | None:
    """Return the layout with which the run's first round was trained.

    A run without a layout is not checked: a run that has begun cannot change the keys that the
    check's message names.

    Raises:
        RunDirectoryError: the installed libraries compute this layout wrongly.
    """
    layout = first.layout
    if layout is None:
        return None
    best = _best_layout(config, base)
    if not is_still_valid(layout, best):
        lost = "no FlexAttention" if layout.cuda == "flex" != best.cuda else ""
        why = "; ".join(filter(None, (best.why, lost)))
        raise RunDirectoryError(
            f"{run.root}: its rounds compute rows by {layout.cpu} ({layout.cuda} on a GPU), which "
            f"the installed transformers gets wrong ({why}); install the versions that "
            f"{run.run.name} names"
        )
    return layout


def _check_engine(config: Config, method: Method, layout: LayoutRecord | None) -> None:
    """Refuse an engine that is not installed, or cannot train with this layout of rows."""
    require_accountant(config)
    _check_quantisation(config, method)
    for engine in engines_of(config).values():
        require_installed(engine)
        if refusal := engine.refusal(layout):
            raise ConfigError(refusal)
        if engine.name == "zero" and method.local_task(1).trained == "C":
            raise ConfigError(
                f"training.engine: zero cannot train a core between B and A, which method.name "
                f"{method.name} asks for; need plain"
            )
        if engine.divides_base and method.changes_base:
            raise ConfigError(
                f"training.zero.stage: got 3, which divides the base, but method.name "
                f"{method.name} changes the base; need 1 or 2, or a method whose base stays"
            )


def _check_quantisation(config: Config, method: Method) -> None:
    """Refuse to quantise a base that changes or is divided, or without the package."""
    kind = config.model.quantization
    if kind == "none":
        return
    require_quantiser(kind)
    got = f"model.quantization: got {kind}"
    if method.changes_base:
        raise ConfigError(
            f"{got}, but method.name {config.method.name} changes the base, whose weights are then "
            "no longer those bits; need none, or a method whose base stays"
        )
    if any(engine.divides_base for engine in engines_of(config).values()):
        raise ConfigError(
            f"{got}, but training.zero.stage 3 divides the base weight by weight, not bits and "
            "their scales; need training.zero.stage: 1 or 2, or none"
        )


def _rows_apart(config: Config) -> bool:
    """Return whether every forward pass computes a single row."""
    training = config.training
    largest = min(training.micro_batch_size or training.batch_size, training.batch_size)
    return largest == config.evaluation.batch_size == 1


def _check_budget(config: Config, clients: Sequence[ClientRecord]) -> None:
    """Refuse a token budget that is too small for the longest row of a training client."""
    budget = config.training.micro_batch_tokens
    if budget is None:
        return
    train = set(split_roles(config.clients, clients).train)
    # the last token is a target only
    over = [c for c in clients if c.id in train and c.longest_row - 1 > budget]
    if over:
        client = max(over, key=lambda client: client.longest_row)
        need = client.longest_row - 1
        raise ConfigError(
            f"training.micro_batch_tokens: got {budget}, a training row of client {client.id} has "
            f"{client.longest_row} tokens and computes {need} (its last one is a target only); "
            f"need at least {need}, or data.cutoff_tokens: {budget + 1}"
        )


def row_encoder(section: DataSection, tokenizer: Any) -> RowEncoder:
    """Return the encoder that a configuration describes."""
    return RowEncoder(tokenizer, template=section.template, cutoff_tokens=section.cutoff_tokens)


def held_out_candidates(section: ClientsSection, clients: Sequence[IndexedClient]) -> set[str]:
    """Return the ids of the clients that may become dev or unseen.

    Raises:
        DataError: `clients.held_out_from` names a client, a file or a column that is not there.
    """
    chosen = section.held_out_from
    if isinstance(chosen, HeldOutSection):
        return _candidates_by_column(chosen, clients)
    if chosen == "all":
        return {client.id for client in clients}
    known = [client.id for client in clients]
    if isinstance(chosen, str):
        chosen = _read_ids(Path(chosen).expanduser(), set(known))
    for client in chosen:
        if client not in set(known):
            raise DataError(f"clients.held_out_from: {unknown_client(client, known)}")
    return set(chosen)


def _tokenise(config: Config, base: Path, cache: CachePaths, report: Report, count: Count) -> Path:
    source = open_source(config.data, cache, config.clients.split_seed)
    key = fingerprint_values(
        FORMAT,
        source.fingerprint,
        config.data.template,
        config.data.cutoff_tokens,
        TEMPLATE_DATE.isoformat(),
        fingerprint_tokenizer(base),
    )
    folder = cache.data(key)
    if not folder.is_dir():
        encoder = row_encoder(config.data, load_tokenizer(base))
        write_clients(folder, source.read(), encoder, count, sources=source.files)
        give_back_freed()  # the same process may train next
    for note in source.notes:
        report(note)
    return folder


def _record(client: IndexedClient, data: TokenizedClients, candidate: bool) -> ClientRecord:
    return ClientRecord(
        id=client.id,
        category=client.category,
        held_out_candidate=candidate,
        train_rows=client.num_rows("train"),
        test_rows=client.num_rows("test"),
        dropped_rows=client.dropped_rows,
        truncated_rows=client.cut_prompts + client.cut_answers,
        cut_answers=client.cut_answers,
        train_tokens=client.train_tokens,
        longest_row=data.longest_row(client.id, "train"),
    )


def _candidates_by_column(chosen: HeldOutSection, clients: Sequence[IndexedClient]) -> set[str]:
    for client in clients:
        if chosen.column not in client.integers:
            usable = set.intersection(*(set(c.integers) for c in clients))
            raise DataError(
                f"clients.held_out_from.column: `{chosen.column}` is no integer column with one "
                f"value for client {client.id}; such columns: {', '.join(sorted(usable)) or 'none'}"
            )
    return {c.id for c in clients if c.integers[chosen.column] % chosen.modulo == chosen.equals}


def _read_ids(file: Path, known: Set[str]) -> tuple[str, ...]:
    """Return the ids of a file, one per line, without blanks around them unless the id has them."""
    if not file.is_file():
        raise DataError(
            f"clients.held_out_from: {file}: no such file; give all, a list of client ids, a file "
            "with one id per line, or {column, modulo, equals}"
        )
    try:
        text = decode_text(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"clients.held_out_from: {file}: cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise DataError(f"clients.held_out_from: {file}: is no text ({error})") from error
    # not `splitlines`: an id may contain a character that Unicode takes for the end of a line
    lines = (line for line in _LINE_END.split(text) if line.strip())
    return tuple(line if line in known else line.strip() for line in lines)
