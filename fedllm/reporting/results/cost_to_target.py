"""What a run took until an evaluation reached a target: rounds, bytes, hours."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedllm.errors import UserError
from fedllm.planning.roles import GROUPS
from fedllm.reporting.results.accounting import round_accounts
from fedllm.reporting.results.metrics import mean_scores
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import EvaluationRecord

# metric -> is more of it better
TARGETS = {"loss": False, "rouge_l": True, "exact_match": True}


@dataclass(frozen=True, kw_only=True)
class ScoreTarget:
    """A mean over clients as deployed that an evaluation has to reach.

    `loss` has to fall to `value`, `rouge_l` and `exact_match` to rise to it. `group` are the
    clients; None: all of them.
    """

    metric: str
    value: float
    group: str | None = None


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


def target_of(text: str) -> ScoreTarget:
    """Return the target that `loss=2.5` or `unseen.rouge_l=0.3` names.

    Raises:
        UserError: there is no such metric or group, or no number.
    """
    name, _, number = text.partition("=")
    group, _, metric = name.rpartition(".")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if metric not in TARGETS or group not in {"", *GROUPS} or not math.isfinite(value):
        raise UserError(
            f"--target {text}: need METRIC=NUMBER or GROUP.METRIC=NUMBER, with METRIC one of "
            f"{', '.join(TARGETS)} and GROUP one of {', '.join(GROUPS)}"
        )
    return ScoreTarget(group=group or None, metric=metric, value=value)


def cost_to_target(paths: RunPaths, rounds: int, target: ScoreTarget) -> Cost | None:
    """Return what the first `rounds` rounds took until one reached a target; None if none did."""
    reached = _reached(target.value, TARGETS[target.metric])
    for number in range(rounds + 1):
        evaluation = EvaluationRecord.find(paths.round(number).evaluation_record)
        clients = evaluation.clients if evaluation else []
        mean = mean_scores(c.as_deployed for c in clients if target.group in {None, c.group})
        if mean and reached(getattr(mean, target.metric)):
            accounts = round_accounts(paths, number)
            return Cost(
                round=number,
                value=getattr(mean, target.metric),
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
