"""`DriftingPipeline`: called as DiT's pipeline is, saved and loaded whole."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tests.vision.tiny_models import autoencoder, generator, tiny_autoencoder
from vision.data import to_uint8
from vision.generator import ImageGenerator
from vision.pipeline import DriftingPipeline
from vision.sample import sample
from vision.tiny_decoder import TinyDecoder
from vision.tokenizer import Tokenizer

NAMES = ("tench, Tinca tinca", "otter", "golden retriever", "cock", "hen")


@pytest.fixture(scope="module")
def pipeline() -> DriftingPipeline:
    return DriftingPipeline(generator(channels=4), Tokenizer(autoencoder()), class_names=NAMES)


@pytest.fixture(scope="module")
def saved(pipeline: DriftingPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def test_a_seed_gives_the_samples_of_the_program(pipeline: DriftingPipeline) -> None:
    images = pipeline([2, 0, 2], guidance_scale=1.5, generator=7, output_type="pt").images
    labels = torch.tensor([2, 0, 2])
    expected = sample(pipeline.generator, labels, guidance_scale=1.5, seed=7, tokenizer=pipeline.tokenizer)
    torch.testing.assert_close(images, (expected.clamp(-1, 1) + 1) / 2)


def test_output_types_show_the_same_images(pipeline: DriftingPipeline) -> None:
    pictures, tensor, array = (pipeline([1, 4], generator=0, output_type=kind).images for kind in ("pil", "pt", "np"))
    assert isinstance(pictures, list) and isinstance(tensor, torch.Tensor) and isinstance(array, np.ndarray)
    assert tensor.shape == (2, 3, 16, 16) and array.shape == (2, 16, 16, 3) and array.dtype == np.float32
    assert tensor.min() >= 0 and tensor.max() <= 1 and tensor.std() > 0.1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    for picture, levels in zip(pictures, array, strict=True):
        assert isinstance(picture, Image.Image)
        assert np.array_equal(np.asarray(picture), np.rint(levels * 255))


def test_a_generator_is_a_source_of_seeds(pipeline: DriftingPipeline) -> None:
    def two(source: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (pipeline([1], generator=source, output_type="pt").images for _ in range(2))
        return first, second

    first, second = two(torch.Generator().manual_seed(3))
    again = two(torch.Generator().manual_seed(3))
    assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, second)
    torch.manual_seed(5)
    first, second = two(None)
    torch.manual_seed(5)
    assert torch.equal(pipeline([1], output_type="pt").images, first) and not torch.equal(first, second)


def test_one_class_may_go_without_a_list(pipeline: DriftingPipeline) -> None:
    one, listed = (pipeline(labels, generator=0, output_type="pt").images for labels in (3, [3]))
    assert torch.equal(one, listed) and len(one) == 1


def test_pixels_need_no_tokenizer() -> None:
    for channels, mode in ((1, "L"), (3, "RGB")):
        [picture] = DriftingPipeline(generator(channels=channels))([0]).images
        assert (picture.mode, picture.size) == (mode, (8, 8))


def test_what_is_saved_loads_whole(pipeline: DriftingPipeline, saved: Path) -> None:
    loaded = DriftingPipeline.from_pretrained(saved).to("cpu")
    assert loaded.class_names == NAMES
    expected = pipeline([0, 1], generator=1, output_type="pt").images
    assert torch.equal(loaded([0, 1], generator=1, output_type="pt").images, expected)


def test_each_part_is_read_by_its_own_library(pipeline: DriftingPipeline, saved: Path) -> None:
    alone = ImageGenerator.from_pretrained(saved)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), pipeline.generator.parameters(), strict=True))
    vae, latents = AutoencoderKL.from_pretrained(saved / "vae"), torch.randn(1, 4, 8, 8)
    assert pipeline.tokenizer is not None
    torch.testing.assert_close(vae.decode(latents / 0.18215).sample, pipeline.tokenizer.decode(latents))


@pytest.mark.parametrize("given", ["folder", "tokenizer", "tiny decoder"])
def test_a_tokenizer_may_be_named_or_given(given: str, saved: Path, tmp_path: Path) -> None:
    generator(channels=4).save_pretrained(tmp_path)
    tokenizer = {
        "folder": str(saved / "vae"),
        "tokenizer": Tokenizer.from_pretrained(saved / "vae"),
        "tiny decoder": TinyDecoder(tiny_autoencoder()),
    }[given]
    loaded = DriftingPipeline.from_pretrained(tmp_path, tokenizer)
    assert loaded([0], output_type="pt").images.shape == (1, 3, 16, 16)
    assert isinstance(loaded.tokenizer, TinyDecoder if given == "tiny decoder" else Tokenizer)


def test_a_hub_repository_is_fetched_whole(
    pipeline: DriftingPipeline, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        written = [path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()]
        assert len(written) == 5 and all(any(fnmatch(name, glob) for glob in allow_patterns) for name in written)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = DriftingPipeline.from_pretrained("owner/name", revision="main")
    assert asked == [("owner/name", "main")]
    assert (loaded.class_names, type(loaded.tokenizer)) == (NAMES, Tokenizer)


def test_classes_have_names(pipeline: DriftingPipeline) -> None:
    assert pipeline.get_label_ids(["golden retriever", "Tinca tinca"]) == [2, 0]
    assert pipeline.get_label_ids("otter") == [1]
    with pytest.raises(ValueError, match="found 'oter'; did you mean 'otter'"):
        pipeline.get_label_ids(["oter"])
    with pytest.raises(ValueError, match="names of the generator's 5 classes are not known"):
        DriftingPipeline(pipeline.generator, pipeline.tokenizer).get_label_ids("otter")


def test_a_model_of_imagenet_knows_its_names(tmp_path: Path) -> None:
    generator(channels=3, num_classes=1000).save_pretrained(tmp_path)
    assert DriftingPipeline.from_pretrained(tmp_path).get_label_ids(["golden retriever", "otter"]) == [207, 360]


def test_bfloat16_is_near(pipeline: DriftingPipeline) -> None:
    exact, rounded = (pipeline([0, 1, 2], generator=0, output_type="pt", bfloat16=on).images for on in (False, True))
    assert not torch.equal(exact, rounded) and (exact - rounded).abs().mean() < 0.05


def test_wrong_parts_are_refused(pipeline: DriftingPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes latents of 4 channels.*found none"):
        DriftingPipeline(pipeline.generator)
    with pytest.raises(ValueError, match="generator's 3 channels, found 4"):
        DriftingPipeline(generator(channels=3), pipeline.tokenizer)
    with pytest.raises(ValueError, match="class_names: expected the generator's 5, found 2"):
        DriftingPipeline(pipeline.generator, pipeline.tokenizer, class_names=["a", "b"])
    with pytest.raises(ValueError, match="found a decoder without its encoder"):
        DriftingPipeline(pipeline.generator, TinyDecoder(tiny_autoencoder())).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    generator(channels=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="makes latents of 4 channels.*found none"):
        DriftingPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": [5]}, r"expected classes in \[0, 5\), found 5 to 5"),
        ({"class_labels": []}, "labels: expected int64"),
        ({"guidance_scale": 0.5}, "guidance_scale: expected α >= 1, found 0.5"),
        ({"output_type": "latent"}, "output_type: expected one of pil, pt, np, found 'latent'"),
    ],
)
def test_a_wrong_call_is_refused(arguments: dict[str, Any], words: str, pipeline: DriftingPipeline) -> None:
    with pytest.raises(ValueError, match=words):
        pipeline(**{"class_labels": [0]} | arguments)


def test_pictures_are_bytes_rounded_to_the_nearest(pipeline: DriftingPipeline) -> None:
    [picture] = pipeline([1], generator=0).images
    expected = to_uint8(sample(pipeline.generator, torch.tensor([1]), tokenizer=pipeline.tokenizer))[0]
    assert np.array_equal(np.asarray(picture), expected.permute(1, 2, 0).numpy())
