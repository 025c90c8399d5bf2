"""Prepare: fetch the base, tokenise the data, index the clients; everything later runs offline."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedllm.config.loading import read_config
from fedllm.config.models import ClientsSection, Config, DataSection, HeldOutSection
from fedllm.data.cache import IndexedClient, TokenizedClients, unknown_client
from fedllm.data.readers import open_source
from fedllm.data.tokenize import RowEncoder
from fedllm.data.writer import FORMAT, write_clients
from fedllm.errors import ConfigError, DataError
from fedllm.model.base import describe_base, load_tokenizer, locate_base
from fedllm.model.fingerprint import fingerprint_tokenizer
from fedllm.planning.federation import plan_federation
from fedllm.steps.aggregate import method_of
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.paths import CachePaths, RunPaths, cache_of
from fedllm.storage.records import ClientRecord, PreparedRecord

Report = Callable[[str], None]


def say(line: str) -> None:
    """Tell progress where a log keeps it."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def prepare_run(run: RunPaths) -> PreparedRecord:
    """Prepare what a run's configuration names and publish `prepared.json`.

    Raises:
        ConfigError: configuration, model, data and method do not fit together.
    """
    config = read_config(run.config)
    prepared = prepare(config, cache_of(config.storage.cache, run.root))
    federation = plan_federation(config, prepared)
    refusal = method_of(config).refuse(list(federation.ranks.values()))
    if refusal:
        raise ConfigError(refusal)
    prepared.publish(run.prepared)
    return prepared


def prepare(config: Config, cache: CachePaths, report: Report = say) -> PreparedRecord:
    """Bring base and data into the cache, where they are not yet, and describe them.

    The same configuration, data and cache give the same record, to the byte.

    Raises:
        ModelError: the base is missing or unsuitable.
        DataError: the data are missing or not as described.
    """
    base = describe_base(locate_base(config.model, cache, report), config.lora.target_modules)
    folder = _tokenised(config, base.path, cache, report)
    data = TokenizedClients.open(folder)
    clients = list(data.clients.values())
    candidates = held_out_candidates(config.clients, clients)
    return PreparedRecord(
        model_fingerprint=base.fingerprint,
        model_path=str(base.path),
        data_fingerprint=folder.name,
        data_path=str(folder),
        model_parameters=base.parameters,
        modules=base.modules,
        clients=[_record(client, data, client.id in candidates) for client in clients],
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
        return _by_column(chosen, clients)
    if chosen == "all":
        return {client.id for client in clients}
    named = _listed(Path(chosen).expanduser()) if isinstance(chosen, str) else list(chosen)
    known = [client.id for client in clients]
    for client in named:
        if client not in set(known):
            raise DataError(f"clients.held_out_from: {unknown_client(client, known)}")
    return set(named)


def _tokenised(config: Config, base: Path, cache: CachePaths, report: Report) -> Path:
    source = open_source(config.data, cache, config.clients.split_seed)
    key = fingerprint_values(
        FORMAT,
        source.fingerprint,
        config.data.template,
        config.data.cutoff_tokens,
        fingerprint_tokenizer(base),
    )
    folder = cache.data(key)
    if not folder.is_dir():
        encoder = row_encoder(config.data, load_tokenizer(base))
        write_clients(folder, source.read(), encoder, report)
    return folder


def _record(client: IndexedClient, data: TokenizedClients, candidate: bool) -> ClientRecord:
    return ClientRecord(
        id=client.id,
        category=client.category,
        held_out_candidate=candidate,
        train_rows=client.num_rows("train"),
        validation_rows=client.num_rows("validation"),
        test_rows=client.num_rows("test"),
        dropped_rows=client.dropped_rows,
        truncated_rows=client.cut_prompts + client.cut_answers,
        cut_answers=client.cut_answers,
        train_tokens=client.train_tokens,
        longest_row=data.longest_row(client.id, "train"),
    )


def _by_column(chosen: HeldOutSection, clients: Sequence[IndexedClient]) -> set[str]:
    for client in clients:
        if chosen.column not in client.integers:
            usable = set.intersection(*(set(c.integers) for c in clients))
            raise DataError(
                f"clients.held_out_from.column: `{chosen.column}` is no integer column with one "
                f"value for client {client.id}; such columns: {', '.join(sorted(usable)) or 'none'}"
            )
    return {c.id for c in clients if c.integers[chosen.column] % chosen.modulo == chosen.equals}


def _listed(file: Path) -> list[str]:
    if not file.is_file():
        raise DataError(
            f"clients.held_out_from: {file}: no such file; give all, a list of client ids, a file "
            "with one id per line, or {column, modulo, equals}"
        )
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
