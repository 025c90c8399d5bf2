"""What the linters cannot hold: sizes, cycles, and what starting the coordinator loads."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import grimp
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("fedllm", "jobs") for path in (ROOT / room).rglob("*.py"))
MODULES = [path for path in SOURCES if path.name != "__init__.py" and path.parts[-2] != "jobs"]
PACKAGE = ROOT / "fedllm" / "__init__.py"
CLI = ROOT / "fedllm" / "cli"
COORDINATOR = (
    *("config", "doctor", "planning", "reporting", "rounds", "scheduling", "statistics"),
    "storage",
)
COMPUTE = (
    *("torch", "transformers", "peft", "datasets", "pyarrow", "numpy", "deepspeed"),
    *("pandas", "matplotlib"),
)
LARGEST_TRACKED_FILE_KIB = 512
MOST_FILES_OF_A_FOLDER = 16


def test_nearly_all_functions_fit_on_a_screen_and_none_is_longer_than_two() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}": _length(function)
        for path in SOURCES
        for function in _functions(path)
    }
    long = {name: lines for name, lines in lengths.items() if lines > 40}
    assert len(long) <= 0.05 * len(lengths), f"more than 5 % over 40 lines: {long}"
    assert not {name: lines for name, lines in long.items() if lines > 80}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = grimp.build_graph("fedllm", "jobs", cache_dir=None)
    circles = [
        (module, chain)
        for module in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(module))
        if (chain := graph.find_shortest_chain(imported, module))
    ]
    assert not circles


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.name == "__init__.py" and path != PACKAGE],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_package_holds_only_its_docstring(path: Path) -> None:
    body = _parse(path).body
    assert len(body) == 1, f"{path}: only a docstring belongs here"
    assert ast.get_docstring(_parse(path))


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_a_program_that_slurm_starts_stays_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("room", COORDINATOR)
def test_the_coordinators_rooms_load_without_the_compute_stack(room: str) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "fedllm" / room).rglob("*.py"))
        if path.name not in ("__init__.py", "tensors.py")
    ]
    assert _loaded_after(*modules) == []


def test_the_command_line_starts_without_the_compute_stack() -> None:
    assert _loaded_after("fedllm.cli.main") == []


def test_the_package_and_a_loaded_run_come_without_the_compute_stack() -> None:
    assert _loaded_after("fedllm", "fedllm.api.loaded_run", "fedllm.api.running") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_paths_know_how_deep_a_file_lies(path: Path) -> None:
    climbed = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(_parse(path))
        if _climbs_levels(node)
    ]
    assert not climbed or path.name == "paths.py", "a property of storage.paths says where it lies"


def test_the_hooks_of_a_commit_are_the_checks() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = hooks["repos"]
    tools = {hook["id"]: hook["entry"].split()[0] for hook in repository["hooks"]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    checks = re.findall(r"^check-(\w+):\n.*?(\.venv/bin/[\w-]+)", makefile, re.MULTILINE)
    assert tools == dict(checks)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_records_are_made_by_keyword(path: Path) -> None:
    classes = [node for node in ast.walk(_parse(path)) if isinstance(node, ast.ClassDef)]
    positional = [
        each.name
        for each in classes
        for decorator in map(ast.unparse, each.decorator_list)
        if decorator.startswith("dataclass") and "kw_only=True" not in decorator
    ]
    assert not positional
    tuples = [each.name for each in classes if "NamedTuple" in map(ast.unparse, each.bases)]
    assert not tuples


def test_no_folder_is_crowded() -> None:
    files = Counter(path.parent for path in MODULES)
    crowded = {str(folder): count for folder, count in files.items()}
    assert not {name: n for name, n in crowded.items() if n > MOST_FILES_OF_A_FOLDER}


def test_a_file_has_a_name_of_its_own() -> None:
    # those of commands have the names of their commands
    names = Counter(path.name for path in MODULES if CLI not in path.parents)
    assert not [name for name, count in names.items() if count > 1]


def test_no_file_has_the_name_of_another_room() -> None:
    rooms = {path.name for path in (ROOT / "fedllm").iterdir() if path.is_dir()}
    inside = [path for path in MODULES if CLI not in path.parents]
    assert not [path for path in inside if path.stem in rooms - {path.parent.name}]


def test_a_public_class_has_a_name_of_its_own() -> None:
    names = Counter(
        node.name
        for path in MODULES
        for node in _parse(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def test_no_file_is_named_after_nothing() -> None:
    said = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}
    assert not [path for path in SOURCES if said & set(path.stem.split("_"))]


def test_no_tracked_file_is_large() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    large = {
        str(path.relative_to(ROOT)): size_kib
        for path in paths
        if path.is_file() and (size_kib := path.stat().st_size // 1024) > LARGEST_TRACKED_FILE_KIB
    }
    assert not large


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _climbs_levels(node: ast.AST) -> TypeGuard[ast.expr]:
    """Return whether an expression is `path.parents[n]` or `path.parent.parent`."""
    match node:
        case ast.Subscript(value=ast.Attribute(attr="parents"), slice=ast.Name(id=name)):
            # a mapping's key is no constant
            return name.isupper()
        case ast.Subscript(value=ast.Attribute(attr="parents")):
            return True
        case ast.Attribute(attr="parent", value=ast.Attribute(attr="parent")):
            return True
    return False


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines from `def` to the end, docstring aside."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    assert docstring.end_lineno is not None
    return lines - (docstring.end_lineno - docstring.lineno + 1)


def _loaded_after(*modules: str) -> list[str]:
    """Import `modules` in a fresh interpreter; return what of the compute stack came with them."""
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted(set({COMPUTE!r}) & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()
