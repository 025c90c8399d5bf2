"""The source of a class of the user's own: which files count, and what is refused."""

import hashlib
import sys
from pathlib import Path

import pytest

from fedllm.errors import ConfigError, RunDirectoryError
from fedllm.storage.own_code import changed_modules, folders_of, read_own_code, refuse_changed
from fedllm.storage.paths import RunPaths


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture(autouse=True)
def path_as_before() -> object:
    before = list(sys.path)
    yield
    sys.path[:] = before


def test_a_package_counts_with_all_that_it_imports_of_itself(tmp_path: Path) -> None:
    write(
        tmp_path,
        zoo___="",
        zoo__mean="import json\nfrom . import lions\nfrom .cats.tiger import *\nclass Mean: ...",
        zoo__lions="from zoo.cats import tiger\nimport beside_zoo",
        zoo__unused="",
        zoo__cats__tiger="import zoo.mean",
        beside_zoo="import no_such_module",
    )
    (tmp_path / "zoo/_.py").rename(tmp_path / "zoo/__init__.py")
    found = read_own_code("zoo.mean:Mean", [str(tmp_path)])
    assert list(found.files) == ["beside_zoo", "zoo", "zoo.cats.tiger", "zoo.lions", "zoo.mean"]
    content = (tmp_path / "zoo/lions.py").read_bytes()
    assert found.files["zoo.lions"] == hashlib.sha256(content).hexdigest()
    assert "zoo" not in sys.modules


def test_a_change_is_named_by_its_modules(tmp_path: Path) -> None:
    write(tmp_path, rule_a="import rule_b\nclass Mean: ...", rule_b="X = 1")
    before = read_own_code("rule_a:Mean", [str(tmp_path)])
    assert changed_modules(before, read_own_code("rule_a:Mean", [str(tmp_path)])) == []
    write(tmp_path, rule_a="import rule_c\nclass Mean: ...", rule_c="X = 1")
    now = read_own_code("rule_a:Mean", [str(tmp_path)])
    assert changed_modules(before, now) == ["rule_a", "rule_b", "rule_c"]
    with pytest.raises(RunDirectoryError, match="the source of rule_a, rule_b, rule_c changed"):
        refuse_changed(RunPaths(root=tmp_path), before, now)


def test_a_class_of_fedllms_own_is_one_file() -> None:
    found = read_own_code("fedllm.methods.spectral.flexlora:FlexLora", ["/nowhere"])
    assert list(found.files) == ["fedllm.methods.spectral.flexlora"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no.such.module:Class", "no module 'no.such.module' among the installed packages, nor in"),
        (":Class", "there is no module ''"),
        ("kinds:Lion", r"kinds.py has no 'Lion'; did you mean Lions\?$"),
        ("kinds:", r"kinds.py has no ''$"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, name: str, words: str) -> None:
    write(tmp_path, kinds="class Lions: ...\nfrom json import dumps as Text\nMade = 1")
    for present in ("Lions", "Text", "Made"):
        assert read_own_code(f"kinds:{present}", [str(tmp_path)]).files
    with pytest.raises(ConfigError, match=f"^method.name: .*{words}"):
        read_own_code(name, [str(tmp_path)])


def test_folders_are_those_of_the_configuration_and_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert folders_of(Path("configs/a.yaml")) == [str(tmp_path / "configs"), str(tmp_path)]
    assert folders_of(tmp_path) == [str(tmp_path)]
