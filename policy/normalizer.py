"""Observations and actions to about [-1, 1] and back: y = scale x + offset, kept with the weights."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

Mode = Literal["limits", "identity", "max_abs"]


class Part(NamedTuple):
    """Some neighbouring dimensions of a key, and what is done to them.

    Args:
        size: how many.
        mode: "limits" takes each dimension's smallest and largest value to -1 and 1, and a dimension whose range is
            below eps, the same to scale 1 and its smallest value to 0; "max_abs" divides all by the largest absolute
            value; "identity" leaves them as they are.
        eps: in the units of the data.
    """

    size: int
    mode: Mode = "limits"
    eps: float = 1e-4


class Normalizer(nn.Module):
    """Scale and offset of every key; float32 throughout.

    Args:
        parts: for each key its dimensions in order, each part a `Part` or what JSON makes of one.

    Raises:
        ValueError: a key or a part that is none.

    >>> normalizer = Normalizer({"action": [Part(2), Part(1, "identity")]})
    >>> _ = normalizer.fit({"action": np.array([[0, -4, 9], [10, 4, 9]], np.float32)})
    >>> normalizer.normalize("action", torch.tensor([[5.0, 2.0, 0.3]]))
    tensor([[0.0000, 0.5000, 0.3000]])
    """

    def __init__(self, parts: Mapping[str, Sequence[Any]]) -> None:
        super().__init__()
        self.parts = {key: tuple(_as_part(key, part) for part in parts[key]) for key in parts}
        for key in self.parts:
            if not key.isidentifier() or not self.parts[key]:
                raise ValueError(f"parts: expected a name with at least one part, found {key!r}: {self.parts[key]}")
        self.affine = nn.ModuleDict({key: _Affine(self.size(key)) for key in self.parts})
        self._fitted = False

    @property
    def config(self) -> dict[str, Any]:
        """The keywords that build this module again, as JSON."""
        return {"parts": {key: [part._asdict() for part in parts] for key, parts in self.parts.items()}}

    def size(self, key: str) -> int:
        """Dimensions of a key."""
        return sum(part.size for part in self.parts[key])

    def fit(self, arrays: Mapping[str, np.ndarray]) -> Self:
        """Choose scale and offset; warns of the dimensions that hardly vary, with their count.

        Args:
            arrays: for each key `[N, D]`, all of the data; further keys are left alone.

        Raises:
            ValueError: a key is missing, or its array is empty, of another size, or not finite.
        """
        for key, parts in self.parts.items():
            values = _checked(key, arrays, self.size(key))
            low, high = values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)  # [D] each
            starts = np.cumsum([0, *(part.size for part in parts)])
            slices = [slice(start, start + part.size) for start, part in zip(starts, parts, strict=False)]
            fits = [_fit_part(part, low[where], high[where]) for part, where in zip(parts, slices, strict=True)]
            scale, offset, constant = (np.concatenate(column) for column in zip(*fits, strict=True))
            self._affine(key).set(scale, offset, low, high)
            if constant.any():
                warnings.warn(
                    f"{key}: {int(constant.sum())} of {len(constant)} dimensions hardly vary in the data, and keep "
                    f"scale 1: {', '.join(map(str, np.flatnonzero(constant)))}",
                    stacklevel=2,
                )
        self._fitted = True
        return self

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Values in the data's units to normalised ones.

        Args:
            key: whose.
            x: `[..., D]`, floating point.

        Raises:
            RuntimeError: neither fitted nor loaded yet.
            KeyError: there is no such key.
            TypeError: no floating-point numbers.
            ValueError: another number of dimensions.

        Returns:
            `[..., D]` float32.
        """
        affine = self._checked_affine(key, x)
        return x.float() * affine.scale + affine.offset

    def unnormalize(self, key: str, y: Tensor) -> Tensor:
        """Normalised values to the data's units; the inverse of `normalize`, with the same arguments and errors."""
        affine = self._checked_affine(key, y)
        return (y.float() - affine.offset) / affine.scale

    def clamp(self, key: str, x: Tensor) -> Tensor:
        """Values in the data's units, moved into the range that the data had; arguments and errors as `normalize`."""
        affine = self._checked_affine(key, x)
        return x.float().clamp(affine.low, affine.high)

    def differences(self, key: str, x: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        """Pairwise differences of numbers that share an axis, as parts of the range that all of them had together.

        A network sees two positions a millimetre apart by this, without subtracting numbers as large as the table.

        Args:
            key, x: as for `normalize`, with the same errors.
            groups: for each axis the dimensions that are positions along it.

        Returns:
            float32 `[..., P]`, within -1 and 1 on the data: of each group (i, j, k) i - j, i - k, j - k.

        >>> normalizer = Normalizer({"state": [Part(3)]}).fit({"state": np.array([[0, 4, 9], [2, 5, 8]], np.float32)})
        >>> normalizer.differences("state", torch.tensor([[1.0, 4.0, 9.0]]), [[0, 1]])
        tensor([[-0.6000]])
        """
        affine = self._checked_affine(key, x)
        found = []
        for group in groups:
            where = torch.tensor(list(group), device=x.device)
            first, second = where[torch.combinations(torch.arange(len(group), device=x.device))].unbind(1)
            extent = affine.high[where].max() - affine.low[where].min()
            found.append((x[..., first].float() - x[..., second].float()) / extent.clamp(min=torch.finfo().tiny))
        return torch.cat(found, -1)

    def _affine(self, key: str) -> "_Affine":
        if key not in self.parts:
            raise KeyError(f"{key}: expected one of {', '.join(self.parts)}")
        affine = self.affine[key]
        if not isinstance(affine, _Affine):
            raise TypeError(f"{key}: expected its scale and offset, found {type(affine).__name__}")
        return affine

    def _checked_affine(self, key: str, x: Tensor) -> "_Affine":
        affine = self._affine(key)
        if not self._fitted:
            if not all(torch.isfinite(buffer).all() for buffer in self.buffers()):
                raise RuntimeError("the normalizer: expected fit(arrays) or load_state_dict first, found neither")
            self._fitted = True
        if not x.is_floating_point():
            raise TypeError(f"{key}: expected floating-point numbers, found {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != len(affine.scale):
            raise ValueError(f"{key}: expected [..., {len(affine.scale)}], found {list(x.shape)}")
        return affine


class _Affine(nn.Module):
    """Scale, offset and the data's limits of one key, NaN until they are known."""

    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("scale", "offset", "low", "high"):
            self.register_buffer(name, torch.full((size,), torch.nan, dtype=torch.float32))

    def set(self, *values: np.ndarray) -> None:
        for buffer, value in zip(self.buffers(), values, strict=True):
            buffer.copy_(torch.from_numpy(value))


def task_parts(
    task: str, sizes: Mapping[str, int], *, observation: Literal["state", "image"], action: Literal["absolute", "delta"]
) -> dict[str, list[Part]]:
    """How the numbers of a task are normalised in published results (Diffusion Policy); images are not among them.

    Args:
        task: name in envs.TASKS.
        sizes: dimensions of "state" and "action".
        observation: whether the state is all that is seen, or the proprioception beside images.
        action: kind of the actions.

    Raises:
        ValueError: sizes that the task does not have.

    Returns:
        For `Normalizer`.

    >>> task_parts("kitchen", {"state": 60, "action": 9}, observation="state", action="absolute")["action"]
    [Part(size=9, mode='limits', eps=0.05)]
    """
    if task in ("lift", "can", "tool_hang"):
        state = [Part(sizes["state"], "max_abs")]
        if observation == "image":  # position of the hand, its quaternion, the fingers
            state = [Part(3), Part(4, "identity"), Part(2)]
        actions = [Part(sizes["action"], "identity")]
        if action == "absolute":  # position, rotation and gripper
            actions = [Part(3, "limits", 1e-7), Part(7, "identity")]
        parts = {"state": state, "action": actions}
    else:
        eps = 5e-2 if task == "kitchen" else 1e-4
        parts = {key: [Part(sizes[key], "limits", eps)] for key in ("state", "action")}
    for key, found in parts.items():
        if sum(part.size for part in found) != sizes[key]:
            raise ValueError(
                f"{task}: {key}: expected {sum(part.size for part in found)} dimensions, found {sizes[key]}"
            )
    return parts


def _fit_part(part: Part, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, offset, and whether the dimension does not vary, `[size]` each."""
    scale, offset, constant = np.ones(part.size), np.zeros(part.size), np.zeros(part.size, bool)
    if part.mode == "limits":
        constant = high - low < part.eps
        scale = np.where(constant, 1.0, 2 / np.where(constant, 1.0, high - low))
        offset = np.where(constant, -low, -1 - scale * low)
    elif part.mode == "max_abs":
        largest = max(np.abs(low).max(), np.abs(high).max())
        constant = np.full(part.size, largest == 0)
        scale = np.full(part.size, 1 / largest if largest else 1.0)
    return scale, offset, constant


def _checked(key: str, arrays: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    if key not in arrays:
        raise ValueError(f"arrays: expected the key {key!r}, found {', '.join(sorted(arrays)) or 'none'}")
    values = np.asarray(arrays[key])
    if values.ndim != 2 or values.shape[1] != size or not len(values) or values.dtype.kind != "f":
        raise ValueError(f"{key}: expected floating-point [N, {size}], found {values.dtype} {list(values.shape)}")
    if not np.isfinite(values).all():
        row, dimension = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"{key}: expected finite numbers, found {values[row, dimension]} at [{row}, {dimension}]")
    return values


def _as_part(key: str, part: Any) -> Part:
    try:
        built = Part(**part) if isinstance(part, Mapping) else Part(*part)
    except TypeError as error:
        raise ValueError(f"{key}: expected size, mode and eps, found {part!r}") from error
    if type(built.size) is not int or built.size < 1 or built.mode not in get_args(Mode) or not 0 < built.eps < np.inf:
        raise ValueError(
            f"{key}: expected size >= 1, one of {', '.join(get_args(Mode))}, and eps above 0, found {tuple(built)}"
        )
    return built
