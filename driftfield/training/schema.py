"""A configuration's keys as a dataclass: types, ranges and help texts, and the check of plain data against them."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from driftfield.training.errors import UserError

T = TypeVar("T")
UNSET = "???"  # Hydra's mark of a value that the user has to give
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "min": (">=", lambda value, bound: value >= bound),
    "max": ("<=", lambda value, bound: value <= bound),
    "above": (">", lambda value, bound: value > bound),
    "below": ("<", lambda value, bound: value < bound),
}
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


class ConfigError(UserError):
    """A configuration that does not say what the program needs."""


def option(
    help: str,
    default: Any = MISSING,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Field of a configuration dataclass, with its help text and its range.

    Args:
        help: what the key means, with its unit.
        default: its value where nothing sets it; without it the user has to.
        min, max: the smallest and largest value allowed, of each element for a list.
        above, below: bounds that the value may not reach.

    >>> from dataclasses import dataclass
    >>> @dataclass(kw_only=True)
    ... class Config:
    ...     batch_size: int = option("images per step", 64, min=1)
    >>> from_plain(Config, {"batch_size": 0})
    Traceback (most recent call last):
    driftfield.training.schema.ConfigError: batch_size: expected an integer >= 1, found 0
    """
    bounds = {"min": min, "max": max, "above": above, "below": below}
    metadata = {"help": help} | {name: bound for name, bound in bounds.items() if bound is not None}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default_factory=lambda: deepcopy(default), metadata=metadata)


def from_plain(schema: type[T], data: Mapping[str, Any]) -> T:
    """Check plain data against a configuration dataclass and build it.

    Args:
        schema: a dataclass, possibly nested, of int, float, bool, str, Path, Literal, tuple, dict and ``X | None``.
        data: values by key; a key left out keeps its default.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range.

    Returns:
        An instance of ``schema``.
    """
    _refuse_unknown(schema, data, "", valid=list(_keys(schema)))
    return _build(schema, data, "")


def to_plain(config: Any) -> Any:
    """A configuration as plain data for YAML and JSON: dataclasses become dicts, tuples lists, paths text.

    >>> to_plain({"sizes": (1, 2), "root": Path("/data")})
    {'sizes': [1, 2], 'root': '/data'}
    """
    if is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def default_values(schema: type) -> dict[str, Any]:
    """What a configuration dataclass holds before anything sets it, as plain data; ``???`` where the user has to.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     seed: int
    >>> default_values(Config)
    {'seed': '???'}
    """
    values: dict[str, Any] = {}
    for declared, kind in declared_fields(schema):
        if declared.default_factory is not MISSING:
            values[declared.name] = to_plain(declared.default_factory())
        elif declared.default is not MISSING:
            values[declared.name] = to_plain(declared.default)
        else:
            values[declared.name] = default_values(_as_type(kind)) if is_dataclass(kind) else UNSET
    return values


def declared_fields(schema: type) -> list[tuple[Field[Any], Any]]:
    """Fields of a dataclass, each with its evaluated type.

    >>> declared_fields(Field)
    Traceback (most recent call last):
    TypeError: must be called with a dataclass type or instance
    """
    hints = get_type_hints(schema)
    return [(declared, hints[declared.name]) for declared in fields(schema)]


def describe(kind: Any, bounds: Mapping[str, Any]) -> str:
    """Say in words what a value of a type and range is.

    >>> describe(int | None, {"min": 1})
    'an integer >= 1 or null'
    """
    origin, parts = get_origin(kind), get_args(kind)
    if _is_union(kind):
        return " or ".join("null" if part is type(None) else describe(part, bounds) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        return f"a list of {describe(parts[0], bounds)}"
    if origin is tuple:
        return "a list [" + ", ".join(describe(part, bounds) for part in parts) + "]"
    if origin is dict:
        return f"names with {describe(parts[1], bounds)} each"
    if is_dataclass(kind):
        return "keys and values"
    limits = [f"{sign} {bounds[name]}" for name, (sign, _) in _BOUNDS.items() if name in bounds]
    return f"{_NAMES[kind]} {' and '.join(limits)}".rstrip()


def nearest(found: str, valid: Sequence[str]) -> str:
    """End of a sentence about a wrong name: the valid one that was probably meant.

    >>> nearest("lrr", ["lr", "steps"])
    "; did you mean 'lr'?"
    """
    same_name = [key for key in valid if key.rpartition(".")[2] == found.rpartition(".")[2]]
    close = same_name or difflib.get_close_matches(found, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists the valid ones"


def _keys(schema: type, where: str = "") -> Iterator[str]:
    for declared, kind in declared_fields(schema):
        yield where + declared.name
        if is_dataclass(kind):
            yield from _keys(_as_type(kind), f"{where}{declared.name}.")


def _refuse_unknown(schema: type, data: Any, where: str, valid: Sequence[str]) -> None:
    kinds = {declared.name: kind for declared, kind in declared_fields(schema)}
    for key, value in data.items():
        if key not in kinds:
            raise ConfigError(f"unknown key {where + str(key)!r}{nearest(where + str(key), valid)}")
        if is_dataclass(kinds[key]) and isinstance(value, Mapping):
            _refuse_unknown(_as_type(kinds[key]), value, f"{where}{key}.", valid)


def _build(schema: type[T], data: Mapping[str, Any], where: str) -> T:
    values = {}
    for declared, kind in declared_fields(schema):
        key = where + declared.name
        required = declared.default is MISSING and declared.default_factory is MISSING
        value = data.get(declared.name, UNSET)
        if value == UNSET and (required or declared.name in data):
            raise ConfigError(f"{key}: expected {describe(kind, declared.metadata)}, found no value")
        if declared.name in data:
            values[declared.name] = _convert(value, kind, declared.metadata, key)
    try:
        return schema(**values)
    except ValueError as error:  # a dataclass's own __post_init__ compares keys with each other
        raise ConfigError(f"{where}{error}") from error


def _convert(value: Any, kind: Any, bounds: Mapping[str, Any], key: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if _is_union(kind):
        return None if value is None else _convert(value, _without_none(kind), bounds, key)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _build(_as_type(kind), value, key + ".")
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(_convert(element, part, bounds, f"{key}[{i}]") for i, (element, part) in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {str(name): _convert(element, parts[1], bounds, f"{key}.{name}") for name, element in value.items()}
    if origin is Literal and any(type(value) is type(choice) and value == choice for choice in parts):
        return value
    if kind is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is kind and _in_range(value, bounds):
        return value
    hint = nearest(str(value), [str(choice) for choice in parts]) if origin is Literal else ""
    raise ConfigError(f"{key}: expected {describe(kind, bounds)}, found {value!r}{hint}")


def _in_range(value: Any, bounds: Mapping[str, Any]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return all(allowed(value, bounds[name]) for name, (_, allowed) in _BOUNDS.items() if name in bounds)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _without_none(kind: Any) -> Any:
    rest = [part for part in get_args(kind) if part is not type(None)]
    if len(rest) != 1:
        raise TypeError(f"a configuration's only union is X | None, found {kind}")
    return rest[0]


def _as_type(kind: Any) -> type:
    return cast(type, kind)
