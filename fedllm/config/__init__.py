"""Configuration: pydantic models (pure), and loading from YAML with all errors together."""
