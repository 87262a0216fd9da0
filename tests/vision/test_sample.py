"""`python -m vision.sample`: what it writes, and that a sample depends on seed, index, class and scale alone."""

import re
import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from driftfield.training import run_program
from tests.vision.tiny_models import autoencoder, generator, tiny_autoencoder
from vision import sample as program
from vision.config import CONFIG_DIR
from vision.data import to_uint8
from vision.generator import ImageGenerator
from vision.sample import SampleConfig, draw_inputs, images_in_batches, sample
from vision.tiny_decoder import TinyDecoder
from vision.tokenizer import Tokenizer

SCALE = 0.18215  # of the Stable Diffusion VAE's latents


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    generator(channels=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of latents with its autoencoder in `large` and a tiny one in `tiny`."""
    folder = tmp_path_factory.mktemp("latent")
    generator(channels=4).save_pretrained(folder)
    autoencoder().save_pretrained(folder / "large")
    tiny_autoencoder().save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ImageGenerator:
    return ImageGenerator.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def latent_model(latent_folder: Path) -> ImageGenerator:
    return ImageGenerator.from_pretrained(latent_folder)


@pytest.fixture(scope="module")
def tokenizer(latent_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(latent_folder / "large")


class Constant(nn.Module):
    """Decodes every latent to the same pixel values."""

    channels = 4

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def decode(self, latents: Tensor) -> Tensor:
        return self.values.expand(len(latents), 1, 1, -1)


def run(folder: Path, *arguments: str) -> int:
    return run_program(
        program.main,
        SampleConfig,
        config_dir=CONFIG_DIR,
        config_name="sample",
        description="",
        arguments=[f"model={folder}", *arguments],
    )


def assert_same_bytes(images: Tensor, expected: Tensor) -> None:
    """Equal but for values next to a half, which a sum in another order may round to the other side."""
    assert images.dtype == expected.dtype == torch.uint8 and images.shape == expected.shape
    assert (images.int() - expected.int()).abs().max() <= 1
    assert (images != expected).float().mean() < 0.01


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_sample_does_not_depend_on_its_batch(model: ImageGenerator, batch_size: int) -> None:
    labels = torch.arange(20) % 5
    together = sample(model, labels, seed=3)
    torch.testing.assert_close(sample(model, labels, seed=3, batch_size=batch_size), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample(model, labels[6:9], seed=3, first_index=6), together[6:9], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_decoded_bytes_do_not_depend_on_their_batch(
    latent_model: ImageGenerator, tokenizer: Tokenizer, batch_size: int
) -> None:
    labels = torch.arange(20) % 5
    options = {"guidance_scale": 2.0, "seed": 3, "tokenizer": tokenizer}
    expected = to_uint8(sample(latent_model, labels, **options))
    batches = list(images_in_batches(latent_model, labels, batch_size=batch_size, **options))
    assert [len(batch) for batch in batches] == [len(labels[i : i + batch_size]) for i in range(0, 20, batch_size)]
    assert_same_bytes(torch.cat(batches), expected)
    [some] = images_in_batches(latent_model, labels[6:9], first_index=6, **options)
    assert_same_bytes(some, expected[6:9])


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


def test_latents_are_divided_by_the_scale_and_decoded(latent_model: ImageGenerator, latent_folder: Path) -> None:
    labels = torch.arange(6) % 5
    latents = sample(latent_model, labels)
    vae = AutoencoderKL.from_pretrained(latent_folder / "large")
    with torch.no_grad():
        expected = to_uint8(vae.decode(latents / SCALE).sample)
    assert expected.shape == (6, 3, 16, 16)
    [images] = images_in_batches(latent_model, labels, tokenizer=Tokenizer.from_pretrained(latent_folder / "large"))
    assert_same_bytes(images, expected)


@pytest.mark.parametrize(("rounding", "levels"), [("nearest", [0, 255, 128, 255]), ("down", [0, 254, 127, 255])])
def test_bytes_are_rounded_as_told(latent_model: ImageGenerator, rounding: program.Rounding, levels: list[int]) -> None:
    decoder = Constant(-1.5, 0.998, 0.002, 7.0)  # 0.998 is level 254.7, 0.002 is 127.8
    [images] = images_in_batches(latent_model, torch.tensor([0]), tokenizer=decoder, rounding=rounding)
    assert images.flatten().tolist() == levels


def test_every_pass_has_the_same_shape_and_is_at_most_one_batch_ahead(model: ImageGenerator) -> None:
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    try:
        batches = images_in_batches(model, torch.arange(22) % 5, batch_size=4)
        assert shapes == []
        for taken in (1, 2, 3):
            assert len(next(batches)) == 4
            assert len(shapes) == taken + 1
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert shapes == [(4, 1, 8, 8)] * 6
    finally:
        hook.remove()


def test_leaving_early_ends_the_drawing_threads(model: ImageGenerator) -> None:
    before = threading.active_count()
    batches = images_in_batches(model, torch.zeros(10**6, dtype=torch.int64), batch_size=2)
    assert len(list(islice(batches, 3))) == 3 and threading.active_count() > before
    del batches
    assert threading.active_count() == before


def test_bfloat16_is_near(model: ImageGenerator) -> None:
    labels = torch.arange(20) % 5
    exact, rounded = (sample(model, labels, bfloat16=on) for on in (False, True))
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_an_image_that_is_not_finite_is_refused(latent_model: ImageGenerator) -> None:
    with pytest.raises(ValueError, match="2 of 2 images are not finite"):
        list(images_in_batches(latent_model, torch.tensor([0, 1]), tokenizer=Constant(0.0, float("nan"))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.tensor([5])}, r"labels: expected classes in \[0, 5\), found 5 to 5"),
        ({"labels": torch.tensor([0.5])}, "labels: expected int64"),
        ({"labels": torch.zeros(0, dtype=torch.int64)}, "labels: expected int64"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected α >= 1, found nan"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"tokenizer": None}, "generator makes latents of 4 channels.* found none"),
    ],
)
def test_a_wrong_request_is_refused_at_once(change: dict, words: str, latent_model: ImageGenerator) -> None:
    arguments = {"labels": torch.tensor([0]), "tokenizer": Constant(0.0)} | change
    with pytest.raises(ValueError, match=words):
        images_in_batches(latent_model, **arguments)


def test_npz_holds_bytes_in_the_evaluators_form(model: ImageGenerator, model_folder: Path, tmp_path: Path) -> None:
    words = ["num=6", "labels=[4,1]", "guidance_scale=2", "seed=5", "batch_size=4"]
    assert run(model_folder, f"out={tmp_path / 'a.npz'}", *words) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (6, 8, 8, 1)
        assert file["labels"].tolist() == [4, 1, 4, 1, 4, 1]
        expected = sample(model, torch.tensor([4, 1] * 3), guidance_scale=2.0, seed=5)
        assert_same_bytes(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), to_uint8(expected))


@pytest.mark.parametrize("decoder", ["tokenizer", "tiny_decoder"])
def test_latent_samples_are_decoded(
    decoder: str, latent_model: ImageGenerator, latent_folder: Path, tmp_path: Path
) -> None:
    folder = latent_folder / {"tokenizer": "large", "tiny_decoder": "tiny"}[decoder]
    assert run(latent_folder, f"out={tmp_path / 'a.npz'}", "num=6", f"{decoder}={folder}") == 0
    decode = {"tokenizer": Tokenizer, "tiny_decoder": TinyDecoder}[decoder].from_pretrained(folder)
    expected = to_uint8(sample(latent_model, torch.arange(6) % 5, guidance_scale=2.0, tokenizer=decode))
    with np.load(tmp_path / "a.npz") as file:
        assert_same_bytes(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), expected)


def test_the_tiny_decoder_comes_before_the_tokenizer(latent_folder: Path, tmp_path: Path) -> None:
    tiny = f"tiny_decoder={latent_folder / 'tiny'}"
    assert run(latent_folder, f"out={tmp_path / 'one.npz'}", "num=2", tiny) == 0
    assert run(latent_folder, f"out={tmp_path / 'both.npz'}", "num=2", tiny, "tokenizer=/nonexistent") == 0
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "both.npz") as both:
        assert np.array_equal(one["arr_0"], both["arr_0"])


def test_the_tokenizer_beside_the_model_is_found(latent_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(latent_folder, tmp_path / "model")
    (tmp_path / "model" / "large").rename(tmp_path / "model" / "vae")
    assert run(tmp_path / "model", f"out={tmp_path / 'found.npz'}", "num=2") == 0
    assert run(latent_folder, f"out={tmp_path / 'named.npz'}", "num=2", f"tokenizer={latent_folder / 'large'}") == 0
    with np.load(tmp_path / "found.npz") as found, np.load(tmp_path / "named.npz") as named:
        assert np.array_equal(found["arr_0"], named["arr_0"])


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
    ("words", "columns", "rows"),
    [(["num=10"], 5, 2), (["num=10", "labels=[3]"], 4, 3), (["num=6", "labels=[3,1]"], 2, 3)],
)
def test_a_grid_has_a_column_per_class_or_is_square(
    words: list[str], columns: int, rows: int, model_folder: Path, tmp_path: Path
) -> None:
    assert run(model_folder, f"out={tmp_path / 'grid.png'}", *words) == 0
    side, gap = 64, 2  # of a small image, enlarged
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (columns * (side + gap) + gap, rows * (side + gap) + gap)


def test_classes_go_by_name(model_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    generator(channels=1, num_classes=10).save_pretrained(model)
    (tmp_path / "config.yaml").write_text("data: {name: fashion_mnist}", encoding="utf-8")
    assert run(model, f"out={tmp_path / 'a.npz'}", "num=3", "labels=[2]", "classes=[sandal,Ankle boot]") == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["labels"].tolist() == [2, 5, 9]


def test_the_last_line_says_how_fast(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model_folder, f"out={tmp_path / 'a.npz'}", "num=10", "batch_size=4") == 0
    assert re.fullmatch(rf"10 samples in {tmp_path / 'a.npz'}, [\d.e+]+ images/s", capsys.readouterr().out.strip())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["labels=[5]"], ["labels", "below 5", "5"]),
        (["classes=[dog]"], ["classes", "not known", "labels=[...]"]),
        (["model=/nonexistent"], ["model", "/nonexistent"]),
        (["tokenizer=/nonexistent"], ["tokenizer", "/nonexistent"]),
        (["tiny_decoder=/nonexistent"], ["tiny_decoder", "/nonexistent"]),
        (["tokenizer={latent}/large"], ["tokenizer", "1 channels", "found 4"]),
        (["model={latent}"], ["latents of 4 channels", "stabilityai/sd-vae-ft-mse"]),
        (["guidance_scale=0.5"], ["guidance_scale", ">= 1", "0.5"]),
        (["out=/dev/null/x.png"], ["out", "/dev/null/x.png"]),
        (["out=/dev/null/x"], ["out", "/dev/null/x"]),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    words: list[str],
    model_folder: Path,
    latent_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [argument.format(latent=latent_folder) for argument in arguments]
    assert run(model_folder, f"out={tmp_path / 'x.png'}", *arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_networks_make_the_same_images(latent_folder: Path, tmp_path: Path) -> None:
    for decoder in (f"tokenizer={latent_folder / 'large'}", f"tiny_decoder={latent_folder / 'tiny'}"):
        words = ["num=6", "batch_size=4", decoder]
        assert run(latent_folder, f"out={tmp_path / 'eager.npz'}", *words) == 0
        assert run(latent_folder, f"out={tmp_path / 'compiled.npz'}", *words, "compile=true") == 0
        with np.load(tmp_path / "eager.npz") as eager, np.load(tmp_path / "compiled.npz") as compiled:
            assert_same_bytes(torch.from_numpy(compiled["arr_0"]), torch.from_numpy(eager["arr_0"]))
