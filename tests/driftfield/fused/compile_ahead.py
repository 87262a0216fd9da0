"""Compiles Triton kernels for a GPU that need not be there, and says what each one needs of it.

Usage: python compile_ahead.py < KERNELS, a JSON list; see `assert_compiles` in conftest.py. Needs TRITON_INTERPRET
unset: a kernel decorated while it is set cannot be compiled.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_ahead(kernel: dict[str, Any]) -> dict[str, Any]:
    """Capability, shared memory, registers and spilled bytes of a kernel."""
    function = getattr(importlib.import_module(kernel["module"]), kernel["kernel"])
    constants = {name: tuple(v) if isinstance(v, list) else v for name, v in kernel["constants"].items()}
    names = function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kernel["signature"][name][0] in "*i"}
    # Triton takes an integer argument that is 1 for a constant
    ones = {name: 1 for name, kind in kernel["signature"].items() if kind == "1"}
    signature = {name: "constexpr" if name in ones else kind for name, kind in kernel["signature"].items()}
    source = ASTSource(function, signature, {**constants, **ones}, aligned)
    options = {name: kernel[name] for name in ("num_warps", "num_stages") if name in kernel}
    compiled = triton.compile(source, target=GPUTarget("cuda", kernel["capability"], 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, encoding="utf-8", check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return {
        "kernel": kernel["kernel"],
        "capability": kernel["capability"],
        "shared": compiled.metadata.shared,
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
    }


if __name__ == "__main__":
    print(json.dumps([compile_ahead(kernel) for kernel in json.load(sys.stdin)]))
