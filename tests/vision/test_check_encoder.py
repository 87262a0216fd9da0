"""`python -m vision.check_encoder`: its statistics against closed forms and loops, and what the program says."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from driftfield import DriftingLoss
from driftfield.training import run_program
from tests.vision.tiny_models import autoencoder
from vision import cache_latents
from vision import check_encoder as program
from vision.check_encoder import (
    CheckConfig,
    FeatureCheck,
    chance_of_agreement,
    check_feature,
    choose_samples,
    summary,
    table,
    verdict,
)
from vision.config import CONFIG_DIR
from vision.mae import ResNetMAE

TEMPERATURES = (0.02, 0.05, 0.2)


def random_feature(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def cycled_labels(num: int, classes: int) -> Tensor:
    return torch.arange(num) % classes


def oracle(feature: np.ndarray, labels: list[int], temperature: float) -> tuple[float, ...]:
    """Agreement, mean distance, concentration, nearest / mean, neighbours: loops in float64, no two distances equal."""
    num, locations = feature.shape[:2]
    distance = [
        [[math.dist(feature[i, place], feature[j, place]) for j in range(num)] for i in range(num)]
        for place in range(locations)
    ]
    pairs = [distance[place][i][j] for place in range(locations) for i in range(num) for j in range(num) if i != j]
    mean = math.fsum(pairs) / len(pairs)
    std = math.sqrt(math.fsum((pair - mean) ** 2 for pair in pairs) / len(pairs))
    agreement, nearest, neighbours = [], [], []
    for place in range(locations):
        for i in range(num):
            others = {j: distance[place][i][j] for j in range(num) if j != i}
            closest = min(others, key=others.__getitem__)
            agreement.append(labels[closest] == labels[i])
            nearest.append(others[closest])
            kernel = [math.exp(-other / (temperature * mean)) for other in others.values()]
            shares = [k / math.fsum(kernel) for k in kernel]
            neighbours.append(math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0)))
    count = len(agreement)
    return sum(agreement) / count, mean, std / mean, math.fsum(nearest) / count / mean, math.fsum(neighbours) / count


@pytest.mark.parametrize("shape", [(7, 1, 3), (12, 4, 2), (9, 2, 30)])
def test_statistics_against_loops(shape: tuple[int, ...]) -> None:
    feature = random_feature(*shape)
    feature[:, -1] *= 3  # one location spreads more than the others, yet the scale is common
    labels = cycled_labels(shape[0], 3)
    check = check_feature(feature, labels, TEMPERATURES)
    for temperature in TEMPERATURES:
        expected = oracle(feature.double().numpy(), labels.tolist(), temperature)
        found = (
            check.agreement, check.mean_distance, check.concentration, check.nearest, check.neighbours[temperature],
        )  # fmt: skip
        assert found == pytest.approx(expected, rel=1e-4)
    assert check.channels == shape[2]


def test_separated_clusters_agree_and_a_small_temperature_counts_just_the_cluster() -> None:
    """Corners of a simplex, 5 samples on each: the other 4 are at distance 0, everything else at sqrt 2."""
    labels = torch.arange(4).repeat_interleave(5)
    feature = torch.eye(4)[labels][:, None]
    check = check_feature(feature, labels, (0.02, 1000.0))
    assert check.agreement == 1
    mean = math.sqrt(2) * 15 / 19
    assert check.mean_distance == pytest.approx(mean, rel=1e-3)
    assert check.concentration == pytest.approx(math.sqrt(2 * 15 / 19 - mean**2) / mean, rel=1e-3)
    assert check.nearest == pytest.approx(0, abs=1e-3)
    assert check.neighbours[0.02] == pytest.approx(4, rel=1e-3)
    assert check.neighbours[1000.0] == pytest.approx(19, rel=1e-3)
    assert verdict(check, num=20, chance=chance_of_agreement(labels)) == "sees classes"


def test_equal_distances_agree_by_chance_and_blind_every_temperature() -> None:
    labels = cycled_labels(16, 4)  # 16: the centre of the simplex is exact, and so are ties
    check = check_feature(torch.eye(16)[:, None], labels, TEMPERATURES)
    assert check.agreement == pytest.approx(chance_of_agreement(labels)) == pytest.approx(3 / 15)
    assert check.concentration == pytest.approx(0, abs=1e-5)
    assert check.nearest == pytest.approx(1)
    for count in check.neighbours.values():
        assert count == pytest.approx(15, rel=1e-3)
    assert verdict(check, num=16, chance=3 / 15) == "neighbours are of any class"


@pytest.mark.parametrize("channels", [64, 512, 4096])
def test_isotropic_noise_concentrates_as_its_dimension_grows(channels: int) -> None:
    """Distances of normal vectors are sqrt 2 times a chi variable: mean sqrt(2 D), deviation 1, to first order."""
    check = check_feature(random_feature(200, 1, channels), cycled_labels(200, 10), TEMPERATURES)
    assert check.mean_distance == pytest.approx(math.sqrt(2 * channels), rel=0.02)
    assert check.concentration == pytest.approx(1 / math.sqrt(2 * channels), rel=0.15)


def test_distances_that_differ_little_beside_the_temperature_are_blind() -> None:
    """Classes a little closer than the rest: neighbours agree, yet every temperature counts everything."""
    labels = torch.arange(10).repeat_interleave(10)
    feature = torch.cat((0.05 * torch.eye(10)[labels], torch.eye(100)), dim=1)[:, None]
    check = check_feature(feature, labels, TEMPERATURES)
    chance = chance_of_agreement(labels)
    assert check.agreement == 1
    assert check.neighbours[0.02] > 90
    assert verdict(check, num=100, chance=chance).startswith("blind")


def test_a_feature_that_is_the_same_for_every_image() -> None:
    labels = cycled_labels(12, 3)
    check = check_feature(torch.full((12, 2, 5), 3.7), labels, TEMPERATURES)
    assert check.agreement == pytest.approx(chance_of_agreement(labels))
    assert all(math.isfinite(value) for value in (*check[1:5], *check.neighbours.values()))
    assert verdict(check, num=12, chance=3 / 11) == "the same for every image"


@pytest.mark.parametrize(("factor", "shift"), [(100.0, 0.0), (1e-2, 0.0), (1.0, 30.0)])
def test_scale_and_shift_change_no_statistic(factor: float, shift: float) -> None:
    feature, labels = random_feature(30, 2, 8), cycled_labels(30, 3)
    plain, changed = (check_feature(f, labels, TEMPERATURES) for f in (feature, factor * feature + shift))
    assert changed.mean_distance == pytest.approx(factor * plain.mean_distance, rel=1e-3)
    assert changed.neighbours == pytest.approx(plain.neighbours, rel=1e-2)
    for name in ("agreement", "concentration", "nearest"):
        assert getattr(changed, name) == pytest.approx(getattr(plain, name), rel=1e-3)


def test_the_scale_is_the_losss() -> None:
    """Mean over pairs of distinct samples, where the loss counts a sample's zero distance to itself too."""
    feature = random_feature(20, 3, 8)
    groups = feature.transpose(0, 1)  # [L, N, C]
    check = check_feature(feature, cycled_labels(20, 2), TEMPERATURES)
    scale = DriftingLoss()(groups, groups).feature_scale  # targets: the samples twice, so 1 pair in 20 is of equals
    assert check.mean_distance * 19 / 20 == pytest.approx(scale.item(), rel=1e-4)


def test_infinite_values_are_refused() -> None:
    feature = random_feature(6, 1, 2)
    feature[3, 0, 1] = math.nan
    with pytest.raises(ValueError, match="expected finite values, found NaN or infinity"):
        check_feature(feature, cycled_labels(6, 2), TEMPERATURES)


@pytest.mark.parametrize("counts", [[5, 5], [1, 9], [3, 4, 7], [2] * 50])
def test_chance_is_that_of_a_blind_draw(counts: list[int]) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j]
    expected = sum(int(labels[i] == labels[j]) for i, j in pairs) / len(pairs)
    assert chance_of_agreement(labels) == pytest.approx(expected)


def test_noise_does_no_better_than_chance() -> None:
    labels = cycled_labels(300, 3)
    check = check_feature(random_feature(300, 4, 16), labels, TEMPERATURES)
    assert verdict(check, num=300, chance=chance_of_agreement(labels)) == "neighbours are of any class"


def test_samples_are_balanced_seeded_and_few_enough_in_classes() -> None:
    labels = torch.arange(2000) % 100
    chosen = choose_samples(labels, num=200, max_classes=10, draws=torch.Generator().manual_seed(1))
    counts = labels[chosen].bincount()
    assert counts[counts > 0].tolist() == [20] * 10 and len(chosen.unique()) == 200
    again = choose_samples(labels, num=200, max_classes=10, draws=torch.Generator().manual_seed(1))
    other = choose_samples(labels, num=200, max_classes=10, draws=torch.Generator().manual_seed(2))
    assert torch.equal(chosen, again) and not torch.equal(chosen, other)
    few = choose_samples(labels, num=400, max_classes=4, draws=torch.Generator())
    assert len(few) == 80  # the classes have no more


@pytest.mark.parametrize(("labels", "num"), [(torch.zeros(9, dtype=torch.int64), 9), (torch.arange(9), 9)])
def test_samples_need_classes_and_neighbours(labels: Tensor, num: int) -> None:
    with pytest.raises(ValueError, match="expected at least two samples of each of at least two classes"):
        choose_samples(labels, num=num, max_classes=50, draws=torch.Generator())


def make_check(agreement: float, word: str = "sees classes") -> FeatureCheck:
    return FeatureCheck(8, agreement, 1.0, 0.2, 0.5, {0.2: 9.0}, word)


def test_the_summary_compares_the_best_feature_with_raw_samples() -> None:
    raw = make_check(0.5)  # standard error of 400 samples: 2.5 %
    for agreement, words in [(0.56, "is better than raw samples"), (0.54, "adds nothing to raw samples")]:
        checks = {"global": raw, "a": make_check(0.3), "b": make_check(agreement), "c": make_check(0.9, "blind")}
        text = summary(checks, num=400, chance=0.1)
        assert "2 of the encoder's 3 features see classes; in the best, b, " in text and text.endswith(words)
    nothing = summary({"global": raw, "a": make_check(0.1, "blind")}, num=400, chance=0.1)
    assert nothing == "none of the encoder's 1 features sees classes: a drift in them leads nowhere"


def test_the_table_has_a_row_for_each_feature() -> None:
    lines = table({"global": make_check(0.5), "layer1": make_check(0.25)}, chance=0.1).splitlines()
    assert "same class (chance 0.100)" in lines[0] and "τ = 0.2" in lines[0]
    assert lines[3] == "| layer1 | 8 | 0.250 | 0.200 | 0.500 | 9.0 | sees classes |"


def run(out: Path, *arguments: str) -> int:
    return run_program(
        program.main,
        CheckConfig,
        config_dir=CONFIG_DIR,
        config_name="check_encoder",
        description="",
        arguments=[f"out={out}", "num=100", *arguments],
    )


@pytest.fixture(scope="module")
def mae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mae")
    torch.manual_seed(0)
    ResNetMAE(in_channels=1, base_channels=4, blocks=(1, 1), num_classes=10).save_pretrained(folder)
    return folder


def read_report(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_raw_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "check.json"
    assert run(out, "encoders=[none]") == 0
    report = read_report(out)
    assert report["num"] == 100 and report["chance"] == pytest.approx(9 / 99) and report["weights_sha256"] is None
    assert list(report["features"]) == ["global"]
    raw = report["features"]["global"]
    assert raw["channels"] == 64 and raw["agreement"] > 0.6  # digits are easy; chance is 0.09
    assert list(raw["neighbours"].values()) == sorted(raw["neighbours"].values())
    printed = capsys.readouterr().out
    assert "100 samples of 10 classes of digits" in printed and f"verdict: {report['verdict']}" in printed
    assert report["verdict"].startswith("raw samples alone: sees classes")


def test_an_encoder_on_digits(tmp_path: Path, mae_folder: Path) -> None:
    arguments = [f"encoders=[mae:{mae_folder}]", "families=ab", "max_locations=5"]
    for batch_size, name in [(250, "a"), (7, "b")]:
        assert run(tmp_path / name, *arguments, f"batch_size={batch_size}") == 0
    one, other = (read_report(tmp_path / name) for name in "ab")
    names = {"global", "norm_x"} | {f"{m}{s}" for m in ("conv1", "layer1", "layer2") for s in ("", "_mean", "_std")}
    assert one["features"].keys() == names
    assert len(one["weights_sha256"]) == 64 and "of the encoder's 10 features" in one["verdict"]
    for feature in names:  # the samples and locations do not depend on the batches
        for key in ("mean_distance", "concentration", "nearest"):
            assert one["features"][feature][key] == pytest.approx(other["features"][feature][key], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encoders=[mae:/nowhere]"], "mae: /nowhere: expected a folder or a hub id"),
        (["encoders=[dino:x]"], "encoder: expected mae:"),
        (["families=xyz"], "families: expected letters of 'abcd', found 'xyz'"),
        (["encoders=[none]", "num=10"], "num: expected at least two samples of each"),
        (["encoders=[none]", "out=/dev/null/x.json"], "out: expected a place that can be written"),
        (["encoders=[none]", "temperatures=[0]"], "temperatures[0]: expected a number > 0, found 0"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "check.json", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_encoder_that_gives_nan_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mae = ResNetMAE(in_channels=1, base_channels=4, blocks=(1,), num_classes=10)
    with torch.no_grad():
        mae.encoder.norms[0].weight[0] = math.nan
    mae.save_pretrained(tmp_path / "mae")
    assert run(tmp_path / "check.json", f"encoders=[mae:{tmp_path / 'mae'}]") == 2
    assert "feature layer1: expected finite values" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures, reddish and bluish, 12 of each, in the form of ImageNet."""
    root = tmp_path_factory.mktemp("photographs")
    draw = np.random.default_rng(0)
    for channel, name in [(0, "red"), (2, "blue")]:
        (root / "train" / name).mkdir(parents=True)
        for index in range(12):
            pixels = draw.integers(0, 100, (20, 18, 3))
            pixels[..., channel] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / name / f"{index}.png")
    return root


def test_a_folder_of_images(tmp_path: Path, photographs: Path) -> None:
    ResNetMAE(in_channels=3, base_channels=4, blocks=(1,), num_classes=2).save_pretrained(tmp_path / "mae")
    folder = ["data.name=imagenet", f"data.folder={photographs}", "data.classes=folders", "data.image_size=16"]
    assert run(tmp_path / "check.json", *folder, f"encoders=[mae:{tmp_path / 'mae'}]", "families=b") == 0
    report = read_report(tmp_path / "check.json")
    assert report["num"] == 24 and report["chance"] == pytest.approx(11 / 23)
    assert {name: feature["channels"] for name, feature in report["features"].items()} == {
        "global": 768, "norm_x": 3, "conv1_mean": 4, "conv1_std": 4, "layer1_mean": 4, "layer1_std": 4,
    }  # fmt: skip
    assert report["features"]["norm_x"]["agreement"] == 1  # the colour's root mean square is the class


def test_latents_with_encoders_of_latents_and_of_images(tmp_path: Path, photographs: Path) -> None:
    tokenizer, store = tmp_path / "vae", tmp_path / "latents"
    autoencoder().save_pretrained(tokenizer)
    cache = [f"data={photographs}", f"out={store}", f"tokenizer={tokenizer}", "classes=folders", "image_size=16"]
    cache.append("std_band=[0.1,1.0]")
    assert (
        run_program(
            cache_latents.main,
            cache_latents.CacheLatentsConfig,
            config_dir=CONFIG_DIR,
            config_name="cache_latents",
            description="",
            arguments=cache,
        )
        == 0
    )
    data = ["data.name=latents", f"data.folder={store}", f"tokenizer={tokenizer}", "families=b"]
    for channels in (4, 3):  # of latents; of images, through the decoder
        mae = ResNetMAE(in_channels=channels, base_channels=4, blocks=(1,), num_classes=2)
        mae.save_pretrained(tmp_path / f"{channels}")
        assert run(tmp_path / "check.json", *data, f"encoders=[mae:{tmp_path / f'{channels}'}]") == 0
        features = read_report(tmp_path / "check.json")["features"]
        assert features["norm_x"]["channels"] == channels and features["global"]["channels"] == 4 * 8 * 8
