"""`python -m vision.sample`: what it writes, and that a sample depends on seed, index, class and scale alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from driftfield.training import run_program
from vision import sample as program
from vision.config import CONFIG_DIR
from vision.data import to_uint8
from vision.generator import ImageGenerator
from vision.sample import SampleConfig, draw_inputs, images_in_batches, sample


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = ImageGenerator(
        image_size=8, channels=1, patch_size=4, hidden_size=16, depth=1, num_heads=2, cond_size=16, num_classes=5,
        num_context_tokens=1, num_styles=3, output_gain=1.0,
    )  # fmt: skip
    for parameter in model.parameters():  # adaLN-zero would hide class and scale
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ImageGenerator:
    return ImageGenerator.from_pretrained(model_folder)


def run(folder: Path, *arguments: str) -> int:
    return run_program(
        program.main,
        SampleConfig,
        config_dir=CONFIG_DIR,
        config_name="sample",
        description="",
        arguments=[f"model={folder}", *arguments],
    )


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_sample_does_not_depend_on_its_batch(model: ImageGenerator, batch_size: int) -> None:
    labels = torch.arange(20) % 5
    together = sample(model, labels, seed=3)
    torch.testing.assert_close(sample(model, labels, seed=3, batch_size=batch_size), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample(model, labels[6:9], seed=3, first_index=6), together[6:9], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_bytes_do_not_depend_on_their_batch(model: ImageGenerator, batch_size: int) -> None:
    labels = torch.arange(20) % 5
    batches = list(images_in_batches(model, labels, guidance_scale=2.0, seed=3, batch_size=batch_size))
    assert [len(batch) for batch in batches] == [len(labels[i : i + batch_size]) for i in range(0, 20, batch_size)]
    expected = to_uint8(sample(model, labels, guidance_scale=2.0, seed=3))
    images = torch.cat(batches)
    assert images.dtype == torch.uint8 and images.shape == expected.shape
    assert (images.int() - expected.int()).abs().max() <= 1  # where a sum in another order crosses a half
    assert (images != expected).float().mean() < 0.01
    [rest] = images_in_batches(model, labels[6:9], guidance_scale=2.0, seed=3, first_index=6)
    assert (rest.int() - expected[6:9].int()).abs().max() <= 1


def test_seed_index_class_and_scale_each_change_the_sample(model: ImageGenerator) -> None:
    one = torch.tensor([1])
    base = sample(model, one)
    for other in (
        sample(model, one, seed=1),
        sample(model, one, first_index=1),
        sample(model, torch.tensor([2])),
        sample(model, one, guidance_scale=3.0),
    ):
        assert (other - base).abs().max() > 1e-3


def test_noise_is_standard_normal_and_styles_are_uniform(model: ImageGenerator) -> None:
    noise, style = draw_inputs(model, [torch.Generator().manual_seed(0)], 4000)
    assert noise.shape == (4000, 1, 8, 8) and style.shape == (4000, 3)
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    share = torch.bincount(style.flatten(), minlength=64) / style.numel()
    assert share.numel() == 64 and (share - 1 / 64).abs().max() < 6 * (1 / 64 / style.numel()) ** 0.5


def test_npz_holds_bytes_in_the_evaluators_form(model: ImageGenerator, model_folder: Path, tmp_path: Path) -> None:
    assert run(model_folder, f"out={tmp_path / 'a.npz'}", "num=6", "labels=[4,1]", "guidance_scale=2", "seed=5") == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (6, 8, 8, 1)
        assert file["labels"].tolist() == [4, 1, 4, 1, 4, 1]
        expected = sample(model, torch.tensor([4, 1] * 3), guidance_scale=2.0, seed=5)
        assert (file["arr_0"] == to_uint8(expected).permute(0, 2, 3, 1).numpy()).all()


def test_grid_and_folder_are_pictures(model_folder: Path, tmp_path: Path) -> None:
    assert run(model_folder, f"out={tmp_path / 'grid.png'}", "num=10") == 0
    assert run(model_folder, f"out={tmp_path / 'folder'}", "num=3", "first_index=7") == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["000007.png", "000008.png", "000009.png"]
    for path in (tmp_path / "grid.png", tmp_path / "folder" / "000007.png"):
        with Image.open(path) as image:
            image.load()
    with Image.open(tmp_path / "folder" / "000007.png") as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["labels=[5]"], ["labels", "below 5", "5"]),
        (["model=/nonexistent"], ["model", "/nonexistent"]),
        (["guidance_scale=0.5"], ["guidance_scale", ">= 1", "0.5"]),
        (["out=/dev/null/x.png"], ["out", "/dev/null/x.png"]),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], words: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model_folder, f"out={tmp_path / 'x.png'}", *arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message
