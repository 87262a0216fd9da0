"""How long the drifting loss takes, in how much memory, how exactly: `python -m benchmarks.field`.

Two tables: many small groups (the locations of feature maps) and one large group (the field at very large batches).
Forms: the loss in its eager form, compiled, in strips and fused, and Algorithm 2 as one writes it down. Each has the
time of the forward pass alone and with the gradient to x, the peak memory with its inputs, and its relative errors
against float64 on a part of the data. The floor is what the same run's copy and product of matrices would need for the
case: every feature read once and one gradient written, or one product for the distances and one for each temperature's
force, whichever takes longer. What cannot run says why; there is no peak memory on a CPU.
"""

import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal, NamedTuple, Self

import torch
from torch import Tensor

from driftfield import DriftingBatch, DriftingLoss
from driftfield.training import option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device
from driftfield.training.errors import UserError

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "benchmarks"
TEMPERATURES: Final = (0.02, 0.05, 0.2)
SMALL_GROUP: Final = (64, 64, 16)  # generated, positives, unconditional: an image's class in the published runs
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANY: Final = {
    "cuda": ("4096x256xfloat32", "4096x2048xfloat32", "65536x256xbfloat16"),
    "cpu": ("16x64xfloat32", "16x64xbfloat16"),
}
FEW: Final = {
    "cuda": ("4096x1024xfloat32", "16384x1024xfloat32", "32768x1024xfloat32", "262144x1024xfloat32"),
    "cpu": ("256x64xfloat32", "1024x64xfloat32"),
}
CHECKED_GROUPS, CHECKED_SAMPLES = 8, 1024  # the part of the data that float64 computes too
PRODUCT_SIZE: Final = {"cuda": 8192, "cpu": 1024}
COPY_BYTES: Final = {"cuda": 1 << 30, "cpu": 1 << 26}
SHORT: Final = 80  # characters of a reason

STRIPS_MIB: Final = {"cuda": 256.0, "cpu": 1.0}  # bound of memory of the strips, but for large groups
STRIPS_COPIES: Final = 8  # of one group's samples, which is less than its pairs: the bound for large groups

Form = Literal["eager", "compiled", "strips", "fused", "plain"]
LossFunction = Callable[[DriftingBatch], Tensor]  # to one loss per group, [G]


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Keys of `python -m benchmarks.field`."""

    many: tuple[str, ...] | None = option(
        "groups of 64 generated, 64 real and 16 unconditional samples, as 4096x256xfloat32: groups, dimension, dtype; "
        "null: those of the device"
    )
    few: tuple[str, ...] | None = option(
        "one group, as 16384x1024xfloat32: generated samples, as many real ones, dimension, dtype; null: likewise"
    )
    forms: tuple[Form, ...] = option(
        "of DriftingLoss: eager, compiled, strips (its memory_mib) and fused; plain: Algorithm 2 as written down"
    )
    tf32: bool = option("products of the forms but fused in TF32 on a GPU; their distances then lose digits")
    repeats: int = option("calls of which the median counts, after two that do not", min=1)
    seconds: float = option("after which no further call is made", min=0)
    device: Device = option("where to compute")
    out: Path = option("JSON file of the figures")


class Case(NamedTuple):
    """Sizes of one call of the loss."""

    groups: int
    generated: int
    positives: int
    unconditional: int
    dimension: int
    dtype: str

    @classmethod
    def of_many(cls, text: str) -> Self:
        """From groups x dimension x dtype."""
        groups, dimension, dtype = _parse("many", text)
        return cls(groups, *SMALL_GROUP, dimension, dtype)

    @classmethod
    def of_few(cls, text: str) -> Self:
        """From samples x dimension x dtype."""
        samples, dimension, dtype = _parse("few", text)
        return cls(1, samples, samples, 0, dimension, dtype)

    def __str__(self) -> str:
        kinds = [str(number) for number in (self.generated, self.positives, self.unconditional) if number]
        return f"{self.groups} x ({' + '.join(kinds)}) x {self.dimension}, {self.dtype}"

    @property
    def targets(self) -> int:
        """Of each sample."""
        return self.generated + self.unconditional + self.positives

    @property
    def bytes(self) -> int:
        """Every feature read once, one gradient written."""
        return self.groups * (self.targets + self.generated) * self.dimension * DTYPES[self.dtype].itemsize

    @property
    def operations(self) -> int:
        """One product for the distances, one for the force of each temperature."""
        product = 2 * self.groups * self.generated * self.targets * self.dimension
        return product * (1 + len(TEMPERATURES))

    def batch(self, device: torch.device) -> DriftingBatch:
        """Samples of noise; the real ones lie elsewhere than the generated ones."""
        random = torch.Generator(device).manual_seed(0)

        def noise(number: int) -> Tensor:
            shape = (self.groups, number, self.dimension)
            return torch.randn(shape, generator=random, device=device, dtype=DTYPES[self.dtype])

        unconditional = noise(self.unconditional) if self.unconditional else None
        return DriftingBatch(noise(self.generated), noise(self.positives).add_(0.5), unconditional)

    def checked(self) -> "Case":
        """The part that is small enough for float64."""
        samples = min(self.generated, CHECKED_SAMPLES), min(self.positives, CHECKED_SAMPLES)
        return Case(min(self.groups, CHECKED_GROUPS), *samples, self.unconditional, self.dimension, self.dtype)


class Rates(NamedTuple):
    """What the device reaches in this run."""

    copy_terabytes: float  # per second, read and written
    float32_teraflops: float  # in TF32 on a GPU
    bfloat16_teraflops: float

    def floors(self, case: Case) -> dict[str, float]:
        """Least time of a case: of its memory, or of its products; with those in float32, and in the faster dtype."""
        fastest = max(self.float32_teraflops, self.bfloat16_teraflops)
        return {
            name: 1e-9 * max(case.bytes / self.copy_terabytes, case.operations / teraflops)
            for name, teraflops in (("floor_ms", self.float32_teraflops), ("fastest_floor_ms", fastest))
        }


def plain_loss(batch: DriftingBatch) -> Tensor:
    """Algorithm 2 and the normalisations of A.6 as one writes them down, `[G]`."""
    x, positives, unconditional, _ = batch
    num_samples, dimension = x.shape[-2:]
    with torch.no_grad():
        negatives = x if unconditional is None else torch.cat([x, unconditional], -2)
        targets = torch.cat([negatives, positives], -2).float()  # [G, T, D]
        distance = torch.cdist(x.float(), targets)  # [G, N, T]
        scale = distance.mean()  # Eq. 21
        distance = distance / scale
        distance.diagonal(dim1=-2, dim2=-1).add_(100.0)  # a sample does not count itself
        targets = targets * (dimension**0.5 / scale)
        drift = torch.zeros_like(x, dtype=torch.float32)
        for temperature in TEMPERATURES:
            logits = -distance / temperature
            affinity = (logits.softmax(-1) * logits.softmax(-2)).clamp(min=1e-6).sqrt()
            negative, positive = affinity.split([negatives.shape[-2], positives.shape[-2]], -1)
            attract = positive * negative.sum(-1, keepdim=True)
            repel = negative * positive.sum(-1, keepdim=True)
            coefficient = torch.cat([-repel, attract], -1)
            force = coefficient @ targets - coefficient.sum(-1, keepdim=True) * targets[..., :num_samples, :]
            drift += force / force.square().mean().sqrt()  # Eq. 25-26
    normalised = x.float() * (dimension**0.5 / scale)
    return (normalised - (normalised.detach() + drift)).square().mean((-2, -1))  # Eq. 6


def loss_function(form: Form, case: Case, device: torch.device) -> LossFunction:
    """A form of the loss."""
    if form == "plain":
        return plain_loss
    memory_mib = max(STRIPS_MIB[device.type], STRIPS_COPIES * 4 * case.targets * case.dimension / 2**20)
    loss_fn = DriftingLoss(
        TEMPERATURES,
        backend="fused" if form == "fused" else "eager",
        memory_mib=memory_mib if form == "strips" else None,
    )
    called = torch.compile(loss_fn, dynamic=False) if form == "compiled" else loss_fn
    return lambda batch: called(*batch).loss


def with_gradient(function: LossFunction, batch: DriftingBatch) -> tuple[Tensor, Tensor]:
    """The loss of each group, and the gradient of their mean to x."""
    x = batch.x.detach().requires_grad_()
    loss = function(batch._replace(x=x))
    (gradient,) = torch.autograd.grad(loss.mean(), x)
    return loss.detach(), gradient


def errors(function: LossFunction, case: Case, device: torch.device) -> dict[str, float]:
    """Relative errors against float64 on a part of the data."""
    batch = case.checked().batch(device)
    exact = DriftingLoss(TEMPERATURES, backend="eager")
    wide = DriftingBatch(*(None if part is None else part.double() for part in batch))
    expected = with_gradient(lambda part: exact(*part).loss, wide)
    found = with_gradient(function, batch)
    names = ("loss_error", "gradient_error")
    return {name: float((a - b).norm() / b.norm()) for name, a, b in zip(names, found, expected, strict=True)}


def measure(form: Form, case: Case, config: BenchmarkConfig, device: torch.device) -> dict[str, Any]:
    """Figures of one form in one case; in the place of a figure that cannot be had, the reason."""
    row: dict[str, Any] = {"form": form, "case": str(case), **case._asdict()}
    function = loss_function(form, case, device)

    def attempt(names: Sequence[str], figures: Callable[[], dict[str, Any]]) -> None:
        try:
            row.update(figures())
        except Exception as error:  # whatever it is: the other cases are still to be measured
            row.update(dict.fromkeys(names, reason(error)))
        _forget()

    def forward() -> dict[str, Any]:
        batch = case.batch(device)
        with torch.no_grad():
            return {"forward_ms": milliseconds(lambda: function(batch), config, device)}

    def forward_and_backward() -> dict[str, Any]:
        batch = case.batch(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        both_ms = milliseconds(lambda: with_gradient(function, batch), config, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        return {"both_ms": both_ms, "peak_gib": peak}

    attempt(("loss_error", "gradient_error"), lambda: errors(function, case, device))
    attempt(("forward_ms",), forward)
    attempt(("both_ms", "peak_gib"), forward_and_backward)
    if form == "compiled":
        torch._dynamo.reset()  # the next case is compiled for itself
    return row


def reason(error: Exception) -> str:
    """Why something could not be measured, in a few words."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if len(text) <= SHORT else f"{text[: SHORT - 3]}..."


def milliseconds(work: Callable[[], object], config: BenchmarkConfig, device: torch.device) -> float:
    """Median time of a call, on a GPU between two of its own events."""
    work(), work()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < config.repeats and (not times or time.perf_counter() < start + config.seconds):
        times.append(_gpu_milliseconds(work) if device.type == "cuda" else _cpu_milliseconds(work))
    return median(times)


def rates(config: BenchmarkConfig, device: torch.device) -> Rates:
    """Copy and product of matrices, measured."""

    def copy() -> float:
        source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2e-9 * source.numel() / milliseconds(lambda: target.copy_(source), config, device)

    def product(dtype: torch.dtype) -> float:
        size = PRODUCT_SIZE[device.type]
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2e-9 * size**3 / milliseconds(lambda: a @ b, config, device)

    with tf32(True):
        found = Rates(copy(), product(torch.float32), product(torch.bfloat16))
    _forget()
    return found


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products of float32 matrices in TF32 where the device can, or in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures as a Markdown table."""
    lines = [
        "| groups x samples x dimension | form | forward ms | and gradient ms | peak GiB | error of loss | of gradient "
        "| floor ms, with fastest products | forward / floor | and gradient / floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        values = [row[name] for name in ("forward_ms", "both_ms", "peak_gib", "loss_error", "gradient_error")]
        reasons = [value for value in values if isinstance(value, str)]
        for value in set(reasons):  # each is given once
            first = values.index(value)
            values[first + 1 :] = ["-" if other == value else other for other in values[first + 1 :]]
        floor = row["floor_ms" if row["dtype"] == "float32" else "fastest_floor_ms"]
        ratios = [time / floor if isinstance(time, float) else "-" for time in values[:2]]
        floors = f"{row['floor_ms']:.3g}, {row['fastest_floor_ms']:.3g}"
        cells = [row["case"], row["form"], *map(_cell, values), floors, *map(_cell, ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: BenchmarkConfig) -> int:
    """Measure, print two tables, write JSON."""
    device = choose_device(config.device)
    many = [Case.of_many(text) for text in (MANY[device.type] if config.many is None else config.many)]
    few = [Case.of_few(text) for text in (FEW[device.type] if config.few is None else config.few)]
    reached = rates(config, device)
    tables: dict[str, list[dict[str, Any]]] = {"many small groups": [], "few large groups": []}
    with tf32(config.tf32):
        for rows, cases in zip(tables.values(), (many, few), strict=True):
            for case in cases:
                for form in config.forms:
                    rows.append(measure(form, case, config, device) | reached.floors(case))
                    print(table(rows[-1:]).rpartition("\n")[2], flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    config.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    write_json(config.out, {"machine": machine, **versions, "tf32": config.tf32, **reached._asdict(), "tables": tables})
    print(
        f"\n{machine}: copy {reached.copy_terabytes:.3g} TB/s, product of float32 {reached.float32_teraflops:.3g} and "
        f"of bfloat16 {reached.bfloat16_teraflops:.3g} TFLOP/s"
    )
    for name, rows in tables.items():
        print(f"\n{name}\n{table(rows)}")
    print(f"\nwritten: {config.out}")
    return 0


def _parse(key: str, text: str) -> tuple[int, int, str]:
    number, dimension, dtype = (text.split("x") + ["", ""])[:3]
    if not (number.isdecimal() and dimension.isdecimal() and dtype in DTYPES and text.count("x") == 2):
        raise UserError(f"{key}: expected sizes as 4096x256xfloat32 or 4096x256xbfloat16, found {text!r}")
    return int(number), int(dimension), dtype


def _cell(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _gpu_milliseconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _cpu_milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def _forget() -> None:
    """Let the next call find the memory of the device as this one did."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, BenchmarkConfig, config_dir=CONFIG_DIR, config_name="field", description=__doc__ or "")
    )
