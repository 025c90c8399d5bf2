"""The methods by name, and a user's own as `package.module:Class`."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import cast

from fedllm.errors import ConfigError
from fedllm.methods.factor_mean import FactorMean
from fedllm.methods.flexlora import FlexLora
from fedllm.methods.protocol import Method

METHODS: Mapping[str, type[Method]] = {"flexlora": FlexLora, "factor_mean": FactorMean}


def method_class(name: str) -> type[Method]:
    """Return the class that `method.name` names: one of `METHODS` or `package.module:Class`.

    Raises:
        ConfigError: no such method, with the valid names and the nearest one.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return _imported(name)
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(
        f"method.name: got {name!r}{guess}, need one of {', '.join(METHODS)} "
        "or your own as package.module:Class"
    )


def build_method(
    name: str, *, seed: int, alpha: float, scaling: str, options: Mapping[str, object]
) -> Method:
    """Return the method of that name with its settings; `options` are the method's own.

    Raises:
        ConfigError: no such method, or options that it does not have.
    """
    chosen = method_class(name)
    settings = {"seed": seed, "alpha": alpha, "scaling": scaling}
    valid = [key for key in inspect.signature(chosen).parameters if key not in settings]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ConfigError(
            f"method.options: {name} has no {', '.join(unknown)}, "
            f"its options are: {', '.join(valid) or 'none'}"
        )
    try:
        return chosen(**settings, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method.options: {name} cannot be made: {error}") from error


def _imported(name: str) -> type[Method]:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"method.name: cannot import {name!r}: {error}") from error
    wanted = {*Method.__annotations__, *(key for key in vars(Method) if not key.startswith("_"))}
    missing = sorted(key for key in wanted if not hasattr(found, key))
    if missing or not inspect.isclass(found):
        what = f"lacks {', '.join(missing)}" if missing else "is not a class"
        raise ConfigError(f"method.name: {name!r} {what} (see fedllm.methods.protocol.Method)")
    return cast(type[Method], found)
