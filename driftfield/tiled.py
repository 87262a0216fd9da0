"""The drift within a bound of memory: groups a few at a time, large groups in strips of rows, no matrix of all pairs.

The softmaxes of the affinity (Table 11) act as potentials u_i and v_j in the unit of the distances:

    A_ij = exp((u_i + v_j - d_ij) / τ),    u_i = h (m_i - τ log Σ_j exp((m_i - d_ij) / τ)),    v_j likewise over x,

where m is the smallest distance of a row or column, and h is 1/2 for the geometric mean of both softmaxes ("xy") and 1
for either alone. So there are three passes over the pairs: the smallest distances, with the sums of the feature scale;
the sums of exponentials of all temperatures; the affinities, with the forces.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from driftfield.checks import working_dtype
from driftfield.drift import SCALE_FLOOR, DriftingBatch, coordinate_scale, regress, target_weight
from driftfield.field import FieldOptions
from driftfield.kernel import SQUARED_DISTANCE_FLOOR, NormalizeOver, centre
from driftfield.normalization import count_varying, force_sums

STRIP_MATRICES = 2  # of a strip's rows and all targets: the distances, and what is made of them
STRIP_VECTORS = 6  # of the coordinates of a strip's rows, beside one F for each temperature
POINT_COPIES = 2  # of the targets of the groups at hand: as they were given, and centred
UNDERSTOOD_OPTIONS = frozenset(
    {"temperatures", "normalize_features", "affinity_floor", "normalize_over", "attraction", "repulsion"}
)

Index = tuple[slice, ...]  # of groups


class Softmax(NamedTuple):
    """A softmax of -d/τ over the rows or the columns, for every temperature."""

    nearest: Tensor  # m, the smallest distance  [..., K]
    sums: Tensor  # Σ exp((m - d) / τ)  [temperatures, ..., K]


class Pull(NamedTuple):
    """What the targets of one side do to every x, before the product with the other side's sum (Eq. 10-11)."""

    weight: Tensor  # ΣA  [..., N]
    moment: Tensor  # ΣA y  [..., N, D]


def distances_into(out: Tensor, scratch: Tensor, x: Tensor, targets: Tensor, unit: Tensor) -> Tensor:
    """`kernel.distances`, operation for operation, but that nothing of the size of the result is allocated.

    Args:
        out: `[G, R, K]`, for the result.
        scratch: likewise, overwritten.
        x: `[G, R, D]`.
        targets: `[G, K, D]`.
        unit: `[G, 1, 1]`.

    >>> points, (out, scratch) = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), torch.empty(2, 1, 1, 2)
    >>> distance = distances_into(out, scratch, points[:, :1], points, torch.ones(1, 1, 1))
    >>> [round(entry, 3) for entry in distance.flatten().tolist()]
    [0.0, 5.0]
    """
    x_norm, target_norm = (torch.linalg.vector_norm(points, dim=-1).square() for points in (x, targets))
    x_norm, target_norm = x_norm[..., :, None], target_norm[..., None, :]
    torch.bmm(x, targets.mT, out=out)
    torch.add(x_norm, target_norm, out=scratch)
    torch.sub(scratch, out, alpha=2.0, out=out)
    # Equal points have distance 0: those of equal norms whose squared distance is no more than rounding.
    rounding = (8.0 + x.shape[-1] ** 0.5) * torch.finfo(x.dtype).eps
    torch.eq(x_norm, target_norm, out=scratch)
    scratch.mul_(rounding * x_norm)
    torch.gt(out, scratch, out=scratch)  # 0 for them, and for what the lower bound replaces
    out.mul_(scratch)
    return torch.clamp(out, min=SQUARED_DISTANCE_FLOOR / unit.square(), out=out).sqrt_().mul_(unit)


def mask_self(distance: Tensor, first_row: int, first_column: int = 0) -> Tensor:
    """Move x away from itself in place: an infinite distance adds to no softmax and has no affinity.

    Args:
        distance: `[..., R, K]`, of some rows to some columns.
        first_row: number of the sample that the first row is.
        first_column: number of the target that the first column is; the targets begin with x.

    >>> mask_self(torch.zeros(1, 3), first_row=1).tolist()
    [[0.0, inf, 0.0]]
    """
    offset = first_row - first_column
    if -distance.shape[-2] < offset < distance.shape[-1]:
        distance.diagonal(offset, -2, -1).fill_(torch.inf)
    return distance


def exponential_sums(scratch: Tensor, distance: Tensor, nearest: Tensor, temperatures: Tensor, dim: int) -> Tensor:
    """Sums of exp((m - d) / τ) over one dimension of some pairs, `[temperatures, ..., K]`.

    Args:
        scratch: `[..., R, K]`, overwritten.
        distance: d, `[..., R, K]`, infinite for pairs that do not count.
        nearest: m of the remaining dimension, finite.
        temperatures: τ, `[temperatures]`, in the unit of the distances.
        dim: -1 or -2.

    >>> exponential_sums(torch.empty(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]), torch.tensor([1.0]), -1)
    tensor([[1.3679]])
    """
    sums = []
    for temperature in temperatures:
        torch.sub(nearest.unsqueeze(dim), distance, out=scratch)
        sums.append(scratch.div_(temperature).exp_().sum(dim))
    return torch.stack(sums)


def potential(softmax: Softmax, temperatures: Tensor, share: float) -> Tensor:
    """u or v of the module's formula, `[temperatures, ..., K]`.

    Args:
        softmax: over the other dimension.
        temperatures: τ, `[temperatures]`.
        share: h.
    """
    # A column may hold nothing but x itself (N = 1): its sum is 0, and any finite potential leaves A at 0.
    logarithm = softmax.sums.clamp(min=torch.finfo(softmax.sums.dtype).tiny).log()
    temperatures = temperatures.view(-1, *[1] * softmax.nearest.ndim)
    return (softmax.nearest - temperatures * logarithm) * share


def potentials(
    over: NormalizeOver, rows: Softmax, columns: Softmax, temperatures: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """u `[temperatures, ..., N]` and v `[temperatures, ..., T]` of a normalisation; None: 0."""
    share = 0.5 if over == "xy" else 1.0
    u = potential(rows, temperatures, share) if over in ("xy", "y") else None
    v = potential(columns, temperatures, share) if over in ("xy", "x") else None
    return u, v


def affinity_into(
    out: Tensor, distance: Tensor, u: Tensor | None, v: Tensor | None, temperature: Tensor, floor: float
) -> Tensor:
    """A of the module's formula.

    Args:
        out: `[..., R, K]`, for the result.
        distance: `[..., R, K]`.
        u: `[..., R]`; 0 if absent.
        v: `[..., K]`; 0 if absent.
        temperature: τ, `[]`, in the unit of the distances.
        floor: lower bound of A² (the release: 1e-6).
    """
    torch.neg(distance, out=out) if u is None else torch.sub(u[..., :, None], distance, out=out)
    if v is not None:
        out += v[..., None, :]
    return out.div_(temperature).exp_().clamp_(min=floor**0.5)


def pull(weights: Tensor, targets: Tensor) -> Pull:
    """`Pull` of the targets `[..., K, D]` with affinities `[..., R, K]`; those of disjoint targets add up."""
    return Pull(weights.sum(-1), weights @ targets)


def force(x: Tensor, attract: Pull, repel: Pull, options: FieldOptions) -> Tensor:
    """V of Eq. 10-11 at x `[..., N, D]` from the pull of the positives and that of the negatives."""
    towards = torch.addcmul(attract.moment, attract.weight[..., None], x, value=-1.0)  # ΣA+ (y+ - x)
    away = torch.addcmul(repel.moment, repel.weight[..., None], x, value=-1.0)  # ΣA- (y- - x)
    if options.normalize_over != "x":
        towards *= repel.weight[..., None]
        away *= attract.weight[..., None]
    return towards.mul_(options.attraction).sub_(away, alpha=options.repulsion)


def unsupported(batch: DriftingBatch, options: FieldOptions) -> str | None:
    """Why strips cannot serve a batch; None: they can."""
    for name in sorted(set(options._fields) - UNDERSTOOD_OPTIONS):
        if getattr(options, name) != options._field_defaults.get(name):
            return f"{name}={getattr(options, name)!r} is not computed in strips"
    return None


class _Points(NamedTuple):
    """The targets of some groups, as `kernel.centre` makes them."""

    targets: Tensor  # [x, unconditional, positives]  [G, T, D]
    unit: Tensor  # [G, 1, 1]
    weight: Tensor  # [G, T]
    varying: Tensor  # []
    num_negatives: int  # N+M


class TiledDrift:
    """`Drift` in strips, equal to `EagerDrift` but for rounding, on any device.

    Args:
        batch: checked.
        options: of the field.
        memory_mib: for all that is held beside the batch and V; the least is two copies of one group's points in the
            working precision and one row of distances.

    Raises:
        ValueError: memory_mib is not > 0.

    >>> options = FieldOptions((0.05, 0.2), True, 1e-6, "xy", 1.0, 1.0)
    >>> drift = TiledDrift(DriftingBatch(torch.randn(64, 3), torch.randn(64, 3)), options, memory_mib=0.01)
    >>> drift.loss(scale=drift.scale_sums[0] / drift.scale_sums[1], factor=torch.ones(2)).shape
    torch.Size([])
    """

    def __init__(self, batch: DriftingBatch, options: FieldOptions, *, memory_mib: float = 1024.0) -> None:
        if not memory_mib > 0:
            raise ValueError(f"memory_mib must be > 0, got {memory_mib}")
        x, positives, unconditional, weight = batch
        if unconditional is not None and weight is not None:  # dimensions of size 1 repeat, and could not be divided
            batch = batch._replace(unconditional_weight=weight.expand(unconditional.shape[:-1]))
        self._batch, self._options, self._dtype = batch, options, working_dtype(x)
        entries = memory_mib * 2**20 / self._dtype.itemsize
        kept = len(options.temperatures) * x.numel()
        self._keeps_forces = 2 * kept <= entries  # else they are computed again for the loss
        num_targets = x.shape[-2] + positives.shape[-2] + (0 if unconditional is None else unconditional.shape[-2])
        entries -= kept if self._keeps_forces else 0
        self._pieces, self._rows = _divide(x.shape, num_targets, len(options.temperatures), entries)
        self._forces: list[Tensor] = []
        with torch.no_grad():
            sums, self._nearest = zip(*map(self._first_pass, self._pieces), strict=True)
        self.scale_sums = torch.stack(sums).sum(0)

    @torch.no_grad()
    def force_sums(self, scale: Tensor) -> Tensor:
        """See `Drift`."""
        x = self._batch.x
        if self._keeps_forces:
            self._forces = [torch.empty_like(x, dtype=self._dtype) for _ in self._options.temperatures]
        sums = []
        for piece, nearest in zip(self._pieces, self._nearest, strict=True):
            for rows, forces in self._strips_of_forces(self._points(piece), nearest, scale):
                sums.append(force_sums(forces))
                if self._keeps_forces:
                    for kept, found in zip(self._forces, forces, strict=True):
                        kept[piece][..., rows, :] = _unflatten(found, piece)
        return torch.stack(sums).sum(0)

    def loss(self, scale: Tensor, factor: Tensor) -> Tensor:
        """See `Drift`."""
        x = self._batch.x
        with torch.no_grad():
            if self._forces:
                drift = _weighted_sum(self._forces, factor)
            else:
                drift = torch.empty_like(x, dtype=self._dtype)  # V  [..., N, D]
                for piece, nearest in zip(self._pieces, self._nearest, strict=True):
                    for rows, forces in self._strips_of_forces(self._points(piece), nearest, scale):
                        drift[piece][..., rows, :] = _unflatten(_weighted_sum(forces, factor), piece)
        return regress(x, drift, coordinate_scale(scale, x.shape[-1], self._options))

    def _points(self, piece: Index) -> _Points:
        x, positives, unconditional, weight = self._batch
        part = DriftingBatch(
            x[piece],
            positives[piece],
            None if unconditional is None else unconditional[piece],
            None if weight is None else weight[piece],
        )
        sets = [part.x, part.positives] if part.unconditional is None else [part.x, part.unconditional, part.positives]
        centred = centre(torch.cat(sets, -2).detach().to(self._dtype))
        shape = centred.points.shape
        return _Points(
            targets=centred.points.view(-1, *shape[-2:]),
            unit=centred.unit.view(-1, 1, 1),
            weight=target_weight(part, self._dtype).view(-1, shape[-2]),
            varying=count_varying(centred, part.x.dtype),
            num_negatives=centred.points.shape[-2] - part.positives.shape[-2],
        )

    def _strips(self, points: _Points) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of some groups, their distances to all targets and a scratch of that size, `[G, R, T]` each."""
        num_samples = self._batch.x.shape[-2]
        # The same memory for every strip: what a C library's heap does with so large pieces is no bound.
        memory = points.targets.new_empty(2, len(points.targets), self._rows, points.targets.shape[-2])
        for start in range(0, num_samples, self._rows):
            rows = slice(start, min(start + self._rows, num_samples))
            out, scratch = memory[:, :, : rows.stop - start].unbind()
            yield rows, distances_into(out, scratch, points.targets[:, rows], points.targets, points.unit), scratch

    def _first_pass(self, piece: Index) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`scale_sums` of some groups, and the smallest distance of every row and column that has a softmax."""
        points = self._points(piece)
        sums = []
        columns = torch.full_like(points.weight, torch.finfo(self._dtype).max)  # [G, T], of none but x itself
        rows = columns[..., : self._batch.x.shape[-2]].clone()  # [G, N]
        for strip, distance, _ in self._strips(points):
            sums.append(
                torch.stack([(distance.sum(-2) * points.weight).sum(), distance.shape[-2] * points.weight.sum()])
            )
            mask_self(distance, strip.start)
            if self._options.normalize_over in ("xy", "y"):
                torch.amin(distance, -1, out=rows[..., strip])
            if self._options.normalize_over in ("xy", "x"):
                torch.minimum(columns, distance.amin(-2), out=columns)
        return torch.cat([torch.stack(sums).sum(0), points.varying[None]]), (rows, columns)

    def _potentials(
        self, points: _Points, nearest: tuple[Tensor, Tensor], temperatures: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The second pass: u and v of some groups."""
        over = self._options.normalize_over
        rows, columns = (Softmax(m, m.new_zeros(len(temperatures), *m.shape)) for m in nearest)
        for strip, distance, scratch in self._strips(points) if over != "none" else ():
            mask_self(distance, strip.start)
            if over in ("xy", "y"):
                rows.sums[..., strip] = exponential_sums(scratch, distance, rows.nearest[..., strip], temperatures, -1)
            if over in ("xy", "x"):
                columns.sums.add_(exponential_sums(scratch, distance, columns.nearest, temperatures, -2))
        return potentials(over, rows, columns, temperatures)

    def _strips_of_forces(
        self, points: _Points, nearest: tuple[Tensor, Tensor], scale: Tensor
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """The second and third pass: rows of some groups, and F of every temperature there, `[G, R, D]` each."""
        options, split = self._options, points.num_negatives
        # τ multiplies the mean distance (Eq. 22), coordinates are those of normalised features
        temperatures = scale.new_tensor(options.temperatures).to(self._dtype)
        if options.normalize_features:
            temperatures = temperatures * scale.clamp(min=SCALE_FLOOR)
        factor = points.unit / coordinate_scale(scale, points.targets.shape[-1], options)
        u, v = self._potentials(points, nearest, temperatures)
        for rows, distance, scratch in self._strips(points):
            mask_self(distance, rows.start)
            x, forces = points.targets[:, rows], []
            for t, temperature in enumerate(temperatures):
                weights = affinity_into(
                    scratch,
                    distance,
                    None if u is None else u[t][..., rows],
                    None if v is None else v[t],
                    temperature,
                    options.affinity_floor,
                )  # [G, R, T]
                negative, positive = weights[..., :split], weights[..., split:]
                if self._batch.unconditional_weight is not None:  # after the softmaxes, so that it acts linearly
                    negative *= points.weight[..., None, :split]
                repel = pull(negative, points.targets[:, :split])
                attract = pull(positive, points.targets[:, split:])
                forces.append(force(x, attract, repel, options).mul_(factor))
            yield rows, forces


def _weighted_sum(forces: list[Tensor], factor: Tensor) -> Tensor:
    """V = Σ_τ factor_τ F_τ (Eq. 26)."""
    drift = forces[0] * factor[0]
    for i in range(1, len(forces)):
        drift.addcmul_(forces[i], factor[i])
    return drift


def _unflatten(rows: Tensor, piece: Index) -> Tensor:
    """`[G, R, D]` with the groups in the dimensions that they have in the batch."""
    return rows.view(*(part.stop - part.start for part in piece), *rows.shape[1:])


def _divide(shape: torch.Size, num_targets: int, num_temperatures: int, entries: float) -> tuple[list[Index], int]:
    """The groups in pieces, and how many rows of each are one strip, so that `entries` numbers are enough."""
    num_samples, dimension = shape[-2:]
    points = POINT_COPIES * num_targets * dimension
    row = STRIP_MATRICES * num_targets + (num_temperatures + STRIP_VECTORS) * dimension
    num_groups = int(entries // (points + num_samples * row))
    if num_groups > 0:
        return list(_blocks(shape[:-2], num_groups)), num_samples
    return list(_blocks(shape[:-2], 1)), min(num_samples, max(1, int((entries - points) // row)))


def _blocks(shape: torch.Size, most: int) -> Iterator[Index]:
    """Divide an array of that shape into blocks of at most `most` entries."""
    if shape.numel() <= most:
        yield tuple(slice(0, size) for size in shape)
        return
    inner = shape[1:].numel()
    step = max(1, most // inner)
    for start in range(0, shape[0], step):
        for block in _blocks(shape[1:], most):
            yield slice(start, min(start + step, shape[0])), *block
