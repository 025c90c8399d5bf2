"""The pages say what the product does: every key with its default, every command that exists."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from pydantic import BaseModel

from fedllm.cli.main import app
from fedllm.config.loading import ENVIRONMENT, flatten
from fedllm.config.models import Config, DataSection, HeldOutSection, TierSection
from fedllm.data.readers import open_source
from fedllm.methods.catalog import METHODS
from fedllm.methods.options import LOCAL_OPTIONS, OPTIONS, SERVER_OPTIONS
from fedllm.storage.paths import CachePaths

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs/configuration.md"
METHODS_PAGE = ROOT / "docs/methods.md"
ADMIN = ROOT / "slurm/ADMIN.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ADMIN, *sorted((ROOT / "docs").glob("*.md"))]
TABLES_OF_SECTIONS: dict[str, type[BaseModel]] = {
    "clients.tiers.NAME": TierSection,
    "clients.held_out_from": HeldOutSection,
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key as the page or the models have it; `words` are the values it is chosen from."""

    default: Any
    kind: str
    words: frozenset[str]


def test_every_key_stands_on_the_page_with_its_default_and_kind() -> None:
    documented, real = _documented_keys(), _real_keys()
    assert sorted(documented) == sorted(real)
    differing = {
        name: (documented[name], key)
        for name, key in real.items()
        if (documented[name].default, documented[name].kind) != (key.default, key.kind)
    }
    assert not differing


def test_every_value_that_a_key_is_chosen_from_stands_on_the_page() -> None:
    documented = _documented_keys()
    missing = {name: key.words - documented[name].words for name, key in _real_keys().items()}
    assert not {name: words for name, words in missing.items() if words}


def test_every_method_stands_on_its_page_and_among_the_values_of_its_key() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (any|one) \| (stays|changes) \| (\w+) \|.*\| ([^|]+) \| (\S+) \|$",
        METHODS_PAGE.read_text("utf-8"),
        re.M,
    )
    real = [
        (name, e.ranks, e.base, e.client_state, e.summary, e.paper) for name, e in METHODS.items()
    ]
    assert rows == real
    assert set(METHODS) <= _documented_keys()["method.name"].words


def test_every_option_of_a_method_stands_on_its_page_with_default_and_values() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| `([^`]+)` \| ([^|]+) \|", METHODS_PAGE.read_text("utf-8"), re.M
    )
    documented = {
        (method, option): (yaml.safe_load(default), frozenset(re.findall(r"`([^`]+)`", words)))
        for method, option, default, words in rows
    }
    real = {
        (method, name): (field.default, frozenset(_literals(field.annotation)))
        for method, options in [*OPTIONS.items(), *LOCAL_OPTIONS.items(), *SERVER_OPTIONS.items()]
        for name, field in options.model_fields.items()
    }
    assert documented == real


def test_the_page_for_admins_has_every_knob_of_the_scheduler_and_its_default() -> None:
    knobs = dict(re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", ADMIN.read_text("utf-8"), re.M))
    real = _real_keys()
    assert {name for name in real if name.startswith("scheduler.")} - {"scheduler.kind"} - {
        "scheduler.workers"
    } <= knobs.keys()
    assert {name for name in real if name.startswith("storage.")} <= knobs.keys()
    differing = {n: v for n, v in knobs.items() if yaml.safe_load(v) != real[n].default}
    assert not differing


def test_every_configuration_on_the_page_for_admins_is_valid() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", ADMIN.read_text("utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    for block in blocks:
        given = yaml.safe_load(block)
        given.setdefault("clients", {})["tiers"] = {"NAME": {"ranks": 1}}
        Config.model_validate(given)


def test_the_readme_names_every_command() -> None:
    named = set(re.findall(r"`fedllm ([a-z]+)", README.read_text(encoding="utf-8")))
    assert named >= set(_commands())


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
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
    assert named <= targets


def test_the_readmes_conversion_makes_files_that_are_read(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    program = next(block for block in blocks if "local_" in block)
    source, out = tmp_path / "1613", tmp_path / "parquet"
    source.mkdir()
    for split in ("training", "eval", "test"):
        for client in (0, 2, 10):
            rows = [
                {"category": "Text Matching 7.json", "instruction": "I", "input": n, "output": "é"}
                for n in ("a", "b")
            ]
            file = source / f"local_{split}_{client}.json"
            file.write_text(json.dumps(rows), encoding="utf-8")
    subprocess.run([sys.executable, "-c", program, source, out], check=True)
    section = DataSection(path=str(out))
    tables = open_source(section, CachePaths(root=tmp_path / "cache"), 0).read()
    assert sorted(tables) == ["test", "train", "validation"]
    for table in tables.values():
        assert table["client"].to_pylist() == ["0", "0", "2", "2", "10", "10"]
        assert set(table["category"].to_pylist()) == {"Text Matching"}
        assert table["references"].to_pylist() == [["é"]] * 6
    assert pq.read_schema(out / "train.parquet").field("client_id").type == pa.int32()


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_group(app).commands)


def _command_lines(text: str) -> Iterator[str]:
    """Yield the `fedllm` command lines of the code blocks; `\\` continues a line."""
    for block in re.findall(r"^```(?:sh|bash|)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:\.venv/bin/)?(fedllm .*)", line)
            if found:
                yield re.sub(r"\s+(&|>|\|).*", "", found.group(1))


def _documented_keys() -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for line in CONFIGURATION.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            name, choices, default, kind, _ = cells
            keys[name.strip("`")] = Key(
                default=yaml.safe_load(default.strip("`")),
                kind=kind,
                words=frozenset(re.findall(r"`([^`]+)`", choices)),
            )
    return keys


def _real_keys() -> dict[str, Key]:
    words, required = dict(_words(Config)), set(_required(Config))
    least = Config.model_validate({"clients": {"tiers": {"NAME": {"ranks": 1}}}})
    keys = {name: (default, kind) for name, (kind, default) in flatten(least).items()}
    for prefix, section in TABLES_OF_SECTIONS.items():
        for name, field in section.model_fields.items():
            _, kind = keys.get(f"{prefix}.{name}", (None, "result"))
            keys[f"{prefix}.{name}"] = (field.default, kind)
        required |= set(_required(section, f"{prefix}."))
    for name, variable in ENVIRONMENT.items():
        # a file has to say it, or the environment
        keys[name] = (f"${variable}", keys[name][1])
    return {
        name: Key(
            default="required" if name in required else default,
            kind=kind,
            words=words.get(name, frozenset()),
        )
        for name, (default, kind) in keys.items()
    }


def _required(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _required(inner, f"{prefix}{name}.")
        elif field.is_required():
            yield f"{prefix}{name}"


def _words(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, frozenset[str]]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _words(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", frozenset(_literals(inner))


def _literals(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Literal:
        yield from map(str, get_args(annotation))
    elif origin in (Union, UnionType, Annotated):
        for member in get_args(annotation):
            yield from _literals(member)
