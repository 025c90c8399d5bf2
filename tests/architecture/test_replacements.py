"""Tests run the code as it is: what they replace is not of this repository."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = ("fedllm", "jobs")
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_nothing_of_our_own_is_replaced(path: Path) -> None:
    replaced = _replaced(ast.parse(path.read_text(encoding="utf-8")))
    assert not list(replaced), "give the code an argument, or make the situation that it is to meet"


@pytest.mark.parametrize(
    "line",
    [
        "from unittest import mock",
        "from unittest.mock import Mock",
        "import pytest_mock",
        "from fedllm.model import losses\nlosses._CHUNK = 1",
        "import fedllm.packing.losses\nfedllm.model.losses._CHUNK = 1",
        "from fedllm.model import losses\nmonkeypatch.setattr(losses, '_CHUNK', 1)",
        "monkeypatch.setattr('fedllm.packing.losses._CHUNK', 1)",
        "from fedllm.a import B\nwith context() as patched:\n    patched.setattr(B.c, 'd', 1)",
        "from jobs import client\nsetattr(client, 'main', 1)",
        "from fedllm.a import B\nmonkeypatch.setitem(B, 'd', 1)",
        "from fedllm.a import B\nmonkeypatch.delattr(B, 'd')",
    ],
)
def test_a_replacement_is_found(line: str) -> None:
    assert len(list(_replaced(ast.parse(line)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from pathlib import Path\nmonkeypatch.setattr(Path, 'rename', 1)",
        "from fedllm.a import B\nb = B()\nb.c = 1",
        "monkeypatch.setenv('FEDLLM_CACHE', 'x')",
    ],
)
def test_other_seams_are_left_alone(line: str) -> None:
    assert not list(_replaced(ast.parse(line)))


def _replaced(tree: ast.Module) -> Iterator[str]:
    """Yield what replaces something of ours, or comes with a library for it."""
    own = {name for node in ast.walk(tree) for name in _own_names(node)}
    for node in ast.walk(tree):
        for target in _targets(node):
            if isinstance(target, ast.Constant):
                is_ours = str(target.value).startswith(tuple(f"{room}." for room in OWN))
            else:
                is_ours = _root(target) in own
            if is_ours:
                yield f"line {target.lineno}: {ast.unparse(node)}"
        if any("mock" in name for name in _imported(node)):
            yield ast.unparse(node)


def _own_names(node: ast.AST) -> list[str]:
    """Return the names that an import of ours gives."""
    if isinstance(node, ast.ImportFrom) and _is_own(node.module or ""):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        own = [alias for alias in node.names if _is_own(alias.name)]
        return [alias.asname or alias.name.partition(".")[0] for alias in own]
    return []


def _targets(node: ast.AST) -> list[ast.expr]:
    """Return whose attributes or items a statement or call sets."""
    match node:
        case ast.Call(func=ast.Attribute(attr="setattr" | "setitem" | "delattr" | "delitem")):
            return node.args[:1]
        case ast.Call(func=ast.Name(id="setattr" | "delattr")):
            return node.args[:1]
        case ast.Assign():
            return [each for each in node.targets if isinstance(each, ast.Attribute)]
        case ast.AugAssign(target=ast.Attribute() as target):
            return [target]
    return []


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in OWN
