"""Quasi-static pushing of PushT's block in closed form, for many agents at once.

A touched block makes the least motion, in the metric of its mass and moment of inertia I, that takes it out of the
agent's way. Without friction, for a contact of depth d with a normal n into the block and the centre of gravity at a
lever l from the normal's line, that is the translation w n and the turn w l / I with w = d / (1 + l^2 / I); mass 1.
"""

from typing import Final, NamedTuple

import numpy as np

from envs.push_t import BAR, CENTRE_OF_GRAVITY, DAMPING, MOMENT_OF_INERTIA, STEM, STIFFNESS, SUBSTEPS, TIMESTEP
from envs.push_t_drawing import AGENT_RADIUS

STRIDE: Final = 2  # timesteps from one look at the contact to the next
LOOKS: Final = SUBSTEPS // STRIDE  # in a control step


class _Rectangle(NamedTuple):
    middle: np.ndarray  # about the centre of gravity
    half: np.ndarray


def _rectangle(corners: np.ndarray) -> _Rectangle:
    return _Rectangle(corners.mean(0) - CENTRE_OF_GRAVITY, np.ptp(corners, axis=0) / 2)


def _agent_response() -> np.ndarray:
    """`[LOOKS, 2, 2]`: what a control step makes of the agent's (offset from its target, velocity), at every look."""
    accelerate = np.array([(1, 0), (-STIFFNESS * TIMESTEP, 1 - DAMPING * TIMESTEP)])
    move = np.array([(1, TIMESTEP), (0, 1)])
    return np.stack([np.linalg.matrix_power(move @ accelerate, STRIDE * look) for look in range(1, LOOKS + 1)])


_RECTANGLES: Final = (_rectangle(BAR), _rectangle(STEM))
_RESPONSE: Final = _agent_response()


def agent_path(position: np.ndarray, velocity: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Where the agent will be, exactly.

    Args:
        position, velocity: now, `[2]` or `[N, 2]`.
        targets: of each control step, `[N, T, 2]`.

    Returns:
        Positions `[T * LOOKS, N, 2]`.
    """
    position, velocity = (np.broadcast_to(start, targets[:, 0].shape) for start in (position, velocity))
    path = []
    for target in targets.swapaxes(0, 1):
        after = np.einsum("lij,jnk->link", _RESPONSE, np.stack([position - target, velocity]))
        path.append(after[:, 0] + target)
        position, velocity = path[-1][-1], after[-1, 1]
    return np.concatenate(path)


def blocks_path(block: np.ndarray, agents: np.ndarray) -> np.ndarray:
    """Where each of N agents pushes a block of its own.

    Args:
        block: centre of gravity and angle `[3]`, to begin with.
        agents: positions `[T * LOOKS, N, 2]`.

    Returns:
        The blocks after every control step `[T, 3, N]`.
    """
    blocks = np.repeat(block[:, None], agents.shape[1], 1)
    path = []
    for look, agent in enumerate(agents, start=1):
        for rectangle in _RECTANGLES:
            _push(blocks, agent, rectangle)
        if look % LOOKS == 0:
            path.append(blocks.copy())
    return np.stack(path)


def _push(blocks: np.ndarray, agent: np.ndarray, rectangle: _Rectangle) -> None:
    """Take one part of the blocks `[3, N]` out of the way of the agents `[N, 2]`, in place."""
    cosine, sine = np.cos(blocks[2]), np.sin(blocks[2])
    x, y = agent[:, 0] - blocks[0], agent[:, 1] - blocks[1]
    local = np.stack([cosine * x + sine * y, cosine * y - sine * x])  # [2, N]
    offset = local - rectangle.middle[:, None]
    beyond = np.abs(offset) - rectangle.half[:, None]
    touched = np.flatnonzero((np.maximum(beyond, 0) ** 2).sum(0) < AGENT_RADIUS**2)
    if len(touched) == 0:
        return
    local, offset, beyond, cosine, sine = (values[..., touched] for values in (local, offset, beyond, cosine, sine))
    inside = beyond.max(0) <= 0  # the agent's centre: it leaves through the nearest side
    outward = np.where(inside, beyond >= beyond.max(0), np.maximum(beyond, 0)) * np.sign(offset)
    length = np.hypot(*outward)
    normal = -outward / length
    depth = AGENT_RADIUS - np.where(inside, beyond.max(0), length)
    lever = local[0] * normal[1] - local[1] * normal[0]
    weight = depth / (1 + lever**2 / MOMENT_OF_INERTIA)
    blocks[0, touched] += weight * (cosine * normal[0] - sine * normal[1])
    blocks[1, touched] += weight * (sine * normal[0] + cosine * normal[1])
    blocks[2, touched] += weight * lever / MOMENT_OF_INERTIA
