"""TensorBoard: an event file per call, in the folder of the run; `tensorboard --logdir runs`."""

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fedllm.reporting.trackers.experiment import Experiment, Row, numbers_of


def export_to_tensorboard(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Write the metrics of rounds as scalars; the step is the round."""
    writers: Any = import_module("tensorboard.summary.writer.event_file_writer")
    events: Any = import_module("tensorboard.compat.proto.event_pb2")
    summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")
    writer = writers.EventFileWriter(str(experiment.folder))
    try:
        for row in rows:
            values = [
                summaries.Summary.Value(tag=name, simple_value=value)
                for name, value in numbers_of(row)
            ]
            writer.add_event(
                events.Event(
                    wall_time=time.time(),
                    step=row["round"],
                    summary=summaries.Summary(value=values),
                )
            )
    finally:
        writer.close()
