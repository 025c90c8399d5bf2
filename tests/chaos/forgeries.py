"""Update files that no worker sent."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from fedllm.storage.paths import encode_client, names_in
from fedllm.storage.records import CohortRecord
from fedllm.storage.tensors import publish_update
from fedllm.storage.trust.signatures import RoundKeys
from fedllm.storage.updates import PublishedUpdate, read_update
from tests.chaos.plan import Fault, Kind
from tests.chaos.trip import Handling, Trip, stopped_or_dead

if TYPE_CHECKING:
    from tests.chaos.campaign import Campaign

# of the header that such a file says it has; a header may have 100 MB
_OVERSIZED_BYTES = 200 * 10**6
_FORGER = hashlib.sha256(b"another secret").digest()


def plant(campaign: "Campaign", trip: Trip, fault: Fault) -> Handling:
    """Somebody puts an update file beside the true ones; the round sets it aside, or is over."""
    yield from stopped_or_dead(trip)
    if campaign.disk_is_full:
        # there is room once the coordinator has ended, and it may wait for this task
        trip.go_on()
    while campaign.disk_is_full:
        yield
    folder = campaign.paths.round(fault.round).updates
    place = folder / f"00-{fault.number:03d}-00.safetensors"
    campaign.planted.add(f"{fault.round:04d}/{place.name}")
    if fault.kind is Kind.OVERSIZED:
        _oversized(place)
        about = f"a header of {_OVERSIZED_BYTES} bytes"
    else:
        about = _untrue(campaign, fault, place)
    trip.go_on()
    while not campaign.paths.round(fault.round).collection.exists():
        yield
    is_aside = any(name.startswith(f"{place.name}.damaged-") for name in names_in(folder))
    return f"{place.name}, {about}: {'set aside' if is_aside else 'it came too late'}"


def _oversized(place: Path) -> None:
    head = _OVERSIZED_BYTES.to_bytes(8, "little")
    part = place.with_name(f".{place.name}.part")
    with part.open("wb") as file:
        file.write(head + json.dumps({"__metadata__": {}}).encode())
        # a hole: it takes no room
        file.truncate(len(head) + _OVERSIZED_BYTES)
    part.rename(place)


def _untrue(campaign: "Campaign", fault: Fault, place: Path) -> str:
    """Publish an update that is forged, replayed or inflated, with valid checksums."""
    cohort = CohortRecord.read(campaign.paths.round(fault.round).cohort)
    source, update = _earlier_update(campaign, fault.round, {c.id for c in cohort.clients})
    changes: dict[str, object] = {"round": fault.round}
    keys = RoundKeys.of(campaign.secret, cohort)
    if fault.kind is Kind.FORGED:
        keys = RoundKeys.of(_FORGER, cohort)
    elif fault.kind is Kind.REPLAYED:
        earlier = campaign.paths.round(int(source.parent.parent.name))
        keys = RoundKeys.of(campaign.secret, CohortRecord.read(earlier.cohort))
    else:
        changes |= {"rows": 10**12}
    record = update.record.model_copy(update=changes)
    sign = partial(keys.signatures, record.run_id, [record.client])
    publish_update(place, [record], {record.client: _tensors(source, record.client)}, sign=sign)
    return f"client {record.client}, made of {source.parent.parent.name}/{source.name}"


def _earlier_update(
    campaign: "Campaign", round_: int, clients: set[str]
) -> tuple[Path, PublishedUpdate]:
    """Return an update of an earlier round by one of these clients, and its file."""
    for path in sorted(campaign.kept.glob("*/updates/[0-9]*.safetensors"), reverse=True):
        earlier = int(path.parent.parent.name) < round_
        for update in read_update(path) if earlier else ():
            if update.record.client in clients and update.record.status == "ok":
                return path, update
    raise AssertionError("none of the clients sent an update before")


def _tensors(path: Path, client: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            owner, module, part = name.split("|")
            if owner == encode_client(client):
                pairs.setdefault(module, {})[part] = file.get_tensor(name)
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}
