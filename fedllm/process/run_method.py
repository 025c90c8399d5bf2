"""The method of a run, whose source must be what the run began with."""

from fedllm.config.models import Config, is_own
from fedllm.methods.catalog import method_of
from fedllm.methods.protocol import Method
from fedllm.process.late_files import read_late_file
from fedllm.scheduling.traits import traits_of
from fedllm.storage.own_code import import_from, read_own_code, refuse_changed
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RunRecord
from fedllm.storage.trust.sealed_commands import OWN_CODE, require_accepted


def method_of_run(run: RunPaths, config: Config) -> Method:
    """Return a run's method; one of the user's own is imported from the folders of the run.

    Raises:
        ConfigError: it cannot be imported or made.
        RunDirectoryError: its source is not what the run began with, or nothing this user accepted.
    """
    if is_own(config.method.name):
        seconds = traits_of(config).visibility_seconds
        known = read_late_file(lambda: RunRecord.read(run.run), seconds)
        record = known.own_code
        if record is not None:
            require_accepted(run.root, known.run_id, known.seals, {OWN_CODE: record.model_dump()})
            import_from(record.folders)
            now = read_own_code(config.method.name, record.folders)
            refuse_changed(run, record, now)
    return method_of(config)
