"""The one-step policy: noise to a chunk of actions in one evaluation, trained by the drifting loss."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from driftfield import DriftingLoss, DriftingOutput, sum_over_features
from policy.diffusion import row_noise
from policy.draws import Draws
from policy.policy import Batch, Policy, PolicyLoss

COLLAPSED = 0.05  # a group that spreads less than this part of the data has collapsed
EQUAL = 1e-6  # demonstrations that deviate less from their mean are equal up to rounding
LossOver = Literal["chunk", "step"]


class DriftingPolicy(Policy):
    """One-step generator of action chunks; one drifting group per observation.

    Every observation has G generated chunks and K demonstrated ones, K usually 1. The default field shares out the
    pull of each demonstration among the chunks nearest to it (`normalize_over="x"`, `repulsion=0`). With the paper's
    field and one demonstration, chunks that agree are all pulled alike and so stay together, at the mean of the modes;
    at larger learning rates they may spread, but hardly any comes near a mode.

    Args:
        generated: G, chunks per observation in training.
        loss_over: "chunk" drifts whole chunks; "step" every time step by itself, which loses what belongs together.
        noise_skip: sigma of what is added to the network's output, net(z) + sigma z.
        loss: keywords of `DriftingLoss`.
        policy: as for `Policy`.

    Raises:
        ValueError: sizes or options that do not fit.

    >>> policy = DriftingPolicy(
    ...     shapes={"state": (3,)}, action_dim=2, network={"name": "mlp", "width": 8}, generated=4,
    ...     normalizer={"parts": {"state": [{"size": 3}], "action": [{"size": 2}]}},
    ... )
    >>> policy.sample(torch.zeros(1, 2, 3), [torch.Generator()]).shape
    torch.Size([1, 16, 2])
    """

    def __init__(
        self,
        *,
        generated: int = 16,
        loss_over: LossOver = "chunk",
        noise_skip: float = 0.0,
        loss: Mapping[str, Any] | None = None,
        **policy: Any,
    ) -> None:
        super().__init__(**policy)
        self.config |= {
            "generated": generated, "loss_over": loss_over, "noise_skip": noise_skip, "loss": dict(loss or {}),
        }  # fmt: skip
        if generated < 1 or loss_over not in ("chunk", "step"):
            raise ValueError(
                f"expected generated >= 1 and loss_over chunk or step, found {generated} and {loss_over!r}"
            )
        self.generated, self.loss_over, self.noise_skip = generated, loss_over, noise_skip
        field: dict[str, Any] = {"temperatures": (0.3,), "normalize_over": "x", "repulsion": 0.0} | dict(loss or {})
        self.drifting_loss = DriftingLoss(**field)

    def generate(self, cond: Tensor, noise: Tensor) -> Tensor:
        """Chunks `[B, T, A]` of features `[B, To, C]` and noise `[B, T, A]`: one evaluation of the network."""
        return self.network(noise, noise.new_zeros(len(noise)), cond) + self.noise_skip * noise

    def loss(self, batch: Batch, draws: Draws, *, temperature_factor: float = 1.0) -> PolicyLoss:
        """The drifting loss of each observation, with its G chunks and K demonstrations as one group.

        Args:
            batch, draws: as for every policy.
            temperature_factor: multiplies every tau, > 0, so that training can anneal them.
        """
        x, positives = self._groups(batch, draws)
        output = self._drift(x, positives, temperature_factor)
        return PolicyLoss(output.loss, {**self._norms(output), **signals(x.detach(), positives)})

    def errors(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """The signals: the loss is flat, and takes a mean over all processes."""
        return signals(*self._groups(batch, draws))

    def sample(self, cond: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One evaluation."""
        return self.generate(cond, row_noise((len(cond), self.horizon, self.action_dim), generators).to(cond))

    def _groups(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Generated chunks `[B, G, T, A]` and demonstrated ones `[B, K, T, A]`, normalised."""
        cond = self.encode(batch.observation, draws)  # [B, To, C]
        shape = (len(cond), self.generated, self.horizon, self.action_dim)
        noise = draws.normal(shape).to(cond)
        x = self.generate(cond.repeat_interleave(self.generated, 0), noise.flatten(0, 1)).view(shape)
        return x, self._normalized(batch.actions)

    def _drift(self, x: Tensor, positives: Tensor, factor: float) -> DriftingOutput:
        if self.loss_over == "chunk":  # [B, G, T A], [B, K, T A]
            return self.drifting_loss(x.flatten(2), positives.flatten(2), temperature_factor=factor)
        steps = range(self.horizon)
        output = sum_over_features(
            self.drifting_loss,
            {str(t): x[:, :, t] for t in steps},
            {str(t): positives[:, :, t] for t in steps},
            temperature_factor=factor,
        )
        return output._replace(loss=output.loss / self.horizon, drift_norm=output.drift_norm.mean(0))

    def _norms(self, output: DriftingOutput) -> dict[str, Tensor]:
        pairs = zip(self.drifting_loss.options.temperatures, output.drift_norm.detach(), strict=True)
        return {f"lambda/{temperature:g}": norm for temperature, norm in pairs}


def signals(x: Tensor, positives: Tensor) -> dict[str, Tensor]:
    """What says whether a policy is a generative model, where the loss does not.

    Args:
        x: generated chunks `[B, G, T, A]`.
        positives: demonstrated ones `[B, K, T, A]`.

    Returns:
        nearest_error: root mean square error, per number, of the generated chunk that is nearest to a demonstration;
        mean_error: that of all chunks; spread: root mean square deviation of the G chunks from their mean, as a part
        of the demonstrations' over the batch, or as it is where these are all equal; collapsed: share of groups whose
        spread is below 0.05.

    >>> x = torch.zeros(3, 8, 4, 2)
    >>> signals(x, torch.randn(3, 1, 4, 2))["collapsed"].item()
    1.0
    """
    size = x[0, 0].numel() ** 0.5
    distance = torch.cdist(positives.flatten(2), x.flatten(2)) / size  # [B, K, G]
    data = (positives - positives.mean((0, 1))).square().mean().sqrt()
    group = (x - x.mean(1, keepdim=True)).square().mean((1, 2, 3)).sqrt()  # [B]
    spread = group / torch.where(data > EQUAL, data, 1.0)
    return {
        "nearest_error": distance.amin(-1).square().mean().sqrt(),
        "mean_error": distance.square().mean().sqrt(),
        "spread": spread.mean(),
        "collapsed": (spread < COLLAPSED).float().mean(),
    }
