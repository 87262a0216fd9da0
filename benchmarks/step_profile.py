"""Where the time of a step goes: its kernels, by family and one by one, and its trace."""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN: Final = 40  # kernels
NAME_LENGTH: Final = 100
# The first that matches; names of kernels on a GPU, of PyTorch's operations on a CPU.
FAMILIES: Final = {
    "memory layout": r"nchwToNhwc|nhwcToNchw|transpose|contiguous",
    "attention": r"fmha|flash|attention",
    "convolution": r"conv|dgrad|wgrad|fprop|implicit",
    "product": r"gemm|cutlass|cublas|nvjet|xmma|(^|::|_)(add|b|badd)?mm\b",
    "compiled": r"^triton_",
    "normalization": r"norm|var_mean|welford",
    "optimizer and averages": r"adam|multi_tensor|foreach|lerp",
    "copy and cast": r"copy|memcpy|memset|::cat\b|catarray",
    "moments of maps": r"^_moments|^_gradient|pool|upsample",
    "loss": r"softmax|cdist|exp|^_",
}


class Kernel(NamedTuple):
    """What one kernel did in a step."""

    name: str
    calls: int
    milliseconds: float


class StepProfile(NamedTuple):
    """What a step did."""

    kernels: list[Kernel]  # the longest first
    step_s: float


def profile_step(step: Callable[[], object], device: torch.device, trace: Path) -> StepProfile:
    """Run a step under PyTorch's profiler and write its trace, for chrome://tracing or Perfetto."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    start = time.perf_counter()
    with profile(activities=activities, acc_events=True) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
        step_s = time.perf_counter() - start
    recorded.export_chrome_trace(str(trace))
    kernels = [
        Kernel(row.key, row.count, (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1000)
        for row in recorded.key_averages()
        if row.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
    ]
    return StepProfile(sorted(kernels, key=lambda kernel: -kernel.milliseconds), step_s)


def family_of_kernel(name: str) -> str:
    """The first family whose pattern is in a kernel's name.

    >>> family_of_kernel("sm90_xmma_fprop_implicit_gemm_bf16bf16"), family_of_kernel("aten::addmm")
    ('convolution', 'product')
    """
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def by_family(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds of each family, the longest first."""
    times: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        times[family_of_kernel(kernel.name)] += kernel.milliseconds
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def report(found: StepProfile) -> str:
    """Families and the longest kernels as Markdown tables."""
    total = sum(kernel.milliseconds for kernel in found.kernels)
    busy = total / (1000 * found.step_s)
    lines = [f"step of {found.step_s:.3g} s under the profiler, kernels {total:.4g} ms, busy {busy:.0%}", ""]
    lines += ["| family | ms | of all |", "|---|---|---|"]
    lines += [f"| {name} | {ms:.4g} | {ms / total:.1%} |" for name, ms in by_family(found.kernels).items()]
    lines += ["", "| kernel | family | calls | ms | of all |", "|---|---|---|---|---|"]
    for name, calls, ms in found.kernels[:SHOWN]:
        short = name[:NAME_LENGTH].replace("|", "/")
        lines.append(f"| `{short}` | {family_of_kernel(name)} | {calls} | {ms:.4g} | {ms / total:.1%} |")
    return "\n".join(lines)
