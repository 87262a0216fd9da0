"""BlockPush's demonstrations as they were first published: three npy files."""

import os
from pathlib import Path
from typing import Final, Literal

from policy.data_error import naming
from policy.npy_episodes import read_episodes
from policy.replay_buffer import ACTION, STATE, ReplayBuffer

FILES: Final = {STATE: "multimodal_push_observations.npy", ACTION: "multimodal_push_actions.npy"}
MASK_FILE: Final = "multimodal_push_masks.npy"
EFFECTOR_TARGET: Final = slice(8, 10)  # of the state


def load_block_push(folder: str | os.PathLike[str], *, action: Literal["delta", "absolute"] = "delta") -> ReplayBuffer:
    """Read the folder of multimodal_push_observations.npy, _actions.npy and _masks.npy.

    Args:
        folder: of the three files.
        action: "delta" as they are, or "absolute": the effector's new target, its present one (of the state) + delta.

    Raises:
        DataError: a file is missing or damaged, or they do not agree.
    """
    with naming(Path(folder)):
        episodes = read_episodes(folder, FILES, MASK_FILE)
        if action == "absolute":
            episodes = [{**part, ACTION: part[STATE][:, EFFECTOR_TARGET] + part[ACTION]} for part in episodes]
        return ReplayBuffer.from_episodes(episodes, {"task": "block_push", "action": action, "source": "block_push"})
