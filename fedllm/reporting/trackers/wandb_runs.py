"""Weights & Biases: one run of project `fedllm`; `WANDB_MODE=offline` keeps it in the folder."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fedllm.reporting.trackers.experiment import Experiment, Row, numbers_of


def export_to_wandb(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Log the metrics of rounds; the step is the round."""
    wandb: Any = import_module("wandb")
    experiment.folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="fedllm",
        id=experiment.run_id,
        name=experiment.name,
        config=dict(experiment.keys),
        dir=str(experiment.folder),
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off"),
    )
    for row in rows:
        run.log(dict(numbers_of(row)), step=row["round"])
    run.finish()
