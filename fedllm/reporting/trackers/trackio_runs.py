"""Trackio: one run of project `fedllm`, in Trackio's folder on this machine (`TRACKIO_DIR`).

`TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` sends it elsewhere, as for any program with Trackio.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from fedllm.reporting.trackers.experiment import Experiment, Row, numbers_of


def export_to_trackio(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Log the metrics of rounds; the step is the round."""
    trackio: Any = import_module("trackio")
    # it prints how to open its dashboard, for every call
    with redirect_stdout(io.StringIO()):
        run = trackio.init(
            project="fedllm",
            # it knows a run by its name alone
            name=f"{experiment.name} {experiment.run_id}",
            config=dict(experiment.keys),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        for row in rows:
            run.log(dict(numbers_of(row)), step=row["round"])
        # not the run's own: at exit Trackio would end it again, and say so
        trackio.finish()
