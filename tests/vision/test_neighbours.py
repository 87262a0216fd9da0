"""`python -m vision.neighbours`: the search against loops, and the picture of a run on the digits."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from driftfield.training import load_config, run_program, to_yaml
from vision import neighbours as program
from vision.config import CONFIG_DIR, TrainConfig
from vision.data import load
from vision.mae import ResNetMAE
from vision.neighbours import NeighboursConfig, embed_pixels, encoder_embedding, nearest_real, save_panel
from vision.pictures import GAP_GREY, GAP_PIXELS
from vision.train import build_generator


class Samples:
    """Real samples whose look depends on the seed."""

    def __init__(self, values: Tensor) -> None:
        self._values = values  # [n, C, H, W]
        self.labels = torch.zeros(len(values), dtype=torch.int64)
        self.class_names: Sequence[str] = ("thing",)
        self.sample_shape = (1, 2, 2)
        self.fingerprint = "samples"

    def __len__(self) -> int:
        return len(self._values)

    def read(self, visits: Tensor, *, seed: int) -> Tensor:
        return self._values[visits] + seed


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 23])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_nearest_are_those_of_loops_over_all_pairs(k: int, batch_size: int) -> None:
    generated, real = normal(6, 0), normal(23, 1)
    near = nearest_real(generated, Samples(real), embed_pixels, k=k, batch_size=batch_size)
    assert near.ids.shape == near.distances.shape == (6, k)
    for row, image in enumerate(generated):
        distances = [float(np.linalg.norm((image - other).numpy())) for other in real]
        assert near.ids[row].tolist() == sorted(range(23), key=distances.__getitem__)[:k]
        assert near.distances[row].tolist() == pytest.approx(sorted(distances)[:k], rel=1e-5)


def test_a_copy_is_found_at_distance_zero_and_equals_come_in_order() -> None:
    real = normal(5, 0).repeat(2, 1, 1, 1)  # every sample twice
    near = nearest_real(real[[3]], Samples(real), embed_pixels, k=2, batch_size=4)
    assert near.ids.tolist() == [[3, 8]] and near.distances.tolist() == [[0, 0]]


def test_samples_are_read_with_the_seed_and_every_one_once() -> None:
    real, seen = normal(7, 0), []
    near = nearest_real(real + 9, Samples(real), embed_pixels, k=1, seed=9, batch_size=3, progress=seen.append)
    assert near.ids[:, 0].tolist() == list(range(7)) and near.distances.max() < 1e-6
    assert seen == [3, 3, 1]


def test_what_cannot_be_searched_is_named() -> None:
    with pytest.raises(ValueError, match="at least 8 real samples, found 7"):
        nearest_real(normal(1, 0), Samples(normal(7, 1)), embed_pixels, k=8)
    with pytest.raises(ValueError, match="finite.*a generated sample"):
        nearest_real(torch.full((1, 1, 2, 2), torch.nan), Samples(normal(7, 1)), embed_pixels, k=1)


class TwoMaps:
    """An encoder of two features that differ in scale by a million."""

    def features(self, images: Tensor, *, families: str = "abcd") -> dict[str, Tensor]:
        flat = images.flatten(1)[:, None]  # [B, 1, 4]
        return {"large": 1e6 * flat[:, :, :2], "small": flat[:, :, 2:]}


def test_in_an_encoders_space_every_map_counts_alike() -> None:
    embed = encoder_embedding(TwoMaps(), torch.device("cpu"))
    a, b = normal(1, 0), normal(1, 1)
    cosines = [
        torch.nn.functional.cosine_similarity(a.flatten()[part], b.flatten()[part], dim=0)
        for part in (slice(0, 2), slice(2, 4))
    ]
    assert float((embed(a) - embed(b)).square().sum()) == pytest.approx(float(sum(2 - 2 * c for c in cosines)))
    assert torch.equal(embed(a).norm(dim=1), torch.tensor([2.0]).sqrt())


# --- the picture --------------------------------------------------------------------------------------------------


def test_a_row_is_an_image_a_gap_and_its_neighbours(tmp_path: Path) -> None:
    generated = torch.tensor([[10], [20]], dtype=torch.uint8)[:, :, None, None].expand(2, 1, 64, 64)
    found = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)[:, :, None, None, None].expand(2, 3, 1, 64, 64)
    save_panel(generated, found, tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as image:
        pixels = np.array(image)
    middle = [GAP_PIXELS + 32 + step * (64 + GAP_PIXELS) for step in range(5)]
    assert pixels[np.ix_(middle[:2], middle)].tolist() == [[10, GAP_GREY, 1, 2, 3], [20, GAP_GREY, 4, 5, 6]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits as it is left behind, its generator and encoder untrained."""
    folder = tmp_path_factory.mktemp("run")
    overrides = ["generator.depth=1", "generator.hidden_size=16", f"judge.folder={folder / 'judges'}", "judge.epochs=1"]
    config = load_config(TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=overrides)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    build_generator(config, channels=1, image_size=8, num_classes=10).save_pretrained(folder / "model")
    torch.manual_seed(0)
    ResNetMAE(in_channels=1, base_channels=4, blocks=(1,), patch_size=4, mask_patch=1, num_classes=10).save_pretrained(
        folder / "encoder"
    )
    return folder


def run(run_dir: Path, *more: str) -> int:
    return run_program(
        program.main,
        NeighboursConfig,
        config_dir=CONFIG_DIR,
        config_name="neighbours",
        description="",
        arguments=[f"run_dir={run_dir}", "device=cpu", *more],
    )


@pytest.mark.parametrize("space", ["pixels", "judge", "mae:{run}/encoder"])
def test_a_run_is_shown_beside_its_data(space: str, run_dir: Path, tmp_path: Path) -> None:
    space = space.replace("{run}", str(run_dir))
    out = tmp_path / "panel.png"
    assert run(run_dir, f"space={space}", f"out={out}", "num_neighbours=3", "labels=[4,7]", "seed=1") == 0
    record = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    digits = load("digits", "train")
    assert (record["space"], record["seed"], record["real"]) == (space, 1, digits.fingerprint)
    assert [row["label"] for row in record["rows"]] == [4, 7]
    for row in record["rows"]:
        distances = [real["distance"] for real in row["real"]]
        assert len(distances) == 3 and distances == sorted(distances)
        assert [real["label"] for real in row["real"]] == digits.labels[[real["id"] for real in row["real"]]].tolist()
    with Image.open(out) as image:
        assert image.size == (5 * 66 + 2, 2 * 66 + 2)  # 8 pixels eight times enlarged


def test_without_an_answer_one_of_each_class_is_shown_in_the_runs_folder(run_dir: Path) -> None:
    assert run(run_dir, "space=pixels") == 0
    record = json.loads((run_dir / "neighbours.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in record["rows"]] == list(range(10))
    assert (run_dir / "neighbours.png").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["run_dir=/nonexistent"], ["run_dir", "/nonexistent"]),
        (["space=imagination"], ["space imagination", "convnextv2"]),
        (["space=mae:/nonexistent"], ["/nonexistent"]),
        (["space=pixels", "labels=[10]"], ["labels", "10"]),
        (["space=pixels", "num_neighbours=1298"], ["1298", "1297"]),
        (["space=pixels", "out=/dev/null/x.png"], ["out", "/dev/null/x.png"]),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], words: list[str], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(run_dir, *more) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message
