"""Runs of a sweep: arms times grid times seeds, and what makes them impossible to compare."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedllm.config.loading import flatten, result_fingerprint
from fedllm.config.models import Config
from fedllm.config.spelling import resolve_scalars
from fedllm.config.sweep_files import (
    HELD_OUT_BY,
    Changes,
    SweepFile,
    SweepSection,
    endpoint_parts,
)
from fedllm.errors import ConfigError
from fedllm.planning.roles import Roles

Phase = Literal["tuning", "run"]
Load = Callable[[Changes], Config]

NOISE_ARM = "A/A"
_RATE = "training.learning_rate"
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.+-]{0,60}")
# what decides which rows train, and which belong to dev and unseen clients and to tests
_SPLIT_KEYS = (
    *("data.path", "data.revision", "data.format", "data.columns", "data.partition"),
    *("data.test_fraction", "data.embedded_clients", "data.embedded_rows"),
    *("clients.split_seed", "clients.dev", "clients.unseen", "clients.held_out_from"),
    "clients.unseen_categories",
)


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        name: its directory below the sweep's.
        arm: the arm that it belongs to.
        phase: whether it tunes the arm's learning rate, or is a result.
        config: its configuration; the rate of a result is the base's until it is tuned.
        rate: the learning rate that it tries; None in a result.
    """

    name: str
    arm: str
    phase: Phase
    config: Config
    rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Arm:
    name: str
    changes: Changes
    seeds: Sequence[int]


def expand(file: SweepFile, load: Load) -> list[SweepRun]:
    """Return the runs of a sweep in the order in which they start: every seed of all arms in turn.

    Args:
        file: the sweep's file.
        load: returns the configuration with some keys changed.

    Raises:
        ConfigError: one line per problem: an arm without a difference, arms that train on what
            others hold out, tuning without dev clients, an endpoint that no run scores.
    """
    arms = list(_arms(file))
    problems = [*_name_problems(file.keys, arms), *_seed_problems(file.keys)]
    problems += _key_problems(file)
    if problems:
        raise ConfigError("\n".join(problems))
    configs = _load_all(file, arms, load)
    results = [arm for arm in arms if arm.name != NOISE_ARM]
    problems = list(_other_splits(results, configs)) or list(_equal_arms(results, configs))
    problems += _unscored(file.keys, next(iter(configs.values())))
    problems += _untunable(file.keys, next(iter(configs.values())))
    if problems:
        raise ConfigError("\n".join(problems))
    return [*_tuning(file.keys, results, configs), *_results(arms, configs)]


def _arms(file: SweepFile) -> Iterator[_Arm]:
    """Yield every arm at every point of the grid, then the A/A arm."""
    named: dict[str, _Arm] = {}
    for arm, changes in (file.arms or {"": {}}).items():
        for values in itertools.product(*file.grid.values()):
            point = dict(zip(file.grid, values, strict=True))
            name = " ".join([arm, *_labels(point)]).strip()
            named[name] = _Arm(name=name, changes={**changes, **point}, seeds=file.keys.seeds)
    for name in file.keys.comparison.contrast or tuple(named)[:2]:
        if name in named:  # a name that is no arm's is a problem of its own
            seeds = (*file.keys.seeds, *file.keys.comparison.contrast_seeds)
            named[name] = replace(named[name], seeds=seeds)
    yield from named.values()
    if (noise := file.keys.noise_floor) and noise.arm in named:
        yield _Arm(name=NOISE_ARM, changes=named[noise.arm].changes, seeds=noise.seeds)


def _labels(point: Changes) -> Iterator[str]:
    """Yield `max_steps=4` for every key of a point, with the whole key where it is ambiguous."""
    leaves = [key.rpartition(".")[2] for key in point]
    for key, leaf in zip(point, leaves, strict=True):
        value = resolve_scalars(point[key])
        yield f"{leaf if leaves.count(leaf) == 1 else key}={_word(value)}"


def _word(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", str(value)).strip("-") or "none"


def _name_problems(keys: SweepSection, arms: Sequence[_Arm]) -> Iterator[str]:
    for name in keys.arms:
        if not _ARM_NAME.fullmatch(name):
            yield f"arms.{name}: need a name of letters, digits, blanks and _ . + -, at most 61"
    known = [arm.name for arm in arms if arm.name != NOISE_ARM]
    folders = [folder_of(arm.name) for arm in arms]
    for place, arm in enumerate(known):
        if (folder := folders[place]) in folders[:place]:
            yield f"arms.{arm}: another arm has the same folder, {folder}; rename one of them"
    if keys.noise_floor and keys.noise_floor.arm not in known:
        yield f"noise_floor.arm: no arm {keys.noise_floor.arm!r}; need one of {_list(known)}"
    for name in keys.comparison.contrast or ():
        if name not in known:
            yield f"comparison.contrast: no arm {name!r}; need two of {_list(known)}"


def _seed_problems(keys: SweepSection) -> Iterator[str]:
    lists = {"seeds": keys.seeds, "comparison.contrast_seeds": keys.comparison.contrast_seeds}
    if keys.noise_floor:
        lists["noise_floor.seeds"] = keys.noise_floor.seeds
    taken: dict[int, str] = {}
    for name, seeds in lists.items():
        if len(set(seeds)) < len(seeds):
            yield f"{name}: got a seed twice; give every seed once"
        if common := set(seeds) & set(taken):
            yield f"{name}: {min(common)} is one of `{taken[min(common)]}` too; need other seeds"
        taken |= dict.fromkeys(seeds, name)


def _key_problems(file: SweepFile) -> Iterator[str]:
    """Yield keys that the sweep itself sets, and values of the grid that cannot be told apart."""
    places = {"set": file.common, "grid": file.grid}
    places |= {f"arms.{arm}": changes for arm, changes in file.arms.items()}
    for place, changes in places.items():
        if "seed" in changes:
            yield f"{place}.seed: the sweep's `seeds` set it; remove it"
        if _RATE in changes and place != "set" and file.keys.tuning:
            yield f"{place}.{_RATE}: `tuning` chooses it for every arm; remove one of them"
    for key, values in file.grid.items():
        words = [_word(resolve_scalars(value)) for value in values]
        if len(set(words)) < len(words) or not words:
            yield f"grid.{key}: got {', '.join(words) or 'no value'}; need different values"
        for arm, changes in file.arms.items():
            if key in changes:
                yield f"arms.{arm}.{key}: `grid` sets it; remove one of them"


def _load_all(file: SweepFile, arms: Sequence[_Arm], load: Load) -> dict[str, Config]:
    """Return the configuration of every arm, with its first seed."""
    configs: dict[str, Config] = {}
    problems: dict[str, None] = {}
    for arm in arms:
        try:
            configs[arm.name] = load({**file.common, **arm.changes, "seed": arm.seeds[0]})
        except ConfigError as error:
            problems |= dict.fromkeys(f"arm {arm.name}: {line}" for line in str(error).split("\n"))
    if problems:
        raise ConfigError("\n".join(problems))
    return configs


def _equal_arms(arms: Sequence[_Arm], configs: Mapping[str, Config]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for arm in arms:
        config = configs[arm.name]
        # a path may change in a run, to the same content; in a sweep it is another base
        what = f"{result_fingerprint(config)} {config.rounds} {config.model.path}"
        first = seen.setdefault(what, arm.name)
        if first != arm.name:
            yield (
                f"arms.{arm.name}: no difference from arm {first}; change a key that decides the "
                "result, or use `noise_floor` for an A/A arm"
            )


def _other_splits(arms: Sequence[_Arm], configs: Mapping[str, Config]) -> Iterator[str]:
    """Yield the arms whose training rows may be dev, unseen or test rows of the first arm."""
    first = arms[0].name
    expected = _split_of(configs[first])
    for arm in arms[1:]:
        for key, value in _split_of(configs[arm.name]).items():
            if value != expected.get(key):
                yield (
                    f"arms.{arm.name}: {key} is {value}, in arm {first} {expected.get(key)}, so it "
                    "would train on rows that the other holds out; put it in `set`"
                )
                break


def _split_of(config: Config) -> dict[str, object]:
    return {
        key: value
        for key, (_, value) in flatten(config).items()
        if any(key == name or key.startswith(f"{name}.") for name in _SPLIT_KEYS)
    }


def _unscored(keys: SweepSection, config: Config) -> Iterator[str]:
    """Yield endpoints that no run of the sweep would score."""
    if not config.evaluation.every:
        yield "evaluation.every: got 0, a sweep compares evaluations; need >= 1"
    # one line for every group of clients, with its first endpoint
    groups = {endpoint_parts(e)[0]: e for e in reversed(keys.comparison.endpoints)}
    for group, endpoint in groups.items():
        key = HELD_OUT_BY.get(group)
        if key and not getattr(config.clients, key.rpartition(".")[2]):
            yield (
                f"comparison: {endpoint} needs {key}, which is empty; set it in `set`, or "
                "choose train_loss"
            )


def _untunable(keys: SweepSection, config: Config) -> Iterator[str]:
    if keys.tuning and not config.clients.dev:
        yield "tuning: chooses by dev clients, but clients.dev is 0; set it in `set`"
    if keys.tuning and len(set(keys.tuning.learning_rates)) < len(keys.tuning.learning_rates):
        yield "tuning.learning_rates: got a rate twice; give every rate once"


def _tuning(
    keys: SweepSection, arms: Sequence[_Arm], configs: Mapping[str, Config]
) -> Iterator[SweepRun]:
    if keys.tuning is None:
        return
    for arm in arms:
        for rate in sorted(keys.tuning.learning_rates):
            config = with_rate(configs[arm.name], rate)
            changes: dict[str, object] = {"seed": keys.tuning.seed}
            if keys.tuning.rounds is not None:
                changes["rounds"] = keys.tuning.rounds
            yield SweepRun(
                name=f"tuning/{folder_of(arm.name)}/rate-{rate:g}",
                arm=arm.name,
                phase="tuning",
                config=config.model_copy(update=changes),
                rate=rate,
            )


def _results(arms: Sequence[_Arm], configs: Mapping[str, Config]) -> Iterator[SweepRun]:
    """Yield the results seed by seed, so that all arms can be compared early."""
    for place in range(max(len(arm.seeds) for arm in arms)):
        for arm in arms:
            if place < len(arm.seeds):
                seed = arm.seeds[place]
                yield SweepRun(
                    name=f"runs/{folder_of(arm.name)}/seed-{seed}",
                    arm=arm.name,
                    phase="run",
                    config=configs[arm.name].model_copy(update={"seed": seed}),
                )


def refuse_leaks(roles_of_arms: Mapping[str, Roles]) -> None:
    """Refuse arms of which one trains on clients that another holds out.

    With equal keys this takes another base, whose tokenizer leaves some clients without rows.

    Raises:
        ConfigError: names the first such arms and client.
    """
    for arm, roles in roles_of_arms.items():
        for other, others in roles_of_arms.items():
            leaked = set(roles.train) & {*others.dev, *others.unseen}
            if leaked:
                raise ConfigError(
                    f"arms.{arm}: trains on client {min(leaked)}, which arm {other} holds out; "
                    "set clients.held_out_from to a list of clients in `set`"
                )


def with_rate(config: Config, rate: float) -> Config:
    """Return a configuration with another learning rate."""
    training = config.training.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"training": training})


def folder_of(arm: str) -> str:
    """Return the name of an arm's folder."""
    return arm.replace("/", "-").replace(" ", "_")


def best_rate(losses: Mapping[float, float]) -> float | None:
    """Return the rate of the lowest loss, of equal ones the lowest; None: no loss is finite."""
    finite = {rate: loss for rate, loss in losses.items() if loss < float("inf")}
    return min(sorted(finite), key=lambda rate: finite[rate], default=None)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
