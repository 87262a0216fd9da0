"""Exponential moving averages of a model's weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from driftfield.training.sharding import placed_like


class EMA:
    """Several float32 averages of one model: ema <- decay * ema + (1 - decay) * weights, after each step (Table 8).

    Parameters are averaged, persistent buffers are copied. Averages stay float32 for a model of any precision.

    Args:
        model: the model in training; it is read, and written only inside `swapped`.
        decays: one average is kept for each.
        warmup: use min(decay, (1 + t) / (10 + t)) at update t = 0, 1, ..., so that a short run forgets its start.

    Raises:
        ValueError: for no decay, one given twice, or one outside [0, 1).

    >>> EMA(nn.Linear(2, 1), decays=(0.999, 0.9999)).decays
    (0.999, 0.9999)
    """

    def __init__(self, model: nn.Module, decays: Sequence[float] = (0.999,), *, warmup: bool = False) -> None:
        self.decays = tuple(float(decay) for decay in decays)
        if not self.decays or len(set(self.decays)) < len(self.decays):
            raise ValueError(f"decays: expected one or more different numbers, found {tuple(decays)}")
        if not all(0 <= decay < 1 for decay in self.decays):
            raise ValueError(f"decays: expected numbers in [0, 1), found {tuple(decays)}")
        self.warmup = warmup
        self.updates = 0
        persistent = model.state_dict(keep_vars=True).keys()
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._averages = {decay: [_float32_copy(p) for p in self._parameters.values()] for decay in self.decays}
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name in persistent}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the model's present weights."""
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        for decay, averages in self._averages.items():
            torch._foreach_lerp_(averages, weights, 1 - self._decay_now(decay))
        _copy_all(self._model_buffers(), list(self._buffers.values()))
        self.updates += 1

    def _decay_now(self, decay: float) -> float:
        return min(decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else decay

    @contextmanager
    def swapped(self, decay: float | None = None) -> Iterator[None]:
        """Let the model hold an average inside a ``with``; its own weights come back after it, error or not.

        Args:
            decay: which average; the first one if not given.

        Raises:
            ValueError: if no average has this decay.
        """
        held = [*self._parameters.values(), *self._model_buffers()]
        average = [*self._average(decay), *self._buffers.values()]
        kept = [tensor.detach().clone() for tensor in held]
        try:
            _copy_all(average, held)
            yield
        finally:
            _copy_all(kept, held)

    def weights(self, decay: float | None = None) -> dict[str, Tensor]:
        """Copy of one average under the model's names, with the buffers: a model's file.

        Args:
            decay: which average; the first one if not given.

        Raises:
            ValueError: if no average has this decay.
        """
        named = dict(zip(self._parameters, self._average(decay), strict=True))
        return {name: tensor.clone() for name, tensor in (named | self._buffers).items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resume needs, flat: ``"0.999/layer.weight"`` ..., ``"buffers/..."`` and ``"updates"``."""
        state = {f"buffers/{name}": copy for name, copy in self._buffers.items()}
        for decay, averages in self._averages.items():
            state |= {f"{decay}/{name}": average for name, average in zip(self._parameters, averages, strict=True)}
        return state | {"updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; nothing changes unless all of it fits.

        Raises:
            ValueError: listing every missing, unexpected or misshapen tensor.
        """
        own = self.state_dict()
        problems = [f"{name} is missing" for name in own.keys() - state.keys()]
        problems += [f"{name} is unexpected" for name in state.keys() - own.keys()]
        problems += [
            f"{name}: expected shape {tuple(own[name].shape)}, found {tuple(state[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ]
        if problems:
            raise ValueError("EMA state: " + "; ".join(sorted(problems)))
        for name, tensor in own.items():
            tensor.copy_(placed_like(state[name], tensor))
        self.updates = int(state["updates"])

    def _average(self, decay: float | None) -> list[Tensor]:
        chosen = self.decays[0] if decay is None else decay
        if chosen not in self._averages:
            raise ValueError(f"decay: expected one of {self.decays}, found {chosen}")
        return self._averages[chosen]

    def _model_buffers(self) -> list[Tensor]:
        return [self._model.get_buffer(name) for name in self._buffers]  # `model.to` puts new tensors in their place


def _float32_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


@torch.no_grad()
def _copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
