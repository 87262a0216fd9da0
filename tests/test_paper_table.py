"""PAPER.md's table is true: what it names imports, and the tests it names are there.

The table's header is `Paper | Here | Test`; it may be split into several tables with that header. In "Here" each word
in backticks that is a dotted name beginning with one of our packages must import, and a path must exist; in "Test"
each word in backticks is `tests/FILE.py::NAME` or a whole file.
"""

import ast
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("driftfield", "vision", "policy", "envs")


class Row(NamedTuple):
    paper: str
    here: list[str]
    test: list[str]


def cells(line: str) -> list[str]:
    """The cells of a table's line; a bar in backticks or after a backslash belongs to its cell."""
    return [cell.strip() for cell in re.findall(r"((?:\\.|`[^`]*`|[^|`\\])*)\|", line.strip().removeprefix("|") + "|")]


def rows(markdown: str) -> list[Row]:
    """The rows of every table headed `Paper | Here | Test`."""
    found, inside = [], False
    for line in markdown.splitlines():
        columns = cells(line)[:3] if line.strip().startswith("|") else []
        if [name.lower() for name in columns] == ["paper", "here", "test"]:
            inside = True
        elif not columns:
            inside = False
        elif inside and not re.fullmatch(r":?-+:?", columns[0]):
            found.append(Row(columns[0], *(re.findall(r"`([^`]+)`", cell) for cell in columns[1:])))
    return found


def names_in(words: list[str]) -> list[str]:
    """The dotted names of our packages among the words, without what may stand in brackets behind them."""
    plain = [re.sub(r"\(.*\)$", "", word) for word in words]
    return [name for name in plain if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+", name)]


def resolve(name: str) -> object:
    """Import what a dotted name refers to: a module, something in a module, or something in a class."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if (ROOT / Path(*parts[:length])).is_dir() or (ROOT / Path(*parts[:length])).with_suffix(".py").is_file():
            found: object = importlib.import_module(module)
            for attribute in parts[length:]:
                found = getattr(found, attribute)
            return found
    raise ModuleNotFoundError(name)


def defined_in(path: Path) -> set[str]:
    """The functions and classes of a file, methods as Class::method."""
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, definitions):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, definitions)}
    return found


def table() -> list[Row]:
    return rows((ROOT / "PAPER.md").read_text(encoding="utf-8")) if (ROOT / "PAPER.md").exists() else []


def test_the_table_is_there() -> None:
    assert table(), "PAPER.md has no table headed Paper | Here | Test"


@pytest.mark.parametrize("row", table(), ids=lambda row: row.paper)
def test_what_a_row_names_imports(row: Row) -> None:
    paths = [word for word in row.here if "/" in word and not word.startswith("python ")]
    assert names_in(row.here) or paths, f"{row.paper}: column Here names nothing of ours in backticks"
    for name in names_in(row.here):
        resolve(name)
    for path in paths:
        assert (ROOT / path).exists(), f"{row.paper}: no file {path}"


@pytest.mark.parametrize("row", table(), ids=lambda row: row.paper)
def test_the_tests_of_a_row_exist(row: Row) -> None:
    assert row.test, f"{row.paper}: column Test names nothing in backticks"
    for word in row.test:
        file, _, name = re.sub(r"\[.*\]$", "", word).partition("::")
        assert re.fullmatch(r"tests/\S+\.py", file) and (ROOT / file).is_file(), f"{row.paper}: no file {file}"
        if name:
            assert name.rpartition("::")[2].lower().startswith("test"), f"{row.paper}: {name} is not collected"
            assert name in defined_in(ROOT / file), f"{row.paper}: {file} has no {name}"


def test_rows_are_read_from_the_right_tables() -> None:
    page = """
| Table | Option |
|---|---|
| 1 | `driftfield.nothing` |

| Paper | Here | Test |
|---|:---:|---|
| Eq. 10 | `driftfield.drifting_field(normalize_over="y" | "xy")` and `x` | `tests/a.py::test_b` |
"""
    assert rows(page) == [
        Row("Eq. 10", ['driftfield.drifting_field(normalize_over="y" | "xy")', "x"], ["tests/a.py::test_b"])
    ]
    assert names_in(rows(page)[0].here) == ["driftfield.drifting_field"]


def test_names_resolve_to_modules_functions_and_methods() -> None:
    import driftfield.field

    assert resolve("driftfield.field") is driftfield.field
    assert resolve("driftfield.field.drifting_field") is driftfield.drifting_field
    assert resolve("driftfield.DriftingLoss.forward") is driftfield.DriftingLoss.forward
    with pytest.raises(AttributeError):
        resolve("driftfield.field.no_such_name")


def test_definitions_are_read_without_importing() -> None:
    assert "test_definitions_are_read_without_importing" in defined_in(Path(__file__))
