"""Trains the cases of `test_zero.py` in several processes; see `trained_by`.

`zero_processes.py MODEL OUT`, once for each process.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedllm.config.models import TrainingSection
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.methods.local_task import LocalTask, TrainedFactors
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings, TrainResult
from fedllm.training.progress import Progress
from fedllm.training.step_plan import Draws
from fedllm.training.trainer_protocol import Member, Snapshots
from fedllm.training.zero import Zero
from tests.training.processes import joined, run_together
from tests.training.test_loop import TARGETS, rows_of, start, with_frozen

STOP = 3


class Stop(Exception):
    """Enough."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A client's training: 7 rows in batches of 3, the last batch of an epoch has one row."""

    rule: str
    dropout: float = 0.0
    layout: str = "parts"
    changes: Mapping[str, Any]
    trained: TrainedFactors = "AB"
    mu: float = 0.0
    frozen_rank: int = 0

    def settings(self, **more: object) -> LocalSettings:
        section = {"batch_size": 3, "weight_decay": 0.01, **self.changes, **more}
        # at eps 1e-8 AdamW makes of rounding what it makes of gradients
        rule = replace(LOCAL_RULES[self.rule], eps=1e-4, mu=self.mu)
        return LocalSettings(
            training=TrainingSection.model_validate(section),
            rule=rule,
            task=LocalTask(trained=self.trained),
        )

    def member(self, slots: AdapterSlots) -> Member:
        draws = Draws(seed=0, round=1, client="one")
        # a divided base does not tell its shapes
        adapter = start(slots)
        if self.frozen_rank:
            adapter = with_frozen(adapter, self.frozen_rank)
        return Member(received=lambda: adapter, rows=rows_of(0), draws=draws)

    def slots(self, model: Path, *, to_divide: bool = False) -> AdapterSlots:
        base = load_base(model, dtype="float32", device="cpu", to_divide=to_divide)
        return AdapterSlots(base, target_modules=TARGETS, dropout=self.dropout, layout=self.layout)


LONG = {"max_steps": 50, "epochs": 20, "learning_rate": 0.01}
ONE = {"max_steps": 1, "learning_rate": 1.0, "clip_norm": None, "schedule": "constant"}
CASES = {
    "a gradient": Case(rule="fedavg", changes={**ONE, "weight_decay": 0.0}),
    "a gradient, small passes": Case(
        rule="fedavg", changes={**ONE, "weight_decay": 0.0, "micro_batch_size": 1}
    ),
    "SGD": Case(rule="fedavg", changes=LONG),
    "AdamW": Case(rule="fedit", changes=LONG),
    "SGD, dropout": Case(rule="fedavg", dropout=0.3, changes={**LONG, "max_steps": 10}),
    "SGD, dropout, padded": Case(
        rule="fedavg", dropout=0.3, layout="padded", changes={**LONG, "max_steps": 10}
    ),
    "SGD, B beside frozen columns, drawn back": Case(
        rule="fedavg", trained="B", mu=0.3, frozen_rank=2, changes={**LONG, "max_steps": 10}
    ),
}
"""What is trained in every way."""

VARIANTS = [
    (processes, name, stage, offload)
    for processes, stage, offload in (
        (1, 2, "none"),
        (2, 1, "none"),
        (2, 2, "none"),
        (2, 2, "cpu"),
        (2, 3, "none"),
    )
    for name in CASES
    # where the optimizer is changes nothing that a long training would show
    if offload == "none" or CASES[name].changes["max_steps"] <= 10
]


def zero(case: Case, slots: AdapterSlots, processes: int, stage: int, offload: str) -> Zero:
    section = {"stage": stage, "offload": offload}
    settings = case.settings(engine="zero", processes=processes, zero=section)
    return Zero(slots=slots, settings=settings)


def interrupted(trainer: Zero, member: Member) -> tuple[TrainResult, Progress]:
    """Stop before a step, go on from there; return the result and where it stopped."""
    left: list[Progress] = []

    def leave(step: int, snapshots: Snapshots) -> None:
        if step == STOP:
            (found,) = snapshots()
            left.append(copied(found))
            raise Stop

    try:
        trainer.train([member], before_step=leave)
    except Stop:
        trainer.let_go()
    (result,) = trainer.train([replace(member, progress=left[0])])
    return result, left[0]


def copied(progress: Progress) -> Progress:
    tensors = {name: tensor.clone() for name, tensor in progress.tensors.items()}
    return replace(progress, tensors=tensors)


def train_all(model: Path, processes: int) -> dict[object, object]:
    found: dict[object, object] = {}
    for layout, dropout in dict.fromkeys((c.layout, c.dropout) for c in CASES.values()):
        cases = {n: c for n, c in CASES.items() if (c.layout, c.dropout) == (layout, dropout)}
        any_case = next(iter(cases.values()))
        whole, divided = (any_case.slots(model, to_divide=divided) for divided in (False, True))
        for name, case in cases.items():
            member = case.member(whole)
            for stage, offload in (v[2:] for v in VARIANTS if v[:2] == (processes, name)):
                slots = divided if stage == 3 else whole
                trainer = zero(case, slots, processes, stage, offload)
                (result,) = trainer.train([member])
                found[name, stage, offload] = result
    case = replace(CASES["AdamW"], dropout=0.3, changes={**LONG, "max_steps": 6})
    slots = case.slots(model, to_divide=processes > 1)
    member = case.member(slots)
    trainer = zero(case, slots, processes, 3, "none")
    (found["undisturbed"],) = trainer.train([member])
    found["resumed"], found["progress"] = interrupted(trainer, member)
    found["environment"] = dict(trainer.environment)
    weights = list(slots.model.parameters())
    found["whole"] = sum(weight.numel() for weight in weights)
    found["parts"] = sum(w.ds_tensor.numel() for w in weights if hasattr(w, "ds_tensor"))
    return found


def trained_by(processes: int, model: Path, out: Path) -> dict[Any, Any]:
    """Start the processes; return what the first one found."""
    run_together("tests.training.zero_processes", (model, out), processes=processes, log=out)
    found: dict[Any, Any] = torch.load(out, weights_only=False)
    return found


def main(model: Path, out: Path) -> None:
    with joined() as (rank, processes):
        found = train_all(model, processes)
        if rank == 0:
            torch.save(found, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
