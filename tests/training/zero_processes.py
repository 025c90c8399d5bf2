"""Trains the cases of `test_zero.py` in several processes; see `trained_by`.

`zero_processes.py MODEL OUT [EARLIER]`, once for each process.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

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
    """A client's training: 7 rows in batches of 5, so that every second step has 2 rows."""

    rule: str
    dropout: float = 0.0
    layout: str = "parts"
    # at eps 1e-8 AdamW makes of rounding what it makes of gradients
    eps: float = 1e-4
    changes: Mapping[str, Any]
    trained: TrainedFactors = "AB"
    mu: float = 0.0
    frozen_rank: int = 0
    dtype: str = "float32"
    quantization: str = "none"

    @property
    def base(self) -> tuple[object, ...]:
        """What cases of one base have in common."""
        return self.layout, self.dropout, self.dtype, self.quantization

    def settings(self, **more: object) -> LocalSettings:
        section = {"batch_size": 5, "weight_decay": 0.01, **self.changes, **more}
        return LocalSettings(
            training=TrainingSection.model_validate(section),
            rule=replace(LOCAL_RULES[self.rule], eps=self.eps, mu=self.mu),
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
        base = load_base(
            model,
            dtype=self.dtype,
            device="cpu",
            to_divide=to_divide,
            quantization=self.quantization,
        )
        return AdapterSlots(base, target_modules=TARGETS, dropout=self.dropout, layout=self.layout)


LONG = {"max_steps": 50, "epochs": 50, "learning_rate": 0.01}
SHORT = {**LONG, "max_steps": 4}
CASES = {
    "SGD": Case(rule="fedavg", changes=LONG),
    "AdamW": Case(rule="fedit", changes=LONG),
    "AdamW as usual": Case(rule="fedit", eps=1e-8, changes=LONG),
    "small passes": Case(rule="fedavg", changes={**SHORT, "micro_batch_size": 1}),
    "all layers kept": Case(rule="fedit", changes={**SHORT, "gradient_checkpointing": False}),
    "bfloat16": Case(rule="fedit", changes={**SHORT, "precision": "bfloat16"}),
    "bfloat16 base": Case(rule="fedavg", dtype="bfloat16", changes=SHORT),
    "bfloat16 base and products": Case(
        rule="fedit", dtype="bfloat16", changes={**SHORT, "precision": "bfloat16"}
    ),
    "4 bits": Case(rule="fedavg", quantization="nf4", changes=SHORT),
    "dropout": Case(rule="fedavg", dropout=0.3, changes=SHORT),
    "dropout, padded": Case(rule="fedavg", dropout=0.3, layout="padded", changes=SHORT),
    "B beside frozen columns, drawn back": Case(
        rule="fedavg", trained="B", mu=0.3, frozen_rank=2, changes=SHORT
    ),
}
"""What is trained in every way."""

WHOLE = [name for name, case in CASES.items() if case.quantization == "none"]
BRIEF = [name for name in WHOLE if CASES[name].changes["max_steps"] < 50]
VARIANTS = [
    (processes, name, stage, offload)
    for processes, stage, offload, names in (
        (1, 1, "none", WHOLE),
        (1, 2, "none", BRIEF),
        (2, 1, "none", [*CASES]),
        (2, 2, "none", ["4 bits"]),
        (2, 2, "none", BRIEF),
        (2, 2, "cpu", BRIEF),
        (2, 3, "none", WHOLE),
        (4, 1, "none", BRIEF),
        (4, 2, "none", ["SGD", *BRIEF]),
        (4, 3, "none", ["AdamW", *BRIEF]),
    )
    for name in names
]


@contextmanager
def gradients(found: list[Tensor]) -> Iterator[None]:
    """Append the gradient of every optimizer step of the block, whole and flat."""

    def before(optimizer: Optimizer, *_: object) -> None:
        own = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        parts = [torch.cat(own).clone()]
        if dist.is_initialized() and dist.get_world_size() > 1:
            mine, parts = (
                parts[0],
                [torch.empty_like(parts[0]) for _ in range(dist.get_world_size())],
            )
            dist.all_gather(parts, mine)
        found.append(torch.cat(parts))

    hook = register_optimizer_step_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def optimizer_sizes(found: list[int]) -> Iterator[None]:
    """Append how many numbers the optimizer of this process keeps after each step."""

    def after(optimizer: Optimizer, *_: object) -> None:
        parts = (part for parts in optimizer.state.values() for part in parts.values())
        found.append(sum(part.numel() for part in parts if part is not None and part.ndim))

    hook = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        hook.remove()


def zero(case: Case, slots: AdapterSlots, processes: int, stage: int, offload: str) -> Zero:
    section = {"stage": stage, "offload": offload}
    # what a user gives comes to the same, with whatever stage and place
    keys = {"reduce_bucket_size": 500, "offload_optimizer": {"pin_memory": False}}
    if stage == 3:
        keys = {"stage3_max_reuse_distance": 10_000}
    given = {"zero_optimization": keys} if offload == "cpu" or stage == 3 else {}
    settings = case.settings(engine="zero", processes=processes, zero=section, deepspeed=given)
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


def train_all(model: Path, processes: int, earlier: Path | None) -> dict[object, object]:
    found: dict[object, object] = {}
    own = {name: CASES[name] for count, name, *_ in VARIANTS if count == processes}
    for base in dict.fromkeys(case.base for case in own.values()):
        cases = {name: case for name, case in own.items() if case.base == base}
        any_case = next(iter(cases.values()))
        whole = any_case.slots(model)
        is_divided = any_case.quantization == "none"
        divided = any_case.slots(model, to_divide=True) if is_divided else whole
        for name, case in cases.items():
            member = case.member(whole)
            for stage, offload in (v[2:] for v in VARIANTS if v[:2] == (processes, name)):
                slots = divided if stage == 3 else whole
                trainer = zero(case, slots, processes, stage, offload)
                steps: list[Tensor] = []
                with gradients(steps):
                    (result,) = trainer.train([member])
                found[name, stage, offload] = result
                found["gradients", name, stage, offload] = steps
    resume_all(found, model, processes, earlier)
    return found


RESUMED = replace(CASES["AdamW"], dropout=0.3, changes={**LONG, "max_steps": 6})


def resume_all(
    found: dict[object, object], model: Path, processes: int, earlier: Path | None
) -> None:
    slots = RESUMED.slots(model, to_divide=processes > 1)
    member = RESUMED.member(slots)
    trainer = zero(RESUMED, slots, processes, 3, "none")
    sizes: list[int] = []
    with optimizer_sizes(sizes):
        (found["undisturbed"],) = trainer.train([member])
    found["resumed"], found["progress"] = interrupted(trainer, member)
    if earlier is not None:
        progress = torch.load(earlier, weights_only=False)["progress"]
        (found["from others"],) = trainer.train([replace(member, progress=progress)])
    found["optimizer"] = sizes[-1]
    found["environment"] = dict(trainer.environment)
    weights = list(slots.model.parameters())
    found["whole"] = sum(weight.numel() for weight in weights)
    found["parts"] = sum(w.ds_tensor.numel() for w in weights if hasattr(w, "ds_tensor"))


def trained_by(
    processes: int, model: Path, out: Path, earlier: Path | None = None
) -> dict[Any, Any]:
    """Start the processes unless `out` is there; return what the first one found.

    `earlier` is what other processes found, whose client these go on with.
    """
    if not out.exists():
        arguments = [model, out, *([earlier] if earlier else [])]
        run_together("tests.training.zero_processes", arguments, processes=processes, log=out)
    found: dict[Any, Any] = torch.load(out, weights_only=False)
    return found


def main(model: Path, out: Path, earlier: Path | None = None) -> None:
    with joined() as (rank, processes):
        found = train_all(model, processes, earlier)
        if rank == 0:
            torch.save(found, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
