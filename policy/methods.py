"""The policies by name."""

import os
from pathlib import Path
from typing import Final

from driftfield.training.pretrained import read_model_name
from policy.diffusion_policy import DiffusionPolicy
from policy.drifting_policy import DriftingPolicy
from policy.policy import Policy
from policy.regression_policy import RegressionPolicy

METHODS: Final[dict[str, type[Policy]]] = {
    "drifting": DriftingPolicy,
    "diffusion": DiffusionPolicy,
    "regression": RegressionPolicy,
}


def load_policy(folder: str | os.PathLike[str]) -> Policy:
    """The policy of a folder, whichever kind it is, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: it is no policy, or the weights do not fit.
    """
    kinds = {kind.__name__: kind for kind in METHODS.values()}
    name = read_model_name(Path(folder))
    if name not in kinds:
        raise ValueError(f"{folder}: expected the config of one of {', '.join(kinds)}, found that of {name}")
    return kinds[name].from_pretrained(folder)
