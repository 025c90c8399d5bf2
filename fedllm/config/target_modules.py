"""`lora.target_modules`: which modules a value names, as PEFT reads it.

A list names modules by their paths or the last parts of them; a text is a regular expression that
the whole path has to match, or `all-linear`.
"""

import re
from collections.abc import Sequence

ALL_LINEAR = "all-linear"

Targets = Sequence[str] | str

# Paths are short, but each `.*` multiplies the time of a path that does not match by its length,
# and a repeated group can take for ever.
_MOST_REPEATS = 4
_MOST_CHARACTERS = 2000
_PLAIN = re.compile(r"[\w-]+")


def is_target(target_modules: Targets, path: str) -> bool:
    """Say whether `target_modules` names the module of this path."""
    if isinstance(target_modules, str):
        return target_modules == ALL_LINEAR or re.fullmatch(target_modules, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in target_modules)


def problem_of(target_modules: Targets) -> str:
    """Say what is wrong with a value, whatever the base; nothing where it can be used."""
    if not isinstance(target_modules, str):
        return "" if target_modules else "need at least one name"
    if target_modules == ALL_LINEAR:
        return ""
    if _PLAIN.fullmatch(target_modules):
        return (
            f"need a list ([{target_modules}]), a regular expression over whole paths "
            f"(.*{target_modules}) or {ALL_LINEAR}"
        )
    try:
        re.compile(target_modules)
    except (re.error, OverflowError, RecursionError) as error:
        return f"no regular expression ({error}); correct it, or give a list of names"
    return _cost_of(target_modules)


def _cost_of(pattern: str) -> str:
    """Say why a pattern could take for ever on a path that it does not match, or nothing."""
    bare = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "x", bare)
    # what `?` means behind a parenthesis and behind another repeat is no repeat
    bare = re.sub(r"\(\?", "(", bare)
    bare = re.sub(r"([*+?}])[?+]", r"\1", bare)
    if re.search(r"\)[*+{]", bare):
        return "it repeats a group, which can take for ever; need a pattern without"
    repeats = len(re.findall(r"[*+?{]", bare))
    if repeats > _MOST_REPEATS or len(pattern) > _MOST_CHARACTERS:
        return (
            f"it has {repeats} of * + ? {{ and {len(pattern)} characters; need at most "
            f"{_MOST_REPEATS} and {_MOST_CHARACTERS}, or a list of names"
        )
    return ""
