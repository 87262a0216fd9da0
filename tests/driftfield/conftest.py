"""Tensors are tiny here: a second thread costs more than it brings, above all where test runs share a machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(fixed_seeds_and_torch_defaults: None) -> None:
    torch.set_num_threads(1)
