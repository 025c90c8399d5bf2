"""`fedllm schema`: the JSON schema of configurations, for editors."""

from fedllm.cli.options import say_json
from fedllm.config.schema import config_schema


def schema() -> None:
    """Print the JSON schema of configurations, which editors read."""
    say_json(config_schema())
