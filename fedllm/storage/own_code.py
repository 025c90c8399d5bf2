"""The source of a user's own class, `package.module:Class`: where it is, and whether it changed.

Nothing is imported to find it: a coordinator may look at a class that needs torch.
"""

import ast
import difflib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from fedllm.errors import ConfigError, RunDirectoryError
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import OwnCodeRecord

_OURS = "fedllm"


def folders_of(config_or_run: Path) -> list[str]:
    """Return where classes of one's own are looked for: the configuration's folder, and this."""
    path = config_or_run.resolve()
    folder = path if path.is_dir() else path.parent
    return list(dict.fromkeys([str(folder), str(Path.cwd())]))


def import_from(folders: Sequence[str]) -> None:
    """Let this process import from `folders`, after the installed packages."""
    # behind them: a file of the user's never hides a package
    sys.path += [folder for folder in folders if folder not in sys.path]
    importlib.invalidate_caches()


def read_own_code(name: str, folders: Sequence[str]) -> OwnCodeRecord:
    """Return the source of the class `name`, of which this process can now import.

    The files are those of its module and of what this imports from the same package, or from the
    same folder of the user's.

    Raises:
        ConfigError: no such module or class, or a file that is not Python.
    """
    import_from(folders)
    module, _, class_name = name.partition(":")
    spec = _spec_of(module)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"method.name: got {name!r}, but there is no module {module!r} among the installed "
            f"packages, nor in {' or '.join(folders)}"
        )
    trees = dict(_own_modules(module, spec, folders))
    _require_class(name, class_name, spec.origin, trees[module])
    files = {other: sha256_of(Path(_origin(other))) for other in sorted(trees)}
    return OwnCodeRecord(name=name, folders=list(folders), files=files)


def changed_modules(before: OwnCodeRecord | None, now: OwnCodeRecord | None) -> list[str]:
    """Return the modules whose source is not as it was."""
    old, new = (code.files if code else {} for code in (before, now))
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def refuse_changed(run: RunPaths, before: OwnCodeRecord, now: OwnCodeRecord) -> None:
    """Refuse a class whose source is not what the run began with.

    Raises:
        RunDirectoryError: it names the modules that changed.
    """
    if changed := changed_modules(before, now):
        raise RunDirectoryError(
            f"{run.root}: method.name {now.name}: the source of {', '.join(changed)} changed since "
            "the run began; restore it, or choose another --run-dir"
        )


def _own_modules(
    module: str, spec: ModuleSpec, folders: Sequence[str]
) -> Iterator[tuple[str, ast.Module]]:
    """Yield a module and all of the user's own that it imports, with their syntax trees."""
    package, _, _ = module.partition(".")
    is_beside = any(Path(spec.origin or "").is_relative_to(folder) for folder in folders)
    waiting, seen = [module], {module}
    while waiting:
        name = waiting.pop()
        tree = _parsed(Path(_origin(name)))
        yield name, tree
        for other in [*_packages_of(name), *_imports(name, tree)]:
            top, _, _ = other.partition(".")
            if other in seen or top == _OURS or not (is_beside or top == package):
                continue
            seen.add(other)
            origin = _origin(other)
            in_folders = any(Path(origin).is_relative_to(folder) for folder in folders)
            if origin and (top == package or in_folders):
                waiting.append(other)


def _packages_of(name: str) -> Iterator[str]:
    """Yield the packages that hold a module: importing it runs them."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))


def _origin(name: str) -> str:
    """Return the file of a module; empty if it has none."""
    spec = _spec_of(name)
    return spec.origin or "" if spec and spec.has_location else ""


def _spec_of(name: str) -> ModuleSpec | None:
    """Return where a module would be imported from, without importing a package above it."""
    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # the last part is enough, and needs no package above it that was imported
        spec = PathFinder.find_spec(part, [*spec.submodule_search_locations])
    return spec


def _parsed(file: Path) -> ast.Module:
    if file.suffix != ".py":
        return ast.Module(body=[], type_ignores=[])
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"method.name: {file}: is not Python: {error}") from error


def _imports(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield the names that may be modules which `module` imports."""
    spec = _spec_of(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    parts = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _require_class(name: str, wanted: str, file: str, tree: ast.Module) -> None:
    """Refuse a name that a module neither defines nor imports.

    A file that is not Python's, and `import *`, may hold any name.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
    if not tree.body or "*" in names or wanted in names:
        return
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"method.name: got {name!r}, but {file} has no {wanted!r}{guess}")
