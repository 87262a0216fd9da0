"""The device that a program computes on."""

import os
from typing import Literal

import torch

from driftfield.training.errors import UserError

Device = Literal["auto", "cpu", "cuda"]


def choose_device(name: Device) -> torch.device:
    """`auto` is the GPU where there is one, under torchrun each process's own.

    On a GPU, algorithms whose result is the same every time are asked for.

    Raises:
        UserError: a GPU is asked for and PyTorch finds none.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a CUDA GPU, found none that PyTorch can use; device=cpu computes without")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun numbers a machine's processes
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass
        torch.backends.cudnn.allow_tf32 = False  # distances lose all digits in TF32; bfloat16=true is the fast way
    return device
