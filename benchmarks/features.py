"""What the moments of feature maps cost: `python -m benchmarks.features`.

Means and standard deviations of patches of 2 and 4 and of the whole map (A.5), of noise in the sizes of the maps that
the encoder makes of the generated images of four labels: in one pass by the fused kernels, by PyTorch's operations as
they are and compiled, and as one writes them down, one reduction for each. The floor is the time to read and write
what has to be, at the rate at which the device copies in the same run.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self

import torch
from torch import Tensor

from benchmarks.field import milliseconds, reason
from driftfield.fused.patch_moments import VARIANCE_FLOOR, patch_moments
from driftfield.training import UserError, option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "benchmarks"
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS: Final = {"last": torch.channels_last, "first": torch.contiguous_format}
MAPS: Final = {  # of MAE-256 on 256 images, and small ones
    "cuda": tuple(f"256x{channels}x{side}xbfloat16" for channels, side in ((256, 32), (512, 16), (1024, 8), (2048, 4))),
    "cpu": ("8x32x16xfloat32", "8x64x8xbfloat16"),
}
PATCH_SIZES: Final = (2, 4)
COPY_BYTES: Final = {"cuda": 2**31, "cpu": 2**26}
CHECKED_IMAGES: Final = 2  # compared with float64

Form = Literal["fused", "compiled", "eager", "plain"]
Moments = Callable[[Tensor], Sequence[Tensor]]  # means and standard deviations of patches of 2, of 4, of the map


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Keys of `python -m benchmarks.features`."""

    maps: tuple[str, ...] | None = option(
        "images, channels, side and dtype, as 256x512x16xbfloat16; null: those of MAE-256 on a GPU, small ones on a CPU"
    )
    channels: tuple[Literal["last", "first"], ...] = option("layout of the maps: channels side by side, or apart")
    forms: tuple[Form, ...] = option("fused: the kernels; eager, compiled: PyTorch's operations; plain: six reductions")
    repeats: int = option("calls of which the median counts, after two that do not", min=1)
    seconds: float = option("after which no further call is made", min=0)
    device: Device = option("where to compute")
    out: Path = option("JSON file of the figures")


class Case(NamedTuple):
    """Sizes of a map."""

    images: int
    channels: int
    side: int
    dtype: str

    @classmethod
    def of(cls, text: str) -> Self:
        """From images x channels x side x dtype."""
        *numbers, dtype = text.split("x")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers) or dtype not in DTYPES:
            raise UserError(f"maps: expected sizes as 256x512x16xfloat32 or 256x512x16xbfloat16, found {text!r}")
        images, channels, side = map(int, numbers)
        if side % PATCH_SIZES[-1] or not side:
            raise UserError(f"maps: expected a side that patches of {PATCH_SIZES[-1]} tile, found {side} in {text!r}")
        return cls(images, channels, side, dtype)

    @property
    def bytes(self) -> int:
        """Of the map."""
        return self.images * self.channels * self.side**2 * DTYPES[self.dtype].itemsize

    @property
    def bytes_of_moments(self) -> int:
        """Two in float32 of each patch, and of the map."""
        patches = sum((self.side // size) ** 2 for size in (*PATCH_SIZES, self.side))
        return self.images * self.channels * patches * 2 * torch.float32.itemsize

    @property
    def bytes_forward(self) -> int:
        """The map is read, the moments are written."""
        return self.bytes + self.bytes_of_moments

    @property
    def bytes_both(self) -> int:
        """And again: map, moments and their gradients are read, the map's gradient is written."""
        return self.bytes_forward + 2 * self.bytes + 2 * self.bytes_of_moments

    def noise(self, layout: str, device: torch.device) -> Tensor:
        """A map [B, C, H, W]."""
        random = torch.Generator(device).manual_seed(0)
        shape = (self.images, self.channels, self.side, self.side)
        noise = torch.randn(shape, generator=random, device=device, dtype=DTYPES[self.dtype])
        return noise.contiguous(memory_format=LAYOUTS[layout])


def plain_moments(feature_map: Tensor) -> list[Tensor]:
    """Six reductions, as one writes them down."""
    feature_map = feature_map.float()
    found = []
    for size in (*PATCH_SIZES, feature_map.shape[-1]):
        patches = feature_map.unflatten(2, (-1, size)).unflatten(4, (-1, size))  # [B, C, h, size, w, size]
        std = (patches.var((3, 5), correction=0) + VARIANCE_FLOOR).sqrt()
        found += [part.flatten(2).transpose(1, 2) for part in (patches.mean((3, 5)), std)]
    return found


def moments_function(form: Form) -> Moments:
    """A form of the six moments."""
    if form == "plain":
        return plain_moments

    def moments(feature_map: Tensor) -> list[Tensor]:
        found = patch_moments(feature_map, PATCH_SIZES, backend="fused" if form == "fused" else "eager")
        return [tensor for pair in (*found.patches, found.whole) for tensor in pair]

    return torch.compile(moments, dynamic=False) if form == "compiled" else moments


def with_gradient(function: Moments, feature_map: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The moments, then the gradient of the map."""
    feature_map = feature_map.detach().requires_grad_()
    found = function(feature_map)
    gradient = torch.autograd.grad(found, feature_map, gradients)
    return [*(part.detach() for part in found), *gradient]


def gradients_of(case: Case, device: torch.device) -> list[Tensor]:
    """Noise for a gradient of each moment."""
    counts = [(case.side // size) ** 2 for size in (*PATCH_SIZES, case.side) for _ in range(2)]
    return [torch.randn(case.images, count, case.channels, device=device) for count in counts]


def error(function: Moments, case: Case, layout: str, device: torch.device) -> float:
    """Largest relative error, of moments and gradient, against float64 on a part of the images."""
    part = case._replace(images=min(case.images, CHECKED_IMAGES))
    feature_map, gradients = part.noise(layout, device), gradients_of(part, device)
    found = with_gradient(function, feature_map, gradients)
    exact = with_gradient(moments_function("eager"), feature_map.double(), [part.double() for part in gradients])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def measure(form: Form, case: Case, layout: str, config: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """Figures of one form for one map; in the place of a figure that cannot be had, the reason."""
    row: dict[str, Any] = {"form": form, **case._asdict(), "layout": layout}
    try:
        function = moments_function(form)
        row["error"] = error(function, case, layout, device)
        feature_map, gradients = case.noise(layout, device), gradients_of(case, device)
        with torch.no_grad():
            row["forward_ms"] = milliseconds(lambda: function(feature_map), config, device)
        row["both_ms"] = milliseconds(lambda: with_gradient(function, feature_map, gradients), config, device)
    except Exception as problem:  # whatever it is: the other forms are still to be measured
        row["problem"] = reason(problem)
    torch._dynamo.reset()
    return row


def copy_terabytes(config: BenchmarkConfig, device: torch.device) -> float:
    """Read and written in a second by a copy."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-9 * source.numel() / milliseconds(lambda: target.copy_(source), config, device)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures as a Markdown table."""
    lines = [
        "| map | channels | form | forward ms | / floor | and gradient ms | / floor | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{row['images']} x {row['channels']} x {row['side']}², {row['dtype']}"
        if "problem" in row:
            figures = [row["problem"], "-", "-", "-", "-"]
        else:
            times = [(row[f"{name}_ms"], row[f"{name}_floor_ms"]) for name in ("forward", "both")]
            figures = [cell for ms, floor in times for cell in (f"{ms:.3g}", f"{ms / floor:.2f}")]
            figures.append(f"{row['error']:.1e}")
        lines.append(f"| {' | '.join([size, row['layout'], row['form'], *figures])} |")
    return "\n".join(lines)


def main(config: BenchmarkConfig) -> int:
    """Measure, print a table, write JSON."""
    device = choose_device(config.device)
    cases = [Case.of(text) for text in (MAPS[device.type] if config.maps is None else config.maps)]
    copied = copy_terabytes(config, device)
    rows = []
    for case in cases:
        floors = {"forward_floor_ms": case.bytes_forward, "both_floor_ms": case.bytes_both}
        floors_ms = {name: 1e-9 * size / copied for name, size in floors.items()}
        for layout in config.channels:
            for form in config.forms:
                rows.append(measure(form, case, layout, config, device) | floors_ms)
                print(table(rows[-1:]).rpartition("\n")[2], flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    config.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    write_json(config.out, {"machine": machine, **versions, "copy_terabytes": copied, "rows": rows})
    print(f"\n{machine}: copy {copied:.3g} TB/s\n{table(rows)}\nwritten: {config.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, BenchmarkConfig, config_dir=CONFIG_DIR, config_name="features", description=__doc__ or "")
    )
