"""Target modules: which modules a value of `lora.target_modules` names, as PEFT reads it.

A list names modules by their paths or by the last parts of their paths. A text is `all-linear`, or
a regular expression that has to match the whole path.
"""

import re
from collections.abc import Sequence

ALL_LINEAR = "all-linear"

Targets = Sequence[str] | str

# On a path that does not match, each `.*` multiplies the time by the length of the path, and a
# repeated group can take for ever.
_MAX_REPEATS = 4
_MAX_CHARACTERS = 2000
_PLAIN_NAME = re.compile(r"[\w-]+")


def is_target(target_modules: Targets, path: str) -> bool:
    """Return whether `target_modules` names the module of this path."""
    if isinstance(target_modules, str):
        return target_modules == ALL_LINEAR or re.fullmatch(target_modules, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in target_modules)


def target_problem(target_modules: Targets) -> str:
    """Return the problem of a value that no base model can use; an empty text without one."""
    if not isinstance(target_modules, str):
        return "" if target_modules else "need at least one name"
    if target_modules == ALL_LINEAR:
        return ""
    if _PLAIN_NAME.fullmatch(target_modules):
        return (
            f"need a list ([{target_modules}]), a regular expression over whole paths "
            f"(.*{target_modules}) or {ALL_LINEAR}"
        )
    return pattern_problem(target_modules)


def pattern_problem(pattern: str) -> str:
    """Return why a text cannot be used as a pattern of module names; an empty text if it can."""
    if cost := _cost_problem(pattern):
        return cost
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression ({error}); correct it, or give a list of names"
    return ""


def _cost_problem(pattern: str) -> str:
    """Return why a pattern could take for ever on a path that does not match, or an empty text."""
    bare = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "x", bare)
    # `?` after a parenthesis or after another repeat is not a repeat
    bare = re.sub(r"\(\?", "(", bare)
    bare = re.sub(r"([*+?}])[?+]", r"\1", bare)
    if re.search(r"\)[*+{]", bare):
        return "it repeats a group, which can take for ever; need a pattern without"
    repeats = len(re.findall(r"[*+?{]", bare))
    if repeats > _MAX_REPEATS or len(pattern) > _MAX_CHARACTERS:
        return (
            f"it has {repeats} of * + ? {{ and {len(pattern)} characters; need at most "
            f"{_MAX_REPEATS} and {_MAX_CHARACTERS}, or a list of names"
        )
    return ""
