"""Rotations as six numbers: inverses of each other, the nearest rotation in Gram and Schmidt's sense, refusals."""

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install -e '.[simulators]'")

from envs.rotation import (
    axis_angle_from_rotation_6d,
    matrix_from_rotation_6d,
    rotation_6d_from_axis_angle,
    rotation_6d_from_matrix,
)


@pytest.fixture
def axis_angles() -> np.ndarray:
    """Vectors shorter than pi, in two leading dimensions; the last one is the identity."""
    random = np.random.default_rng(0)
    axes = random.normal(size=(4, 25, 3))
    angles = random.uniform(0, np.pi, size=(4, 25, 1))
    vectors = axes / np.linalg.norm(axes, axis=-1, keepdims=True) * angles
    vectors[-1, -1] = 0
    return vectors


def test_axis_angle_returns(axis_angles: np.ndarray) -> None:
    six = rotation_6d_from_axis_angle(axis_angles)
    assert six.shape == (4, 25, 6)
    np.testing.assert_allclose(axis_angle_from_rotation_6d(six), axis_angles, atol=1e-12)


def test_half_turns_return_up_to_their_sign() -> None:
    for axis in (*np.eye(3), [0.6, 0, 0.8]):
        vector = axis_angle_from_rotation_6d(rotation_6d_from_axis_angle(np.pi * np.asarray(axis)))
        np.testing.assert_allclose(np.abs(vector), np.pi * np.asarray(axis), atol=1e-7)


def test_matrices_are_rotations_and_their_rows_are_the_six_numbers(axis_angles: np.ndarray) -> None:
    six = rotation_6d_from_axis_angle(axis_angles)
    matrices = matrix_from_rotation_6d(six)
    np.testing.assert_allclose(
        matrices @ np.swapaxes(matrices, -1, -2), np.broadcast_to(np.eye(3), matrices.shape), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=1e-12)
    np.testing.assert_allclose(rotation_6d_from_matrix(matrices), six, atol=1e-12)


def test_a_quarter_turn_about_z_by_hand() -> None:
    # x goes to y: columns (0, 1, 0), (-1, 0, 0), (0, 0, 1), so rows (0, -1, 0), (1, 0, 0).
    np.testing.assert_allclose(rotation_6d_from_axis_angle([0, 0, np.pi / 2]), [0, -1, 0, 1, 0, 0], atol=1e-15)


def test_any_two_rows_in_the_same_half_plane_are_the_same_rotation(axis_angles: np.ndarray) -> None:
    six = rotation_6d_from_axis_angle(axis_angles)
    first, second = six[..., :3], six[..., 3:]
    skewed = np.concatenate([3 * first, 0.2 * second - 0.7 * first], axis=-1)
    np.testing.assert_allclose(matrix_from_rotation_6d(skewed), matrix_from_rotation_6d(six), atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 0, 0, 0, 1, 0], "not parallel"),
        ([1, 2, 3, 2, 4, 6], "not parallel"),
        ([np.nan, 0, 0, 0, 1, 0], "finite"),
        ([[1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]], r"rotation_6d at \[1\]"),
        ([1, 0, 0], r"\[\.\.\., 6\], found \[3\]"),
    ],
)
def test_what_is_no_rotation_is_refused(rows: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        matrix_from_rotation_6d(rows)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, 3\]"):
        rotation_6d_from_matrix(np.eye(2))
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\]"):
        rotation_6d_from_axis_angle(np.zeros(4))
