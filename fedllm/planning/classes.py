"""sbatch options of a job kind or tier, and the classes of tiers that share them."""

from collections.abc import Mapping
from typing import Literal

from fedllm.config.models import SbatchOptions, SbatchSection

JobKind = Literal["prepare", "coordinator", "aggregate", "evaluate"]


def job_options(section: SbatchSection, kind: JobKind) -> SbatchOptions:
    """Return the options of a job that is one task."""
    own: SbatchOptions = getattr(section, kind)
    return {**section.default, **own}


def tier_options(section: SbatchSection, tier: str) -> SbatchOptions:
    """Return the options of a tier's workers."""
    return {**section.default, **section.client, **section.tiers.get(tier, {})}


def classes_of(section: SbatchSection, tiers: Mapping[str, object]) -> dict[str, str]:
    """Return tier -> class: the first tier whose options are equal names the class."""
    classes: dict[str, str] = {}
    for tier in tiers:
        options = tier_options(section, tier)
        same = (t for t in classes if tier_options(section, t) == options)
        classes[tier] = next(same, tier)
    return classes
