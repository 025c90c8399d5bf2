"""What a run took until an evaluation reached a target: rounds, bytes, hours."""

from collections.abc import Callable
from dataclasses import dataclass

from fedllm.reporting.results.accounting import round_accounts
from fedllm.reporting.results.metrics import mean_scores
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import EvaluationRecord

# metric -> is more of it better
TARGETS = {"loss": False, "rouge_l": True, "exact_match": True}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run took from its first round to `round`, whose evaluation reached a target."""

    round: int
    value: float
    num_bytes: int
    num_bytes_16bit: int
    client_hours: float
    gpu_hours: float
    server_hours: float


def cost_to_target(
    paths: RunPaths, rounds: int, *, metric: str, target: float, group: str | None = None
) -> Cost | None:
    """Return what a run took until an evaluation reached a target; None if none did.

    Args:
        paths: the run.
        rounds: the rounds to look at.
        metric: `loss`, which has to fall to the target, or `rouge_l` or `exact_match`.
        target: its value, as the mean over clients as deployed.
        group: `train`, `dev` or `unseen`; None: all clients.
    """
    reached = _reached(target, TARGETS[metric])
    for number in range(rounds + 1):
        evaluation = EvaluationRecord.find(paths.round(number).evaluation_record)
        clients = evaluation.clients if evaluation else []
        mean = mean_scores(c.as_deployed for c in clients if group in {None, c.group})
        if mean and reached(getattr(mean, metric)):
            accounts = round_accounts(paths, number)
            return Cost(
                round=number,
                value=getattr(mean, metric),
                num_bytes=sum(each.bytes_up + each.bytes_down for each in accounts),
                num_bytes_16bit=sum(
                    each.bytes_up_16bit + each.bytes_down_16bit for each in accounts
                ),
                client_hours=sum(each.client_seconds for each in accounts) / 3600,
                gpu_hours=sum(each.gpu_seconds for each in accounts) / 3600,
                server_hours=sum(each.server_seconds for each in accounts) / 3600,
            )
    return None


def _reached(target: float, more_is_better: bool) -> Callable[[float], bool]:
    return lambda value: value >= target if more_is_better else value <= target
