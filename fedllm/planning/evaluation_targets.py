"""Evaluation targets: the clients and rows that are scored after a round, cut into pieces."""

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedllm.config.models import Config, EvaluationSection, SbatchOptions, SchedulerSection
from fedllm.planning.bundles import cut_in_order
from fedllm.planning.capacity import Capacity, TaskSize
from fedllm.planning.classes import asks_for_gpus, job_options
from fedllm.planning.engines import engines_of, job_size
from fedllm.planning.federation import TERAFLOPS, Federation
from fedllm.planning.roles import GROUPS, split_roles
from fedllm.planning.seeding import seed_of
from fedllm.planning.tiers import assign_tiers
from fedllm.storage.records import BundleRecord, ClientRecord, Group, PreparedRecord

T = TypeVar("T")
# passes and steps are full but at the end of a piece, which has so many batches of rows
_BATCHES_PER_PIECE = 16
_TERA = 1e12
# every row is scored at its client's ranks and at the largest
_TIMES = 2


@dataclass(frozen=True, kw_only=True)
class Target:
    """Client to score; `rows` are indices into its test split."""

    client: str
    group: Group
    tier: str
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationPiece:
    """Clients of equal ranks that one process scores; `number` is its place in the evaluation.

    What is computed together depends on the piece alone, never on how many tasks share them.
    """

    number: int
    targets: tuple[Target, ...]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(len(target.rows) for target in self.targets)


def is_evaluated(section: EvaluationSection, round_number: int, rounds: int) -> bool:
    """Return whether a round is evaluated: round 0, every `evaluation.every`-th and the last."""
    if not section.every:
        return False
    return round_number % section.every == 0 or round_number == rounds


def is_complete(section: EvaluationSection, round_number: int, rounds: int) -> bool:
    """Return whether all clients and rows are scored: in the last round, and in round 0."""
    return section.complete_at_end and round_number in {0, rounds}


def choose_targets(config: Config, prepared: PreparedRecord, round_number: int) -> list[Target]:
    """Choose the targets of a round's evaluation.

    At most `evaluation.clients` of each group are scored, on at most `evaluation.rows_per_client`
    rows each. These subsets depend on `clients.split_seed` and are the same in every round.
    """
    section = config.evaluation
    complete = is_complete(section, round_number, config.rounds)
    by_id = {client.id: client for client in prepared.clients}
    tiers = assign_tiers(config.clients, config.seed, list(by_id))
    roles = split_roles(config.clients, prepared.clients)
    groups: Mapping[Group, tuple[str, ...]] = {name: getattr(roles, name) for name in GROUPS}
    seed = config.clients.split_seed
    targets: list[Target] = []
    for group, ids in groups.items():
        scored = [id_ for id_ in ids if by_id[id_].test_rows]
        limit = None if complete else section.clients
        for id_ in _subset(scored, limit, seed_of("evaluation", seed, group)):
            rows = _rows(by_id[id_], None if complete else section.rows_per_client, seed)
            targets.append(Target(client=id_, group=group, tier=tiers[id_], rows=rows))
    return targets


def _rows(client: ClientRecord, limit: int | None, seed: int) -> tuple[int, ...]:
    return tuple(_subset(range(client.test_rows), limit, seed_of("rows", seed, client.id)))


def _subset(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    if limit is None or limit >= len(items):
        return list(items)
    kept = random.Random(seed).sample(range(len(items)), limit)
    return [items[index] for index in sorted(kept)]


def pieces_to_score(
    federation: Federation, *, state_round: int, targets_round: int, rank: int | None = None
) -> list[EvaluationPiece]:
    """Return the pieces of an evaluation, each of clients that one adapter serves, or none.

    Args:
        federation: clients, tiers and ranks.
        state_round: the round of the state that is scored.
        targets_round: the round whose clients and rows are scored.
        rank: the rank of all clients; None: each client's own.
    """
    config = federation.config
    targets = choose_targets(config, federation.prepared, targets_round)
    serves_all = rank is not None or scores_base(config, state_round)
    ranks = None if serves_all else federation.ranks
    return cut_pieces(targets, ranks, config.evaluation.batch_size)


def last_pieces(federation: Federation) -> list[EvaluationPiece]:
    """Return the pieces of a run's last evaluation, its largest; none without evaluations."""
    rounds = federation.config.rounds
    if not is_evaluated(federation.config.evaluation, rounds, rounds):
        return []
    return pieces_to_score(federation, state_round=rounds, targets_round=rounds)


def scores_base(config: Config, state_round: int) -> bool:
    """Return whether a state is the untouched base: B is zero, so every rank scores the same."""
    return state_round == 0 and not config.model.adapter


def cut_pieces(
    targets: Sequence[Target], ranks: Mapping[str, Mapping[str, int]] | None, batch_size: int
) -> list[EvaluationPiece]:
    """Cut an evaluation into pieces of about 16 batches of rows; a client is never cut.

    Args:
        targets: what is scored.
        ranks: tier -> module -> rank: a piece has clients of equal ranks; None: all may share one.
        batch_size: the rows that are scored at once.
    """
    groups: list[tuple[Mapping[str, int] | None, list[Target]]] = []
    for target in targets:
        own = None if ranks is None else ranks[target.tier]
        same = next((of_group for other, of_group in groups if other == own), None)
        if same is None:
            groups.append((own, [target]))
        else:
            same.append(target)
    most = _BATCHES_PER_PIECE * batch_size
    cuts = [
        cut
        for _, of_group in groups
        for cut in cut_in_order(of_group, lambda target: len(target.rows), most)
    ]
    return [EvaluationPiece(number=number, targets=tuple(cut)) for number, cut in enumerate(cuts)]


def bundles_of(pieces: Sequence[EvaluationPiece]) -> list[BundleRecord]:
    """Return the pieces as bundles that tasks claim; their cost is a number of rows."""
    return [
        BundleRecord(
            number=piece.number,
            worker_class="evaluate",
            clients=[target.client for target in piece.targets],
            cost=piece.rows,
        )
        for piece in pieces
    ]


def scoring_seconds(config: Config, prepared: PreparedRecord, targets: Sequence[Target]) -> float:
    """Estimate how long one process scores targets, by operations: generating text is slower."""
    by_id = {client.id: client for client in prepared.clients}
    tokens = 0.0
    for target in targets:
        client = by_id[target.client]
        row_tokens = client.train_tokens / client.train_rows if client.train_rows else 0.0
        tokens += len(target.rows) * (row_tokens + config.evaluation.max_new_tokens)
    gpus = asks_for_gpus(job_options(config.scheduler.sbatch, "evaluate"))
    speed = _TERA * (config.scheduler.worker_teraflops or TERAFLOPS[gpus])
    return _TIMES * tokens * 2.0 * prepared.model_parameters / speed


def scorers_of(
    federation: Federation,
    pieces: Sequence[EvaluationPiece],
    capacity: Callable[[SbatchOptions, TaskSize], Capacity],
) -> int:
    """Return how many tasks score the pieces of an evaluation that are left.

    Processes that divide the base score all pieces together, one after the other.
    """
    config = federation.config
    size = job_size("evaluate", engines_of(config))
    if size.processes > 1:
        return 1
    targets = [target for piece in pieces for target in piece.targets]
    return num_scorers(
        len(pieces),
        scoring_seconds(config, federation.prepared, targets),
        capacity(job_options(config.scheduler.sbatch, "evaluate"), size),
        config.scheduler,
    )


def shared_seconds(federation: Federation, pieces: Sequence[EvaluationPiece], tasks: int) -> float:
    """Estimate how long tasks that claim piece after piece score, without their start."""
    free_at = [0.0] * tasks
    for piece in pieces:
        seconds = scoring_seconds(federation.config, federation.prepared, piece.targets)
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)


def num_scorers(pieces: int, seconds: float, room: Capacity, section: SchedulerSection) -> int:
    """Return how many tasks score the pieces of an evaluation.

    Args:
        pieces: how many are left.
        seconds: what one process would need for them.
        room: the tasks that the scheduler can take.
        section: `scheduler` of the configuration.
    """
    most = max(1, min(pieces, room.max_parallel, room.largest_array))
    if room.resident:
        return most
    by_target = math.ceil(seconds / (60.0 * section.target_minutes))
    by_min_work = int(seconds / (60.0 * section.worker_minutes_min))
    return max(1, min(most, max(by_target, min(room.free_slots, by_min_work))))
