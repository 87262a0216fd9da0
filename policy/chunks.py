"""Picture of the chunks that a policy draws for one observation: whether it knows more than one way."""

from pathlib import Path
from typing import Final

import matplotlib.pyplot as plt
import torch

from driftfield.training import generator
from policy.policy import Batch, Policy
from policy.replay_buffer import ACTION

CHUNKS: Final = 32  # of each observation
SIDE_IN: Final = 2.2  # of an axis


@torch.no_grad()
def draw_chunks(policy: Policy, batch: Batch, path: Path) -> None:
    """Write a picture: 32 chunks of each observation over the demonstrated one, as paths in the plane.

    Args:
        policy: of two actions, both positions.
        batch: a few observations with their demonstrations.
        path: of the PNG.

    Raises:
        ValueError: the actions are not two.
    """
    if policy.action_dim != 2:
        raise ValueError(f"action_dim: expected 2, the coordinates of a position, found {policy.action_dim}")
    count = len(batch.actions)
    device = batch.actions.device
    rows = {key: value.repeat_interleave(CHUNKS, 0) for key, value in batch.observation.items()}
    draws = [generator(0, "chunks", row, device=device) for row in range(count * CHUNKS)]
    chunks = policy.predict_chunk(rows, draws).unflatten(0, (count, CHUNKS)).cpu()  # [B, 32, T, 2]
    demonstrated = policy.normalizer.clamp(ACTION, batch.actions[:, 0]).cpu()  # [B, T, 2]
    figure, axes = plt.subplots(1, count, figsize=(SIDE_IN * count, SIDE_IN + 0.3), layout="constrained", squeeze=False)
    for axis, some, one in zip(axes[0], chunks, demonstrated, strict=True):
        axis.plot(*one.T, color="0.75", linewidth=6, solid_capstyle="round")
        for chunk in some:
            axis.plot(*chunk.T, color="tab:blue", linewidth=0.8, marker=".", markersize=2)
        axis.set(xticks=[], yticks=[], aspect="equal")
        axis.set_adjustable("datalim")
    figure.suptitle(f"{CHUNKS} chunks of each observation (blue), and one demonstration (grey)", fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)
