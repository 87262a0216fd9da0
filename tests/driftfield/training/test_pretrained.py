"""A model's folder: what is written is read back bit by bit; anything else is refused, by the file's name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftfield.training.pretrained import read_arguments, read_model_name, read_weights, write_model


class Model(nn.Module):
    def __init__(self, *, width: int) -> None:
        super().__init__()
        if width > 9:
            raise ValueError(f"width must be at most 9, got {width}")
        self.layer = nn.Linear(width, 2)
        self.register_buffer("count", torch.tensor(7))


def build(folder: Path) -> Model:
    return read_weights(folder, lambda: Model(**read_arguments(folder, "Model")))


def tensors(folder: Path) -> dict[str, Tensor]:
    return build(folder).state_dict()


def write(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "deep" / "model", Model(width=3), "Model", {"width": 3})
    return tmp_path / "deep" / "model"


def test_what_is_written_is_read_bit_by_bit(folder: Path) -> None:
    model = Model(width=3).half().train()
    model.count += 1
    write_model(folder, model, "Model", {"width": 3})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert read_model_name(folder) == "Model" and read_arguments(folder, "Model") == {"width": 3}
    loaded = read_weights(folder, lambda: Model(width=3).half())
    assert not loaded.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_model_of_another_size_replaces_the_old_one(folder: Path) -> None:
    write_model(folder, Model(width=5), "Model", {"width": 5})
    assert tensors(folder)["layer.weight"].shape == (2, 5)


@pytest.mark.parametrize("failing", ["model.safetensors", "config.json"])
def test_a_disk_that_refuses_leaves_each_file_whole(
    failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_model(folder, Model(width=3), "Model", {"width": 3})
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
    assert (folder / failing).read_bytes() == before[failing]
    tensors(folder)


def test_config_is_written_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: (order.append(Path(target).name), replace(source, target))
    )
    write_model(folder, Model(width=3), "Model", {"width": 3})
    assert order == ["model.safetensors", "config.json"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_absent_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"model: expected {name}, found none$"):
        build(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model": "Other", "arguments": {}}, "expected the config of Model, found that of Other"),
        ({"model": "Model"}, "expected an object with the keys 'model' and 'arguments'"),
        ({"model": "Model", "arguments": {}, "more": 1}, "expected an object with the keys 'model' and 'arguments'"),
        ({"model": "Model", "arguments": [3]}, r"expected a text and an object, found 'Model', \[3\]"),
        ({"model": 3, "arguments": {}}, r"expected a text and an object, found 3, \{\}"),
        ({"model": "Model", "arguments": {"width": 10}}, "width must be at most 9, got 10"),
        ({"model": "Model", "arguments": {"length": 3}}, "unexpected keyword argument 'length'"),
    ],
)
def test_a_config_of_something_else_is_refused(config: dict[str, Any], words: str, folder: Path) -> None:
    write(folder, **config)
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        build(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model": "Model", ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_model_name(folder)


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    write(folder, model="Model", arguments={"width": 4})
    with pytest.raises(ValueError, match=r"model\.safetensors: the weights do not fit the model of config\.json"):
        build(folder)
    with pytest.raises(ValueError, match="the weights do not fit"):
        read_weights(folder, lambda: nn.Sequential(Model(width=3)))  # other names


def test_weights_that_are_cut_off_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        build(folder)
