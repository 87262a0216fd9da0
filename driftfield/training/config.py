"""The one configuration system: a dataclass says which keys there are, YAML files and ``key=value`` set them.

    configs/train.yaml                 values of the program's keys; a key left out keeps the dataclass's default
    configs/experiment/NAME.yaml       experiment=NAME: only what is special; its first comment line says what it is
    configs/GROUP/NAME.yaml            GROUP=NAME: further groups, named in the defaults list of train.yaml

Hydra composes the files; the dataclass decides. Nothing is read, written or instantiated before every key is checked.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, SafeLoader, YAMLError, parse  # type: ignore[import-untyped]

from driftfield.training.schema import ConfigError, default_values, from_plain, nearest, to_plain

T = TypeVar("T")
EXPERIMENT = "experiment"
MAX_DEPTH = 20


def load_config(schema: type[T], *, config_dir: Path, config_name: str, overrides: Sequence[str] = ()) -> T:
    """Compose and check a configuration: the dataclass's defaults < config_name.yaml < experiment < key=value.

    Args:
        schema: a dataclass as `from_plain` takes.
        config_dir: folder of the YAML files.
        config_name: the program's file there, without ``.yaml``.
        overrides: ``"experiment=NAME"``, ``"GROUP=NAME"``, ``"key.subkey=value"`` in Hydra's grammar of values.

    Raises:
        ConfigError: one sentence naming the key, what was expected and what was found.

    Returns:
        An instance of ``schema``.
    """
    return from_plain(schema, compose_plain(schema, config_dir, config_name, overrides))


def to_yaml(config: Any) -> str:
    """A configuration as YAML that `read_config` reads back equal.

    >>> to_yaml({"learning_rate": 1e-5})
    'learning_rate: 1.0e-05\\n'
    """
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file as data alone: ``${...}`` stays text, so a foreign file reads neither environment nor files.

    Raises:
        ConfigError: if it can't be read, is not a mapping, gives a key twice, is nested deeply, or repeats itself by
            aliases (``*name``), which let a short file fill the memory.
    """
    try:
        _check_plain(path)
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path}: expected YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def compose_plain(schema: type, config_dir: Path, config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose files and overrides as `load_config` does, unchecked: what the keys would be set to.

    Raises:
        ConfigError: a file or an override that can't be read, or names code by ``_target_``.
    """
    parsed = [_parse(text) for text in overrides]
    groups = [override for override in parsed if _chooses_a_file(override, config_dir)]
    try:
        with initialize_config_dir(config_dir=str(config_dir.resolve()), version_base=None):
            composed = compose(config_name, overrides=[_choice(override, config_dir) for override in groups])
        data = to_plain(OmegaConf.to_container(OmegaConf.merge(default_values(schema), composed)))
        for override in parsed:
            if override not in groups:
                _set(data, override.key_or_group, override.value())
        data = to_plain(OmegaConf.to_container(OmegaConf.create(data), resolve=True))
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"configuration {config_dir / config_name}.yaml: {_one_line(error)}") from error
    _refuse_targets(data)
    return dict(data)


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        if not (equals and all(part.isidentifier() for part in key.split("."))):
            raise ConfigError(f"{text!r}: expected key=value") from error
        return Override(OverrideType.CHANGE, key, ValueType.ELEMENT, value)  # text outside the grammar, such as ~/data
    key = override.key_or_group
    if not key:
        raise ConfigError(f"{text!r}: expected key=value")
    if override.is_add() or override.is_force_add() or override.is_delete() or override.package is not None:
        raise ConfigError(f"{text!r}: expected key=value, without '+', '~' or '@': the keys are fixed, so {key}=...")
    if override.is_sweep_override():
        raise ConfigError(f"{text!r}: expected one value; a list is {key}=[a,b], a text with a comma {key}='\"a,b\"'")
    return override


def _chooses_a_file(override: Override, config_dir: Path) -> bool:
    return (config_dir / override.key_or_group).is_dir() and not isinstance(override.value(), dict)


def _choice(override: Override, config_dir: Path) -> str:
    group, name = override.key_or_group, str(override.value())
    names = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"{group}: expected one of {', '.join(names)}; found {name!r}{nearest(name, names)}")
    if group == EXPERIMENT:
        return f"+{group}@_global_='{name}'"  # spares each file Hydra's `# @package _global_` line
    return f"{group}='{name}'"


def _set(data: Any, key: str, value: Any) -> None:
    if isinstance(value, dict) and value:
        for name, element in value.items():  # what it does not name stays, as in a file
            _set(data, f"{key}.{name}", element)
        return
    *groups, last = key.split(".")
    for depth, group in enumerate(groups):
        if not isinstance(data.setdefault(group, {}), dict):
            raise ConfigError(f"unknown key {key!r}: {'.'.join(groups[: depth + 1])} is a single value")
        data = data[group]
    data[last] = value


def _check_plain(path: Path) -> None:
    depth = 0
    with open(path, encoding="utf-8") as file:
        for event in parse(file, Loader=SafeLoader):  # one by one, so a hostile file is left before it takes long
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if isinstance(event, AliasEvent) or depth > MAX_DEPTH:
                raise ConfigError(f"{path}: expected YAML without aliases, at most {MAX_DEPTH} levels deep")


def _refuse_targets(data: Any, where: str = "") -> None:
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if key == "_target_":
            raise ConfigError(f"{where}_target_: a configuration holds values and names no code, found {value!r}")
        _refuse_targets(value, f"{where}{key}.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
