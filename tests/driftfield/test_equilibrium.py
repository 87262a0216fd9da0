"""What the field is for: particles that follow it take the target's distribution, and Table 1's variants do not."""

import pytest
import torch

from driftfield import DriftingLoss, drifting_field

LEFT_SHARE = 0.3


def bimodal(count: int, generator: torch.Generator) -> torch.Tensor:
    """30 % around -2, 70 % around 2, each with standard deviation 0.3."""
    centre = torch.where(torch.rand(count, 1, generator=generator) < LEFT_SHARE, -2.0, 2.0)
    return centre + 0.3 * torch.randn(count, 1, generator=generator)


def follow_the_field(attraction: float, repulsion: float, seed: int) -> torch.Tensor:
    """128 particles, all in the left mode at first, after 300 long and 100 short steps along V."""
    generator = torch.Generator().manual_seed(seed)
    x = -2.0 + 0.3 * torch.randn(128, 1, generator=generator)
    for step in range(400):
        x = x + (4.0 if step < 300 else 0.5) * drifting_field(
            x,
            bimodal(128, generator),
            x,
            temperature=0.5,
            mask_self=True,
            affinity_floor=1e-6,  # lets particles see a mode that their kernel does not reach
            attraction=attraction,
            repulsion=repulsion,
        )
    return x


@pytest.mark.parametrize("seed", [0, 1])
def test_particles_take_both_modes_in_their_share(seed: int) -> None:
    x = follow_the_field(1.0, 1.0, seed)
    left, right = x[x < 0], x[x > 0]
    assert abs(len(left) / len(x) - LEFT_SHARE) < 0.05
    assert abs(left.median() + 2.0) < 0.3
    assert abs(right.median() - 2.0) < 0.3
    assert 0.15 < right.std() < 0.6


def test_unbalanced_fields_fail_as_in_table_1() -> None:
    only_attraction = follow_the_field(1.0, 0.0, seed=0)
    assert (only_attraction - only_attraction.median()).abs().quantile(0.95) < 1e-3  # one point
    more_attraction = follow_the_field(1.5, 1.0, seed=0)
    assert (more_attraction < 0).float().mean() < 0.1  # the smaller mode is lost
    more_repulsion = follow_the_field(1.0, 1.5, seed=0)
    assert more_repulsion.abs().max() > 100.0  # particles flee


def test_drift_norm_shows_progress_where_the_official_loss_is_flat() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(-2.0 + 0.3 * torch.randn(64, 1, generator=generator))
    optimizer, loss_fn = torch.optim.Adam([x], lr=0.05), DriftingLoss([0.05])
    losses, norms = [], []
    for _ in range(300):
        output = loss_fn(x, bimodal(64, generator))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
        norms.append(output.drift_norm.item())
    assert max(abs(loss - 1.0) for loss in losses) < 1e-4
    assert sum(norms[-50:]) < 0.5 * sum(norms[:50])
    assert 0.6 < (x > 0).float().mean() < 0.95
