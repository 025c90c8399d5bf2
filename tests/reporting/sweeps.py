"""Sweeps of one round, made of real records."""

from pathlib import Path

from fedllm.storage.paths import SweepPaths
from fedllm.storage.records import RoundRecord
from fedllm.storage.sweep_records import SweepRecord, SweepRunRecord
from tests.planning.federations import client, config_of, prepared_of
from tests.reporting.runs import CLIENTS, aggregated, begin, evaluation


def sweep_of(root: Path, losses: dict[str, list[float | None]]) -> SweepPaths:
    """Make a sweep of one round: arm -> loss at the end by seed; None: the run has only begun."""
    paths = SweepPaths(root=root)
    runs = []
    for arm, of_arm in losses.items():
        for seed, loss in enumerate(of_arm):
            name = f"runs/{arm}/seed-{seed}"
            run = begin(paths.run(name).root, rounds=1, seed=seed)
            config = config_of(rounds=1, seed=seed).model_dump(mode="json")
            runs.append(SweepRunRecord(name=name, arm=arm, phase="run", config=config))
            if loss is None:
                continue
            prepared_of([client(id_, category=id_) for id_ in CLIENTS]).publish(run.prepared)
            for number, value in ((0, 9.0), (1, loss)):
                here = run.round(number)
                aggregated(number).publish(here.aggregate_record)
                scores = {id_: value + n / 10 for n, id_ in enumerate(CLIENTS)}
                evaluation(number, scores).publish(here.evaluation_record)
                done = RoundRecord(round=number, lease=1, state_sha256="", clients=4)
                done.publish(here.record)
    comparison = {"endpoint": "train_loss", "contrast": list(losses)[:2]}
    SweepRecord(runs=runs, comparison=comparison).publish(paths.record)
    return paths
