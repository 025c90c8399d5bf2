"""The JSON schema of configuration files, from the configuration's models.

An editor that reads it completes keys and marks wrong ones. It says less than loading checks:
what depends on several keys is no part of it.
"""

from collections.abc import Mapping
from typing import Any

from fedllm.config import models
from fedllm.config.loading import ENVIRONMENT
from fedllm.config.models import Config
from fedllm.config.reference import meanings, plain


def config_schema() -> dict[str, Any]:
    """Return the schema of a file as people write it.

    Paths that the environment may give are not required, and a section may be empty: in YAML it is
    null where all its keys are comments.
    """
    schema = Config.model_json_schema()
    for section, key in (name.split(".") for name in ENVIRONMENT):
        for required in (schema, _section(schema, section)):
            for name in (section, key):
                if name in required.get("required", []):
                    required["required"].remove(name)
    for name, part in {Config.__name__: schema, **schema["$defs"]}.items():
        _complete(part, meanings(vars(models)[name]))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _section(schema: dict[str, Any], name: str) -> dict[str, Any]:
    reference = schema["properties"][name]["$ref"]
    section: dict[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
    return section


def _complete(part: dict[str, Any], texts: Mapping[str, str]) -> None:
    """Let the sections of a part be empty, and say what its keys mean."""
    for name, value in part.get("properties", {}).items():
        if "$ref" in value:
            part["properties"][name] = {"anyOf": [value, {"type": "null"}]}
        if name in texts:
            part["properties"][name]["description"] = plain(texts[name])
