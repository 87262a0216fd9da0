"""Ways around PushT's block for the agent: the shortest ones in a graph of points that moves with the block."""

from typing import Final, NamedTuple

import numpy as np
import shapely

from envs.push_t import OUTLINE, on_table, rotation
from envs.push_t_drawing import AGENT_RADIUS, TABLE_SIZE

CONTACT_SPACING: Final = 10.0  # px along the outline
CONTACT_GAP: Final = 2.0  # px between the agent and the block where a push begins
ROUTE_GAP: Final = 1.5  # px, the least between the agent and the block on a route
CORNER_GAPS: Final = (20.0, 32.0)  # px from the lines of the outline to the points around its corners
MOST_LEGS: Final = 7

_BLOCK: Final = shapely.Polygon(OUTLINE)
_CORNER_DIRECTIONS: Final = np.array([(-1, -1), (1, -1), (1, 1), (1, 1), (1, 1), (-1, 1), (-1, 1), (-1, 1)])


class Contacts(NamedTuple):
    """Where pushes begin, in the block's frame."""

    points: np.ndarray  # [C, 2] of the agent's centre
    inward: np.ndarray  # [C] rad, the direction into the block


class Routes(NamedTuple):
    """Shortest ways from one position to all nodes of the graph; contacts come first."""

    lengths: np.ndarray  # [nodes] px, infinite where there is none
    previous: np.ndarray  # [nodes] the node before each, -1 for the start
    nodes: np.ndarray  # [nodes, 2] on the table

    def way(self, node: int) -> np.ndarray:
        """The points `[legs, 2]` to go to after the start, up to a node."""
        way = [node]
        while self.previous[way[-1]] >= 0:
            way.append(int(self.previous[way[-1]]))
        return self.nodes[way[::-1]]


def _contacts() -> Contacts:
    points, inward = [], []
    for corner, following in zip(OUTLINE, np.roll(OUTLINE, -1, 0), strict=True):
        length = float(np.linalg.norm(following - corner))
        along = (following - corner) / length
        outward = np.array([along[1], -along[0]])
        for distance in np.arange(CONTACT_SPACING / 2, length, CONTACT_SPACING):
            point = corner + distance * along + (AGENT_RADIUS + CONTACT_GAP) * outward
            if _BLOCK.distance(shapely.Point(point)) > AGENT_RADIUS + ROUTE_GAP:  # not so in the inner corners
                points.append(point)
                inward.append(np.arctan2(-outward[1], -outward[0]))
    return Contacts(np.array(points), np.array(inward))


def _legs(starts: np.ndarray, ends: np.ndarray, clearance: float) -> np.ndarray:
    """Lengths `[...]` of straight ways between points `[..., 2]` of the block's frame; infinite if too near it."""
    starts, ends = np.broadcast_arrays(starts, ends)
    near = shapely.distance(shapely.linestrings(np.stack([starts, ends], -2)), _BLOCK) < clearance
    return np.where(near, np.inf, np.linalg.norm(ends - starts, axis=-1))


CONTACTS: Final = _contacts()
_NODES: Final = np.concatenate([CONTACTS.points, *(OUTLINE + gap * _CORNER_DIRECTIONS for gap in CORNER_GAPS)])
_LEGS: Final = _legs(_NODES[:, None], _NODES[None], AGENT_RADIUS + ROUTE_GAP)  # [nodes, nodes]


def routes(agent: np.ndarray, pose: np.ndarray) -> Routes:
    """The shortest ways around the block.

    Args:
        agent: where they start, `[2]`; an agent that is too near the block goes away from it first.
        pose: the block's, `[3]`.
    """
    local = (agent - pose[:2]) @ rotation(pose[2])
    nodes = on_table(_NODES, pose)
    off_table = ((nodes < 0) | (nodes > TABLE_SIZE)).any(-1)
    clearance = min(AGENT_RADIUS + ROUTE_GAP, _BLOCK.distance(shapely.Point(local)) - 0.01)
    lengths = np.where(off_table, np.inf, _legs(local, _NODES, clearance))
    legs = np.where(off_table, np.inf, _LEGS)
    previous = np.full(len(nodes), -1)
    for _ in range(MOST_LEGS - 1):
        through = lengths[:, None] + legs
        nearest = through.argmin(0)
        shorter = through.min(0) < lengths - 1e-6
        previous[shorter] = nearest[shorter]
        lengths = np.where(shorter, through.min(0), lengths)
    return Routes(lengths, previous, nodes)
