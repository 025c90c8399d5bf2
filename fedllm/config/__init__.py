"""Configuration: pydantic models (pure) and YAML -> models, all errors together."""
