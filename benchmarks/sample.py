"""How fast samples are made, part by part and end to end: `python -m benchmarks.sample`.

The weights are random: the time does not depend on them, but for the PNGs, which compress as their pixels allow. The
parts run on their own, one after another; end to end they overlap, as in `python -m vision.sample`. On a CPU they share
the cores, so that end to end takes the sum of their times.
"""

import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from driftfield.training import option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device
from vision.data import to_uint8
from vision.generator import PRESETS, ImageGenerator
from vision.sample import compile_networks, images_in_batches, inputs_in_batches, sample
from vision.sample_files import PngFolder
from vision.tiny_decoder import TinyDecoder
from vision.tokenizer import Tokenizer

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "benchmarks"
TINY: Final = {
    "image_size": 16, "channels": 4, "patch_size": 2, "hidden_size": 64, "depth": 2, "num_heads": 4, "cond_size": 64,
    "num_classes": 10,
}  # fmt: skip
SD_VAE_WIDTHS: Final = (128, 256, 512, 512)  # config.json of stabilityai/sd-vae-ft-mse
TINY_VAE_WIDTHS: Final = (8, 16)
SHORTEST_S: Final = 1.0  # a part is repeated for at least this long


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Keys of `python -m benchmarks.sample`."""

    size: Literal["tiny", "B/2", "L/2", "B/16", "L/16"] = option("the generator, of Table 8 but for tiny")
    decoder: Literal["vae", "tiny"] = option("what decodes latents: Stable Diffusion's VAE, or AutoencoderTiny")
    num: int = option("samples end to end", min=2)
    batch_size: int = option("samples computed at once", min=1)
    device: Device = option("where to compute")
    bfloat16: bool = option("activations in bfloat16")
    compile: bool = option("compile generator and decoder")
    out: Path = option("JSON file of the figures")


def build(config: BenchmarkConfig, device: torch.device) -> tuple[ImageGenerator, Tokenizer | TinyDecoder | None]:
    """Generator and decoder of the published shapes with random weights."""
    from diffusers import AutoencoderKL, AutoencoderTiny  # takes seconds

    arguments: dict[str, Any] = dict(TINY if config.size == "tiny" else PRESETS[config.size])
    model = ImageGenerator(**arguments, output_gain=1.0).to(device).eval()
    if model.channels == 3:
        return model, None
    if config.decoder == "tiny":
        return model, TinyDecoder(AutoencoderTiny(), bfloat16=config.bfloat16).to(device)
    widths = TINY_VAE_WIDTHS if config.size == "tiny" else SD_VAE_WIDTHS
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=model.channels,
        norm_num_groups=min(32, widths[0] // 2),
    )
    return model, Tokenizer(vae, bfloat16=config.bfloat16).to(device)


def measure(config: BenchmarkConfig) -> dict[str, float]:
    """Images per second of each part alone, and end to end."""
    device = choose_device(config.device)
    model, decoder = build(config, device)
    if config.compile:
        compile_networks(model, decoder)
    size = min(config.batch_size, config.num)
    labels = torch.arange(config.num) % model.num_classes
    [(noise, style)] = inputs_in_batches(model, 0, [range(size)])
    inputs = [part.to(device) for part in (noise, labels[:size], torch.ones(size), style)]

    def draw() -> None:
        for _ in inputs_in_batches(model, 0, [range(size)] * 4):
            pass

    def generate() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bfloat16):
            made: Tensor = model(*inputs)
        return made

    rates = {"noise": 4 * size * _per_second(draw, device), "generator": size * _per_second(generate, device)}
    if decoder is not None:
        latents, decode = generate().float(), torch.no_grad()(decoder.decode)
        rates["decoder"] = size * _per_second(lambda: decode(latents), device)
    pictures = to_uint8(sample(model, labels[:size], batch_size=size, tokenizer=decoder, bfloat16=config.bfloat16))

    def stream() -> Iterable[Tensor]:
        return images_in_batches(
            model, labels, batch_size=config.batch_size, tokenizer=decoder, bfloat16=config.bfloat16
        )

    rates["PNG files"] = _written_per_second([pictures] * max(1, config.num // size))
    return rates | {"end to end": _written_per_second(stream())}


def table(rates: dict[str, float]) -> str:
    """Images per second as a Markdown table, with end to end as a share of the slowest part."""
    lines = ["| part | images/s |", "|---|---|", *(f"| {name} | {rate:.4g} |" for name, rate in rates.items())]
    name, share = slowest(rates)
    return "\n".join([*lines, f"| end to end / {name} | {share:.2f} |"])


def slowest(rates: dict[str, float]) -> tuple[str, float]:
    """The slowest part, and the rate end to end as a share of its own."""
    name = min((name for name in rates if name != "end to end"), key=lambda name: rates[name])
    return name, rates["end to end"] / rates[name]


def main(config: BenchmarkConfig) -> int:
    """Measure, print and write the table."""
    rates = measure(config)
    device = choose_device(config.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        config.out,
        {
            "machine": machine,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: getattr(config, name) for name in ("size", "decoder", "num", "batch_size", "bfloat16", "compile")},
            "images_per_second": rates,
            "end_to_end_share_of_slowest": slowest(rates)[1],
        },
    )
    print(f"{config.size}, batches of {config.batch_size}, {machine}\n{table(rates)}\nwritten: {config.out}")
    return 0


def _per_second(work: Callable[[], object], device: torch.device) -> float:
    """Calls per second, after one that warms up."""
    work()
    calls, start = 0, _now(device)
    while (now := _now(device)) < start + SHORTEST_S or calls == 0:
        work()
        calls += 1
    return calls / (now - start)


def _written_per_second(batches: Iterable[Tensor]) -> float:
    """Images per second, taken from the iterator and written to a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder:
        start, written = time.perf_counter(), 0
        with PngFolder(Path(folder)) as files:
            for batch in batches:
                files.write(batch)
                written += len(batch)
        return written / (time.perf_counter() - start)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, BenchmarkConfig, config_dir=CONFIG_DIR, config_name="sample", description=__doc__ or "")
    )
