"""The hook by which other tests make the program fail."""

import errno

import pytest

from driftfield.training import fault_point
from driftfield.training.faults import VARIABLE


def test_only_the_named_point_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fault_point("step.3")
    monkeypatch.setenv(VARIABLE, "step.3:raise")
    fault_point("step.30")
    with pytest.raises(RuntimeError, match="step.3"):
        fault_point("step.3")


def test_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "a.b:enospc")
    with pytest.raises(OSError, match="No space left") as error:
        fault_point("a.b")
    assert error.value.errno == errno.ENOSPC


def test_an_unknown_action_does_not_pass_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "a.b:explode")
    with pytest.raises(ValueError, match="found 'explode'"):
        fault_point("a.b")
