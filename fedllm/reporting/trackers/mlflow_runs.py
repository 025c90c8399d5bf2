"""MLflow: one run of experiment `fedllm`, at `MLFLOW_TRACKING_URI` or in the folder."""

import os
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fedllm.reporting.trackers.experiment import Experiment, Row, numbers_of

_TAG = "fedllm.run_id"
# of a parameter's value, by MLflow's own limits
_MOST_LETTERS, _MOST_PARAMETERS = 500, 100


def export_to_mlflow(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Log the metrics of rounds; the step is the round."""
    mlflow: Any = import_module("mlflow")
    entities: Any = import_module("mlflow.entities")
    experiment.folder.mkdir(parents=True, exist_ok=True)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{experiment.folder}/mlflow.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = _run_of(client, experiment, entities)
    now = int(1000 * time.time())
    for row in rows:
        metrics = [
            entities.Metric(name, value, now, row["round"]) for name, value in numbers_of(row)
        ]
        client.log_batch(run, metrics=metrics)


def _run_of(client: Any, experiment: Experiment, entities: Any) -> str:
    """Return MLflow's id of the run, which is created once."""
    found = client.get_experiment_by_name("fedllm")
    place = found.experiment_id if found else client.create_experiment("fedllm")
    runs = client.search_runs([place], f"tags.`{_TAG}` = '{experiment.run_id}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    tags = {_TAG: experiment.run_id, "mlflow.runName": experiment.name}
    run = str(client.create_run(place, tags=tags).info.run_id)
    parameters = [
        entities.Param(key, str(value)[:_MOST_LETTERS]) for key, value in experiment.keys.items()
    ]
    for start in range(0, len(parameters), _MOST_PARAMETERS):
        client.log_batch(run, params=parameters[start : start + _MOST_PARAMETERS])
    return run
