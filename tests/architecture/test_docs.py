"""The pages say what the product does: every key with its default, every command that exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from docs import reference
from fedllm.cli.main import app
from fedllm.config.loading import flatten
from fedllm.config.models import Config
from fedllm.config.reference import key_entries, option_entries
from fedllm.methods.options import LOCAL_OPTIONS, OPTIONS, SERVER_OPTIONS
from fedllm.reporting.plan.idle_resources import resource_warnings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ADMIN = ROOT / "slurm/ADMIN.md"
PAGES = [
    *(README, ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", ADMIN),
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_every_key_and_option_has_a_meaning() -> None:
    every = [*OPTIONS.values(), *LOCAL_OPTIONS.values(), *SERVER_OPTIONS.values()]
    entries = [*key_entries(), *(entry for each in every for entry in option_entries(each))]
    assert len(entries) > 120
    assert not [entry.name for entry in entries if len(entry.meaning) < 10]


def test_every_key_has_a_section_on_the_page() -> None:
    page = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert not [key.name for key in key_entries() if f"| `{key.name}` |" not in page]


@pytest.mark.parametrize("page", reference.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_code(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text == reference.written(text), "write them: make reference"


def test_the_entries_of_keys_are_those_of_a_configuration() -> None:
    least = Config.model_validate({"clients": {"tiers": {"NAME": {"ranks": 1}}}})
    real = {name: kind for name, (kind, _) in flatten(least).items()}
    entries = {entry.name: entry.kind for entry in key_entries()}
    assert real.items() <= entries.items()
    # and what only another form of a value has
    assert {name.rpartition(".")[0] for name in entries.keys() - real.keys()} == {
        "clients.held_out_from"
    }


def test_the_page_for_admins_has_every_knob_of_the_scheduler_and_its_default() -> None:
    knobs = dict(re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", ADMIN.read_text("utf-8"), re.M))
    real = {entry.name: yaml.safe_load(entry.default) for entry in key_entries()}
    assert {name for name in real if name.startswith("scheduler.")} - {"scheduler.kind"} - {
        "scheduler.workers"
    } <= knobs.keys()
    assert {name for name in real if name.startswith("storage.")} <= knobs.keys()
    differing = {n: v for n, v in knobs.items() if yaml.safe_load(v) != real[n]}
    assert not differing


def test_every_configuration_on_the_page_for_admins_is_valid() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", ADMIN.read_text("utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    for block in blocks:
        given = yaml.safe_load(block)
        given.setdefault("clients", {})["tiers"] = {"NAME": {"ranks": 1}}
        # no job is slower than its partition allows, and nothing is charged for nothing
        assert resource_warnings(Config.model_validate(given)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_of_a_page_parses(page: Path) -> None:
    commands = _commands()
    for line in _command_lines(page.read_text(encoding="utf-8")):
        program, name, *arguments = shlex.split(line, comments=True)
        if name.startswith("-"):
            continue
        assert name in commands, f"{page.name}: {program} {name}: no such command"
        commands[name].make_context(name, arguments, resilient_parsing=False).close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", text)
    links = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_file_that_the_architecture_names_exists() -> None:
    named = re.findall(
        r"`((?:fedllm|jobs)/[\w/.]+)`", (ROOT / "docs" / "architecture.md").read_text()
    )
    assert named and not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_of_a_page_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", page.read_text(encoding="utf-8"), re.M))
    assert named <= targets


def test_the_readme_keeps_to_two_screens() -> None:
    assert README.read_text(encoding="utf-8").count("\n") <= 100


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_group(app).commands)


def _command_lines(text: str) -> Iterator[str]:
    """Yield the `fedllm` command lines of the code blocks; `\\` continues a line."""
    for block in re.findall(r"^```(?:sh|bash|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:\.venv/bin/)?(fedllm .*)", line)
            if found:
                yield re.sub(r"\s+(&|>|\|).*", "", found.group(1))
