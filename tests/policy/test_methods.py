"""The policies by name."""

from typing import get_args

from policy.config import Method
from policy.methods import METHODS
from policy.policy import Policy


def test_every_method_that_can_be_configured_has_a_policy_of_its_own() -> None:
    assert set(METHODS) == set(get_args(Method))
    assert len(set(METHODS.values())) == len(METHODS) and all(issubclass(kind, Policy) for kind in METHODS.values())
    assert all(name in kind.__name__.lower() for name, kind in METHODS.items())
