"""Names of the classes a generator knows, and the classes of names."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from driftfield.training import ConfigError, read_config
from driftfield.training.atomic_file import parse_json
from vision.data import FASHION_MNIST_CLASSES

CLASS_NAMES_FILE: Final = "class_names.json"  # beside a model: a list of names, in the order of the classes
IMAGENET_CLASSES: Final = 1000
NAMES_OF_DATA: Final = {"digits": tuple("0123456789"), "fashion_mnist": FASHION_MNIST_CLASSES}


def class_names(source: str | os.PathLike[str], num_classes: int) -> tuple[str, ...] | None:
    """Names of a model's classes, as far as they are known.

    They are those of class_names.json beside the model, else of the data that the run around the model's folder was
    trained on, else, for 1000 classes, ImageNet's.

    Args:
        source: where the model is from.
        num_classes: how many it has.

    Raises:
        ValueError: class_names.json does not hold as many names.

    Returns:
        One text per class, several names of a class separated by ", "; None where no names are known.

    >>> names = class_names("Goodeat/drifting", 1000)
    >>> names[207], names[0]
    ('golden retriever', 'tench, Tinca tinca')
    """
    folder = Path(source)
    names = (_names_beside(folder) or _names_of_run(folder.parent)) if folder.is_dir() else None
    if names is None and num_classes == IMAGENET_CLASSES:
        from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import

        info = ImageNetInfo("imagenet-1k")
        names = tuple(info.index_to_description(index) for index in range(num_classes))
    if names is not None and len(names) != num_classes:
        raise ValueError(f"{source}: expected names of {num_classes} classes, found {len(names)}")
    return names


def label_ids(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """The classes that have these names.

    Args:
        names: of all classes, as `class_names` returns them.
        wanted: one of each class's names, or all of them as they stand in `names`; case does not matter.

    Raises:
        ValueError: no class, or more than one, has a name.

    >>> label_ids(["tench, Tinca tinca", "crane"], ["tinca tinca"])
    [0]
    """
    by_name: dict[str, list[int]] = {}
    for index, text in enumerate(names):
        for name in dict.fromkeys([text.casefold(), *(part.strip() for part in text.casefold().split(","))]):
            by_name.setdefault(name, []).append(index)
    return [_only_one(by_name, name) for name in wanted]


def _only_one(by_name: dict[str, list[int]], name: str) -> int:
    found = by_name.get(name.casefold(), [])
    if not found:
        close = "".join(
            f"; did you mean {near!r}?" for near in difflib.get_close_matches(name.casefold(), by_name, n=1)
        )
        raise ValueError(f"expected the name of a class, found {name!r}{close}")
    if len(found) > 1:
        raise ValueError(f"expected the name of one class, found {name!r} of the classes {found}")
    return found[0]


def _names_beside(folder: Path) -> tuple[str, ...] | None:
    path = folder / CLASS_NAMES_FILE
    if not path.is_file():
        return None
    names = parse_json(path.read_bytes())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected a list of texts")
    return tuple(names)


def _names_of_run(folder: Path) -> tuple[str, ...] | None:
    try:
        data = read_config(folder / "config.yaml").get("data")
    except ConfigError:  # no run, or none of ours
        return None
    return NAMES_OF_DATA.get(data.get("name", "")) if isinstance(data, dict) else None
