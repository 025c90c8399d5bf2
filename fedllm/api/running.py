"""Runs from a Python program: the same call as `fedllm run`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.api.loaded_run import LoadedRun
from fedllm.cli import execution
from fedllm.config.loading import validate
from fedllm.config.models import Config
from fedllm.errors import UserError


def run(
    config: str | Path | Config | Mapping[str, Any],
    *,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> LoadedRun:
    """Run a configuration to its end, or go on where its run directory stopped.

    Args:
        config: a configuration file, its content as nested mappings, or a validated `Config`.
        run_dir: the run directory. Default for a file: `runs/<its name>`.
        overrides: `KEY=VALUE` as of `--set`, for a configuration file.

    Returns:
        The finished run.

    Raises:
        ConfigError: the configuration is not valid.
        FedllmError: the run cannot go on; see `fedllm.errors`.
    """
    if isinstance(config, str | Path):
        root = None if run_dir is None else Path(run_dir)
        return LoadedRun(execution.start(Path(config), list(overrides), root))
    if run_dir is None:
        raise UserError("run_dir: missing; a configuration without a file needs a run directory")
    if overrides:
        raise UserError("overrides: only for a configuration file; change the mapping instead")
    valid = config if isinstance(config, Config) else validate(dict(config))
    return LoadedRun(execution.start_config(valid, Path(run_dir)))
