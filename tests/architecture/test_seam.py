"""One room knows the schedulers: no other reads their variables or asks which one it is."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from fedllm.config.models import SchedulerSection

ROOT = Path(__file__).resolve().parents[2]
KINDS = set(get_args(SchedulerSection.model_fields["kind"].annotation))
SOURCES = sorted(
    path
    for room in ("fedllm", "jobs")
    for path in (ROOT / room).rglob("*.py")
    if ROOT / "fedllm" / "scheduling" not in path.parents
)


def test_no_other_room_knows_the_variables_of_a_batch_system() -> None:
    assert [_name(path) for path in SOURCES if "SLURM" in path.read_text()] == []


def test_no_other_room_decides_by_the_kind_of_scheduler() -> None:
    found = {_name(path): [*_comparisons(ast.parse(path.read_text()))] for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_comparison_is_found_however_it_is_written() -> None:
    found = """
        config.scheduler.kind == "slurm"
        section.kind in ("local", "inline")
        TABLE[config.scheduler.kind]
        match config.scheduler.kind:
            case _: pass
        kind = config.scheduler.kind
        f"scheduler.kind is {config.scheduler.kind}"
        options["local"]
    """
    lines = "\n".join(line.removeprefix(" " * 8) for line in found.splitlines())
    assert [*_comparisons(ast.parse(lines))] == [2, 3, 4, 5, 7]


def _comparisons(tree: ast.Module) -> Iterator[int]:
    """Yield the lines that decide by the kind of scheduler; a message may name it."""
    named = {
        id(node.value)
        for each in ast.walk(tree)
        if isinstance(each, ast.JoinedStr)
        for node in ast.walk(each)
        if isinstance(node, ast.FormattedValue)
    }
    lines = set()
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.expr)):
        is_asked = isinstance(node, ast.Attribute) and ast.unparse(node).endswith("scheduler.kind")
        if (is_asked and id(node) not in named) or _names_a_kind(node):
            lines.add(node.lineno)
    yield from sorted(lines)


def _names_a_kind(node: ast.expr) -> bool:
    if not isinstance(node, ast.Compare):
        return False
    constants = (each for side in node.comparators for each in ast.walk(side))
    return any(isinstance(each, ast.Constant) and each.value in KINDS for each in constants)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))
