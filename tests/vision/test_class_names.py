"""Names of classes: where they come from, and which class a name means."""

import json
from pathlib import Path

import pytest

from vision.class_names import class_names, label_ids


def test_imagenet_names_are_those_of_its_thousand_classes() -> None:
    names = class_names("owner/name", 1000)
    assert names is not None and len(names) == 1000
    known = {0: "tench", 207: "golden retriever", 360: "otter", 417: "balloon", 999: "toilet tissue"}
    assert label_ids(names, list(known.values())) == list(known)
    assert label_ids(names, ["Golden Retriever", "tench, Tinca tinca"]) == [207, 0]


def test_a_name_of_two_classes_is_refused_with_both() -> None:
    names = class_names("owner/name", 1000) or ()
    with pytest.raises(ValueError, match=r"'crane' of the classes \[134, 517\]"):
        label_ids(names, ["crane"])


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="found 'goldn retriever'; did you mean 'golden retriever'"):
        label_ids(["otter", "golden retriever"], ["goldn retriever"])


def run_folder(folder: Path, data: str) -> Path:
    (folder / "model").mkdir()
    (folder / "config.yaml").write_text(f"data:\n  name: {data}\n", encoding="utf-8")
    return folder / "model"


def test_a_run_knows_the_names_of_its_data(tmp_path: Path) -> None:
    names = class_names(run_folder(tmp_path, "fashion_mnist"), 10) or ()
    assert label_ids(names, ["sandal", "Ankle boot"]) == [5, 9]


def test_names_beside_the_model_come_first(tmp_path: Path) -> None:
    model = run_folder(tmp_path, "fashion_mnist")
    (model / "class_names.json").write_text(json.dumps(["cat", "dog"]), encoding="utf-8")
    assert class_names(model, 2) == ("cat", "dog")
    with pytest.raises(ValueError, match="expected names of 3 classes, found 2"):
        class_names(model, 3)
    (model / "class_names.json").write_text('{"cat": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match="expected a list of texts"):
        class_names(model, 2)


@pytest.mark.parametrize("source", ["owner/name", "/nonexistent/model"])
def test_names_may_be_unknown(source: str) -> None:
    assert class_names(source, 10) is None


def test_names_of_other_data_are_unknown(tmp_path: Path) -> None:
    assert class_names(run_folder(tmp_path, "latents"), 10) is None
