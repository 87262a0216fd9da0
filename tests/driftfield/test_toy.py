"""The toy program: what its generators reach, and what its command line writes and refuses."""

import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from driftfield import DriftingLoss, toy

# Enough to see where a start ends; the program's own count is for pictures.
STEPS = 300


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@cache
def run(panel: toy.Panel, field: str, steps: int = STEPS) -> toy.Run:
    loss_fn = DriftingLoss(toy.TEMPERATURES, **toy.FIELDS[field])
    return toy.run_panel(panel, loss_fn, steps=steps, seed=0)


def test_bimodal_has_two_modes_of_equal_weight() -> None:
    shares = toy.share_of_modes(toy.bimodal(20_000, rng()))
    within_three_deviations = 1 - math.exp(-(3**2) / 2)  # of a Gaussian in the plane
    assert shares.tolist() == pytest.approx([within_three_deviations / 2] * 2, abs=0.01)


def test_checkerboard_fills_every_other_cell_evenly() -> None:
    cells = ((toy.checkerboard(20_000, rng()) + 1) * 2).floor().long()  # [num, 2]
    counts = (4 * cells[:, 1] + cells[:, 0]).bincount(minlength=16).reshape(4, 4)
    dark = torch.arange(4)[:, None] % 2 == torch.arange(4) % 2
    assert (counts[~dark] == 0).all()
    assert (counts[dark] / 20_000).tolist() == pytest.approx([1 / 8] * 8, abs=0.01)


def test_swiss_roll_winds_outwards() -> None:
    x = toy.swiss_roll(5000, rng())
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    along = radius * 4.5 * math.pi  # the angle of the spiral at this radius
    turned = (along - angle + math.pi).remainder(2 * math.pi) - math.pi
    assert turned.abs().quantile(0.99) < 4 * 0.02 * 4.5 * math.pi  # four deviations of the noise
    assert radius.min() > 1 / 3 - 0.1 and radius.max() < 1.1


@pytest.mark.parametrize("panels", toy.PANELS.values(), ids=toy.PANELS)
def test_a_generator_starts_as_the_blob_of_its_panel(panels: tuple[toy.Panel, ...]) -> None:
    for panel in panels:
        x = toy.Generator(panel.start, panel.spread, rng=rng())(torch.randn(5000, 2, generator=rng())).detach()
        assert x.mean(0).tolist() == pytest.approx(panel.start, abs=0.1 * panel.spread)
        assert x.std(0).tolist() == pytest.approx([panel.spread] * 2, rel=0.1)


def test_energy_distance_is_zero_for_one_set_and_grows_with_the_shift() -> None:
    x = torch.randn(300, 2, generator=rng())
    assert toy.energy_distance(x, x) == 0
    distances = [toy.energy_distance(x, x + shift) for shift in (0.1, 1.0, 10.0)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("panel", toy.PANELS["fig3"], ids=lambda panel: panel.name)
def test_both_modes_are_found_from_every_start(panel: toy.Panel) -> None:
    result = run(panel, "default")
    assert toy.share_of_modes(result.samples[-1]).min() > 0.4
    assert toy.energy_distance(result.samples[-1], result.real) < 0.02
    # where the distributions agree, generated samples drift no more than real ones would
    last = result.drift_norm[-STEPS // 10 :].mean(0)
    assert (last < 1.25 * result.real_drift_norm).all()
    assert (result.drift_norm[:5].amax(0) > 2 * last).all()
    # Eq. 25-26: as many unit drifts as temperatures, which agree in part
    assert result.loss.max() < 4.001 and result.loss[-STEPS // 10 :].mean() < 3.7


@pytest.mark.parametrize(
    "field",
    ["sinkhorn", *(pytest.param(f, marks=pytest.mark.slow) for f in ("bias-corrected", "sinkhorn-halves", "mmd"))],
)
def test_fields_beyond_the_paper_find_both_modes_too(field: str) -> None:
    result = run(toy.PANELS["fig3"][2], field)
    assert toy.share_of_modes(result.samples[-1]).min() > 0.4
    assert toy.energy_distance(result.samples[-1], result.real) < 0.02


def test_without_repulsion_all_samples_end_on_one_point_between_the_modes() -> None:
    panel = toy.PANELS["fig3"][2]
    result, good = run(panel, "attraction-only"), run(panel, "default")
    assert result.samples[-1].std(0).max() < 0.05 * toy.MODE_STD
    assert result.samples[-1].mean(0).tolist() == pytest.approx([0, 0], abs=0.1)
    assert toy.energy_distance(result.samples[-1], result.real) > 0.5
    # what the loss then shows: the drifts of both temperatures are the same, 2² = 4
    assert result.loss[-STEPS // 10 :].min() > 3.99
    # real samples are no equilibrium of such a field
    assert (result.real_drift_norm > 1.5 * good.real_drift_norm).all()


def test_a_run_shows_one_noise_from_before_the_first_step_to_after_the_last() -> None:
    panel = toy.PANELS["fig3"][1]
    result = run(panel, "default", 3)
    assert result.moments == sorted(result.moments) and result.moments[0] == 0 and result.moments[-1] == 3
    assert len(result.samples) == toy.FRAMES == len(result.moments)
    assert result.samples[0].mean(0).tolist() == pytest.approx(panel.start, abs=0.05)
    for frame in range(1, toy.FRAMES):
        moved = result.moments[frame] > result.moments[frame - 1]
        assert moved != torch.equal(result.samples[frame], result.samples[frame - 1])
    assert result.loss.shape == (3,) and result.drift_norm.shape == (3, len(toy.TEMPERATURES))


def test_a_run_is_a_function_of_its_seed() -> None:
    panel, loss_fn = toy.PANELS["fig4"][0], DriftingLoss(toy.TEMPERATURES)
    first, again, other = (toy.run_panel(panel, loss_fn, steps=2, seed=seed).samples for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_program_writes_pictures_and_prints_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy.main(["--steps", "45", "--only", "fig4", "--out", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out
    for panel in toy.PANELS["fig4"]:
        assert f"\n{panel.name}  " in printed
    written = [Path(line.strip()) for line in printed.partition("\nwrote\n")[2].splitlines()]
    assert [path.name for path in written] == ["fig4.png", "fig4.gif"]
    for path in written:
        with Image.open(path) as picture:
            picture.verify()
        with Image.open(path) as picture:
            assert min(picture.size) > 400
            if path.suffix == ".gif":
                assert picture.n_frames > toy.FRAMES // 2 and picture.info["loop"] == 0
                assert path.stat().st_size < 1_500_000
                first = picture.convert("RGB")
                picture.seek(picture.n_frames - 1)
                assert first.tobytes() != picture.convert("RGB").tobytes()


def test_the_table_holds_what_was_seen_and_what_real_samples_reach() -> None:
    runs = [run(panel, "default") for panel in toy.PANELS["fig3"][:2]]
    header, *lines = toy.table(runs, seed=0).splitlines()
    assert header.split("  ")[-1].strip() == "energy distance" and "λ at τ=0.05" in header and "left mode" in header
    assert [line[:24].rstrip() for line in lines] == [*(seen.panel.name for seen in runs), "  real samples"]
    for line, seen in zip(lines, runs, strict=False):
        *norms, left, right, distance = line[24:].split()
        assert [float(norm) for norm in norms] == pytest.approx(
            seen.drift_norm[-STEPS // 10 :].mean(0).tolist(), abs=1e-3
        )
        shares = [float(share.rstrip("%")) / 100 for share in (left, right)]
        assert shares == pytest.approx(toy.share_of_modes(seen.samples[-1]).tolist(), abs=1e-3)
        assert float(distance) == pytest.approx(toy.energy_distance(seen.samples[-1], seen.real), abs=1e-4)
    assert float(lines[-1].split()[-1]) < 0.005


def test_every_option_reaches_the_loss_and_the_headline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    short = toy.run_panel(toy.PANELS["fig4"][0], DriftingLoss(toy.TEMPERATURES), steps=1, seed=0)

    def recorded(panel: toy.Panel, loss_fn: DriftingLoss, *, steps: int, seed: int) -> toy.Run:
        seen.append((panel, loss_fn, steps, seed))
        return short

    monkeypatch.setattr(toy, "run_panel", recorded)
    monkeypatch.setattr(toy, "write_pictures", lambda runs, title, folder, name: [folder / name])
    options = "--recipe paper --field 2x-repulsion --normalize-over y --affinity-floor 1e-05 --temperatures 0.1 0.3"
    assert toy.main([*options.split(), "--only", "fig4", "--seed", "7", "--out", str(tmp_path)]) == 0
    assert [panel for panel, *_ in seen] == list(toy.PANELS["fig4"])
    for _, loss_fn, steps, seed in seen:
        assert not loss_fn.normalize_drift  # the recipe of Eq. 6
        assert (loss_fn.options.attraction, loss_fn.options.repulsion, loss_fn.options.normalize_over) == (
            1.0,
            2.0,
            "y",
        )
        assert (loss_fn.options.affinity_floor, loss_fn.options.temperatures) == (1e-5, (0.1, 0.3))
        assert (steps, seed) == (toy.STEPS["fig4"], 7)
    assert capsys.readouterr().out.startswith(f"Fig. 4 with {options}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", "argument --steps: must be at least 1, found 0"),
        ("--seed -1", "argument --seed: must lie in [0, 2^63), found -1"),
        ("--field none", "argument --field: invalid choice: 'none'"),
        ("--temperatures 0.1 0", "temperatures must be"),
        ("--affinity-floor -1", "affinity_floor must be"),
        ("--field sinkhorn --normalize-over y", "normalize_over must be left at 'xy'"),
        ("--out {file}/folder", "argument --out: cannot make the folder"),
    ],
)
def test_unusable_options_are_told_in_a_sentence_before_any_work(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "run_panel", lambda *_, **__: pytest.fail("trained all the same"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as left:
        toy.main(words.format(file=tmp_path / "file").split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("missing", ["matplotlib", "PIL"])
def test_a_missing_library_is_named_with_its_remedy(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert toy.main(["--out", str(tmp_path / "folder")]) == 1
    assert capsys.readouterr().err == f"error: drawing needs {missing}: pip install -e .[train]\n"
    assert not (tmp_path / "folder").exists()
