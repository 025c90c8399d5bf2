"""The methods by name, and a user's own as `package.module:Class`; imported when they are used."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from fedllm.config.models import Config, MethodSection, Section, is_own
from fedllm.errors import ConfigError
from fedllm.methods.local_rules import LOCAL_RULES, LocalRule
from fedllm.methods.options import (
    LOCAL_KEY,
    LOCAL_OPTIONS,
    OPTIONS,
    SERVER_KEY,
    SERVER_OPTIONS,
    NoOptions,
    parse_options,
)

if TYPE_CHECKING:
    from fedllm.methods.protocol import Method
    from fedllm.methods.server_side import ServerSide

NO_SERVER = "none"
# what a method averages, where the change of one client is bounded in it
PrivateSpace: TypeAlias = Literal["products", "factors"]


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """A method's class by its import path, and what a user reads of it.

    `ranks` says whether clients of different ranks work together: `any`, or `one` for all; `base`
    whether the method changes the weights of the base, `client_state` what clients keep between
    their rounds, `private` what it averages of private clients, if it can have them; `bytes_up` and
    `bytes_down` what a client sends and receives in a round.
    """

    path: str
    ranks: Literal["any", "one"]
    summary: str
    paper: str
    private: PrivateSpace | None = None
    base: Literal["stays", "changes"] = "stays"
    client_state: str = "none"
    bytes_up: str = "its adapter"
    bytes_down: str = "its adapter"


# by import path, so that a coordinator knows the names without loading torch
METHODS: Mapping[str, MethodEntry] = {
    "flexlora": MethodEntry(
        path="fedllm.methods.spectral.flexlora:FlexLora",
        ranks="any",
        summary="mean of full-size products, SVD, each client the best of its rank",
        paper="https://arxiv.org/abs/2402.11505",
        private="products",
    ),
    "raflora": MethodEntry(
        path="fedllm.methods.spectral.raflora:RaFlora",
        ranks="any",
        summary="as flexlora, each range of directions by the clients that train it",
        paper="https://arxiv.org/abs/2602.13486",
    ),
    "rbla": MethodEntry(
        path="fedllm.methods.pairs.rbla:Rbla",
        ranks="any",
        summary="each row of A and column of B averaged over the clients that train it",
        paper="https://arxiv.org/abs/2408.08699",
    ),
    "hetlora": MethodEntry(
        path="fedllm.methods.pairs.hetlora:HetLora",
        ranks="any",
        summary="factors padded with zeros, weighted by the norm of each client's change",
        paper="https://arxiv.org/abs/2401.06432",
    ),
    "factor_mean": MethodEntry(
        path="fedllm.methods.pairs.factor_mean:FactorMean",
        ranks="one",
        summary="means of A and of B, each by itself: FedAvg and FedIT with LoRA",
        paper="https://arxiv.org/abs/2305.05644",
        private="factors",
    ),
    "lora_fair": MethodEntry(
        path="fedllm.methods.pairs.lora_fair:LoraFair",
        ranks="one",
        summary="as factor_mean, B corrected so that the product is near the mean of products",
        paper="https://arxiv.org/abs/2411.14961",
    ),
    "fedrot": MethodEntry(
        path="fedllm.methods.pairs.fedrot:FedRot",
        ranks="one",
        summary="as factor_mean, each client's factors turned to agree with the last ones",
        paper="https://arxiv.org/abs/2602.23638",
    ),
    "ffa": MethodEntry(
        path="fedllm.methods.pairs.ffa:Ffa",
        ranks="one",
        summary="A is frozen, the mean of B: nothing is lost in aggregation",
        paper="https://arxiv.org/abs/2403.12313",
        private="factors",
        bytes_up="B",
    ),
    "rolora": MethodEntry(
        path="fedllm.methods.pairs.rolora:RoLora",
        ranks="one",
        summary="clients train B in odd rounds and A in even ones, the mean of that factor",
        paper="https://arxiv.org/abs/2409.02346",
        private="factors",
        bytes_up="B or A",
    ),
    "fedsvd": MethodEntry(
        path="fedllm.methods.spectral.fedsvd:FedSvd",
        ranks="one",
        summary="clients train B alone, an SVD of the product gives them a new A",
        paper="https://arxiv.org/abs/2505.12805",
        bytes_up="B",
    ),
    "fedsa": MethodEntry(
        path="fedllm.methods.pairs.fedsa:FedSa",
        ranks="one",
        summary="the mean of A, every client keeps its own B",
        paper="https://arxiv.org/abs/2410.01463",
        client_state="B",
        bytes_up="A",
        bytes_down="A",
    ),
    "local_only": MethodEntry(
        path="fedllm.methods.pairs.local_only:LocalOnly",
        ranks="any",
        summary="no federation: every client goes on with its own adapter",
        paper="https://arxiv.org/abs/1602.05629",
        client_state="all",
    ),
    "fslora": MethodEntry(
        path="fedllm.methods.pairs.fslora:FsLora",
        ranks="any",
        summary="clients train sketches of the factors, the mean of their changes is added",
        paper="https://arxiv.org/abs/2501.19389",
    ),
    "fed_plora": MethodEntry(
        path="fedllm.methods.pairs.fed_plora:FedPLora",
        ranks="any",
        summary="clients train some rank-one parts beside the frozen others, a mean of each part",
        paper="https://arxiv.org/abs/2602.16936",
        bytes_down="R (O + I)",
    ),
    "slora": MethodEntry(
        path="fedllm.methods.spectral.slora:SLora",
        ranks="any",
        summary="first some entries of the weights train, their SVD starts flexlora",
        paper="https://arxiv.org/abs/2308.06522",
        base="changes",
    ),
    "flora": MethodEntry(
        path="fedllm.methods.residuals.flora:Flora",
        ranks="any",
        summary="the mean of products goes into the base every round, adapters start anew",
        paper="https://arxiv.org/abs/2409.05976",
        base="changes",
        bytes_down="all adapters",
    ),
    "florist": MethodEntry(
        path="fedllm.methods.residuals.florist:Florist",
        ranks="any",
        summary="as flora, of the mean only the leading directions",
        paper="https://arxiv.org/abs/2506.09199",
        base="changes",
        bytes_down="k (O + I)",
    ),
    "fedex": MethodEntry(
        path="fedllm.methods.residuals.fedex:FedEx",
        ranks="one",
        summary="as factor_mean, what it misses of the mean of products goes into the base",
        paper="https://arxiv.org/abs/2410.09432",
        base="changes",
        bytes_down="all adapters",
    ),
    "fedmomentum": MethodEntry(
        path="fedllm.methods.residuals.fedmomentum:FedMomentum",
        ranks="one",
        summary="SVD of the mean: the first directions to the adapter, the next into the base",
        paper="https://arxiv.org/abs/2603.08014",
        base="changes",
        bytes_down="k (O + I)",
    ),
}


# key -> the words that its value is chosen from, beside the user's own
KEY_CHOICES: Mapping[str, tuple[str, ...]] = {
    "method.name": tuple(METHODS),
    "method.local": tuple(LOCAL_RULES),
}


def check_names(name: str, local: str) -> None:
    """Check `method.name` and `method.local` without importing anything.

    Raises:
        ConfigError: no such method, with the valid names and the nearest one.
    """
    if name in LOCAL_RULES:
        raise ConfigError(
            f"method.name: got {name!r}, which is a value of method.local; the server side of "
            "FedAvg and FedIT is factor_mean"
        )
    if name not in METHODS and not is_own(name):
        own = " or your own as package.module:Class"
        raise ConfigError(f"method.name: got {name!r}{_nearest(name, METHODS)}{own}")
    local_rule(local)


def check_method(section: MethodSection) -> None:
    """Check a `method` section without importing anything.

    The options of a user's own method are checked when the method is made.

    Raises:
        ConfigError: no such method or rule, or options that the method does not have.
    """
    check_names(section.name, section.local)
    local_rule(section.local, section.local_options)
    _server_options(section.server, section.server_options)
    if section.name in METHODS:
        parse_options(section.name, OPTIONS.get(section.name, NoOptions), section.options)


def local_rule(local: str, options: Mapping[str, Any] | None = None) -> LocalRule:
    """Return what `method.local` names, with what `method.local_options` changes.

    Raises:
        ConfigError: no such rule, with the valid names and the nearest one; or options that it
            does not have.
    """
    if local in METHODS:
        raise ConfigError(
            f"method.local: got {local!r}, which is a value of method.name; need one of "
            f"{', '.join(LOCAL_RULES)}"
        )
    if local not in LOCAL_RULES:
        raise ConfigError(f"method.local: got {local!r}{_nearest(local, LOCAL_RULES)}")
    model = LOCAL_OPTIONS.get(local, NoOptions)
    given = parse_options(local, model, options or {}, key=LOCAL_KEY)
    return replace(LOCAL_RULES[local], **given.model_dump())


def method_class(name: str) -> "type[Method]":
    """Return the class that `method.name` names: one of `METHODS` or `package.module:Class`.

    Raises:
        ConfigError: no such method, with the valid names and the nearest one.
    """
    check_names(name, next(iter(LOCAL_RULES)))
    return _imported(METHODS[name].path if name in METHODS else name)


def build_method(
    name: str,
    *,
    seed: int,
    alpha: float,
    scaling: str,
    options: Mapping[str, Any] | None = None,
    server: str = NO_SERVER,
    server_options: Mapping[str, Any] | None = None,
) -> "Method":
    """Return the method of that name with its settings.

    Options that are given are passed as `options`, an instance of the class's `options_class`; an
    optimizer of the server is passed as `server`.

    Raises:
        ConfigError: no such method, or one that cannot be made from these settings.
    """
    found = method_class(name)
    settings: dict[str, Any] = {"seed": seed, "alpha": alpha, "scaling": scaling}
    if options:
        model = getattr(found, "options_class", NoOptions)
        settings["options"] = parse_options(name, model, options)
    given = _server_options(server, server_options or {})
    if server != NO_SERVER:
        settings["server"] = _server_side(found, name, server, given)
    try:
        return found(**settings)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"method.name: {name} cannot be made: {error}") from error


def private_space(config: Config) -> PrivateSpace | None:
    """Return what the method averages, if the clients are private; None: they are not.

    Raises:
        ConfigError: the method is not for private clients.
    """
    if config.privacy.clip_norm is None:
        return None
    name, options = config.method.name, config.method.options
    space = METHODS[name].private if name in METHODS else None
    if space is None:
        able = ", ".join(each for each, entry in METHODS.items() if entry.private)
        raise ConfigError(
            f"privacy.clip_norm: method.name {name} cannot bound what one client changes; need "
            f"one of {able}, or null"
        )
    if space == "products" and options.get("truncated") != "keep":
        # with `drop` the state depends on who takes part, whatever they send
        raise ConfigError("method.options.truncated: has to be keep with privacy.clip_norm")
    return space


def method_of(config: Config) -> "Method":
    """Return the configured method.

    Raises:
        ConfigError: no such method, or one that cannot be made from these settings.
    """
    check_method(config.method)
    private_space(config)
    return build_method(
        config.method.name,
        seed=config.seed,
        alpha=config.lora.alpha,
        scaling=config.lora.scaling,
        options=config.method.options,
        server=config.method.server,
        server_options=config.method.server_options,
    )


def _server_options(server: str, options: Mapping[str, Any]) -> Section:
    model = SERVER_OPTIONS.get(server, NoOptions)
    return parse_options(server, model, options, key=SERVER_KEY)


def _server_side(found: "type[Method]", name: str, server: str, options: Section) -> "ServerSide":
    """Return the server's optimizer; refuse one that cannot move the method's state."""
    from fedllm.methods.server_side import SERVER_SIDES

    # a change of the base would not move with the factors
    sides = () if found.changes_base else found.server_sides
    if server not in sides:
        why = (
            f"keeps moments of every entry, but the directions of {name}'s state change every round"
            if sides
            else f"needs a state of factors alone, which {name} does not have"
        )
        wanted = ", ".join([*sides, NO_SERVER])
        raise ConfigError(f"method.server: {server} {why}; need one of {wanted}")
    return SERVER_SIDES[server](options)


def _nearest(name: str, table: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return f"{guess}, need one of {', '.join(table)}"


def _imported(path: str) -> "type[Method]":
    from fedllm.methods.protocol import Method

    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a module of the user's own may raise anything
        raise ConfigError(
            f"method.name: cannot import {path!r}: {type(error).__name__}: {error}"
        ) from error
    wanted = {*Method.__annotations__, *(key for key in vars(Method) if not key.startswith("_"))}
    missing = sorted(key for key in wanted if not hasattr(found, key))
    if missing or not inspect.isclass(found):
        what = f"lacks {', '.join(missing)}" if missing else "is not a class"
        raise ConfigError(f"method.name: {path!r} {what} (see fedllm.methods.protocol.Method)")
    return cast("type[Method]", found)
