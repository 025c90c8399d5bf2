"""The adapter of one client of a round, before anything was averaged."""

from collections.abc import Mapping
from pathlib import Path

from fedllm.adapters.peft_config import CONFIG
from fedllm.adapters.peft_writer import write_peft_adapter
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors
from fedllm.server.export import Exported, describe, open_state
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.outputs import filling_folder
from fedllm.storage.records import CollectedUpdate, CollectionRecord
from fedllm.storage.tensors import UpdateFile

_SHOWN = 8  # clients of an error


def export_client(run: RunPaths, round_number: int | None, client: str, out: Path) -> Exported:
    """Write the adapter that a client trained in a round, in PEFT's format.

    Args:
        run: the run; its updates of that round have to be there still.
        round_number: the round; None is the newest.
        client: its id.
        out: a new or empty folder.

    Raises:
        AdapterError: the round has no update of the client, it was removed or is damaged, or what
            clients of the method send is no whole adapter.
    """
    state = open_state(run, round_number)
    if state.method.per_client or state.method.changes_base:
        raise AdapterError(
            f"--client: what a client of method.name {state.config.method.name} sends is only a "
            "part of its adapter; leave out --client to export the state of the run"
        )
    paths = run.round(state.round)
    used = _used(CollectionRecord.find(paths.collection))
    if client not in used:
        shown = ", ".join(sorted(used)[:_SHOWN]) or "none"
        raise AdapterError(
            f"--client: {client} has no update in round {state.round}; its clients: {shown}"
        )
    path = paths.updates / used[client].file
    if not path.exists():
        raise AdapterError(
            f"--client: the updates of round {state.round} were removed; only those of the last "
            "aggregated round are kept"
        )
    file = UpdateFile(path, used[client].sha256)
    adapter = {module: _trained(file, client, module) for module in state.ranks}
    ranks = {module: factors.rank for module, factors in adapter.items()}
    with filling_folder(out, last=CONFIG) as folder:
        write_peft_adapter(folder, adapter, about=describe(state, ranks))
    return Exported(round=state.round, ranks=ranks, base_model=state.base_model)


def _used(collection: CollectionRecord | None) -> Mapping[str, CollectedUpdate]:
    return {update.client: update for update in collection.updates} if collection else {}


def _trained(file: UpdateFile, client: str, module: str) -> Factors:
    parts = {}
    for part in ("A", "B"):
        file.check(client, module, part)
        parts[part] = file.view(client, module, part).float()
    return Factors(a_RI=parts["A"], b_OR=parts["B"], scale=file.scale(client, module))
