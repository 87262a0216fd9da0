"""The update that ends a step: gradients of all processes, clipped, applied only if finite."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from driftfield.training.distributed import sum_gradients
from driftfield.training.ema import EMA
from driftfield.training.errors import UserError
from driftfield.training.optimizer_state import load_optimizer, optimizer_state
from driftfield.training.sharding import gathered, placed_like, whole

MAX_REJECTED_STEPS = 10  # in a row


class Update:
    """Take the optimizer's step and move the averages, unless the gradient is not finite, which changes nothing.

    All processes see the same summed gradient, so they take or reject a step together.

    Args:
        model: its gradients hold this process's part.
        optimizer: of the model's parameters.
        ema: averages of the model.
        clip_norm: largest norm of the gradient.

    >>> import torch
    >>> model = nn.Linear(1, 1)
    >>> update = Update(model, torch.optim.SGD(model.parameters()), EMA(model), clip_norm=1.0)
    >>> model(torch.full((1, 1), float("inf"))).sum().backward()
    >>> update(0.1), update.rejected
    (inf, 1)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, ema: EMA, *, clip_norm: float) -> None:
        self._model, self._optimizer, self._ema, self._clip_norm = model, optimizer, ema, clip_norm
        self.rejected = 0  # steps in a row

    def __call__(self, learning_rate: float) -> float:
        """Update with this learning rate.

        Raises:
            UserError: ten steps in a row had a gradient that is not finite.

        Returns:
            Norm of the gradient before it was clipped.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        sum_gradients(self._model.parameters())
        norm = whole(clip_grad_norm_(self._model.parameters(), self._clip_norm)).item()
        if norm < float("inf"):  # False for NaN too
            self._optimizer.step()
            self._ema.update()
            self.rejected = 0
            return norm
        self.rejected += 1
        if self.rejected >= MAX_REJECTED_STEPS:
            raise UserError(
                f"{MAX_REJECTED_STEPS} steps in a row had a gradient that is not finite: nothing was changed since; "
                "try a lower learning_rate"
            )
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of model, averages and optimizer, by group: what a resumed training needs of an update.

        Every process must ask; of a sharded model the main process has whole tensors, the others none.
        """
        return {
            "model": gathered(self._model.state_dict()),
            "ema": gathered(self._ema.state_dict()),
            "optimizer": gathered(optimizer_state(self._optimizer).tensors),
        }

    def state(self) -> dict[str, Any]:
        """What else it needs, as JSON."""
        return {"rejected_steps": self.rejected, "optimizer": optimizer_state(self._optimizer).state}

    def restore(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take over what `tensors` and `state` gave, sharded then or not; further entries are left alone.

        Raises:
            ValueError, RuntimeError: they are another model's.
        """
        self.rejected = state["rejected_steps"]
        own = self._model.state_dict()
        model = {name: placed_like(tensor, own.get(name, tensor)) for name, tensor in tensors["model"].items()}
        self._model.load_state_dict(model)
        self._ema.load_state_dict(tensors["ema"])
        load_optimizer(self._optimizer, tensors["optimizer"], state["optimizer"])
