"""What a run has spent up to each evaluated round, and quality at equal spending."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedllm.config.models import Config
from fedllm.config.sweep_files import endpoint_parts
from fedllm.storage.kept_records import ClientsRecord
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import EvaluationRecord, RoundRecord


@dataclass(frozen=True, kw_only=True)
class SpentRound:
    """An evaluated round: the primary endpoint, and what was spent from the start until then.

    Attributes:
        round: its number; 0 is the untouched base, for which nothing was spent.
        value: mean of the primary endpoint over clients.
        num_bytes: sent and received by clients, as stored.
        gpu_seconds: of the tasks that trained; 0 without GPUs.
        client_seconds: in which clients trained.
        parameters: trainable parameters of all clients of all rounds.
        client_rounds: clients that trained, over all rounds.
        is_known: whether all its rounds recorded their clients; earlier versions did not.
    """

    round: int
    value: float
    num_bytes: float = 0.0
    gpu_seconds: float = 0.0
    client_seconds: float = 0.0
    parameters: float = 0.0
    client_rounds: int = 0
    is_known: bool = True


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A quantity that arms spend, with its unit, and how a round tells it."""

    unit: str
    of: Callable[[SpentRound], float]


BYTES = Budget(unit="MiB", of=lambda r: r.num_bytes / 2**20)
GPU_SECONDS = Budget(unit="GPU-seconds", of=lambda r: r.gpu_seconds)
CLIENT_SECONDS = Budget(unit="client-seconds", of=lambda r: r.client_seconds)
PARAMETERS = Budget(unit="M parameters", of=lambda r: r.parameters / 1e6)


def spent_rounds(paths: RunPaths, config: Config, endpoint: str) -> tuple[SpentRound, ...]:
    """Return the evaluated rounds of a run, oldest first."""
    group, metric = endpoint_parts(endpoint)
    spent = SpentRound(round=0, value=0.0)
    rounds = []
    for number in range(config.rounds + 1):
        round_paths = paths.round(number)
        if number:
            spent = _after(spent, round_paths)
        evaluation = EvaluationRecord.find(round_paths.evaluation_record)
        clients = evaluation.clients if evaluation else []
        scores = [float(getattr(c.as_deployed, metric)) for c in clients if c.group == group]
        if scores:
            rounds.append(replace(spent, round=number, value=sum(scores) / len(scores)))
    return tuple(rounds)


def _after(spent: SpentRound, paths: RoundPaths) -> SpentRound:
    """Return what was spent after one more round."""
    trained, record = ClientsRecord.find(paths.clients), RoundRecord.find(paths.record)
    if trained is None or record is None:
        return replace(spent, is_known=False)
    clients = trained.clients
    return replace(
        spent,
        num_bytes=spent.num_bytes + sum(c.bytes_up + c.bytes_down for c in clients),
        gpu_seconds=spent.gpu_seconds + record.gpu_seconds,
        client_seconds=spent.client_seconds + sum(c.seconds for c in clients),
        parameters=spent.parameters + sum(c.trainable or c.values_down for c in clients),
        client_rounds=spent.client_rounds + len(clients),
    )


def budgets_of(runs: Sequence[Sequence[SpentRound]]) -> tuple[Budget, ...]:
    """Return the budgets that all runs recorded; seconds of clients where a run had no GPU."""
    if not all(rounds and rounds[-1].is_known for rounds in runs):
        return ()
    has_gpus = all(rounds[-1].gpu_seconds > 0 for rounds in runs)
    return (BYTES, GPU_SECONDS if has_gpus else CLIENT_SECONDS, PARAMETERS)


def common_amount(arms: Sequence[Sequence[Sequence[SpentRound]]], budget: Budget) -> float:
    """Return what the arm that spends least has spent in all, as the mean over its seeds."""
    return min(statistics.fmean(budget.of(rounds[-1]) for rounds in runs) for runs in arms)


def value_within(
    runs: Sequence[Sequence[SpentRound]], budget: Budget, amount: float
) -> float | None:
    """Return the mean over seeds of the last round evaluated within a budget.

    Half a round of slack is given, since seeds draw other clients. None: no such round.
    """
    values = []
    for rounds in runs:
        trained = [r for r in rounds if r.round]
        slack = budget.of(trained[0]) / trained[0].round / 2 if trained else 0.0
        within = [r for r in rounds if budget.of(r) <= amount + slack]
        if not within:
            return None
        values.append(within[-1].value)
    return statistics.fmean(values)


def parameters_per_client(runs: Sequence[Sequence[SpentRound]]) -> float:
    """Return the mean number of trainable parameters of a client in a round."""
    last = [rounds[-1] for rounds in runs]
    clients = sum(r.client_rounds for r in last)
    return sum(r.parameters for r in last) / clients if clients else 0.0
