"""What no file of the packages may hold: code that runs what it reads, shells, validation that `python -O` drops."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("driftfield", "vision", "policy", "envs", "benchmarks")
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.popen": "starts a shell",
    "os.system": "starts a shell",
    "subprocess.getoutput": "starts a shell",
    "subprocess.getstatusoutput": "starts a shell",
    "tempfile.mktemp": "names a file that another process can make first; use mkstemp or mkdtemp",
    "torch.load": "unpickles; use safetensors",
    "torch.save": "pickles; use safetensors",
    "yaml.full_load": "builds objects; use yaml.safe_load",
    "yaml.load": "builds objects; use yaml.safe_load",
    "yaml.load_all": "builds objects; use yaml.safe_load_all",
    "yaml.unsafe_load": "builds objects; use yaml.safe_load",
}
UNSAFE_KEYWORDS = {
    "allow_pickle": "unpickles",
    "shell": "starts a shell",
    "trust_remote_code": "runs downloaded code",
}


class Finding(NamedTuple):
    line: int
    reason: str


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `import numpy as np` gives np -> numpy."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted_name(node: ast.expr, imported: dict[str, str]) -> str:
    """The full name of what an expression refers to, or "" where it is no plain chain of names."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value, imported)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def is_true(node: ast.expr) -> bool:
    """Anything but a literal that is false: a variable may be true."""
    return not (isinstance(node, ast.Constant) and not node.value)


def opens_text_without_encoding(call: ast.Call, imported: dict[str, str]) -> bool:
    """open(...), path.open(...), path.read_text() and path.write_text(...) in text mode with no encoding said."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or None in given:
        return False
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
        return len(call.args) <= (call.func.attr == "write_text")
    if dotted_name(call.func, imported) in ("open", "io.open", "os.fdopen"):
        mode = given.get("mode", call.args[1] if len(call.args) > 1 else ast.Constant("r"))
    elif isinstance(call.func, ast.Attribute) and call.func.attr == "open":
        if isinstance(call.func.value, ast.Name) and call.func.value.id in imported:
            return False  # Image.open, gzip.open, os.open: not pathlib's
        mode = given.get("mode", call.args[0] if call.args else ast.Constant("r"))
        if not (isinstance(mode, ast.Constant) and re.fullmatch("[rwaxbt+]+", str(mode.value))):
            return False  # the first argument of an archive's open is a name, not a mode
    else:
        return False
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def encoding_findings(tree: ast.AST) -> Iterator[Finding]:
    imported = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and opens_text_without_encoding(node, imported):
            yield Finding(node.lineno, "opens text without an encoding")


def call_findings(call: ast.Call, imported: dict[str, str]) -> Iterator[Finding]:
    name = dotted_name(call.func, imported)
    if name.removeprefix("builtins.") in UNSAFE_CALLS:
        yield Finding(call.lineno, f"{name} {UNSAFE_CALLS[name.removeprefix('builtins.')]}")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    for keyword in UNSAFE_KEYWORDS.keys() & keywords.keys():
        if is_true(keywords[keyword]):
            yield Finding(call.lineno, f"{keyword} {UNSAFE_KEYWORDS[keyword]}")
    if "weights_only" in keywords and not (
        isinstance(keywords["weights_only"], ast.Constant) and keywords["weights_only"].value is True
    ):
        yield Finding(call.lineno, "weights_only that may be false unpickles")
    if name.endswith((".extractall", ".unpack_archive")) and "filter" not in keywords:
        yield Finding(call.lineno, "unpacks outside the target folder; say filter='data'")


def unsafe_findings(tree: ast.AST) -> Iterator[Finding]:
    imported = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield Finding(node.lineno, "assert is dropped by python -O; raise ValueError")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            sources = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for source in sources:
                if source.partition(".")[0] in UNSAFE_MODULES:
                    yield Finding(node.lineno, f"{source} runs code while it reads")
        elif isinstance(node, ast.Call):
            yield from call_findings(node, imported)


def findings_in(folders: tuple[str, ...], *checks: str) -> list[str]:
    run = {"unsafe": unsafe_findings, "encoding": encoding_findings}
    found = []
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, reason in sorted(finding for check in checks for finding in run[check](tree)):
            found.append(f"{path.relative_to(ROOT)}:{line}: {reason}")
    return found


def test_the_packages_hold_no_unsafe_construct() -> None:
    assert list((ROOT / "driftfield").rglob("*.py")) and list((ROOT / "vision").rglob("*.py"))
    assert findings_in(PACKAGES, "unsafe") == []


def test_text_files_are_opened_with_an_encoding() -> None:
    assert findings_in((*PACKAGES, "tests"), "encoding") == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import dill",
        "import torch as t\nt.load('w.pt')",
        "from torch import load\nload('w.pt', weights_only=True)",
        "loader('w.pt', weights_only=flag)",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "read(a, allow_pickle=flag)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "from os import system as s\ns('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import tempfile\ntempfile.mktemp()",
        "assert x > 0, 'x is positive'",
        "archive.extractall(folder)",
    ],
)
def test_an_unsafe_construct_is_found(source: str) -> None:
    assert list(unsafe_findings(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import numpy as np\nnp.load('a.npy')\nnp.load('a.npy', allow_pickle=False)",
        "from safetensors.torch import load_file\nload_file('w.safetensors')",
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "archive.extractall(folder, filter='data')",
    ],
)
def test_a_safe_construct_is_left_alone(source: str) -> None:
    assert list(unsafe_findings(ast.parse(source))) == []


@pytest.mark.parametrize(
    "source",
    [
        "open(p)",
        "open(p, 'w')",
        "open(p, mode='a')",
        "path.open()",
        "(folder / 'a').open('w')",
        "path.read_text()",
        "path.write_text(text)",
    ],
)
def test_text_without_encoding_is_found(source: str) -> None:
    assert list(encoding_findings(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "open(p, 'rb')",
        "open(p, encoding='utf-8')",
        "path.open('wb')",
        "path.read_text('utf-8')",
        "path.write_text(text, encoding='utf-8')",
        "from PIL import Image\nImage.open(path)",
        "archive.open('member.txt')",
    ],
)
def test_bytes_and_said_encodings_are_left_alone(source: str) -> None:
    assert list(encoding_findings(ast.parse(source))) == []
