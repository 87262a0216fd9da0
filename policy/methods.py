"""The policies by name."""

from typing import Final

from policy.diffusion_policy import DiffusionPolicy
from policy.drifting_policy import DriftingPolicy
from policy.policy import Policy
from policy.regression_policy import RegressionPolicy

METHODS: Final[dict[str, type[Policy]]] = {
    "drifting": DriftingPolicy,
    "diffusion": DiffusionPolicy,
    "regression": RegressionPolicy,
}
