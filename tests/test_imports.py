"""Who may import whom: read from the syntax trees, and seen once in an interpreter that has nothing but torch."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each package may import of the others; imports point one way.
MAY_IMPORT: dict[str, set[str]] = {
    "driftfield": set(),
    "vision": {"driftfield"},
    "policy": {"driftfield", "envs"},
    "envs": set(),
}
# The parts of driftfield that `import driftfield` leaves alone, and that may need more than torch.
MORE_THAN_TORCH = ("driftfield.toy", "driftfield.training")


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name; none for a package that is not there."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, module: str = "", *, is_package: bool = False) -> Iterator[str]:
    """The dotted name of each thing a syntax tree imports, at any depth: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                here = module.split(".")
                above = here[: len(here) - node.level + is_package]
                source = ".".join([*above, source] if source else above)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imports_of(path: Path, module: str) -> list[str]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package=path.name == "__init__.py"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b, c", ["a.b", "c"]),
        ("from a.b import c as d", ["a.b.c"]),
        ("from . import c", ["p.q.c"]),
        ("from .. import c", ["p.c"]),
        ("from ..a import c", ["p.a.c"]),
        ("def f():\n    if x:\n        import a", ["a"]),
    ],
)
def test_imports_are_read_from_every_form(source: str, expected: list[str]) -> None:
    assert list(imports(ast.parse(source), "p.q.r")) == expected


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imports(ast.parse("from . import c\nfrom .a import d"), "p.q", is_package=True)) == ["p.q.c", "p.q.a.d"]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    forbidden = MAY_IMPORT.keys() - {package} - MAY_IMPORT[package] | {"tests", "benchmarks"}
    assert modules(package) or package in ("policy", "envs"), f"{package} has no modules"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for module, path in modules(package).items()
        for name in imports_of(path, module)
        if name.partition(".")[0] in forbidden
    ]
    assert wrong == []


def test_the_core_of_driftfield_imports_only_torch_and_the_standard_library() -> None:
    """But for the kernels, which nothing imports that does not run them (see test_backend)."""
    allowed = sys.stdlib_module_names | {"torch", "driftfield"}
    core = {name: path for name, path in modules("driftfield").items() if not name.startswith(MORE_THAN_TORCH)}
    assert {"driftfield", "driftfield.field", "driftfield.loss"} <= core.keys()
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for module, path in core.items()
        for name in imports_of(path, module)
        if name.partition(".")[0] not in (allowed | {"triton"} if module.startswith("driftfield.fused") else allowed)
        or name.startswith(MORE_THAN_TORCH)
    ]
    assert wrong == []


def test_envs_know_nothing_of_torch() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for module, path in modules("envs").items()
        for name in imports_of(path, module)
        if name.partition(".")[0] in ("torch", "torchvision")
    ]
    assert wrong == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_import_goes_round_in_a_circle(package: str) -> None:
    inside = modules(package)

    def module_of(name: str) -> str | None:  # an imported name is a module, or something in a module
        return name if name in inside else name.rpartition(".")[0] if name.rpartition(".")[0] in inside else None

    graph = {module: {module_of(name) for name in imports_of(path, module)} for module, path in inside.items()}
    try:
        graphlib.TopologicalSorter({module: needs - {None} for module, needs in graph.items()}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def distribution_name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def required_with(distribution: str) -> set[str]:
    """A distribution and all it requires without any extra, as far as installed."""
    found, waiting = set(), [distribution]
    while waiting:
        name = distribution_name(waiting.pop())
        if name not in found:
            found.add(name)
            try:
                waiting += [r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r]
            except importlib.metadata.PackageNotFoundError:
                found.discard(name)  # for another platform
    return found


def test_driftfield_comes_up_with_nothing_but_torch_and_opens_no_connection() -> None:
    wanted = required_with("torch") | {"driftfield"}
    hidden = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not wanted & {distribution_name(name) for name in distributions}
    } - sys.stdlib_module_names.union(MAY_IMPORT)
    assert {"numpy", "safetensors", "hydra", "omegaconf", "tqdm", "matplotlib"} <= hidden
    script = f"""
import sys

def no_connection(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"import driftfield caused {{event}}")

for name in {sorted(hidden)!r}:
    sys.modules[name] = None  # importing it now raises ModuleNotFoundError
sys.addaudithook(no_connection)
import driftfield
import torch

early = [name for name in sys.modules if name.startswith({MORE_THAN_TORCH!r})]
assert not early, f"import driftfield has imported {{early}}"
x, positives = torch.randn(2, 4, 3), torch.randn(2, 5, 3)
print("loss", tuple(driftfield.DriftingLoss()(x, positives).loss.shape))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (run.returncode, run.stdout.strip()) == (0, "loss (2,)"), run.stderr


def imported_distributions(*folders: str) -> set[str]:
    """The distributions that hold what the Python files under these folders import."""
    holders = importlib.metadata.packages_distributions()
    roots = {
        "tensorboard" if name.startswith("torch.utils.tensorboard") else name.partition(".")[0]
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    own = {path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")}  # helpers beside a test
    outside = roots - sys.stdlib_module_names - MAY_IMPORT.keys() - own - {"tests", "benchmarks", ""}
    return {distribution_name(name) for root in outside for name in holders.get(root, [f"{root}-is-not-installed"])}


def declared_distributions(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {distribution_name(requirement) for requirements in lists for requirement in requirements} - {"driftfield"}


def test_what_the_packages_import_is_what_pyproject_requires() -> None:
    optional = declared_distributions("wandb") - declared_distributions()  # not in the lock, so not installed
    imported = imported_distributions(*MAY_IMPORT)
    missing = {f"{name}-is-not-installed" for name in optional}
    declared = declared_distributions("train", "vision", "envs", "policy", "simulators", "fused", "tensorboard")
    assert imported - declared - missing == set(), "imported but not required"
    only_files = {"gymnasium-robotics"}  # envs.kitchen reads its model
    assert declared - imported == only_files, "required but never imported"


def test_what_the_tests_import_is_what_pyproject_requires() -> None:
    extras = ("train", "vision", "envs", "policy", "simulators", "fused", "tensorboard", "wandb", "dev")
    declared = declared_distributions(*extras)
    assert imported_distributions("tests") - declared == set()
