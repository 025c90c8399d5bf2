"""Sweep files: the models of their keys, and their loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedllm.config.models import WHOLE_LINES, Config, Name, PositiveFloat, PositiveInt, Section
from fedllm.config.problems import problem_lines
from fedllm.config.spelling import is_null, resolve_scalars
from fedllm.config.yaml_text import read_yaml
from fedllm.errors import ConfigError

# how a sweep's file is told from a configuration
BASE = "base"

# fmt: off
Endpoint = Literal[
    "unseen_loss", "unseen_rouge_l", "unseen_exact_match",
    "dev_loss", "dev_rouge_l", "dev_exact_match",
    "train_loss", "train_rouge_l", "train_exact_match",
    "new_category_loss", "new_category_rouge_l", "new_category_exact_match",
]
# fmt: on
# the key without which a group of clients is empty
HELD_OUT_BY = {
    "unseen": "clients.unseen",
    "dev": "clients.dev",
    "new_category": "clients.unseen_categories",
}
Changes = Mapping[str, Any]


def endpoint_parts(endpoint: str) -> tuple[str, str]:
    """Return the group of clients of an endpoint, and its score."""
    group = next((name for name in HELD_OUT_BY if endpoint.startswith(f"{name}_")), "train")
    return group, endpoint.removeprefix(f"{group}_")


class TuningSection(Section):
    """Tuning: the learning rates that every arm tries, on dev clients, for as many rounds each."""

    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]
    rounds: PositiveInt | None = None
    seed: int = 1000


class NoiseFloorSection(Section):
    """The A/A arm: another arm once more, with other seeds."""

    arm: Name
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]


class ComparisonSection(Section):
    """Comparison: the primary endpoint and contrast, and how the others are shown."""

    endpoint: Endpoint = "unseen_loss"
    secondary: tuple[Endpoint, ...] | None = None
    contrast: Annotated[tuple[Name, ...], Field(min_length=2, max_length=2)] | None = None
    contrast_seeds: tuple[int, ...] = ()
    last_rounds: PositiveInt = 1
    cluster: Literal["category", "client"] = "category"
    min_clients: Annotated[int, Field(ge=6)] = 6

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All endpoints, the primary one first; by default loss and Rouge-L of its clients."""
        group, _ = endpoint_parts(self.endpoint)
        usual = (f"{group}_loss", f"{group}_rouge_l")
        others = usual if self.secondary is None else self.secondary
        return tuple(dict.fromkeys([self.endpoint, *others]))


class SweepSection(Section):
    """A sweep: arms, a grid and seeds over one base configuration."""

    base: str
    set: dict[str, Any] = Field(default_factory=dict)
    arms: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    tuning: TuningSection | None = None
    noise_floor: NoiseFloorSection | None = None
    comparison: ComparisonSection = ComparisonSection()
    max_parallel: PositiveInt | None = None

    @field_validator("arms", mode="before")
    @classmethod
    def _no_changes(cls, value: Any) -> Any:
        # an arm that changes nothing may be written with nothing behind its colon
        if not isinstance(value, dict):
            return value
        return {name: {} if changes is None else changes for name, changes in value.items()}

    @model_validator(mode="after")
    def _has_arms(self) -> "SweepSection":
        if not self.arms and not self.grid:
            line = "arms: missing; give arms, a grid, or both"
            raise PydanticCustomError(WHOLE_LINES, "{lines}", {"lines": line})
        return self


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A sweep's file: its keys, and the changes of its arms and its grid as they are spelled.

    Attributes:
        path: the file.
        keys: its keys.
        base: the configuration that all arms change.
        common: key -> value that holds for all arms.
        arms: arm -> key -> value.
        grid: key -> values.
    """

    path: Path
    keys: SweepSection
    base: Path
    common: Changes
    arms: Mapping[str, Changes]
    grid: Mapping[str, tuple[Any, ...]]


def is_sweep_file(path: Path) -> bool:
    """Return whether a file is a sweep's; one that cannot be read is none."""
    try:
        return path.is_file() and BASE in read_yaml(path)
    except ConfigError:
        return False


def load_sweep(path: Path) -> SweepFile:
    """Read a sweep's file.

    Raises:
        ConfigError: one line per problem, each with key, value and remedy.
    """
    if path.is_dir():
        raise ConfigError(
            f"{path}: a directory, need a sweep file; to continue a sweep: fedllm resume {path}"
        )
    if not path.is_file():
        raise ConfigError(f"{path}: no such sweep file; `fedllm sweep --example` prints one")
    # a table whose keys are all comments is null
    raw = {key: value for key, value in read_yaml(path).items() if not is_null(value)}
    if BASE not in raw and raw.keys() & Config.model_fields.keys():
        raise ConfigError(
            f"{path}: a configuration, but this command needs a sweep file, whose key `{BASE}` "
            f"names a configuration; to run it once: fedllm run {path}"
        )
    resolved = resolve_scalars(raw, SweepSection)
    try:
        keys = SweepSection.model_validate(resolved)
    except ValidationError as error:
        lines = list(problem_lines(error, resolved, SweepSection))
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from error
    return SweepFile(
        path=path,
        keys=keys,
        base=_base_of(path, keys.base),
        common=raw.get("set", {}),
        arms={name: {} if is_null(of) else of for name, of in raw.get("arms", {}).items()},
        grid={key: tuple(values) for key, values in raw.get("grid", {}).items()},
    )


def _base_of(path: Path, base: str) -> Path:
    """Return the base: beside the sweep's file, else as a command line would name it."""
    beside = path.parent / base
    return beside if beside.exists() else Path(base)
