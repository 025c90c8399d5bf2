"""The trainers there are, by the name of the engine that `planning.engines.engine_of` gives."""

from collections.abc import Mapping
from importlib.util import find_spec

from fedllm.errors import ConfigError
from fedllm.planning.engines import Engine
from fedllm.training.plain import Plain
from fedllm.training.together import Together
from fedllm.training.trainer_protocol import OpenTrainer
from fedllm.training.zero import Zero

TRAINERS: Mapping[str, OpenTrainer] = {"plain": Plain, "together": Together, "zero": Zero}


def require_installed(engine: Engine) -> None:
    """Raise ConfigError if a package that an engine needs is not installed here."""
    if engine.package is not None and find_spec(engine.package) is None:
        raise ConfigError(
            f"training.engine: {engine.name} needs {engine.package}, which is not installed here; "
            f"pip install 'fedllm[{engine.package}]', or training.engine: plain"
        )
