"""`python -m benchmarks.train_step`: a real step of a published experiment, small, and its figures."""

import json
from pathlib import Path

from benchmarks import train_step as program
from benchmarks.step_profile import Kernel, StepProfile, by_family, family_of_kernel, report
from benchmarks.train_step import BenchmarkConfig
from driftfield.training import run_program

SMALL = (
    "generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2", "labels_per_step=2", "labels_at_once=1",
    "generated_per_label=4", "positives_per_label=4", "unconditional_per_label=2", "compile=false", "bfloat16=false",
)  # fmt: skip


def test_a_step_of_the_ablation_is_measured(tmp_path: Path) -> None:
    overrides = ",".join(f"'{word}'" for word in SMALL)
    words = ["experiments=[ablation]", f"overrides=[{overrides}]", "steps=1", "encoder=", "device=cpu", "profile=true"]
    ended = run_program(
        program.main,
        BenchmarkConfig,
        config_dir=program.CONFIG_DIR,
        config_name="train_step",
        description="",
        arguments=[*words, f"out={tmp_path / 'figures.json'}"],
    )
    assert ended == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    (row,) = figures["rows"]
    assert row["images_per_step"] == 8 and row["labels_at_once"] == 1 and row["statistics"] == "batch"
    assert abs(row["images_per_s"] * row["step_s"] - 8) < 1e-9
    assert 0 < row["teraflops"] < figures["product_teraflops"]
    assert abs(row["hours_of_the_run"] - 122_880_000 / 8 * row["step_s"] / 3600) < 1e-6 * row["hours_of_the_run"]
    trace = json.loads((tmp_path / "figures-ablation.trace.json").read_text(encoding="utf-8"))
    assert any("AdamW" in event.get("name", "") for event in trace["traceEvents"])
    kernels = (tmp_path / "figures-ablation.md").read_text(encoding="utf-8")
    assert "| product |" in kernels and "| `aten::addmm` | product |" in kernels


def test_kernels_are_summed_by_family() -> None:
    names = {
        "sm90_xmma_dgrad_implicit_gemm_indexed_bf16": "convolution",
        "nvjet_tst_192x192_64x4": "product",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>": "product",
        "void pytorch_flash::flash_fwd_kernel": "attention",
        "fmha_cutlassB_f32_aligned_64x64_k64_sm80": "attention",
        "triton_poi_fused_add_relu_3": "compiled",
        "void cudnn::engines_precompiled::nchwToNhwcKernel": "memory layout",
        "Memcpy DtoD (Device -> Device)": "copy and cast",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer and averages",
        "_moments": "moments of maps",
        "elementwise_kernel": "other",
    }
    assert {name: family_of_kernel(name) for name in names} == names
    found = StepProfile(
        [Kernel("aten::mm", 2, 30.0), Kernel("aten::bmm", 1, 20.0), Kernel("elementwise", 9, 50.0)], 0.2
    )
    assert by_family(found.kernels) == {"product": 50.0, "other": 50.0}
    assert "kernels 100 ms, busy 50%" in report(found) and "| `aten::mm` | product | 2 | 30 | 30.0% |" in report(found)
