"""Queue of recent real samples per class, from which each step draws its positives (A.8)."""

import torch
from torch import Tensor


class SampleQueue:
    """One ring buffer of real samples per class; new samples push out the oldest (A.8).

    With the default `sample_shape` the samples are ids into a data set, 8 bytes each. A queue of one class serves the
    unconditional samples.

    Args:
        num_classes: >= 1.
        capacity: samples kept per class, >= 1 (paper: 128; 1000 for the unconditional queue).
        sample_shape: shape of one sample.
        dtype: of a sample.

    >>> queue = SampleQueue(num_classes=2, capacity=3)
    >>> queue.push(torch.tensor([10, 11, 12, 13, 20]), torch.tensor([0, 0, 0, 0, 1]))
    >>> sorted(queue.sample(torch.tensor([0]), 3, generator=torch.Generator()).flatten().tolist())
    [11, 12, 13]
    """

    def __init__(
        self,
        num_classes: int,
        capacity: int,
        *,
        sample_shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.int64,
    ) -> None:
        if num_classes < 1 or capacity < 1:
            raise ValueError(f"expected at least 1 class and capacity 1, got {num_classes} and {capacity}")
        self.samples = torch.zeros(num_classes, capacity, *sample_shape, dtype=dtype)  # [classes, capacity, ...]
        self.pushed = torch.zeros(num_classes, dtype=torch.int64)  # samples ever pushed, per class

    @property
    def counts(self) -> Tensor:
        """Samples held per class, `[classes]`."""
        return self.pushed.clamp(max=self.samples.shape[1])

    def push(self, samples: Tensor, labels: Tensor) -> None:
        """Store samples in the given order, each over its class's oldest.

        Args:
            samples: `[K, *sample_shape]`.
            labels: `[K]` int64.

        Raises:
            ValueError: shapes or dtypes do not fit, or a label is out of range.
        """
        self._check_labels(labels)
        num_classes, capacity = self.samples.shape[:2]
        if samples.shape != (len(labels), *self.samples.shape[2:]) or samples.dtype != self.samples.dtype:
            raise ValueError(
                f"expected samples [{len(labels)}, *{list(self.samples.shape[2:])}] of {self.samples.dtype}, "
                f"got {list(samples.shape)} of {samples.dtype}"
            )
        order = labels.argsort(stable=True)
        labels, samples = labels[order], samples[order]
        added = labels.bincount(minlength=num_classes)  # [classes]
        rank = torch.arange(len(labels)) - (added.cumsum(0) - added)[labels]  # place among this push's own class
        kept = rank >= added[labels] - capacity  # what this very push would overwrite is not written
        slot = (self.pushed[labels] + rank) % capacity
        self.samples[labels[kept], slot[kept]] = samples[kept]
        self.pushed += added

    def sample(self, labels: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` different stored samples for every label.

        Args:
            labels: `[B]` int64.
            count: samples per label, >= 1.
            generator: source of randomness, on the CPU.

        Raises:
            ValueError: a label is out of range, its class holds fewer than `count` samples, or count < 1.

        Returns:
            `[B, count, *sample_shape]`.
        """
        self._check_labels(labels)
        if count < 1:
            raise ValueError(f"expected count >= 1, got {count}")
        held = self.counts[labels]  # [B]
        if bool((held < count).any()):
            worst = int(labels[held.argmin()])
            raise ValueError(f"class {worst} holds {int(held.min())} samples in the queue, expected at least {count}")
        keys = torch.rand(len(labels), self.samples.shape[1], generator=generator)  # [B, capacity]
        keys = keys.masked_fill(torch.arange(keys.shape[1]) >= held[:, None], -1.0)
        chosen = keys.topk(count, dim=1).indices  # [B, count]
        return self.samples[labels[:, None], chosen]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        return {"samples": self.samples.clone(), "pushed": self.pushed.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it belongs to a queue of another shape or dtype.
        """
        for name, mine in self.state_dict().items():
            if name not in state or state[name].shape != mine.shape or state[name].dtype != mine.dtype:
                found = f"{list(state[name].shape)} of {state[name].dtype}" if name in state else "nothing"
                raise ValueError(f"queue state {name!r}: expected {list(mine.shape)} of {mine.dtype}, found {found}")
        self.samples = state["samples"].clone()
        self.pushed = state["pushed"].clone()

    def _check_labels(self, labels: Tensor) -> None:
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(f"labels must be [K] of torch.int64, got {list(labels.shape)} of {labels.dtype}")
        if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < len(self.samples)):
            raise ValueError(
                f"labels must lie in [0, {len(self.samples)}), got {int(labels.min())} to {int(labels.max())}"
            )
