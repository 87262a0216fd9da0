"""Groups shared by all processes: the loss of their concatenation, with the samples of the others passing by.

Every process keeps its own rows (its x) and sends its targets round a ring, from neighbour to neighbour, so that no
memory holds a whole group or a matrix of its size. They go round once for each of the three passes of
`driftfield.tiled`; what the passes find for a column, over the rows of all processes, travels behind it.
"""

from collections.abc import Iterator
from math import isqrt, prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from driftfield.checks import working_dtype
from driftfield.drift import SCALE_FLOOR, DriftingBatch, coordinate_scale, regress, target_weight
from driftfield.field import FieldOptions, check_repulsion
from driftfield.kernel import CentredPoints, centre_at
from driftfield.normalization import count_varying, distance_sums, force_sums, sum_over_processes
from driftfield.tiled import (
    STRIP_MATRICES,
    Pull,
    Softmax,
    affinity_into,
    distances_into,
    exponential_sums,
    force,
    mask_self,
    potentials,
    pull,
    unsupported,
)

MEMORY_MIB = 256.0  # of the matrices of pairs: on a GPU, products of 4096 x 4096 pairs run at full speed
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
    columns: Tensor  # what a pass needs of each target  [K, G, T]


class _Tile(NamedTuple):
    """Some of the own rows against some columns of a block: all of them negatives, or all positives."""

    groups: slice
    rows: slice
    columns: slice
    repels: bool
    distance: Tensor  # [g, n, t]
    scratch: Tensor  # [g, n, t]


class RingDrift:
    """`Drift` of groups whose samples are spread over the processes of the default process group.

    Loss and scalars are those of the concatenated groups, the same in all processes. The gradient is that of this one
    loss, to the own x: gradients of shared parameters are to be added up over the processes, not averaged. Processes
    may have different numbers of samples. All must call, in the same order.

    Args:
        batch: checked; the own part of the samples of every group. The groups are the same in all processes.
        options: of the field.
        memory_mib: for the matrices of pairs; None: 256. Beside them, three copies of the own targets in the working
            precision are held, and two forces on the own x for every temperature.

    Raises:
        ValueError: the processes differ in groups, dimension, dtype or options, have an option that this way of
            computing does not know, or together one sample that nothing repels.

    >>> options = FieldOptions((0.2,), True, 1e-6, "xy", 1.0, 1.0)
    >>> drift = RingDrift(DriftingBatch(torch.randn(2, 8, 3), torch.randn(2, 8, 3)), options)
    >>> drift.loss(scale=drift.scale_sums[0] / drift.scale_sums[1], factor=torch.ones(1)).shape
    torch.Size([2])
    """

    def __init__(self, batch: DriftingBatch, options: FieldOptions, *, memory_mib: float | None = None) -> None:
        reason = unsupported(batch, options)
        if reason is not None:
            raise ValueError(f"groups shared by all processes: {reason}")
        self._x, self._options = batch.x, options
        is_up = dist.is_available() and dist.is_initialized()
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if is_up else (0, 1)
        self._counts = _agree(batch, options, self._world)
        generated, unconditional, _ = (sum(numbers) for numbers in zip(*self._counts, strict=True))
        check_repulsion(generated, unconditional, options)
        self._forces: list[Tensor] = []
        with torch.no_grad():
            centred = self._centre(batch)
            self._points, self._unit = centred.points, centred.unit
            self._entries = max(1, int((memory_mib or MEMORY_MIB) * 2**20 / self._points.itemsize / STRIP_MATRICES))
            self._weight = target_weight(batch, self._points.dtype).view(self._points.shape[:-1])
            sums, self._nearest_of_rows, self._nearest_of_columns = self._first_pass()
            self.scale_sums = torch.cat([sums, count_varying(centred, batch.x.dtype)[None]])

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
                drift.addcmul_(forces[i], factor[i])
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

    def _first_pass(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the scale `[2]`, the smallest distance of every own row `[G, N]` and of every own column `[G, T]`."""
        sums = self._points.new_zeros(2)
        columns = torch.full_like(self._weight, torch.finfo(self._weight.dtype).max)
        rows = columns[:, : self._counts[self._rank].generated].clone()
        for block in self._blocks():
            for tile in self._tiles(block):
                groups, distance = tile.groups, tile.distance
                sums += distance_sums(distance, block.weight[groups, tile.columns])  # the samples themselves included
                self._mask_self(tile, block)
                rows[groups, tile.rows] = torch.minimum(rows[groups, tile.rows], distance.amin(-1))
                columns[groups, tile.columns] = torch.minimum(columns[groups, tile.columns], distance.amin(-2))
            columns = self._follow(columns, block)
        return sums, rows, columns

    def _potentials(self, temperatures: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The second pass: u of the own rows `[temperatures, G, N]`, v of the own columns `[temperatures, G, T]`."""
        over = self._options.normalize_over
        rows, columns = (
            Softmax(nearest, nearest.new_zeros(len(temperatures), *nearest.shape))
            for nearest in (self._nearest_of_rows, self._nearest_of_columns)
        )
        for block in self._blocks(self._nearest_of_columns[None]) if over != "none" else ():
            for tile in self._tiles(block):
                self._mask_self(tile, block)
                for sums, nearest, dim, part in (
                    (rows.sums, rows.nearest, -1, (tile.groups, tile.rows)),
                    (columns.sums, block.columns[0], -2, (tile.groups, tile.columns)),
                ):
                    sums[:, *part] += exponential_sums(tile.scratch, tile.distance, nearest[part], temperatures, dim)
            columns = columns._replace(sums=self._follow(columns.sums, block))
        return potentials(over, rows, columns, temperatures)

    def _compute_forces(self, scale: Tensor) -> list[Tensor]:
        """The second and third pass: F of every temperature in normalised coordinates, `[G, N, D]` each."""
        options, x = self._options, self._own_x
        # τ multiplies the mean distance (Eq. 22), coordinates are those of normalised features
        temperatures = scale.new_tensor(options.temperatures).to(x.dtype)
        if options.normalize_features:
            temperatures = temperatures * scale.clamp(min=SCALE_FLOOR)
        u, v = self._potentials(temperatures)
        attract, repel = (
            [Pull(torch.zeros_like(x[..., 0]), torch.zeros_like(x)) for _ in temperatures] for _ in range(2)
        )
        for block in self._blocks(v):
            for tile in self._tiles(block):
                self._mask_self(tile, block)
                rows, columns = (tile.groups, tile.rows), (tile.groups, tile.columns)
                for t, temperature in enumerate(temperatures):
                    weights = affinity_into(
                        tile.scratch,
                        tile.distance,
                        None if u is None else u[t][rows],
                        None if v is None else block.columns[t][columns],
                        temperature,
                        options.affinity_floor,
                    )  # [g, n, t]
                    if tile.repels:  # after the softmaxes, so that the weight acts linearly
                        weights *= block.weight[columns][..., None, :]
                    found, total = pull(weights, block.points[columns]), (repel if tile.repels else attract)[t]
                    total.weight[rows] += found.weight
                    total.moment[rows] += found.moment
        factor = self._unit / coordinate_scale(scale, x.shape[-1], options)
        return [force(x, *pulls, options).mul_(factor) for pulls in zip(attract, repel, strict=True)]

    @property
    def _own_x(self) -> Tensor:
        return self._points[:, : self._counts[self._rank].generated]  # [G, N, D]

    def _tiles(self, block: _Block) -> Iterator[_Tile]:
        """The own rows against a block, in parts of a size that the memory allows."""
        counts, x = self._counts[block.home], self._own_x
        num_groups, num_rows, _ = x.shape
        first_positive = counts.generated + counts.unconditional
        memory = x.new_empty(2, self._entries)
        for repels, start, stop in ((True, 0, first_positive), (False, first_positive, sum(counts))):
            width = min(stop - start, max(isqrt(self._entries), self._entries // num_rows))
            height = min(num_rows, max(1, self._entries // width))
            depth = max(1, self._entries // (width * height))
            for groups in _slices(0, num_groups, depth):
                for rows in _slices(0, num_rows, height):
                    for columns in _slices(start, stop, width):
                        own, other = x[groups, rows], block.points[groups, columns]
                        shape = (2, *own.shape[:2], other.shape[1])
                        distance, scratch = memory[:, : prod(shape[1:])].view(shape).unbind()
                        distances_into(distance, scratch, own, other, self._unit[groups])
                        yield _Tile(groups, rows, columns, repels, distance, scratch)

    def _mask_self(self, tile: _Tile, block: _Block) -> None:
        """Move x away from itself; the other processes' x are other samples."""
        if tile.repels and block.home == self._rank:
            mask_self(tile.distance, tile.rows.start, tile.columns.start)

    def _blocks(self, columns: Tensor | None = None) -> Iterator[_Block]:
        """The own targets, then those of each process before this one, while the next ones are on their way.

        Args:
            columns: what the pass needs of each of the own targets, `[K, G, T]`.
        """
        if columns is None:
            columns = self._weight.new_empty(0, *self._weight.shape)
        block = _Block(self._rank, self._points, self._weight, columns)
        for _ in range(self._world - 1):
            home = (block.home - 1) % self._world
            points, weight, columns = block[1:]
            length = sum(self._counts[home])
            following = _Block(
                home,
                points.new_empty(len(points), length, points.shape[-1]),
                weight.new_empty(len(weight), length),
                columns.new_empty(*columns.shape[:-1], length),
            )
            transfers = self._send_on(block[1:], following[1:])
            yield block
            for transfer in transfers:
                transfer.wait()
            block = following
        yield block

    def _follow(self, columns: Tensor, block: _Block) -> Tensor:
        """Send what was found for each column of a block on behind it; after a whole round it is at home.

        Args:
            columns: `[..., T]`.
            block: theirs.

        Returns:
            `[..., T]`, of the block that comes next.
        """
        if self._world == 1:
            return columns
        following = columns.new_empty(*columns.shape[:-1], sum(self._counts[(block.home - 1) % self._world]))
        for transfer in self._send_on((columns,), (following,)):
            transfer.wait()
        return following

    def _send_on(self, own: tuple[Tensor, ...], following: tuple[Tensor, ...]) -> list[dist.Work]:
        """Begin to send tensors to the next process, and to receive those of the one before."""
        after, before = (self._rank + 1) % self._world, (self._rank - 1) % self._world
        sends = [dist.P2POp(dist.isend, tensor, after) for tensor in own if tensor.numel()]
        receives = [dist.P2POp(dist.irecv, tensor, before) for tensor in following if tensor.numel()]
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
                f"groups shared by all processes: process 0 has {texts[0]} and process {number} has {text}, expected "
                "the same"
            )
    return [_Counts(*row[:3]) for row in rows]


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
