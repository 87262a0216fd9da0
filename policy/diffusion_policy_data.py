"""Demonstrations as Diffusion Policy publishes them: a zarr (format 2) folder or zip file, data/ and meta/episode_ends.

PushT has img, state (agent, block), keypoint and action, in pixels; BlockPush has obs and action.
"""

import os
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from policy.data_error import DataError, available, naming
from policy.replay_buffer import ACTION, EPISODE_ENDS, STATE, ReplayBuffer
from policy.zarr_arrays import ZarrStore

KEYPOINTS: Final = (9, 2)  # of PushT's block
LARGEST_DELTA_M: Final = 0.1  # of a BlockPush action; an absolute one has x from 0.15 m on


def load_diffusion_policy(
    path: str | os.PathLike[str],
    *,
    observation: Literal["state", "image"] = "state",
    allow_missing_chunks: bool = False,
) -> ReplayBuffer:
    """Read a replay buffer of Diffusion Policy.

    Args:
        path: folder or zip file.
        observation: of PushT, "state" is the block's 9 key points and the agent, `[20]`; "image" is the image and the
            agent. BlockPush has a state alone.
        allow_missing_chunks: as for `ZarrStore`.

    Raises:
        DataError: it is missing, damaged, or lacks an array.
    """
    path = Path(path)
    with ZarrStore(path, allow_missing_chunks=allow_missing_chunks) as store, naming(path):
        ends = store.read(EPISODE_ENDS)
        action = _float32(store.read("data/action"))
        if "data/keypoint" in store.names:
            return ReplayBuffer(
                {ACTION: action, **_push_t(store, observation)}, ends, _attributes("push_t", "absolute")
            )
        if "data/obs" not in store.names:
            found = available("data/obs", store.names)
            raise DataError(f"{path}: expected data/keypoint (PushT) or data/obs (BlockPush), {found}")
        if observation == "image":
            raise DataError(f"{path}: observation: expected 'state', found 'image', of which this store has none")
        kind = "delta" if np.abs(action).max(initial=0) <= LARGEST_DELTA_M * (1 + 1e-5) else "absolute"
        return ReplayBuffer(
            {ACTION: action, STATE: _float32(store.read("data/obs"))}, ends, _attributes("block_push", kind)
        )


def _push_t(store: ZarrStore, observation: str) -> dict[str, np.ndarray]:
    agent = _float32(store.read("data/state"))[:, :2]  # [N, 2]
    if observation == "image":
        return {"image": _pixels(store.read("data/img")), STATE: agent}
    keypoints = _float32(store.read("data/keypoint"))
    if keypoints.shape[1:] != KEYPOINTS or len(keypoints) != len(agent):
        raise ValueError(f"data/keypoint: expected [{len(agent)}, 9, 2], found {list(keypoints.shape)}")
    return {STATE: np.concatenate([keypoints.reshape(len(keypoints), -1), agent], axis=1)}


def _pixels(image: np.ndarray) -> np.ndarray:
    """Images [N, H, W, 3] of 0 to 255 in any kind of number, as uint8."""
    if image.dtype == np.uint8:
        return image
    low, high = image.min(initial=0), image.max(initial=0)
    if not (0 <= low and 1 < high <= 255):  # also NaN
        raise ValueError(f"data/img: expected values from 0 to 255, found {low} to {high}")
    pixels: np.ndarray = np.rint(image, out=image).astype(np.uint8)
    return pixels


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32, copy=False)


def _attributes(task: str, action: str) -> dict[str, Any]:
    return {"task": task, "action": action, "source": "diffusion_policy"}
