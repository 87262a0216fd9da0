"""The device of a program, with and without a GPU, by a stand-in for PyTorch's."""

import pytest
import torch

from driftfield.training import UserError
from driftfield.training.device import choose_device


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """PyTorch says that there are GPUs; what is chosen of them. Its settings come back afterwards."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, *, warn_only: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return chosen


def test_without_a_gpu_the_cpu_is_chosen_and_a_gpu_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="^device: expected a CUDA GPU, found none .*; device=cpu computes without$"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(
    name: str, chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_device(name) == torch.device("cuda", 0)  # type: ignore[arg-type]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(name) == torch.device("cuda", 3)  # type: ignore[arg-type]
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 3)]
    assert not torch.backends.cudnn.allow_tf32


def test_cpu_is_the_cpu_where_there_is_a_gpu(chosen: list[torch.device]) -> None:
    assert choose_device("cpu") == torch.device("cpu") and chosen == []
