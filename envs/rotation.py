"""Rotations as six numbers, the form in which policies learn them.

The six numbers are the first two rows of the rotation matrix, one after the other. Unlike axis-angle vectors and
quaternions they are a continuous function of the rotation (Zhou et al., arXiv 1812.07035), and any six numbers whose
halves are not parallel are a rotation after orthonormalisation. Other conversions are scipy.spatial's.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

SMALLEST_SINE: Final = 1e-6  # between the two rows; float32 says nothing about the plane of more parallel ones

Float = NDArray[np.floating[Any]]


def matrix_from_rotation_6d(rotation_6d: ArrayLike) -> Float:
    """The rotation matrix whose first two rows are closest to the given ones, in Gram and Schmidt's order.

    Args:
        rotation_6d: two rows `[..., 6]`, neither unit nor perpendicular of necessity.

    Raises:
        ValueError: the last axis is not 6 long, or two rows are parallel, zero or not finite.

    Returns:
        Rotation matrices `[..., 3, 3]`, float64.

    >>> matrix_from_rotation_6d([0, 2, 0, -1, 5, 0]).astype(int).tolist()
    [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]
    """
    rows = np.asarray(rotation_6d, dtype=np.float64)
    if rows.ndim == 0 or rows.shape[-1] != 6:
        raise ValueError(f"rotation_6d: expected shape [..., 6], found {list(rows.shape)}")
    first, second = rows[..., :3], rows[..., 3:]  # [..., 3]
    with np.errstate(divide="ignore", invalid="ignore"):  # checked below, where the message can name the rows
        first = first / np.linalg.norm(first, axis=-1, keepdims=True)
        second = second / np.linalg.norm(second, axis=-1, keepdims=True)
        second = second - np.sum(first * second, axis=-1, keepdims=True) * first
        sine = np.linalg.norm(second, axis=-1, keepdims=True)
        second = second / sine
    bad = np.argwhere(~(sine[..., 0] > SMALLEST_SINE))
    if len(bad):
        where = f" at {bad[0].tolist()}" if rows.ndim > 1 else ""
        found = rows[tuple(bad[0])].tolist()
        raise ValueError(f"rotation_6d{where}: expected two finite rows that are not parallel, found {found}")
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def rotation_6d_from_matrix(matrix: ArrayLike) -> Float:
    """The first two rows of rotation matrices.

    Args:
        matrix: rotation matrices `[..., 3, 3]`.

    Raises:
        ValueError: the last two axes are not 3 long.

    Returns:
        `[..., 6]`, float64.

    >>> rotation_6d_from_matrix([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]).tolist()
    [0.0, 1.0, 0.0, -1.0, 0.0, 0.0]
    """
    rotation = np.asarray(matrix, dtype=np.float64)
    if rotation.shape[-2:] != (3, 3):
        raise ValueError(f"matrix: expected shape [..., 3, 3], found {list(rotation.shape)}")
    return rotation[..., :2, :].reshape(*rotation.shape[:-2], 6).copy()


def rotation_6d_from_axis_angle(axis_angle: ArrayLike) -> Float:
    """The six numbers of rotations given as axis times angle, as recorded demonstrations hold them.

    Args:
        axis_angle: `[..., 3]` in radians.

    Raises:
        ValueError: the last axis is not 3 long.

    Returns:
        `[..., 6]`, float64.

    >>> rotation_6d_from_axis_angle([0, 0, np.pi]).round(6).tolist()
    [-1.0, -0.0, 0.0, 0.0, -1.0, 0.0]
    """
    vectors = np.asarray(axis_angle, dtype=np.float64)
    if vectors.ndim == 0 or vectors.shape[-1] != 3:
        raise ValueError(f"axis_angle: expected shape [..., 3], found {list(vectors.shape)}")
    matrices = Rotation.from_rotvec(vectors.reshape(-1, 3)).as_matrix()
    return rotation_6d_from_matrix(matrices.reshape(*vectors.shape[:-1], 3, 3))


def axis_angle_from_rotation_6d(rotation_6d: ArrayLike) -> Float:
    """Axis times angle of rotations given as six numbers.

    Args:
        rotation_6d: `[..., 6]`, as `matrix_from_rotation_6d` takes it.

    Raises:
        ValueError: what `matrix_from_rotation_6d` refuses.

    Returns:
        `[..., 3]` in radians, no longer than pi.

    >>> axis_angle_from_rotation_6d([1, 0, 0, 0, 0, -1]).round(6).tolist()
    [1.570796, 0.0, 0.0]
    """
    matrices = matrix_from_rotation_6d(rotation_6d)
    vectors = Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_rotvec()
    return vectors.reshape(*matrices.shape[:-2], 3)
