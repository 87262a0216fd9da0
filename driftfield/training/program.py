"""The command line that every program of this project has."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from driftfield.training.config import EXPERIMENT, compose_plain, load_config, to_yaml
from driftfield.training.errors import UserError
from driftfield.training.schema import ConfigError, declared_fields, describe

T = TypeVar("T")


def run_program(
    main: Callable[[T], int | None],
    schema: type[T],
    *,
    config_dir: Path,
    config_name: str,
    description: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a program: read its command line, call ``main(config)``, and tell the user's errors in one sentence.

    Args:
        main: the program; what it returns is the exit code, None for 0.
        schema, config_dir, config_name: as for `load_config`.
        description: what ``--help`` says first.
        arguments: the command line, ``sys.argv[1:]`` if not given.

    Returns:
        The exit code: 2 for a `UserError`, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = [word for word in words if word.startswith("-")]
    overrides = [word for word in words if not word.startswith("-")]
    try:
        for flag in flags:
            if flag not in ("-h", "--help", "--print-config"):
                raise ConfigError(f"unknown option {flag}: expected key=value, --print-config or --help")
        if "-h" in flags or "--help" in flags:
            print(_help(schema, config_dir, config_name, overrides, description))
            return 0
        config = load_config(schema, config_dir=config_dir, config_name=config_name, overrides=overrides)
        if "--print-config" in flags:
            print(to_yaml(config), end="")
            return 0
        return main(config) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _help(schema: type, config_dir: Path, config_name: str, overrides: Sequence[str], description: str) -> str:
    data = compose_plain(schema, config_dir, config_name, overrides)
    rows = list(_help_rows(schema, data))
    width = min(44, max(len(row[0]) for row in rows))
    keys = "\n".join(f"  {setting:<{width}}  {text}" for setting, text in rows)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    return (
        f"{description.strip()}\n\nusage: {program} [experiment=NAME] [key=value ...] [--print-config] [--help]\n\n"
        f"keys, with their present values:\n{keys}{_experiments(config_dir)}"
    )


def _help_rows(schema: type, data: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    for declared, kind in declared_fields(schema):
        value = data.get(declared.name)
        if is_dataclass(kind) and isinstance(value, Mapping):
            yield from _help_rows(cast(type, kind), value, f"{where}{declared.name}.")
            continue
        meaning = f"{declared.metadata.get('help', '')} ({describe(kind, declared.metadata)})"
        yield f"{where}{declared.name}={json.dumps(value, ensure_ascii=False)}", meaning.strip()


def _experiments(config_dir: Path) -> str:
    files = sorted((config_dir / EXPERIMENT).glob("*.yaml"))
    if not files:
        return ""
    width = max(len(path.stem) for path in files)
    return "\n\nexperiments:\n" + "\n".join(f"  {path.stem:<{width}}  {_first_comment(path)}" for path in files)


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
