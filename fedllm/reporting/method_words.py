"""The method of a run in words: its two sides with their options, and privacy."""

from collections.abc import Mapping
from typing import Any

from fedllm.config.models import Config
from fedllm.errors import counted
from fedllm.storage.records import PrivacyRecord


def method_words(config: Config) -> str:
    """Return server side, client side, the server's optimizer and privacy, each with its options.

    What a run does not use is left out.
    """
    section = config.method
    sides = [(section.name, section.options), (section.local, section.local_options)]
    if section.server != "none":
        sides.append((section.server, section.server_options))
    if config.privacy.clip_norm is not None:
        privacy = config.privacy.model_dump(include={"clip_norm", "noise_multiplier"})
        sides.append(("privacy", privacy))
    return " + ".join(_words(name, options) for name, options in sides)


def privacy_words(found: PrivacyRecord, rounds: int) -> str:
    """Return what some rounds say about any one client."""
    return (
        f"privacy of a client after {counted(rounds, 'round')}: epsilon {found.epsilon:.2f} at "
        f"delta {found.delta:g} ({found.sampling} cohorts of {found.cohort} of "
        f"{counted(found.clients, 'client')})"
    )


def _words(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{option}={value}" for option, value in options.items())])
