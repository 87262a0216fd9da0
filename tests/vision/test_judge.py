"""The judging classifier: good enough to judge, the same every time, and never taken from a cache that does not fit."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision import judge as module
from vision.data import ImageSet, Split, load, to_float
from vision.judge import SETTINGS, Judge, JudgeNetwork, JudgeSettings, load_or_train, train_judge
from vision.metrics import evaluate_features

QUICK = JudgeSettings(
    widths=(4,), stem_stride=1, num_features=6, epochs=2, batch_size=8, learning_rate=1e-2,
    max_shift=0.1, max_rotation_deg=10, max_zoom=0.1, mirror=True,
)  # fmt: skip


def stripes(split: Split, *, seed: int = 0, name: str = "stripes") -> ImageSet:
    """Noisy 6 x 6 images with a bright left half (class 0) or right half (class 1)."""
    labels = torch.arange(30) % 2
    generator = torch.Generator().manual_seed(seed + (split == "test"))
    images = torch.randint(0, 60, (30, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :, :3] += 180
    images[labels == 1, :, :, 3:] += 180
    return ImageSet(images, labels, ("left", "right"), name, split)


def quick(folder: Path, *, settings: JudgeSettings = QUICK, **changes: ImageSet) -> Judge:
    return load_or_train(
        **{"train": stripes("train"), "test": stripes("test"), **changes}, folder=folder, settings=settings
    )


def weights(judge: Judge) -> dict[str, Tensor]:
    return judge.network.state_dict()


def same_weights(a: Judge, b: Judge) -> bool:
    return all(torch.equal(weights(a)[name], weights(b)[name]) for name in weights(a))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it turns any further training into a failure."""

    def forbid() -> None:
        monkeypatch.setattr(module, "train_judge", lambda *_, **__: pytest.fail("trained although the cache fits"))

    return forbid


# --- the real one -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return load_or_train(load("digits", "train"), load("digits", "test"), tmp_path_factory.mktemp("judge"))


def test_digits_are_recognised(digits_judge: Judge) -> None:
    test = load("digits", "test")
    predicted = digits_judge.logits(to_float(test.images)).argmax(1)
    assert digits_judge.test_accuracy == float((predicted == test.labels).double().mean())
    assert digits_judge.test_accuracy >= 0.985
    assert digits_judge.features(to_float(test.images)).shape == (500, 64)


def test_real_training_digits_are_as_close_to_the_test_split_as_it_is_to_itself(digits_judge: Judge) -> None:
    """The floor is fair only if the judge does not set its own training images apart from unseen ones."""
    train, test = load("digits", "train"), load("digits", "test")
    half = torch.arange(500) % 2 == 0
    seen, unseen = (digits_judge.features(to_float(split.images)) for split in (train, test))
    judged = {"reference": unseen[half], "train": seen, "train_labels": train.labels, "feature_space": "digits"}
    judged |= {"coverage_pixels": 1.0, "coverage_pixels_real": 1.0}
    logits = digits_judge.logits(to_float(test.images))[~half]
    result = evaluate_features(unseen[~half], logits, test.labels[~half], judge_accuracy=1.0, **judged)  # type: ignore[arg-type]
    assert result.n_generated == result.n_floor == 250
    assert result.frechet_floor < 1.25 * result.frechet
    assert abs(result.coverage_real - result.coverage) < 0.03


def test_features_are_what_the_last_layer_sees(digits_judge: Judge) -> None:
    images = to_float(load("digits", "test").images[:20])
    features = digits_judge.features(images)
    assert torch.equal(digits_judge.network.head(features).detach(), digits_judge.logits(images))
    assert not features.requires_grad and not digits_judge.network.training
    alone = torch.cat([digits_judge.features(image[None]) for image in images])
    torch.testing.assert_close(alone, features, rtol=1e-4, atol=1e-5)  # no image depends on its neighbours


# --- determinism --------------------------------------------------------------------------------------------------


def test_training_again_writes_the_same_files_whatever_the_global_seed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    quick(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    quick(tmp_path / "b")
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first == second
    assert [Path(name).name for name in first] == ["config.json", "judge.json", "model.safetensors"]
    assert not same_weights(quick(tmp_path / "a"), quick(tmp_path / "b", settings=replace(QUICK, seed=1)))


def test_killed_training_starts_again_and_ends_the_same(tmp_path: Path) -> None:
    class Killed(BaseException):
        """What no handler catches."""

    def kill(done: int, total: int) -> None:
        if done >= total / 2:
            raise Killed

    splits = stripes("train"), stripes("test")
    with pytest.raises(Killed):
        load_or_train(*splits, tmp_path / "a", settings=QUICK, progress=kill)
    assert contents(tmp_path) == {}
    again = load_or_train(*splits, tmp_path / "a", settings=QUICK)
    assert same_weights(again, quick(tmp_path / "b"))


def test_progress_counts_images_up_to_all_of_them(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_or_train(
        stripes("train"), stripes("test"), tmp_path, settings=QUICK, progress=lambda *call: calls.append(call)
    )
    assert calls == [(done, 48) for done in range(8, 49, 8)]  # 30 images are three batches of 8; two epochs


# --- the cache ----------------------------------------------------------------------------------------------------


def test_cache_is_used_while_data_and_settings_are_the_same(tmp_path: Path, no_training: Callable[[], None]) -> None:
    trained = quick(tmp_path)
    no_training()
    cached = quick(tmp_path)
    assert same_weights(cached, trained)
    assert cached.record == trained.record and cached.name == trained.name
    images = to_float(stripes("test").images)
    assert torch.equal(cached.logits(images), trained.logits(images))


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": replace(QUICK, epochs=3)},
        {"settings": replace(QUICK, seed=5)},
        {"train": stripes("train", seed=9)},
        {"test": stripes("test", seed=9)},
        {"train": stripes("train", name="bars"), "test": stripes("test", name="bars")},
    ],
)
def test_other_data_or_settings_get_a_judge_of_their_own(
    tmp_path: Path, no_training: Callable[[], None], changes: dict[str, object]
) -> None:
    first = quick(tmp_path)
    other = quick(tmp_path, **changes)  # type: ignore[arg-type]
    assert other.record.identity != first.record.identity
    no_training()
    assert quick(tmp_path).record == first.record
    assert quick(tmp_path, **changes).record == other.record  # type: ignore[arg-type]


def test_another_recipe_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quick(tmp_path)
    monkeypatch.setattr(module, "RECIPE", module.RECIPE + 1)
    assert quick(tmp_path).record.identity != first.record.identity


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def set_field(path: Path, field: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), field: value}), encoding="utf-8")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "weights cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"abc"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config of another model": lambda folder: set_field(folder / "config.json", "model", "ResNetMAE"),
    "record cut short": lambda folder: (folder / "judge.json").write_text("{", encoding="utf-8"),
    "record is a list": lambda folder: (folder / "judge.json").write_text("[]", encoding="utf-8"),
    "record with a stray field": lambda folder: set_field(folder / "judge.json", "stray", 1),
    "record of other data": lambda folder: set_field(folder / "judge.json", "identity", {}),
    "record not text": lambda folder: (folder / "judge.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_reported_and_trained_again(tmp_path: Path, damage: str) -> None:
    trained = quick(tmp_path)
    files = contents(tmp_path)
    (place,) = tmp_path.iterdir()
    DAMAGES[damage](place)
    with pytest.warns(UserWarning, match=f"{place}: expected a whole judge, found: .*; training it again"):
        again = quick(tmp_path)
    assert same_weights(again, trained)
    assert contents(tmp_path) == files


def test_a_kill_between_weights_and_record_is_no_damage(tmp_path: Path) -> None:
    quick(tmp_path)
    files = contents(tmp_path)
    (place,) = tmp_path.iterdir()
    (place / "judge.json").unlink()
    (place / "model.safetensors").write_bytes(b"of an older try")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick(tmp_path)
    assert contents(tmp_path) == files


# --- parts and bad input ------------------------------------------------------------------------------------------


def test_it_learns_an_easy_task(tmp_path: Path) -> None:
    assert quick(tmp_path, settings=replace(QUICK, epochs=30, mirror=False)).test_accuracy == 1.0


def test_mirroring_makes_left_and_right_the_same(tmp_path: Path) -> None:
    assert quick(tmp_path, settings=replace(QUICK, epochs=30, mirror=True)).test_accuracy < 0.9


def test_augmentation_of_nothing_changes_nothing() -> None:
    images = to_float(stripes("train").images)
    still = replace(QUICK, max_shift=0, max_rotation_deg=0, max_zoom=0, mirror=False)
    torch.testing.assert_close(module._augment(images, still, torch.Generator()), images, rtol=0, atol=1e-5)
    turned = module._augment(images, replace(still, mirror=True), torch.Generator().manual_seed(0))
    flips = [torch.allclose(after, before.flip(-1), atol=1e-5) for before, after in zip(images, turned, strict=True)]
    kept = [torch.allclose(after, before, atol=1e-5) for before, after in zip(images, turned, strict=True)]
    assert all(flipped != same for flipped, same in zip(flips, kept, strict=True))
    assert 5 < sum(flips) < 25


def test_augmentation_shifts_within_its_bound() -> None:
    image = torch.full((200, 1, 20, 20), -1.0)
    image[:, :, 10, 10] = 1.0
    still = replace(QUICK, max_rotation_deg=0, max_zoom=0, mirror=False, max_shift=0.1)
    moved = (module._augment(image, still, torch.Generator().manual_seed(0)) + 1)[:, 0]  # [200, 20, 20]
    columns = (moved.sum(1) * torch.arange(20.0)).sum(1) / moved.sum((1, 2))
    assert 1.5 < (columns - 10).abs().max() <= 2 + 1e-3  # a tenth of 20 pixels
    assert (columns - 10).mean().abs() < 0.3


def test_image_sizes_that_fit_are_the_ones_announced() -> None:
    fields = {"num_classes": 2, "widths": (4, 4), "stem_stride": 2, "num_features": 3}
    with pytest.raises(ValueError, match="image_shape must be at least 7 x 7, found 6 x 9"):
        JudgeNetwork(image_shape=(1, 6, 9), **fields)  # type: ignore[arg-type]
    features, logits = JudgeNetwork(image_shape=(3, 7, 9), **fields).eval()(torch.zeros(5, 3, 7, 9))  # type: ignore[arg-type]
    assert features.shape == (5, 3) and logits.shape == (5, 2)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 6, 6, dtype=torch.uint8), torch.zeros(6, 6)]
)
def test_images_of_another_shape_or_kind_are_refused(tmp_path: Path, images: Tensor) -> None:
    judge = quick(tmp_path)
    with pytest.raises(ValueError, match=r"images must be floating point \[B, 1, 6, 6\], found torch\.\w+ \["):
        judge.features(images)


def test_splits_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name of train and test must be the same, found stripes and bars"):
        quick(tmp_path, test=stripes("test", name="bars"))
    with pytest.raises(ValueError, match=r"image shape .* found \(1, 6, 6\) and \(1, 8, 8\)"):
        quick(tmp_path, test=replace(load("digits", "test"), name="stripes"))
    with pytest.raises(ValueError, match="classes of train and test"):
        quick(tmp_path, test=replace(stripes("test"), class_names=("left", "middle")))
    with pytest.raises(ValueError, match="settings must be given for data sets other than digits, .* found 'stripes'"):
        load_or_train(stripes("train"), stripes("test"), tmp_path)
    with pytest.raises(ValueError, match="epochs: expected at least 1, found 0"):
        replace(QUICK, epochs=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_every_data_set_has_settings_that_fit_its_images(name: str) -> None:
    settings = replace(SETTINGS[name], epochs=1, batch_size=4)
    side = {"digits": 8, "fashion_mnist": 32}[name]
    few = ImageSet(torch.zeros(8, 1, side, side, dtype=torch.uint8), torch.arange(8), tuple("abcdefgh"), name, "train")
    assert train_judge(few, settings)(torch.zeros(3, 1, side, side))[0].shape == (3, 64)
