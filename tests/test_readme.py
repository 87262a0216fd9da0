"""README.md is executed: its Python, its commands, its tree, and the links of every document beside it.

What the tests hold README.md to:
- a ```python block is a whole program;
- a ```bash or ```sh block holds one command a line (a backslash continues it), each either `make TARGET`,
  `python -m MODULE ...` or one of ELSEWHERE; `python -m` runs, shortened by SMOKE, in the order of the page, in one
  empty folder, so that a command finds what the ones above it wrote;
- the tree is the fenced block that has a line `driftfield/`: two spaces deeper is one folder deeper, names are
  separated from what is said about them by two spaces or more, and a line set in by more than 8 continues the last.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# First words of commands that act outside the project, and so cannot be run here.
ELSEWHERE = ("cd", "git", "pip", "source", "sudo", "tensorboard")
# What makes a program finish within seconds, added to the end of its command line.
SMOKE: dict[str, tuple[str, ...]] = {
    "driftfield.toy": ("--steps", "20"),
    "vision.train": ("images=320", "encoder.images=256", "judge.epochs=1", "evaluate_images=100"),
    "vision.sample": (),
    "vision.evaluate": ("num=100", "guidance_scales=[1,2]"),
    "vision.neighbours": (),
    "vision.ablate": (),  # only its --help
    "vision.train_rival": ("images=320", "judge.epochs=1", "evaluate_images=100", "flow_matching.evaluations=[1,4]"),
    "vision.check_encoder": ("num=100",),
    "policy.train": (
        "demonstrations.collect=10",
        "samples=1280",
        "warmup_samples=128",
        "network.width=32",
        "evaluation.episodes=4",
        "evaluation.videos=1",
    ),  # fmt: skip
    "policy.evaluate": ("episodes=2", "latency_chunks=5", "show=1"),
    "policy.toy": ("steps=20",),
    "policy.collect": ("episodes=2", "workers=1"),
}


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text."""
    for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```\s*$", markdown, re.MULTILINE | re.DOTALL):
        yield Block(match[1].strip(), markdown.count("\n", 0, match.start()) + 1, match[2])


def commands(markdown: str) -> list[str]:
    """The lines of the shell blocks, continued lines joined, comments and prompts left out."""
    shell = "\n".join(block.text for block in blocks(markdown) if block.language in ("bash", "sh"))
    lines = (line.strip().removeprefix("$ ") for line in shell.replace("\\\n", " ").splitlines())
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line and not line.startswith("#")]


def tree(markdown: str) -> list[str]:
    """The paths that the tree block names, folders with a slash at their end."""
    found = [block.text for block in blocks(markdown) if re.search(r"^driftfield/(\s|$)", block.text, re.MULTILINE)]
    if len(found) != 1:
        raise ValueError(f"expected one fenced block with a line 'driftfield/', found {len(found)}")
    paths, folders = [], [""]
    for line in found[0].splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent > 8:
            continue
        depth = indent // 2
        if indent % 2 or depth >= len(folders):
            raise ValueError(f"no folder above this line is set in by {indent - 2}: {line!r}")
        names = re.split(r"\s{2,}", line.strip())[0].split(" ")
        paths += [folders[depth] + name for name in names]
        folders = folders[: depth + 1] + [folders[depth] + names[0]] * names[0].endswith("/")
    return paths


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""


def of_module(command: str) -> str:
    return command.split()[2] if command.startswith("python -m ") else ""


PYTHON_BLOCKS = [block for block in blocks(readme()) if block.language == "python"]
PROGRAMS = [command for command in commands(readme()) if of_module(command)]


def test_the_readme_has_the_two_commands_a_program_and_python() -> None:
    assert {"make demo", "make test"} <= set(commands(readme()))
    assert PYTHON_BLOCKS and PROGRAMS


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: f"line {block.line}")
def test_python_in_the_readme_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / f"readme_line_{block.line}.py"
    program.write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(program), run_name="__main__")


def test_every_command_in_the_readme_is_of_a_known_kind() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for command in commands(readme()):
        words = shlex.split(command)
        assert not {"&&", "||", "|", ";", "&"} & set(words), f"{command}: one command a line"
        if words[0] == "make":
            goals = {word for word in words[1:] if "=" not in word}
            assert goals <= targets, f"{command}: the Makefile has no {goals - targets}"
        elif of_module(command):
            assert of_module(command) in SMOKE, f"{command}: say in SMOKE how to run it within seconds"
        else:
            assert words[0] in ELSEWHERE, f"{command}: neither run here nor known to act elsewhere"


@pytest.fixture(scope="module")
def folder_of_commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_command_in_the_readme_runs(command: str, folder_of_commands: Path) -> None:
    words = [sys.executable, *shlex.split(command)[1:], *SMOKE[of_module(command)]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        words, cwd=folder_of_commands, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"


def tracked_in(folder: str) -> set[str]:
    """The names git tracks directly in a folder, folders with a slash at their end."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--", folder or "."], cwd=ROOT, check=True, capture_output=True, text=True
    )
    below = [path.removeprefix(folder) for path in listing.stdout.split("\0") if path]
    return {path.partition("/")[0] + "/" * ("/" in path) for path in below}


def test_the_tree_names_what_exists() -> None:
    for path in tree(readme()):
        there = (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
        assert there, f"the README's tree names {path}"


def test_the_tree_leaves_nothing_out() -> None:
    named = tree(readme())
    for folder in {path.rstrip("/").rpartition("/")[0] for path in named}:
        prefix = f"{folder}/" if folder else ""
        told = {path.removeprefix(prefix) for path in named if path.startswith(prefix)}
        there = {name for name in tracked_in(prefix) if not name.startswith((".", "__")) and name != "py.typed"}
        assert there <= told, f"in {folder or 'the root'} the README's tree leaves out {sorted(there - told)}"


def test_links_between_documents_lead_somewhere() -> None:
    for document in sorted(ROOT.glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"<img[^>]+src=\"([^\"]+)", text):
            if not re.match(r"[a-z]+:|#", target):
                assert (ROOT / target.partition("#")[0]).exists(), f"{document.name} links to {target}"


def test_commands_are_read_from_shell_blocks_alone() -> None:
    page = "```bash\n# why\n$ make test   # all\npython -m a.b x=1 \\\n    y=2\n```\n```python\nmake = 1\n```\n"
    assert commands(page) == ["make test", "python -m a.b x=1 y=2"]


def test_a_tree_is_read_with_folders_lists_and_continued_lines() -> None:
    page = """
```
README.md LICENSE
driftfield/      the idea,
                 told at length
  a.py           x
  b/             y
    c.py
z/
```
"""
    inside = ["driftfield/", "driftfield/a.py", "driftfield/b/", "driftfield/b/c.py"]
    assert tree(page) == ["README.md", "LICENSE", *inside, "z/"]
