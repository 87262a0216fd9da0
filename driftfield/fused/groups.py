"""The drift of many small groups, as Triton kernels that keep every pair of points on the chip (see `group_kernels`).

1. `gram` reads the points once, as they lie in memory, and writes the Gram matrix of each group, from which everything
   follows that is a number per pair. Distances, and so the feature scale s, come out on the way.
2. `forces` reads the Gram matrices and writes ΣF² of every temperature, for λ, and the softmax denominators.
3. `losses` reads the same and writes |V|²: the loss of each group, without a look at the points.
4. `drift` runs in the backward pass: it reads the points and their distances and writes the gradient.

What one group costs, for N = P = 64 and M = 16 in D coordinates of b bytes and three temperatures:

| kernel | reads | writes | products of 16-bit parts |
|---|---|---|---|
| gram | 144 D b | 58 KB | 29.2 D kFLOP, 6 times (4 times for 16-bit features) |
| forces | 58 KB, once more per further temperature from the cache | 2.5 KB | 1.87 MFLOP, 3 times for each temperature |
| losses | 58 + 2.5 KB | 4 B | 1.87 MFLOP, 3 times |
| drift | 144 D b + 37 + 2.5 KB | 64 D b | 18.4 D kFLOP, 3 times |

58 KB are the 6 different blocks of the Gram matrix of 144 points, 37 KB the half that x takes part in; these 37 KB and
the arguments are what is kept for the backward pass. At D = 256 that is 580 KB in float32 and 400 KB in bfloat16, where
reading once and writing one gradient takes 213 and 107 KB.

Equal points are at distance 0 as in `driftfield.kernel`. ΣF² carries an error of about 4e-7 of Σ|coefficient|² times
the largest squared norm of a point: where all samples drift by less than 1e-3 of the spread of their group, λ and the
loss are less accurate than those of `EagerDrift`. The direction of the drift is not.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from driftfield.drift import SCALE_FLOOR, DriftingBatch, coordinate_scale
from driftfield.field import FieldOptions
from driftfield.fused import group_kernels as kernels

MAX_SAMPLES = 64  # per group; more do not fit into the registers of one program
MAX_POSITIVES = 128
MAX_UNCONDITIONAL = 64
MAX_TEMPERATURES = 8
LOG2_E = 1.4426950408889634
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KNOWN_OPTIONS = frozenset(
    {
        "temperatures",
        "normalize_features",
        "affinity_floor",
        "normalize_over",
        "attraction",
        "repulsion",
    }
)


def unsupported(batch: DriftingBatch, options: FieldOptions) -> str | None:
    """Why `GroupDrift` cannot serve a batch; None: it can."""
    x, positives, unconditional, weight = batch
    limits = {"generated": (x, MAX_SAMPLES), "positive": (positives, MAX_POSITIVES)}
    if unconditional is not None:
        limits["unconditional"] = (unconditional, MAX_UNCONDITIONAL)
    for name, (points, limit) in limits.items():
        if points.shape[-2] > limit:
            return f"{points.shape[-2]} {name} samples per group, expected at most {limit}"
    entries = sum(_Sizes.of(x, positives, unconditional).num_pairs)
    if entries > _max_entries(x.device):
        return (
            f"{entries} entries of the Gram matrix of a group, expected at most {_max_entries(x.device)} on {x.device}"
        )
    if x.dtype not in DTYPES:
        return f"{x.dtype}, expected float32, bfloat16 or float16"
    if len(options.temperatures) > MAX_TEMPERATURES:
        return f"{len(options.temperatures)} temperatures, expected at most {MAX_TEMPERATURES}"
    for name, default in FieldOptions._field_defaults.items():
        if name not in KNOWN_OPTIONS and getattr(options, name) != default:
            return f"the option {name}={getattr(options, name)!r}"
    if _layout(_sets(batch)) is None:
        return "groups in more than two dimensions that do not follow each other in memory"
    return None


def _max_entries(device: torch.device) -> int:
    """How many fit into the shared memory of one program: 227 KiB from Hopper on, 163 KiB before."""
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return 36 * 1024 if hopper else 24 * 1024


class GroupDrift:
    """`driftfield.drift.Drift` of many small groups.

    The last of `scale_sums` counts groups in which some coordinate varies, not the coordinates.
    """

    def __init__(self, batch: DriftingBatch, options: FieldOptions) -> None:
        self._batch, self._options = batch, options
        x, positives, *rest = batch
        unconditional, weight = (None if part is None else part.detach() for part in rest)
        self._frozen = DriftingBatch(x.detach(), positives.detach(), unconditional, weight)
        *self._pairs, sums = _gram(*self._frozen)
        self.scale_sums = sums.sum(0)
        self._forces: tuple[Tensor, Tensor] | None = None  # ΣF² of each group and temperature, and softmax terms
        self._forces_scale: Tensor | None = None  # that they are for

    def force_sums(self, scale: Tensor) -> Tensor:
        """See `Drift`."""
        squares, _ = self._forces_at(scale)
        return torch.cat([squares.sum(0), squares.new_full((1,), self._batch.x.numel())])

    def loss(self, scale: Tensor, factor: Tensor) -> Tensor:
        """See `Drift`."""
        _, *others = self._frozen
        rows, other_rows, norms, units = self._pairs
        _, terms = self._forces_at(scale)
        tensors = (*others, rows, norms, units, self._scales(scale), terms, factor.detach().float())
        loss: Tensor = _Loss.apply(self._batch.x, other_rows, _kernel_options(self._options), *tensors)
        return loss

    def _scales(self, scale: Tensor) -> Tensor:
        """What distances and coordinates are divided by, and log2(e)/τ of every temperature, [2 + temperatures].

        Not constants of the kernels, which would then be compiled anew for every step of an annealing.
        """
        divisor = scale.clamp(min=SCALE_FLOOR) if self._options.normalize_features else torch.ones_like(scale)
        rates = [
            scale.new_full((), LOG2_E / temperature) for temperature in self._options.temperatures
        ]  # wait for none
        scales = [divisor, coordinate_scale(scale, self._batch.x.shape[-1], self._options), *rates]
        return torch.stack(scales).detach().float()

    def _forces_at(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        if self._forces is None or self._forces_scale is not scale:
            options = _kernel_options(self._options)
            self._forces = _forces(*self._frozen, *self._pairs, self._scales(scale), *options)
            self._forces_scale = scale
        return self._forces


class _Loss(torch.autograd.Function):
    """Eq. 6: its value from the Gram matrices, its gradient by a second look at the points."""

    @staticmethod
    def forward(x: Tensor, other_rows: Tensor, options: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        *others, rows, norms, units, scales, terms, factor = tensors
        pairs = (rows, other_rows, norms, units)
        squares: Tensor = _losses(x, *others, *pairs, scales, terms, factor, *options)  # [groups]
        return (squares / (x.shape[-2] * x.shape[-1])).reshape(x.shape[:-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.options, *tensors = inputs
        ctx.save_for_backward(x, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _drift(*ctx.saved_tensors, gradients[0], *ctx.options)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def _kernel_options(options: FieldOptions) -> tuple[float, str, float, float]:
    """The end of the arguments of `_forces`, `_losses` and `_drift`."""
    return options.affinity_floor**0.5, options.normalize_over, options.attraction, options.repulsion


class _Sizes(NamedTuple):
    """How many points of each set a group has, and the powers of two that their blocks have."""

    num_x: int
    num_u: int
    num_p: int
    dimension: int

    @classmethod
    def of(cls, x: Tensor, positives: Tensor, unconditional: Tensor | None) -> "_Sizes":
        num_u = 0 if unconditional is None else unconditional.shape[-2]
        return cls(x.shape[-2], num_u, positives.shape[-2], x.shape[-1])

    @property
    def blocks(self) -> tuple[int, int, int]:
        """X, U, P; a product of tensor cores has sides of at least 16."""
        return _block(self.num_x), _block(self.num_u) if self.num_u else 0, _block(self.num_p)

    @property
    def num_pairs(self) -> tuple[int, int]:
        """Entries of `rows` and `others` of one group."""
        x, u, p = self.blocks
        return x * (x + u + p), u * u + p * u + p * p

    def constants(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        x, u, p = self.blocks
        rounding = (8.0 + self.dimension**0.5) * torch.finfo(torch.float32).eps  # as in driftfield.kernel.distances
        counts = {"NUM_X": self.num_x, "NUM_U": self.num_u, "NUM_P": self.num_p}
        return {**counts, "X": x, "U": u, "P": p, "ROUNDING": rounding}

    def launch(self, kernel: str) -> dict[str, int]:
        """Warps and stages."""
        return {"num_warps": 8, "num_stages": 2}

    @property
    def columns(self) -> int:
        """Coordinates at a time."""
        return min(32 if sum(self.blocks) <= 160 else 16, _block(self.dimension))


def _block(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


class _Layout(NamedTuple):
    """Groups as [outer, inner]."""

    num_inner: int
    strides: list[list[int]]  # of each tensor: outer, inner, and its last two


def _layout(tensors: Sequence[Tensor]) -> _Layout | None:
    """The leading dimensions of all tensors, but for their last two, as two; None where that takes more."""
    shape = tensors[0].shape[:-2]
    merged: list[tuple[int, list[int]]] = []  # size and every tensor's stride, the last dimension first
    for i in reversed(range(len(shape))):
        strides = [tensor.stride(i) for tensor in tensors]
        if shape[i] == 1:
            continue
        if merged and strides == [merged[-1][0] * stride for stride in merged[-1][1]]:
            merged[-1] = merged[-1][0] * shape[i], merged[-1][1]
        else:
            merged.append((shape[i], strides))
    if len(merged) > 2:
        return None
    merged += [(1, [0] * len(tensors))] * (2 - len(merged))
    (num_inner, inner), (_, outer) = merged
    return _Layout(num_inner, [[outer[i], inner[i], *tensor.stride()[-2:]] for i, tensor in enumerate(tensors)])


def _sets(batch: DriftingBatch) -> list[Tensor]:
    """x, unconditional, positives, and the weight as [..., M, 1]; x in place of what there is not."""
    x, positives, unconditional, weight = batch
    if unconditional is None:
        return [x, x, positives, x]
    if weight is None:
        return [x, unconditional, positives, x]
    return [x, unconditional, positives, weight.expand(unconditional.shape[:-1])[..., None]]


def _options(
    weight: Tensor | None, scales: Tensor, floor: float, over: str, attraction: float, repulsion: float
) -> dict[str, Any]:
    """What the kernels after the first are compiled for."""
    numbers = {"FLOOR": floor, "OVER": over, "ATTRACTION": attraction, "REPULSION": repulsion}
    return {"WEIGHTED": weight is not None, "TEMPERATURES": len(scales) - 2, **numbers}


def _launch(kernel: Any, pointers: Sequence[Tensor], layout: _Layout | None, programs: int, **constants: Any) -> None:
    if layout is None:
        raise ValueError("the groups lie in memory as `unsupported` says they must not")
    strides = [stride for strides in layout.strides for stride in strides]
    with torch.cuda.device_of(pointers[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*pointers, *strides, layout.num_inner, **constants)


_Pairs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# The launches are operators, so that torch.compile takes them as they are.


@torch.library.custom_op("driftfield::group_gram", mutates_args=())
def _gram(
    x: Tensor, positives: Tensor, unconditional: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gram matrices of x with all and of the others, squared norms, units, and what groups add to `scale_sums`."""
    sizes = _Sizes.of(x, positives, unconditional)
    outputs: _Pairs = _new_pairs(x, positives, unconditional, weight)
    rows, _, _, units, _ = outputs
    states = torch.empty_like(units, dtype=torch.int32)
    sets = _sets(DriftingBatch(x, positives, unconditional, weight))
    for again in (False, True):
        _launch(
            kernels.gram,
            [*sets, *outputs, states],
            _layout(sets),
            len(rows),
            **sizes.constants(),
            D=sizes.dimension,
            COLUMNS=sizes.columns,
            WEIGHTED=weight is not None,
            INPUT_EPSILON=torch.finfo(x.dtype).eps,
            AGAIN=again,
            **sizes.launch("gram"),
        )
    return outputs


@_gram.register_fake
def _new_pairs(x: Tensor, positives: Tensor, unconditional: Tensor | None, weight: Tensor | None) -> _Pairs:
    sizes = _Sizes.of(x, positives, unconditional)
    groups = x.shape[:-2].numel()
    shapes = [(size,) for size in (*sizes.num_pairs, sum(sizes.blocks))] + [(), (3,)]
    rows, others, norms, units, sums = (x.new_empty(groups, *shape, dtype=torch.float32) for shape in shapes)
    return rows, others, norms, units, sums


@torch.library.custom_op("driftfield::group_forces", mutates_args=())
def _forces(
    x: Tensor,
    positives: Tensor,
    unconditional: Tensor | None,
    weight: Tensor | None,
    rows: Tensor,
    others: Tensor,
    norms: Tensor,
    units: Tensor,
    scales: Tensor,
    floor: float,
    over: str,
    attraction: float,
    repulsion: float,
) -> tuple[Tensor, Tensor]:
    """ΣF² over the samples of each group, [groups, temperatures], and the logarithms of softmax denominators."""
    sizes = _Sizes.of(x, positives, unconditional)
    squares, terms = _new_forces(x, positives, unconditional, weight, rows, others, norms, units, scales)
    weights = _sets(DriftingBatch(x, positives, unconditional, weight))[3]
    _launch(
        kernels.forces,
        [rows, others, norms, units, weights, scales, terms, squares],
        _layout([weights]),
        squares.numel(),
        **sizes.constants(),
        **_options(weight, scales, floor, over, attraction, repulsion),
        **sizes.launch("forces"),
    )
    return squares, terms


@_forces.register_fake
def _new_forces(
    x: Tensor, positives: Tensor, unconditional: Tensor | None, weight: Tensor | None, rows: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    block_x, block_u, block_p = _Sizes.of(x, positives, unconditional).blocks
    groups, temperatures = rows.shape[0], arguments[3].shape[0] - 2
    terms = rows.new_empty(groups, temperatures, 2 * block_x + block_u + block_p)
    return rows.new_empty(groups, temperatures), terms


@torch.library.custom_op("driftfield::group_losses", mutates_args=())
def _losses(
    x: Tensor,
    positives: Tensor,
    unconditional: Tensor | None,
    weight: Tensor | None,
    rows: Tensor,
    others: Tensor,
    norms: Tensor,
    units: Tensor,
    scales: Tensor,
    terms: Tensor,
    factor: Tensor,
    floor: float,
    over: str,
    attraction: float,
    repulsion: float,
) -> Tensor:
    """Σ|V|² over the samples of each group, [groups]."""
    sizes = _Sizes.of(x, positives, unconditional)
    squares = rows.new_empty(len(rows))
    weights = _sets(DriftingBatch(x, positives, unconditional, weight))[3]
    _launch(
        kernels.losses,
        [rows, others, norms, units, weights, scales, terms, factor, squares],
        _layout([weights]),
        len(rows),
        **sizes.constants(),
        **_options(weight, scales, floor, over, attraction, repulsion),
        **sizes.launch("losses"),
    )
    return squares


@_losses.register_fake
def _new_losses(
    x: Tensor, positives: Tensor, unconditional: Tensor | None, weight: Tensor | None, rows: Tensor, *_: Any
) -> Tensor:
    return rows.new_empty(rows.shape[0])


@torch.library.custom_op("driftfield::group_drift", mutates_args=())
def _drift(
    x: Tensor,
    positives: Tensor,
    unconditional: Tensor | None,
    weight: Tensor | None,
    rows: Tensor,
    norms: Tensor,
    units: Tensor,
    scales: Tensor,
    terms: Tensor,
    factor: Tensor,
    upstream: Tensor,
    floor: float,
    over: str,
    attraction: float,
    repulsion: float,
) -> Tensor:
    """Gradient to x, whose loss of each group has the gradient `upstream`."""
    sizes = _Sizes.of(x, positives, unconditional)
    gradient: Tensor = _new_gradient(x, positives, unconditional, weight)
    sets = [*_sets(DriftingBatch(x, positives, unconditional, weight)), gradient]
    _launch(
        kernels.drift,
        [*sets, rows, norms, units, scales, terms, factor, upstream.reshape(-1).contiguous()],
        _layout(sets),
        len(rows),
        **sizes.constants(),
        D=sizes.dimension,
        COLUMNS=sizes.columns,
        **_options(weight, scales, floor, over, attraction, repulsion),
        **sizes.launch("drift"),
    )
    return gradient


@_drift.register_fake
def _new_gradient(x: Tensor, positives: Tensor, unconditional: Tensor | None, weight: Tensor | None, *_: Any) -> Tensor:
    """In the memory format of x, unless that does not go with the layout of the others."""
    gradient = torch.empty_like(x)
    sets = _sets(DriftingBatch(x, positives, unconditional, weight))
    return gradient if _layout([*sets, gradient]) else torch.empty_like(x, memory_format=torch.contiguous_format)
