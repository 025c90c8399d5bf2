"""The scores of clients' test rows, computed by one process or by several that divide the base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fedllm.config.models import Config
from fedllm.data.cache import TokenizedClients
from fedllm.evaluation.answers import Scored, ignore_scored
from fedllm.evaluation.lockstep import lockstep
from fedllm.evaluation.scores import RowScores, mean_scores, score_rows
from fedllm.packing.precision import precision
from fedllm.packing.sequences import length_of
from fedllm.packing.slots import AdapterSlots
from fedllm.planning.evaluation_targets import Target
from fedllm.process.session import Session
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.records import Scores
from fedllm.training.shares import divide_rows
from fedllm.worker.process_group import connected

Keep = Callable[[Target, Sequence[RowScores]], None]


def keep_nothing(target: Target, scores: Sequence[RowScores]) -> None:
    """Keep no answers."""


@contextmanager
def scoring_task(session: Session, identity: TaskIdentity | None, config: Config) -> Iterator[None]:
    """Connect the processes of a task that score together; None: this one alone."""
    if identity is None:
        yield
        return
    with connected(identity, wait_minutes=config.scheduler.hung_minutes):
        try:
            yield
        finally:
            session.end_task()


def all_agree(slots: AdapterSlots, yes: bool) -> bool:
    """Return whether a question is answered so by all processes that divide the base, together."""
    if not slots.is_divided:
        return yes
    answers = torch.tensor([int(yes)])
    dist.all_reduce(answers, op=dist.ReduceOp.MIN)
    return bool(answers.item())


def score_targets(
    slots: AdapterSlots,
    data: TokenizedClients,
    targets: Sequence[Target],
    config: Config,
    keep: Keep = keep_nothing,
    scored: Scored = ignore_scored,
) -> dict[str, Scores]:
    """Return the scores of every target's rows with the installed adapter.

    Forward passes use `training.precision`, as in training. `keep` is called with every target,
    `scored` with the number of further rows: pass by pass, or
    once by processes that divide the base.
    Processes that divide the base divide the targets too; all of them return all scores.
    """
    places = list(range(len(targets)))
    if slots.is_divided:
        scores = _score_together(slots, data, targets, config, scored)
    else:
        scores = _score(slots, data, targets, config, places, scored)
    for place, target in enumerate(targets):
        keep(target, scores[place])
    return {target.client: mean_scores(scores[place]) for place, target in enumerate(targets)}


def _score_together(
    slots: AdapterSlots,
    data: TokenizedClients,
    targets: Sequence[Target],
    config: Config,
    scored: Scored,
) -> Mapping[int, Sequence[RowScores]]:
    tokens = [
        sum(map(length_of, (data.rows(target.client, "test")[index] for index in target.rows)))
        for target in targets
    ]
    places = divide_rows(tokens, dist.get_world_size())[dist.get_rank()]
    with lockstep(slots):
        own = _score(slots, data, targets, config, places, ignore_scored)
    parts: list[Mapping[int, Sequence[RowScores]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    scored(sum(len(rows) for part in parts for rows in part.values()))
    return {place: rows for part in parts for place, rows in part.items()}


def _score(
    slots: AdapterSlots,
    data: TokenizedClients,
    targets: Sequence[Target],
    config: Config,
    places: Sequence[int],
    scored: Scored,
) -> Mapping[int, Sequence[RowScores]]:
    """Return the scores of the rows of some targets, by the place of the target."""
    if not places:
        return {}
    clients = []
    for place in places:
        test = data.rows(targets[place].client, "test")
        clients.append([test[index] for index in targets[place].rows])
    with precision(config.training.precision, slots.device):
        scores = score_rows(slots, clients, config.evaluation, data.answer_form, scored)
    return dict(zip(places, scores, strict=True))
