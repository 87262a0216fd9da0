"""Groups shared by all processes: the loss of their concatenation, with the samples of the others passing by.

Every process keeps its own rows (its x) and sends its targets round a ring, from neighbour to neighbour, so that no
memory holds a whole group or a matrix of its size. They go round three times: for the scale, for the softmaxes (the
sums of that over x travel with the columns they belong to), and for the forces.
"""

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from driftfield.checks import working_dtype
from driftfield.drift import SCALE_FLOOR, DriftingBatch, FieldOptions, coordinate_scale, regress, target_weight
from driftfield.kernel import CentredPoints, centre_at, distances
from driftfield.normalization import count_varying, force_sums, sum_over_processes

TILE_ENTRIES = 1 << 22  # distances held at once
AGREED_LENGTH = 512  # characters of what all processes must agree on


class _Counts(NamedTuple):
    """How many samples of each group a process has."""

    generated: int  # N
    unconditional: int  # M
    positives: int  # P


class _Block(NamedTuple):
    """The targets of one process."""

    home: int  # its rank
    points: Tensor  # [x, unconditional, positives], centred, in units of `unit`  [G, T, D]
    weight: Tensor  # [G, T]


class _Tile(NamedTuple):
    """Some of the own rows against some columns of a block: all of them negatives, or all positives."""

    groups: slice
    rows: slice
    columns: slice
    repels: bool
    distance: Tensor  # [g, n, t]
    self_pair: Tensor | None  # [n, t] bool


class _Softmax(NamedTuple):
    """What a softmax needs of the entries that went in so far: exp(logit - peak) / total."""

    peak: Tensor
    total: Tensor

    def include(self, logits: Tensor, dim: int, *part: int | slice) -> None:
        """Take in entries along `dim`, for the softmaxes `part`."""
        old, total = self.peak[part], self.total[part]
        peak = torch.maximum(old, logits.amax(dim))
        total.mul_((old - peak).exp()).add_((logits - peak.unsqueeze(dim)).exp().sum(dim))
        old.copy_(peak)

    def of(self, logits: Tensor, dim: int, *part: int | slice) -> Tensor:
        """Softmax of entries along `dim` that are among those taken in."""
        return (logits - self.peak[part].unsqueeze(dim)).exp() / self.total[part].unsqueeze(dim)


class RingDrift:
    """`Drift` of groups whose samples are spread over the processes of the default process group.

    Loss and scalars are those of the concatenated groups, the same in all processes. The gradient is that of this one
    loss, to the own x: gradients of shared parameters are to be added up over the processes, not averaged. Processes
    may have different numbers of samples. All must call, in the same order.

    Args:
        batch: the own part of the samples of every group; the groups are the same in all processes.
        options: of the field.

    Raises:
        ValueError: the processes differ in groups, dimension, dtype or options.

    >>> options = FieldOptions((0.2,), True, 1e-6, "xy", 1.0, 1.0)
    >>> drift = RingDrift(DriftingBatch(torch.randn(2, 8, 3), torch.randn(2, 8, 3)), options)
    >>> drift.loss(scale=drift.scale_sums[0] / drift.scale_sums[1], factor=torch.ones(1)).shape
    torch.Size([2])
    """

    def __init__(self, batch: DriftingBatch, options: FieldOptions) -> None:
        self._x, self._options = batch.x, options
        is_up = dist.is_available() and dist.is_initialized()
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if is_up else (0, 1)
        self._counts = _agree(batch, options, self._world)
        self._forces: list[Tensor] = []
        with torch.no_grad():
            centred = self._centre(batch)
            weight = target_weight(batch, centred.points.dtype)
            self._own = _Block(self._rank, centred.points, weight.view(centred.points.shape[:-1]))
            self._unit = centred.unit
            self.scale_sums = torch.cat([self._distance_sums(), count_varying(centred, batch.x.dtype)[None]])

    @torch.no_grad()
    def force_sums(self, scale: Tensor) -> Tensor:
        """See `Drift`; of the own rows."""
        self._forces = self._compute_forces(scale)
        return force_sums(self._forces)

    def loss(self, scale: Tensor, factor: Tensor) -> Tensor:
        """See `Drift`; of the concatenated groups."""
        with torch.no_grad():
            forces = self._forces or self._compute_forces(scale)
            drift = forces[0] * factor[0]  # V  [G, N, D]
            for i in range(1, len(forces)):
                drift = torch.addcmul(drift, forces[i], factor[i])
        divisor = coordinate_scale(scale, self._x.shape[-1], self._options)
        share = self._counts[self._rank].generated / sum(counts.generated for counts in self._counts)
        own = regress(self._x, drift.view(self._x.shape), divisor) * share  # the own rows' part of the mean over N
        return sum_over_processes(own.detach()) + (own - own.detach())

    def _centre(self, batch: DriftingBatch) -> CentredPoints:
        """The own targets relative to the centre of the whole group, `[G, T, D]`."""
        x, positives, unconditional, _ = batch
        parts = [x, positives] if unconditional is None else [x, unconditional, positives]
        points = torch.cat(parts, -2).detach().to(working_dtype(x))
        points = points.reshape(-1, *points.shape[-2:])
        share = points.shape[-2] / sum(sum(counts) for counts in self._counts)
        mean = sum_over_processes(points.mean(-2, keepdim=True) * share)
        bounds = torch.cat([-points.amin(-2, keepdim=True), points.amax(-2, keepdim=True)], -2)  # [G, 2, D]
        if self._world > 1:
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        return centre_at(points, mean, -bounds[:, :1], bounds[:, 1:])

    def _distance_sums(self) -> Tensor:
        """As `normalization.distance_sums`, of the own rows."""
        sums = self._own.points.new_zeros(2)
        for block in self._blocks():
            for tile in self._tiles(block):
                sums[0] += (tile.distance.sum(-2) * block.weight[tile.groups, tile.columns]).sum()
            sums[1] += self._counts[self._rank].generated * block.weight.sum()
        return sums

    def _compute_forces(self, scale: Tensor) -> list[Tensor]:
        """F of every temperature in normalised coordinates, `[G, N, D]` each."""
        rows, columns = self._softmaxes(scale)
        groups, (num_rows, *_), dimension = len(self._own.points), self._counts[self._rank], self._x.shape[-1]
        shape = (len(self._options.temperatures), 2, groups, num_rows)
        sums = self._own.points.new_zeros(shape)  # ΣA+ and ΣA-  [temperatures, 2, G, N]
        pulls = self._own.points.new_zeros(*shape, dimension)  # ΣA+ y+ and ΣA- y-  [temperatures, 2, G, N, D]
        for block in self._blocks():
            for tile in self._tiles(block):
                weight = block.weight[tile.groups, None, tile.columns]  # after the softmaxes, so that it acts linearly
                for t, logits in enumerate(self._logits(tile, scale)):
                    weights = self._affinity(t, logits, tile, rows, columns) * weight  # [g, n, t]
                    part = (t, int(tile.repels), tile.groups, tile.rows)
                    sums[part] += weights.sum(-1)
                    pulls[part] += weights @ block.points[tile.groups, tile.columns]
            columns = self._travel(columns, block)
        factor = self._unit / coordinate_scale(scale, dimension, self._options)
        return [self._force(*sums[t], *pulls[t]) * factor for t in range(len(sums))]

    def _force(
        self, positive_sum: Tensor, negative_sum: Tensor, positive_pull: Tensor, negative_pull: Tensor
    ) -> Tensor:
        """F of one temperature (Eq. 10-11, Alg. 2): as `field.weighted_drift`, from what it adds up."""
        x = self._own.points[:, : positive_sum.shape[-1]]
        attract = torch.addcmul(positive_pull, positive_sum[..., None], x, value=-1.0)  # Σ A+ (y+ - x)
        repel = torch.addcmul(negative_pull, negative_sum[..., None], x, value=-1.0)
        if self._options.normalize_over != "x":
            attract *= negative_sum[..., None]
            repel *= positive_sum[..., None]
        return self._options.attraction * attract - self._options.repulsion * repel

    def _softmaxes(self, scale: Tensor) -> tuple[_Softmax, _Softmax]:
        """Over all targets for the own rows `[temperatures, G, N]`; over all x for the own targets."""
        temperatures, groups = len(self._options.temperatures), len(self._own.points)

        def empty(length: int) -> _Softmax:
            zeros = self._own.points.new_zeros(temperatures, groups, length)
            return _Softmax(zeros - torch.inf, zeros)

        rows, columns = empty(self._counts[self._rank].generated), empty(self._own.points.shape[-2])
        if self._options.normalize_over == "none":
            return rows, columns
        for block in self._blocks():
            for tile in self._tiles(block):
                for t, logits in enumerate(self._logits(tile, scale)):
                    if "y" in self._options.normalize_over:
                        rows.include(logits, -1, t, tile.groups, tile.rows)
                    if "x" in self._options.normalize_over:
                        columns.include(logits, -2, t, tile.groups, tile.columns)
            columns = self._travel(columns, block)
        return rows, columns

    def _affinity(self, t: int, logits: Tensor, tile: _Tile, rows: _Softmax, columns: _Softmax) -> Tensor:
        """As `kernel.affinity`."""
        over, floor = self._options.normalize_over, self._options.affinity_floor
        if over == "none":
            return logits.exp().clamp(min=floor**0.5)
        softmaxes = []
        if "y" in over:
            softmaxes.append(rows.of(logits, -1, t, tile.groups, tile.rows))
        if "x" in over:
            softmaxes.append(columns.of(logits, -2, t, tile.groups, tile.columns))
        if len(softmaxes) == 2:
            return (softmaxes[0] * softmaxes[1]).clamp(min=floor).sqrt()
        return softmaxes[0].clamp(min=floor**0.5)

    def _logits(self, tile: _Tile, scale: Tensor) -> Iterator[Tensor]:
        """-distance / τ of every temperature, `[g, n, t]`."""
        distance = tile.distance
        if self._options.normalize_features:
            distance = distance / scale.clamp(min=SCALE_FLOOR)  # τ multiplies the mean distance (Eq. 22)
        for temperature in self._options.temperatures:
            logits = distance / -temperature
            if tile.self_pair is not None:
                logits = logits.masked_fill_(tile.self_pair, torch.finfo(logits.dtype).min)
            yield logits

    def _tiles(self, block: _Block) -> Iterator[_Tile]:
        """The own rows against a block, in parts of at most TILE_ENTRIES distances."""
        generated, unconditional, positives = self._counts[block.home]
        x = self._own.points[:, : self._counts[self._rank].generated]
        num_groups, num_rows, _ = x.shape
        first_positive = generated + unconditional
        for repels, start, stop in ((True, 0, first_positive), (False, first_positive, first_positive + positives)):
            width = min(stop - start, max(isqrt(TILE_ENTRIES), TILE_ENTRIES // num_rows))
            height = min(num_rows, max(1, TILE_ENTRIES // width))
            depth = max(1, TILE_ENTRIES // (width * height))
            for groups in _slices(0, num_groups, depth):
                for rows in _slices(0, num_rows, height):
                    for columns in _slices(start, stop, width):
                        distance = distances(x[groups, rows], block.points[groups, columns], self._unit[groups])
                        own = repels and block.home == self._rank  # then its first columns are the own x
                        self_pair = _same(rows, columns, x.device) if own else None
                        yield _Tile(groups, rows, columns, repels, distance, self_pair)

    def _blocks(self) -> Iterator[_Block]:
        """The own targets, then those of each process before this one, while the next ones are on their way."""
        block = self._own
        for _ in range(self._world - 1):
            home = (block.home - 1) % self._world
            length = sum(self._counts[home])
            points = block.points.new_empty(len(block.points), length, block.points.shape[-1])
            following = _Block(home, points, block.weight.new_empty(len(points), length))
            transfers = self._send_on(block[1:], following[1:])
            yield block
            for transfer in transfers:
                transfer.wait()
            block = following
        yield block

    def _travel(self, columns: _Softmax, block: _Block) -> _Softmax:
        """Send the sums over x on behind their block; after a whole round they are at home."""
        if self._world == 1:
            return columns
        length = sum(self._counts[(block.home - 1) % self._world])
        peak = columns.peak.new_empty(*columns.peak.shape[:-1], length)
        following = _Softmax(peak, torch.empty_like(peak))
        for transfer in self._send_on(columns, following):
            transfer.wait()
        return following

    def _send_on(self, own: tuple[Tensor, ...], following: tuple[Tensor, ...]) -> list[dist.Work]:
        """Begin to send tensors to the next process, and to receive those of the one before."""
        after, before = (self._rank + 1) % self._world, (self._rank - 1) % self._world
        sends = [dist.P2POp(dist.isend, tensor, after) for tensor in own]
        receives = [dist.P2POp(dist.irecv, tensor, before) for tensor in following]
        return dist.batch_isend_irecv(sends + receives)


def _agree(batch: DriftingBatch, options: FieldOptions, world: int) -> list[_Counts]:
    """The counts of every process, after a look at what must be equal in all of them. Waits for the device."""
    x, positives, unconditional, _ = batch
    counts = _Counts(x.shape[-2], 0 if unconditional is None else unconditional.shape[-2], positives.shape[-2])
    if world == 1:
        return [counts]
    agreed = f"groups {list(x.shape[:-2])}, dimension {x.shape[-1]}, {x.dtype}, {options}"
    letters = agreed.encode()[:AGREED_LENGTH].ljust(AGREED_LENGTH)
    own = torch.tensor([*counts, *letters], device=x.device)
    everyone = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(everyone, own)
    rows = torch.stack(everyone).tolist()
    texts = [bytes(row[3:]).decode(errors="replace").rstrip() for row in rows]
    for number, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"shared groups: expected the same in all processes, but process 0 has {texts[0]} "
                f"and process {number} has {text}"
            )
    return [_Counts(*row[:3]) for row in rows]


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _same(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Where a row and a column have the same number, `[n, t]`."""
    row, column = (torch.arange(part.start, part.stop, device=device) for part in (rows, columns))
    return row[:, None] == column
