"""The trackers by name, and the export of what a run recorded to those that it names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from fedllm.config.loading import flatten
from fedllm.config.models import Config, ReportingSection
from fedllm.errors import ConfigError, FedllmError
from fedllm.reporting.results.metrics import metric_rows
from fedllm.reporting.trackers.experiment import Experiment, Row
from fedllm.reporting.trackers.mlflow_runs import export_to_mlflow
from fedllm.reporting.trackers.tensorboard_events import export_to_tensorboard
from fedllm.reporting.trackers.trackio_runs import export_to_trackio
from fedllm.reporting.trackers.wandb_runs import export_to_wandb
from fedllm.storage.kept_records import ExportedRecord
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RunRecord


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A tracker: the package that it needs, and the export of some rounds' metrics."""

    package: str
    export: Callable[[Experiment, Sequence[Row]], None]


TRACKERS: Mapping[str, Tracker] = {
    "tensorboard": Tracker(package="tensorboard", export=export_to_tensorboard),
    "wandb": Tracker(package="wandb", export=export_to_wandb),
    "mlflow": Tracker(package="mlflow", export=export_to_mlflow),
    "trackio": Tracker(package="trackio", export=export_to_trackio),
}


def require_trackers(section: ReportingSection) -> None:
    """Refuse trackers whose packages are not installed here.

    Raises:
        ConfigError: one line for each of them.
    """
    lines = [
        f"reporting.trackers: {name} needs {TRACKERS[name].package}, which is not installed "
        f"here; pip install {TRACKERS[name].package}, or leave it out"
        for name in section.trackers
        if find_spec(TRACKERS[name].package) is None
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def export_rounds(paths: RunPaths, config: Config, say: Callable[[str], None]) -> None:
    """Give the metrics of finished rounds to the trackers that the run names.

    A round is given once, or again if the coordinator was killed in between. A tracker that fails
    ends nothing: its rounds are given with the next one.
    """
    if not config.reporting.trackers:
        return
    rows = metric_rows(paths)
    keys = {key: value for key, (_, value) in flatten(config).items()}
    for name in config.reporting.trackers:
        record = ExportedRecord.find(paths.exported(name))
        further = [row for row in rows if record is None or _number(row) > record.round]
        if not further:
            continue
        experiment = Experiment(
            run_id=RunRecord.read(paths.run).run_id,
            name=paths.title,
            keys=keys,
            folder=paths.tracker(name),
        )
        try:
            TRACKERS[name].export(experiment, further)
        except FedllmError:
            raise
        except Exception as error:  # any error of a foreign package
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"reporting.trackers: {name}: {reason}; its rounds are given with the next one")
        else:
            ExportedRecord(round=max(map(_number, further))).publish(paths.exported(name))


def _number(row: Row) -> int:
    number = row["round"]
    assert isinstance(number, int), "a round has a number"
    return number
