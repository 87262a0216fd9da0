"""Streamed statistics, scores and protocols against closed forms, SciPy, torch-fidelity and loops."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.metric_isc
from torch import Tensor

from driftfield.training import UserError
from vision.fid import (
    PROTOCOLS,
    Reference,
    StreamedGaussian,
    StreamedInceptionScore,
    describe_labels,
    fid_name,
    kernel_distance,
    open_real_images,
    open_reference,
    sample_labels,
)
from vision.metrics import Gaussian, fit_gaussian, frechet_between
from vision.npz import npz_arrays, read_npz_array, read_npz_rows


def normal(n: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def streamed(*batches: Tensor) -> Gaussian:
    stream = StreamedGaussian(batches[0].shape[1])
    for batch in batches:
        stream.update(batch)
    return stream.gaussian()


# --- statistics and distance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 0, 40, 3]])
def test_streamed_statistics_are_those_of_the_whole(sizes: list[int]) -> None:
    features = normal(50, 4) @ normal(4, 4, seed=1) + 3
    gaussian = streamed(*features.split(sizes))
    np.testing.assert_allclose(gaussian.mean, features.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12, atol=1e-13)


def test_streamed_statistics_stay_exact_far_from_the_origin() -> None:
    # Sums of squares would lose all digits of a unit covariance at an offset of 1e8.
    features = normal(1000, 3)
    far = streamed(*(features + 1e8).split(9))
    exact = np.cov((features + 1e8 - 1e8).numpy(), rowvar=False)  # rounded to the grid that the offset leaves
    np.testing.assert_allclose(far.covariance, exact, atol=1e-7)  # a mean is rounded to 1e-8 there


def test_single_precision_features_are_summed_in_double() -> None:
    features = (normal(20_000, 1) + 1000).float()
    gaussian = streamed(*features.split(100))
    exact = features.double()
    np.testing.assert_allclose(gaussian.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(gaussian.covariance[0, 0], exact.var(), rtol=1e-10)


def test_distance_of_diagonal_gaussians_has_a_closed_form() -> None:
    # Sum over axes of (difference of means)^2 + (difference of standard deviations)^2.
    sigma_a, sigma_b = torch.tensor([1.0, 2.0, 0.0, 5.0]).double(), torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    shift = torch.tensor([0.0, 1.0, -2.0, 4.0]).double()
    # Two points at ±sigma / sqrt(2) on each axis in turn, doubled so that the axes do not correlate: exact moments.
    signs = torch.tensor([[a, b, c, d] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1) for d in (-1, 1)]).double()
    unit = signs * (15 / 16) ** 0.5  # unbiased variance 1 on each axis, no correlation
    a, b = streamed(*(unit * sigma_a).split(5)), streamed(*(unit * sigma_b + shift).split(3))
    expected = float((shift.square() + (sigma_a - sigma_b).square()).sum())
    assert frechet_between(a, b) == pytest.approx(expected, rel=1e-10)


def test_distance_of_streamed_statistics_agrees_with_scipys_matrix_square_root() -> None:
    a, b = normal(40, 6) @ normal(6, 6, seed=1), normal(60, 6, seed=2) @ normal(6, 6, seed=3) + 0.5
    one, other = streamed(*a.split(7)), streamed(*b.split(11))
    root = scipy.linalg.sqrtm((one.covariance @ other.covariance).numpy())
    expected = (
        (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * root.trace()
    )
    assert frechet_between(one, other) == pytest.approx(float(expected.real), rel=1e-9)


@pytest.mark.parametrize("n", [100, 8])  # 8 samples in 16 dimensions: a singular covariance
def test_statistics_are_at_distance_zero_from_themselves(n: int) -> None:
    features = normal(n, 16)
    gaussian = streamed(*features.split(3))
    assert frechet_between(gaussian, gaussian) == pytest.approx(0, abs=1e-10)
    assert frechet_between(gaussian, fit_gaussian(features.flip(0))) == pytest.approx(0, abs=1e-10)


def test_unusable_features_are_named() -> None:
    stream = StreamedGaussian(3)
    with pytest.raises(ValueError, match=r"features must be \[B, 3\], found \[2, 4\]"):
        stream.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 rows"):
        stream.update(torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]))
    stream.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 rows, found 1"):
        stream.gaussian()


# --- Inception Score ----------------------------------------------------------------------------------------------


def inception_score(logits: Tensor, *, splits: int, batch: int) -> tuple[float, float]:
    stream = StreamedInceptionScore(len(logits), num_logits=logits.shape[1], splits=splits)
    for start in range(0, len(logits), batch):
        stream.update(logits[start : start + batch], first_index=start)
    return stream.score()


def test_score_of_sure_and_even_predictions_is_the_number_of_classes() -> None:
    one_hot = 1e4 * torch.eye(7).repeat(5, 1)
    assert inception_score(one_hot, splits=1, batch=4) == (pytest.approx(7, rel=1e-12), 0)


def test_score_of_predictions_that_are_all_alike_is_one() -> None:
    logits = normal(1, 9).expand(40, 9)
    assert inception_score(logits, splits=10, batch=11) == (pytest.approx(1, rel=1e-12), pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize(("n", "splits", "batch"), [(200, 10, 200), (203, 10, 17), (30, 1, 4), (12, 10, 5)])
def test_score_agrees_with_torch_fidelity(n: int, splits: int, batch: int) -> None:
    logits = 3 * normal(n, 12)
    theirs = torch_fidelity.metric_isc.isc_features_to_metric(logits, splits=splits)
    mean, std = inception_score(logits, splits=splits, batch=batch)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_score_needs_every_sample_once() -> None:
    with pytest.raises(ValueError, match="10 splits needs as many samples, found 9"):
        StreamedInceptionScore(9, num_logits=3)
    stream = StreamedInceptionScore(20, num_logits=3)
    stream.update(torch.zeros(5, 3), first_index=0)
    with pytest.raises(ValueError, match="logits of 20 samples, found 5"):
        stream.score()


# --- Kernel Inception Distance ------------------------------------------------------------------------------------


def test_kernel_distance_agrees_with_loops_over_all_pairs() -> None:
    # Sets of equal size below 1000 are each one whole subset, so that no draw enters.
    x, y = normal(12, 5).numpy(), (normal(12, 5, seed=1) + 0.7).numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    between = sum(kernel(a, b) for a in x for b in y) / 12**2
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found.mean == pytest.approx(within - 2 * between, rel=1e-10)
    assert found.std == pytest.approx(0, abs=1e-10) and found.subset_size == 12


def test_kernel_distance_of_one_distribution_is_near_zero_and_of_two_is_not() -> None:
    features, others = normal(150, 8), normal(120, 8, seed=1)
    apart = kernel_distance(features, features + 2).mean
    assert apart > 10
    # Of a set and itself: only between the sets does each pair with itself count, 2 / m times by how much it is more.
    kernel = (features @ features.T / 8 + 1) ** 3
    more = kernel.diag().mean() - (kernel.sum() - kernel.trace()) / (150 * 149)
    assert kernel_distance(features, features.flip(0)).mean == pytest.approx(-2 * float(more) / 150, rel=1e-9)
    fresh = kernel_distance(features, others)
    assert abs(fresh.mean) < 0.02 * apart and fresh.std > 0 and fresh.subset_size == 120


# --- names and labels ---------------------------------------------------------------------------------------------


def test_only_fifty_thousand_samples_make_fid_50k() -> None:
    assert [n for n in (49_000, 49_999, 50_000, 50_001, 500_000) if fid_name(n) == "FID-50k"] == [50_000]


def test_balanced_labels_are_fifty_of_each_class() -> None:
    labels = sample_labels("balanced", range(50_000), num_classes=1000, seed=0)
    assert labels.dtype == torch.int64
    assert torch.equal(torch.bincount(labels), torch.full((1000,), 50))


@pytest.mark.parametrize("rule", ["balanced", "random"])
def test_a_label_depends_on_its_index_alone(rule: str) -> None:
    whole = sample_labels(rule, range(100), num_classes=10, seed=3)
    assert torch.equal(sample_labels(rule, range(40, 60), num_classes=10, seed=3), whole[40:60])
    assert sample_labels(rule, range(0), num_classes=10, seed=3).tolist() == []
    assert torch.equal(sample_labels(rule, range(100), num_classes=10, seed=4), whole) == (rule == "balanced")


def test_random_labels_are_uniform() -> None:
    counts = torch.bincount(sample_labels("random", range(20_000), num_classes=10, seed=0), minlength=10)
    # Chi-square with 9 degrees of freedom: 27.9 is exceeded once in a thousand seeds. Multinomial, so never all equal.
    assert 0 < float(((counts - 2000) ** 2 / 2000).sum()) < 27.9


def test_the_label_rule_is_said_with_its_counts() -> None:
    assert describe_labels("balanced", 50_000, 1000) == "balanced: i mod 1000, 50 of each class"
    assert describe_labels("balanced", 10, 1000) == "balanced: i mod 1000, 0 or 1 of each class"
    assert "seed" in describe_labels("random", 50_000, 1000)


def test_the_protocols_are_those_of_their_authors() -> None:
    assert PROTOCOLS["release"].labels == "balanced" and PROTOCOLS["adm"].labels == "random"


# --- references ---------------------------------------------------------------------------------------------------


def save(path: Path, **arrays: np.ndarray) -> Path:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


def good_statistics() -> tuple[np.ndarray, np.ndarray]:
    gaussian = fit_gaussian(normal(20, 4))
    return gaussian.mean.numpy(), gaussian.covariance.numpy()


def read(path: Path, protocol: str = "release", **more: str) -> Reference:
    return open_reference(path, protocol=protocol, num_features=4, num_spatial=3, **more)


@pytest.mark.parametrize(
    ("protocol", "names"),
    [("release", ("ref_mu", "ref_sigma")), ("release", ("mu", "sigma")), ("adm", ("mu", "sigma"))],
)
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_reference_is_read_and_hashed(
    protocol: str, names: tuple[str, str], by_columns: bool, tmp_path: Path
) -> None:
    mu, sigma = good_statistics()
    sigma = np.asfortranarray(sigma) if by_columns else sigma
    path = save(tmp_path / "reference.npz", **dict(zip(names, (mu, sigma), strict=True)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reference = read(path, protocol, expected_sha256=digest.upper())
    assert reference.sha256 == digest
    assert reference.gaussian.mean.dtype == reference.gaussian.covariance.dtype == torch.float64
    np.testing.assert_array_equal(reference.gaussian.mean, mu)
    np.testing.assert_array_equal(reference.gaussian.covariance, sigma)


def test_the_release_prefers_its_own_names(tmp_path: Path) -> None:
    mu, sigma = good_statistics()
    path = save(tmp_path / "both.npz", mu=mu + 1, sigma=sigma, ref_mu=mu, ref_sigma=sigma)
    np.testing.assert_array_equal(read(path).gaussian.mean, mu)


MU, SIGMA = good_statistics()


def test_spatial_statistics_are_read_where_the_reference_has_both(tmp_path: Path) -> None:
    usual, spatial = {"mu": MU, "sigma": SIGMA}, {"mu_s": MU[1:], "sigma_s": SIGMA[1:, 1:]}
    found = read(save(tmp_path / "both.npz", **usual, **spatial), "adm")
    assert found.spatial is not None and found.spatial.mean.dtype == torch.float64
    np.testing.assert_array_equal(found.spatial.mean, MU[1:])
    np.testing.assert_array_equal(found.spatial.covariance, SIGMA[1:, 1:])
    np.testing.assert_array_equal(found.gaussian.mean, MU)
    for name in ((), ("mu_s",), ("sigma_s",)):
        some = {key: spatial[key] for key in name}
        assert read(save(tmp_path / "some.npz", **usual, **some), "adm").spatial is None


@pytest.mark.parametrize(
    ("protocol", "arrays", "words"),
    [
        ("release", {"mu": MU}, ["ref_mu/ref_sigma or mu/sigma", "found mu"]),
        ("adm", {"ref_mu": MU, "ref_sigma": SIGMA}, ["protocol=adm", "ref_mu", "not comparable"]),
        ("release", {"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": SIGMA}, ["protocol=release", "mu_s"]),
        ("adm", {"mu": MU[:3], "sigma": SIGMA}, ["mu", "[4]", "[3]"]),
        ("adm", {"mu": MU, "sigma": SIGMA[:3]}, ["sigma", "[4, 4]", "[3, 4]"]),
        ("adm", {"mu": MU, "sigma": (100 * SIGMA).astype(np.int64)}, ["real numbers", "int64"]),
        ("adm", {"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": SIGMA}, ["mu_s", "[3]", "[4]"]),
        ("adm", {"mu": MU, "sigma": SIGMA, "mu_s": MU[1:], "sigma_s": -SIGMA[1:, 1:]}, ["covariance"]),
        ("adm", {"mu": MU * np.nan, "sigma": SIGMA}, ["finite"]),
        ("adm", {"mu": MU, "sigma": np.triu(SIGMA)}, ["covariance"]),
        ("adm", {"mu": MU, "sigma": -SIGMA}, ["covariance"]),
        ("adm", {"mu": np.array([None] * 4), "sigma": SIGMA}, ["Python objects"]),
    ],
)
def test_a_file_that_is_no_reference_is_refused(
    protocol: str, arrays: dict[str, np.ndarray], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read(save(tmp_path / "reference.npz", **arrays), protocol)
    for word in ["reference", *words]:
        assert word in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found .*absent\.npz: No such file"):
        read(tmp_path / "absent.npz")
    path = save(tmp_path / "reference.npz", mu=MU, sigma=SIGMA)
    with pytest.raises(UserError, match=f"expected SHA-256 {'0' * 64}, found [0-9a-f]{{64}} of"):
        read(path, expected_sha256="0" * 64)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-30], whole.replace(b"\x93NUMPY", b"\x92NUMPY")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="expected a whole npz file"):
            read(path)


def test_one_flipped_bit_of_a_reference_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "reference.npz", mu=MU, sigma=SIGMA)
    whole = path.read_bytes()
    position = whole.index(SIGMA.tobytes()) + 5
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(UserError, match="CRC"):
        read(path)


# --- images of an npz ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_rows_are_read_in_parts(compression: int, tmp_path: Path) -> None:
    images = np.arange(7 * 2 * 3 * 3, dtype=np.uint8).reshape(7, 2, 3, 3)
    (np.savez if compression == zipfile.ZIP_STORED else np.savez_compressed)(tmp_path / "images.npz", arr_0=images)
    path = tmp_path / "images.npz"
    assert npz_arrays(path)["arr_0"][:2] == ((7, 2, 3, 3), np.uint8)
    parts = list(read_npz_rows(path, "arr_0", rows=range(1, 6), at_once=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(parts), images[1:6])
    np.testing.assert_array_equal(read_npz_array(path, "arr_0"), images)
    for name, rows in [("arr_0", range(5, 8)), ("arr_1", range(1))]:
        with pytest.raises(ValueError, match="arr_0 has 7 rows|arr_1"):
            list(read_npz_rows(path, name, rows=rows, at_once=2))


def test_real_images_are_looked_at_before_they_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "images.npz", arr_0=np.zeros((5, 4, 4, 3), np.uint8))
    found = open_real_images(path, at_most=3)
    assert found is not None
    assert (found.num, found.sha256) == (3, hashlib.sha256(path.read_bytes()).hexdigest())
    assert open_real_images(save(tmp_path / "none.npz", mu=MU), at_most=3) is None
    for wrong in (np.zeros((5, 3, 4, 4), np.uint8), np.zeros((5, 4, 4, 3)), np.zeros((5, 4, 3), np.uint8)):
        with pytest.raises(UserError, match=r"arr_0 as uint8 \[n, H, W, 3\]"):
            open_real_images(save(path, arr_0=wrong), at_most=3)
