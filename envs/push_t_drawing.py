"""How PushT looks: the picture that the human demonstrations were recorded in, drawn again with OpenCV."""

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np

TABLE_SIZE: Final = 512  # px

WHITE: Final = (255, 255, 255)
GOAL: Final = (144, 238, 144)  # LightGreen
WALL: Final = (211, 211, 211)  # LightGray
AGENT: Final = (65, 105, 225)  # RoyalBlue
AGENT_INSIDE: Final = (78, 126, 255)  # 1.2 times as bright
BLOCK: Final = (119, 136, 153)  # LightSlateGray
BLOCK_INSIDE: Final = (142, 163, 183)  # 1.2 times as bright

WALL_CORNERS: Final = ((5, 5), (506, 5), (506, 506), (5, 506))
WALL_WIDTH: Final = 4
AGENT_RADIUS: Final = 15
OUTLINE_RADIUS: Final = 2  # of the block's edges


def draw_table(agent: np.ndarray, block: Sequence[np.ndarray], goal: Sequence[np.ndarray]) -> np.ndarray:
    """The table from above.

    Args:
        agent: centre of the agent `[2]`, px.
        block: polygons `[corners, 2]` of the block, px.
        goal: polygons of the block at its goal.

    Returns:
        RGB picture `[512, 512, 3]` uint8.
    """
    picture = np.full((TABLE_SIZE, TABLE_SIZE, 3), WHITE, np.uint8)
    for polygon in goal:
        cv2.fillPoly(picture, [_rounded(polygon)], GOAL)
    cv2.polylines(picture, [np.array(WALL_CORNERS, np.int32)], True, WALL, WALL_WIDTH)
    centre = tuple(map(int, _rounded(agent)))
    cv2.circle(picture, centre, AGENT_RADIUS, AGENT, cv2.FILLED)
    cv2.circle(picture, centre, AGENT_RADIUS - 4, AGENT_INSIDE, cv2.FILLED)
    for polygon in block:
        corners = _rounded(polygon)
        cv2.fillPoly(picture, [corners], BLOCK_INSIDE)
        cv2.polylines(picture, [corners], True, BLOCK, 2 * OUTLINE_RADIUS)
        for x, y in corners:
            cv2.circle(picture, (int(x), int(y)), OUTLINE_RADIUS, BLOCK, cv2.FILLED)
    return picture


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    """The picture at another size `[size, size, 3]`, interpolated linearly and not smoothed first, as in the data."""
    return cv2.resize(picture, (size, size))


def _rounded(points: np.ndarray) -> np.ndarray:
    return np.round(points).astype(np.int32)
