"""Blocks of the cohort that are folded before the aggregation, and found again by it.

A file per block holds what it comes to and says what that follows from: its members' updates by
checksum, and a fingerprint of everything else. The aggregation takes what it would have made
itself, bit for bit, and folds all other blocks anew.

Legend: G modules, O out, I in, R stacked rank of a block, C clients.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce

import torch
from pydantic import ValidationError

from fedllm.aggregation.decomposition import Partial
from fedllm.aggregation.devices import is_fast_at_bfloat16
from fedllm.aggregation.groups import Group
from fedllm.aggregation.routes import route_for
from fedllm.config.loading import result_fingerprint
from fedllm.config.models import Config
from fedllm.errors import AdapterError
from fedllm.lora.factors import Block
from fedllm.methods.protocol import Method
from fedllm.steps.collected import CollectedUpdates
from fedllm.steps.engine import Kept, folded
from fedllm.steps.feeding import Portion, Source
from fedllm.steps.log import say
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.paths import RoundPaths
from fedllm.storage.records import (
    CohortRecord,
    CollectedUpdate,
    CollectionRecord,
    FoldMember,
    FoldRecord,
)
from fedllm.storage.tensors import CheckedFile, Planned, writing_checked
from fedllm.storage.trials import installed
from fedllm.storage.updates import Origin, UpdateScanner
from fedllm.training.environment import processor


@dataclass(frozen=True, kw_only=True)
class Folding:
    """What a block comes to follows from this, beside the updates of its clients.

    Attributes:
        paths: the round.
        config: of the run.
        cohort: of the round.
        method: folds.
        groups: of all modules.
        devices: groups are dealt to them in turn.
    """

    paths: RoundPaths
    config: Config
    cohort: CohortRecord
    method: Method
    groups: Sequence[Group]
    devices: Sequence[torch.device]

    @cached_property
    def made_with(self) -> str:
        """A fingerprint: two that agree fold the same updates to the same bits."""
        kinds = [_kind(device) for device in self.devices]
        groups = [
            (group.modules, asdict(group.problem), route_for(group.problem), group.clients)
            for group in self.groups
        ]
        return fingerprint_values(
            result_fingerprint(self.config),
            self.method.name,
            groups,
            kinds[:1] if len(set(kinds)) == 1 else kinds,
            torch.__version__,
            dict(installed()).get("fedllm"),
        )

    def record(self, block: int, updates: Iterable[CollectedUpdate]) -> FoldRecord:
        """Return what the file of a block says that was folded from some updates."""
        members = [
            FoldMember(client=u.client, file=u.file, sha256=u.sha256, weight=u.weight)
            for u in updates
        ]
        return FoldRecord(
            round=self.paths.number, block=block, members=members, made_with=self.made_with
        )

    def places(self, block: int) -> tuple[int, ...]:
        """Return the places in the cohort of a block's clients."""
        size = self.config.aggregation.block_clients
        return tuple(range(len(self.cohort.clients)))[block * size : (block + 1) * size]


def fold_blocks(folding: Folding, blocks: Sequence[int], run_id: str) -> list[int]:
    """Fold those of some blocks of which all updates are there; return which.

    Raises:
        AdapterError: a block could not be folded; the others were.
    """
    scanner = UpdateScanner(round=folding.paths, origin=Origin.of(run_id, folding.cohort))
    published = scanner.scan().published
    failed: AdapterError | None = None
    done: list[int] = []
    for block in blocks:
        found = [published.get(folding.cohort.clients[p].id) for p in folding.places(block)]
        updates = [
            CollectedUpdate(
                client=update.record.client,
                tier="",
                attempt=update.record.attempt,
                file=update.file,
                sha256=update.sha256,
                weight=float(update.record.rows),
            )
            for update in found
            if update is not None and update.record.status != "failed"
        ]
        if folding.paths.collection.exists() or not updates or len(updates) < len(found):
            continue
        try:
            if _fold_block(folding, block, updates):
                done.append(block)
        except AdapterError as error:
            say(f"block {block}: {error}")
            failed = failed or error
    if failed:
        raise failed
    return done


def _fold_block(folding: Folding, block: int, updates: Sequence[CollectedUpdate]) -> bool:
    """Fold a block where it comes to less than it was; say whether it does."""
    provisional = CollectionRecord(round=folding.paths.number, lease=0, updates=list(updates))
    weights = folding.method.weigh([update.weight for update in updates])
    source = CollectedUpdates.open(folding.paths, provisional, folding.cohort, weights)
    places = folding.places(block)
    worth: dict[str, dict[str, Planned]] = {}
    for group in folding.groups:
        planned = _planned(folding.method, source, Portion(group=group, clients=places))
        if planned:
            worth[group.modules[0]] = planned
    if not worth:
        return False
    whole = {_name(m, part): plan for m, parts in worth.items() for part, plan in parts.items()}
    record = folding.record(block, updates)
    path = folding.paths.fold(block)
    with writing_checked(path, record.model_dump_json(), whole) as writer:
        for first, part, tensor in _folded(folding, source, places, worth):
            writer.write(_name(first, part), tensor)
    return True


def _folded(
    folding: Folding, source: Source, places: tuple[int, ...], worth: Mapping[str, object]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield the parts of what a block comes to, group by group."""
    count = len(folding.devices)
    for number, device in enumerate(folding.devices):
        groups = [g for g in folding.groups[number::count] if g.modules[0] in worth]
        portions = [Portion(group=group, clients=places) for group in groups]
        partials = folded(folding.method, source, portions, device)
        for group, partial in zip(groups, partials, strict=True):
            for part, tensor in partial.items():
                yield group.modules[0], part, tensor


def _planned(method: Method, source: Source, portion: Portion) -> dict[str, Planned]:
    """Return the parts that a group's block comes to; none where it is no less than it was."""
    group = portion.group
    tensors = [
        tensor
        for module in group.modules
        for client, rank in zip(portion.clients, portion.ranks, strict=True)
        if rank
        for tensor in source.factors(client, module)
    ]
    num_modules, rank = len(group.modules), sum(portion.ranks)
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    # shapes alone, without arithmetic
    block = Block(
        a_GRI=torch.empty(num_modules, rank, group.problem.in_, dtype=dtype, device="meta"),
        b_GOR=torch.empty(num_modules, group.problem.out, rank, dtype=dtype, device="meta"),
        ranks=portion.ranks,
        scales_GC=torch.ones(num_modules, len(portion.ranks), dtype=torch.float64),
        weights_GC=torch.ones(num_modules, len(portion.ranks), dtype=torch.float64),
    )
    parts = method.fold(block, group.problem)
    planned = {part: Planned.of(tensor) for part, tensor in parts.items()}
    is_less = sum(map(_num_bytes, planned.values())) < sum(tensor.nbytes for tensor in tensors)
    return planned if is_less else {}


@dataclass(frozen=True, kw_only=True)
class Ahead(Kept):
    """The blocks of a collection that were folded before."""

    files: Mapping[int, CheckedFile]
    block_clients: int

    @classmethod
    def open(cls, folding: Folding, updates: Mapping[int, CollectedUpdate]) -> "Ahead":
        """Open what was folded of exactly these updates, which are known by place in the cohort."""
        size = folding.config.aggregation.block_clients
        files: dict[int, CheckedFile] = {}
        for block in sorted({place // size for place in updates}):
            mine = [updates[place] for place in folding.places(block) if place in updates]
            path = folding.paths.fold(block)
            try:
                file = CheckedFile(path)
                found = FoldRecord.model_validate_json(file.header.records)
            except FileNotFoundError:
                continue
            except (DamagedUpdateError, ValidationError, OSError) as error:
                say(f"{path}: cannot be read ({error}); block {block} is folded again")
                continue
            if found == folding.record(block, mine):
                files[block] = file
            else:
                say(f"{path}: not of these updates and settings; block {block} is folded again")
        return cls(files=files, block_clients=size)

    def has(self, group: Group, clients: tuple[int, ...]) -> bool:
        """Say whether a file says that it holds what a group's block comes to."""
        return bool(self._names(group, clients))

    def take(self, group: Group, clients: tuple[int, ...]) -> Partial | None:
        """Return what a group's block comes to, or None where the file was altered."""
        file = self.files[clients[0] // self.block_clients]
        names = self._names(group, clients)
        try:
            for name in names.values():
                file.check(name)
        except DamagedUpdateError as error:
            say(f"{file.path}: {error}; folded again")
            return None
        # a copy lies as it would have been made: products may round by where their factors begin
        return {part: file.view(name).clone() for part, name in names.items()}

    def _names(self, group: Group, clients: tuple[int, ...]) -> dict[str, str]:
        """Return the names of a group's parts."""
        file = self.files.get(clients[0] // self.block_clients)
        prefix = _name(group.modules[0], "")
        names = file.header.layout if file else ()
        return {n.removeprefix(prefix): n for n in names if n.startswith(prefix)}


def _name(first_module: str, part: str) -> str:
    return f"{first_module}|{part}"


def _num_bytes(planned: Planned) -> int:
    return math.prod(planned.shape) * planned.dtype.itemsize


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    fast = "fast" if is_fast_at_bfloat16(device) else "slow"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {capability}, {fast} at bfloat16"
