"""The files around the code agree with each other: lock, version, Makefile, CI."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import driftfield

ROOT = Path(__file__).resolve().parents[1]
LOCKED_EXTRAS = ("train", "vision", "tensorboard", "dev")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, object]:
    return tomllib.loads(text_of("pyproject.toml"))["project"]


def locked_entries() -> list[str]:
    """requirements.lock, one string for each requirement with its hashes."""
    lines = [line for line in text_of("requirements.lock").splitlines() if not line.lstrip().startswith("#")]
    return re.split(r"\n(?=\S)", "\n".join(lines).strip())


def test_every_locked_file_has_a_hash_and_none_an_address() -> None:
    entries = locked_entries()
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9.-]+==\S+( ; [^\\]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\\n)?)+", entry), entry
    assert "://" not in text_of("requirements.lock")


def test_the_lock_satisfies_pyproject() -> None:
    locked = [Requirement(entry.partition(" \\")[0]) for entry in locked_entries()]
    pins = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in locked}
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *(line for extra in LOCKED_EXTRAS for line in extras[extra])]
    for requirement in map(Requirement, wanted):
        if requirement.name != "driftfield":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_version_is_the_same_everywhere() -> None:
    version = project()["version"]
    assert driftfield.__version__ == version
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    newest = re.search(r"^## \[(.+?)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None and newest[1] == version


def run_make(*words: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "last_line"),
    [("demo", "/python -m vision.train"), ("test", "/python -m pytest -n 2 --dist loadfile -m 'not slow'")],
)
def test_a_target_sets_up_everything_and_then_runs(target: str, last_line: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    lines = run_make("--dry-run", target, f"VENV={venv}", "PYTHON=python3").stdout.splitlines()
    made, locked = lines.index(f"python3 -m venv {venv}"), lines.index(next(x for x in lines if x.endswith(".lock")))
    assert made < locked
    assert all("--require-hashes" in line or "--no-deps" in line for line in lines if " install " in line)
    assert lines[-1] == f"{venv}/bin{last_line}"


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c 'import sys; sys.version_info = (3, 9, 1)\n'\"$2\"\n", encoding="utf-8"
    )
    old.chmod(0o755)
    run = run_make("test", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert run.returncode != 0
    assert "driftfield needs Python 3.11 or newer, found 3.9" in run.stderr


def test_ci_runs_the_test_command() -> None:
    assert text_of(".ci/run").splitlines()[-1] == "make test"
    assert os.access(ROOT / ".ci/run", os.X_OK)
