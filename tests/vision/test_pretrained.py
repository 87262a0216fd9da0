"""`from_pretrained` from folder, hub and release; `push_to_hub` and the card it writes."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.vision.release_artifacts import GOLDEN, golden_mae
from vision import pretrained
from vision.convert import convert
from vision.generator import ImageGenerator
from vision.mae import ResNetMAE
from vision.model_card import model_card
from vision.release_model import convert_release

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY: dict[str, Any] = {"in_channels": 2, "base_channels": 4, "blocks": (1, 1), "num_classes": 3}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    cache = tmp_path / "huggingface" / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, repository: str, path: str = "", *, commit: str = COMMIT, revision: str = "main") -> Path:
    """A folder of a repository in the cache, where the hub's client finds it."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit, encoding="utf-8")
    folder = root / "snapshots" / commit / path
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items()) and len(state) > 0


def test_a_hub_id_is_found_in_the_hubs_cache(hub_cache: Path) -> None:
    mae = ResNetMAE(**TINY)
    mae.save_pretrained(cached(hub_cache, "me/tiny"))
    assert equal(ResNetMAE.from_pretrained("me/tiny"), mae)
    other = ResNetMAE(**TINY)
    other.save_pretrained(cached(hub_cache, "me/tiny", commit="f" * 40, revision="v2"))
    assert equal(ResNetMAE.from_pretrained("me/tiny", revision="v2"), other)


def test_only_the_two_files_are_asked_for(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ResNetMAE(**TINY).save_pretrained(tmp_path)
    ResNetMAE.from_pretrained("me/tiny", revision="v1")
    assert asked == [(("me/tiny",), {"revision": "v1", "allow_patterns": ["config.json", "model.safetensors"]})]
    golden_mae("mae_latent", tmp_path / "models" / "mae" / "jax" / "mae_latent_640")
    ResNetMAE.from_pretrained("hf://mae_latent_640")
    path = "models/mae/jax/mae_latent_640"
    patterns = [f"{path}/metadata.json", f"{path}/ema_params.msgpack"]
    assert asked[1:] == [(("Goodeat/drifting",), {"revision": None, "allow_patterns": patterns})]


def test_a_released_model_is_converted_once(hub_cache: Path, tmp_path: Path) -> None:
    artifact = cached(hub_cache, "Goodeat/drifting", "models/gen/jax/latent_B_sota")
    shutil.copytree(GOLDEN / "generator_latent", artifact, dirs_exist_ok=True)
    generator = ImageGenerator.from_pretrained("hf://latent_B_sota")
    convert(GOLDEN / "generator_latent", tmp_path / "expected")
    assert equal(generator, ImageGenerator.from_pretrained(tmp_path / "expected"))
    ours = hub_cache.parent / "driftfield" / "latent_B_sota"
    assert sorted(path.name for path in ours.iterdir()) == ["config.json", "model.safetensors"]
    shutil.rmtree(hub_cache)
    assert equal(ImageGenerator.from_pretrained("hf://latent_B_sota"), generator)


def test_a_half_written_conversion_is_done_again(hub_cache: Path) -> None:
    artifact = cached(hub_cache, "Goodeat/drifting", "models/gen/jax/ablation")
    shutil.copytree(GOLDEN / "generator_pixel", artifact, dirs_exist_ok=True)
    generator = ImageGenerator.from_pretrained("hf://ablation")
    (hub_cache.parent / "driftfield" / "ablation" / "config.json").unlink()  # it is written last
    assert equal(ImageGenerator.from_pretrained("hf://ablation"), generator)


def test_a_process_that_is_not_the_main_one_gets_its_conversion(hub_cache: Path) -> None:
    """The main process may be slower, or on a machine with another cache."""
    artifact = cached(hub_cache, "Goodeat/drifting", "models/gen/jax/latent_B_sota")
    shutil.copytree(GOLDEN / "generator_latent", artifact, dirs_exist_ok=True)
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        assert ImageGenerator.from_pretrained("hf://latent_B_sota").channels == 4
    finally:
        torch.distributed.destroy_process_group()


def test_one_converts_while_the_others_wait(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = cached(hub_cache, "Goodeat/drifting", "models/gen/jax/latent_B_sota")
    shutil.copytree(GOLDEN / "generator_latent", artifact, dirs_exist_ok=True)
    converted: list[Any] = []

    def convert_slowly(*arguments: Any, **options: Any) -> None:
        converted.append(arguments)
        time.sleep(0.5)  # long enough for the others to come
        convert_release(*arguments, **options)

    monkeypatch.setattr(pretrained, "convert_release", convert_slowly)
    with ThreadPoolExecutor(3) as pool:  # the lock is a file's, so it parts threads as it parts processes
        first, *others = pool.map(ImageGenerator.from_pretrained, ["hf://latent_B_sota"] * 3)
    assert len(converted) == 1
    assert all(equal(first, other) for other in others)


def test_each_revision_is_converted_for_itself(hub_cache: Path) -> None:
    for name, commit, revision in [("generator_latent", COMMIT, "main"), ("generator_pixel", "f" * 40, "pr/1")]:
        artifact = cached(hub_cache, "Goodeat/drifting", "models/gen/jax/ablation", commit=commit, revision=revision)
        shutil.copytree(GOLDEN / name, artifact, dirs_exist_ok=True)
    assert ImageGenerator.from_pretrained("hf://ablation").channels == 4
    assert ImageGenerator.from_pretrained("hf://ablation", revision="pr/1").channels == 3
    folders = sorted(path.name for path in (hub_cache.parent / "driftfield").iterdir())
    assert folders == ["ablation", "ablation@pr%2F1"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "me/tiny",
            FileNotFoundError,
            "^me/tiny: expected .* found neither .* fetch config.json and model.safetensors",
        ),
        ("hf://mae_latent_256", FileNotFoundError, "^Goodeat/drifting: .* python -m vision.convert source=FOLDER"),
        ("hf://latent_L_sota", ValueError, "^hf://latent_L_sota: expected a ResNetMAE .* one of mae_latent_640, "),
        (
            "hf://mae_latent_64",
            ValueError,
            "^hf://mae_latent_64: expected a ResNetMAE of the release, hf:// and one of",
        ),
        ("not/a/folder", FileNotFoundError, "^not/a/folder: expected a folder or a hub id .* no such folder$"),
    ],
)
def test_what_is_nowhere(hub_cache: Path, source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        ResNetMAE.from_pretrained(source)
    assert "\n" not in str(raised.value)


def test_a_released_name_that_holds_another_model(hub_cache: Path) -> None:
    artifact = cached(hub_cache, "Goodeat/drifting", "models/mae/jax/mae_latent_640")
    shutil.copytree(GOLDEN / "generator_latent", artifact, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="expected the metadata of ResNetMAE, found that of ImageGenerator"):
        ResNetMAE.from_pretrained("hf://mae_latent_640")
    assert not (hub_cache.parent / "driftfield").exists()


def test_a_partly_cached_repository(hub_cache: Path) -> None:
    cached(hub_cache, "Goodeat/drifting", "models/mae/jax/mae_latent_640")
    with pytest.raises(FileNotFoundError, match="mae_latent_640: .*found no metadata.json nor ema_params.msgpack"):
        ResNetMAE.from_pretrained("hf://mae_latent_640")
    cached(hub_cache, "me/tiny")
    with pytest.raises(FileNotFoundError, match="found no config.json nor model.safetensors"):
        ResNetMAE.from_pretrained("me/tiny")


def test_a_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="a folder with config.json and model.safetensors, found no config.json"
    ):
        ResNetMAE.from_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="found the release's ema_params.msgpack; python -m vision.convert source"
    ):
        ImageGenerator.from_pretrained(GOLDEN / "generator_latent")


class FakeHub:
    """Records what would be sent."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        return f"hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.calls.append((repo_id, commit_message))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_what_is_pushed_loads_again(hub: FakeHub, tmp_path: Path) -> None:
    mae = ResNetMAE(**TINY)
    assert mae.push_to_hub("me/tiny", private=True) == "hub/me/tiny"
    assert hub.calls == [("me/tiny", {"private": True, "exist_ok": True}), ("me/tiny", "Upload ResNetMAE")]
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert equal(ResNetMAE.from_pretrained(tmp_path), mae)


def test_the_card_says_what_the_model_is(hub: FakeHub) -> None:
    mae = ResNetMAE(**TINY)
    mae.push_to_hub("me/tiny", dataset="two digits", metrics={"FID (release protocol)": 8.4625, "a|b": "none"})
    _, header, text = hub.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header) == {"license": "mit", "tags": ["drifting", "one-step-generation", "pytorch"]}
    assert "# ResNetMAE\n\nMasked autoencoder over a ResNet; its encoder makes the features of the drift.\n" in text
    assert f"{sum(parameter.numel() for parameter in mae.parameters()):,} parameters" in text
    assert '"base_channels": 4' in text and "arxiv.org/abs/2602.04770" in text
    assert text.endswith(
        "## Data\n\nTrained on two digits.\n\n"
        "## Metrics\n\n| metric | value |\n|---|---|\n| FID (release protocol) | 8.4625 |\n| a\\|b | none |\n"
    )


def test_the_cards_code_loads_the_model(hub: FakeHub, hub_cache: Path) -> None:
    mae = ResNetMAE(**TINY)
    mae.push_to_hub("me/tiny")
    mae.save_pretrained(cached(hub_cache, "me/tiny"))
    code = hub.files["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    names: dict[str, Any] = {}
    exec(code.replace('"cuda"', '"cpu"'), names)
    assert equal(names["model"], mae)


def test_a_card_has_no_empty_section() -> None:
    card = model_card(
        repository="me/m", model="M", module="m", description="A model.", num_parameters=1, arguments={"a": 1},
        license="cc-by-4.0",
    )  # fmt: skip
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "Data" not in card and "Metrics" not in card and "None" not in card
    sections = card.split("\n#")[1:]
    assert len(sections) == 3 and all(len(section.strip().splitlines()) > 1 for section in sections)


def test_a_hub_that_refuses(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token\nlog in")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(OSError, match="^me/tiny: expected to write to it, but the hub says: no token; `hf auth login`"):
        ResNetMAE(**TINY).push_to_hub("me/tiny")
    with pytest.raises(ValueError, match="repository: expected a hub id 'owner/name', found 'tiny'"):
        ResNetMAE(**TINY).push_to_hub("tiny")
    assert hub.calls == []
