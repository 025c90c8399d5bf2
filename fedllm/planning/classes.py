"""Classes of tiers with equal sbatch options, and the options of jobs and tiers."""

import math
import re
from collections.abc import Mapping
from typing import Literal

from fedllm.config.models import SbatchOptions, SbatchSection
from fedllm.planning.option_spelling import by_flag, flag_name

JobKind = Literal["prepare", "coordinator", "aggregate", "evaluate"]


def job_options(section: SbatchSection, kind: JobKind) -> SbatchOptions:
    """Return the sbatch options of a job of one task."""
    own: SbatchOptions = getattr(section, kind)
    return {**by_flag(section.default), **by_flag(own)}


def tier_options(section: SbatchSection, tier: str) -> SbatchOptions:
    """Return the sbatch options of a tier's workers, by long flag: `c` is `cpus-per-task`."""
    levels = (section.default, section.client, section.tiers.get(tier, {}))
    return {flag: value for level in levels for flag, value in by_flag(level).items()}


def classes_of(section: SbatchSection, tiers: Mapping[str, object]) -> dict[str, str]:
    """Return tier -> class; a class is named after its first tier.

    Args:
        section: sbatch options.
        tiers: tier -> its engine, which workers of a class share.
    """
    classes: dict[str, str] = {}
    for tier, engine in tiers.items():
        key = tier_options(section, tier), engine
        same = (t for t in classes if (tier_options(section, t), tiers[t]) == key)
        classes[tier] = next(same, tier)
    return classes


def asks_for_gpus(options: SbatchOptions) -> bool:
    """Return whether tasks with these options run on a GPU."""
    flags = by_flag(options)
    if any(flags.get(key) for key in ("gpus", "gpus-per-node", "gpus-per-task")):
        return True
    return "gpu" in str(flags.get("gres") or "")


_MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")


def with_more_memory(options: SbatchOptions, factor: float) -> SbatchOptions | None:
    """Return options with `factor` times the memory; None if no option sets the memory."""
    grown = dict(options)
    for key, value in options.items():
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip(), re.IGNORECASE)
        if flag_name(key) in _MEMORY_OPTIONS and parts and float(parts[1]):
            grown[key] = f"{math.ceil(float(parts[1]) * factor)}{parts[2].upper()}"
    return None if grown == options else grown
