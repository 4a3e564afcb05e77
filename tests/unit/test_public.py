"""The public face: what `crackle` offers, and what type checkers, help and introspection see of it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import crackle

PUBLIC = sorted(set(crackle.__all__) - {"__version__"})


def test_dir_shows_the_public_names_and_no_others() -> None:
    assert [name for name in dir(crackle) if not name.startswith("_")] == PUBLIC


def test_the_version_is_the_distributions() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{crackle.__version__}"' in text


def test_type_checkers_see_the_public_names_and_no_others() -> None:
    tree = ast.parse(Path(crackle.__file__).read_text())
    seen = [
        alias.asname
        for statement in tree.body
        if isinstance(statement, ast.If)
        for import_ in statement.body
        if isinstance(import_, ast.ImportFrom)
        for alias in import_.names
    ]
    assert sorted(name for name in seen if name) == sorted(crackle.__all__)


def test_a_type_checker_knows_what_each_name_is(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    lines = [
        *(f"from crackle import {name}" for name in PUBLIC),
        *(f"reveal_type({name})" for name in PUBLIC),
    ]
    program.write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--strict", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(PUBLIC), done.stdout
    assert not [line for line in revealed if '"Any"' in line]
    assert done.returncode == 0, done.stdout


def callables() -> Iterator[tuple[str, object]]:
    """Every public class and function, and every public method and property of the classes."""
    for name in PUBLIC:
        value = getattr(crackle, name)
        yield name, value
        for attribute, member in inspect.getmembers_static(value):
            if attribute == "__init__" or not attribute.startswith("_"):
                if isinstance(member, property):
                    member = member.fget
                if inspect.isfunction(member):
                    yield f"{name}.{attribute}", member


@pytest.mark.parametrize(("name", "value"), [pytest.param(*each, id=each[0]) for each in callables()])
def test_type_hints_can_be_had(name: str, value: object) -> None:
    typing.get_type_hints(value)


@pytest.mark.parametrize("name", PUBLIC)
def test_help_has_something_to_say(name: str) -> None:
    assert inspect.getdoc(getattr(crackle, name))


def test_a_name_that_is_none_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'crackle' has no attribute 'MicroVm'"):
        crackle.MicroVm  # noqa: B018
