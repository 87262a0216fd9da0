"""How long a chunk of actions takes: `python -m benchmarks.policy_latency`.

From the features of one observation to one chunk, batch 1, weights random: drifting in one evaluation of the network,
Diffusion Policy in 100 (DDPM) and 16 (DDIM) of the same network. Rounds alternate between the three and between the
forms of the network, each given about as many evaluations as the others, so that whatever else the machine does slows
all of them down. A form that cannot run says why.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import torch
from torch import Tensor

from driftfield.training import generator, option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device
from policy.diffusion import ActionDenoiser, DiffusionProcess, row_noise
from policy.unet1d import ConditionalUnet1D

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "benchmarks"
SIZES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {"channels": (8, 16), "step_dim": 8},
    "small": {"channels": (64, 128, 256), "step_dim": 64},  # trains on a CPU
    "66M": {"channels": (256, 512, 1024), "step_dim": 256},
}
ACTION_DIM, STATE_DIM, OBS_STEPS, HORIZON = 2, 20, 2, 16  # PushT
EVALUATIONS: Final = {"drifting": 1, "ddpm": 100, "ddim": 16}

Form = Literal["eager", "compile", "export"]
Inputs = tuple[Tensor, Tensor, Tensor]  # x [1, T, A], step [1], cond [1, To, C]


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Keys of `python -m benchmarks.policy_latency`."""

    networks: tuple[Literal["tiny", "small", "66M"], ...] = option("U-Nets; 66M is Diffusion Policy's for states")
    forms: tuple[Form, ...] = option("how they run: eager, torch.compile, or torch.export compiled ahead of time")
    rounds: int = option("chunks of the slowest method; the others make more in the same time", min=2)
    threads: int | None = option("threads on the CPU; null: as many as PyTorch takes", min=1)
    device: Device = option("where to compute")
    out: Path = option("JSON file of the figures")


def build(name: str, device: torch.device) -> ConditionalUnet1D:
    """The network of a name, with random weights."""
    torch.manual_seed(0)
    return ConditionalUnet1D(ACTION_DIM, STATE_DIM, OBS_STEPS, **SIZES[name]).to(device).eval()


def inputs(device: torch.device) -> Inputs:
    """Noise, step 0 and features for one chunk."""
    x = torch.randn(1, HORIZON, ACTION_DIM, generator=generator(0, "x"))
    cond = torch.randn(1, OBS_STEPS, STATE_DIM, generator=generator(0, "cond"))
    return x.to(device), torch.zeros(1, dtype=torch.int64, device=device), cond.to(device)


def prepare(network: ConditionalUnet1D, form: Form, folder: Path, given: Inputs) -> ActionDenoiser:
    """The network as it is, compiled at its first call, or exported and compiled into a file."""
    if form == "eager":
        return network
    if form == "compile":
        # CUDA graphs ("reduce-overhead") spare a GPU the launch of some hundred small kernels.
        return torch.compile(network, fullgraph=True, mode="reduce-overhead" if given[0].is_cuda else None)
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    package = aoti_compile_and_package(torch.export.export(network, given), package_path=str(folder / "network.pt2"))
    return aoti_load_package(package)


def methods(network: ActionDenoiser, given: Inputs) -> dict[str, Callable[[], Tensor]]:
    """What makes one chunk, by method."""
    noise = generator(0, "noise")
    x, step, cond = given

    def drift() -> Tensor:
        return network(row_noise(x.shape, [noise]).to(cond), step, cond)

    def denoise(process: DiffusionProcess) -> Callable[[], Tensor]:
        return lambda: process.sample(network, tuple(x.shape), cond, [noise])

    return {
        "drifting": drift,
        "ddpm": denoise(DiffusionProcess(sampler="ddpm", steps=EVALUATIONS["ddpm"])),
        "ddim": denoise(DiffusionProcess(sampler="ddim", steps=EVALUATIONS["ddim"])),
    }


def measure(name: str, forms: Sequence[Form], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Figures of one network in each form."""
    given, network = inputs(device), build(name, device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    rows: dict[Form, dict[str, Any]] = {
        form: {"network": name, "parameters": parameters, "form": form} for form in forms
    }
    makers: dict[Form, dict[str, Callable[[], Tensor]]] = {}
    with torch.no_grad(), TemporaryDirectory() as folder:
        for form in forms:
            start = time.perf_counter()
            try:
                ready = methods(prepare(network, form, Path(folder), given), given)
                for make in ready.values():
                    make()
            except Exception as error:  # whatever a compiler raises: the other forms are still to be measured
                rows[form]["failure"] = str(error).strip().partition("\n")[0] or type(error).__name__
            else:
                makers[form] = ready
                rows[form]["ready_s"] = time.perf_counter() - start
        times: dict[Form, dict[str, list[float]]] = {form: {method: [] for method in EVALUATIONS} for form in makers}
        for _ in range(rounds):
            for form, ready in makers.items():
                for method, make in ready.items():
                    times[form][method] += [
                        _seconds(make, device) for _ in range(max(EVALUATIONS.values()) // EVALUATIONS[method])
                    ]
    for form, of_methods in times.items():
        figures = {method: percentiles(values) for method, values in of_methods.items()}
        rows[form] |= figures | ratios(figures)
    return list(rows.values())


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds, and of how many."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {"p50_ms": 1000 * cuts[49], "p95_ms": 1000 * cuts[94], "chunks": len(seconds)}


def ratios(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times as long a chunk of the baselines takes as one of drifting, by medians."""
    drifting = figures["drifting"]["p50_ms"]
    return {f"{method}_over_drifting": figures[method]["p50_ms"] / drifting for method in ("ddpm", "ddim")}


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds per chunk as a Markdown table."""
    lines = [
        "| network | form | ready s | drifting p50 / p95 ms | DDPM 100 p50 / p95 ms | DDIM 16 p50 / p95 ms "
        "| DDPM / drifting | DDIM / drifting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failure" in row:
            cells = [row["failure"], *["-"] * 5]
        else:
            cells = [f"{row['ready_s']:.2g}"]
            cells += [f"{row[method]['p50_ms']:.3g} / {row[method]['p95_ms']:.3g}" for method in EVALUATIONS]
            cells += [f"{row[f'{method}_over_drifting']:.0f}" for method in ("ddpm", "ddim")]
        lines.append(f"| {row['network']} ({row['parameters'] / 1e6:.3g} M) | {row['form']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: BenchmarkConfig) -> int:
    """Measure, print a table, write JSON."""
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rows: list[dict[str, Any]] = []
    for name in config.networks:
        rows += measure(name, config.forms, config.rounds, device)
        print(table(rows[-len(config.forms) :]), flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, {"machine": machine, **versions, "rounds": config.rounds, "rows": rows})
    print(f"\n{machine}\n{table(rows)}\nwritten: {config.out}")
    return 0


def _seconds(make: Callable[[], Tensor], device: torch.device) -> float:
    """Time of one chunk, until it is in the memory of the CPU, where a robot needs it."""
    start = time.perf_counter()
    make().cpu()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(
        run_program(
            main, BenchmarkConfig, config_dir=CONFIG_DIR, config_name="policy_latency", description=__doc__ or ""
        )
    )
