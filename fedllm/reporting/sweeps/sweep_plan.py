"""The plan of a sweep: the hours of every arm, before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.reporting.plan.plan import Geometry
from fedllm.reporting.tables import number, text_table
from fedllm.storage.kept_records import duration


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """The runs of an arm, and the hours of all of them together.

    `hours` is the time that they take one after the other, evaluations included: at least, because
    generating text is slower than its operations.
    """

    arm: str
    phase: str
    runs: int
    rounds: int
    hours: float
    worker_hours: float
    cpu_hours: float
    gpu_hours: float


def arm_plan(arm: str, phase: str, runs: int, geometry: Geometry) -> ArmPlan:
    """Return the plan of an arm from that of one of its runs."""
    rounds = runs * geometry.rounds
    # the base is evaluated once for all runs that score the same rows
    evaluations = runs * max(0, geometry.evaluation.times - 1)
    minutes = rounds * geometry.round_minutes + evaluations * geometry.evaluation.seconds / 60
    return ArmPlan(
        arm=arm,
        phase=phase,
        runs=runs,
        rounds=geometry.rounds,
        hours=minutes / 60,
        worker_hours=rounds * geometry.worker_hours,
        cpu_hours=rounds * geometry.cpu_hours,
        gpu_hours=rounds * geometry.gpu_hours,
    )


def describe_sweep_plan(plans: Sequence[ArmPlan], *, one_by_one: bool) -> str:
    """Return the plan as text; with `one_by_one` the runs follow each other."""
    rows = [_row(f"{p.arm} ({p.phase})" if p.phase == "tuning" else p.arm, [p]) for p in plans]
    rows.append(_row("all", plans))
    header = ["arm", "runs", "rounds", "worker hours", "CPU hours", "GPU hours", "time"]
    hours = sum(plan.hours for plan in plans)
    end = (
        f"one run after the other: at least {duration(3600 * hours)}"
        if one_by_one
        else f"side by side under one throttle; one after the other: {duration(3600 * hours)}"
    )
    note = "estimated from model and data; hours are those of training"
    return "\n".join([text_table("hours of a sweep", header, rows), end, note])


def _row(name: str, plans: Sequence[ArmPlan]) -> list[str]:
    return [
        name,
        str(sum(plan.runs for plan in plans)),
        str(sum(plan.runs * plan.rounds for plan in plans)),
        *(
            number(sum(getattr(plan, key) for plan in plans), 2)
            for key in ("worker_hours", "cpu_hours", "gpu_hours")
        ),
        duration(3600 * sum(plan.hours for plan in plans)),
    ]
