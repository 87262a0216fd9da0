"""One-step generative models trained by drifting (Deng et al., arXiv 2602.04770): the field and the loss."""

from driftfield.drift import DriftingBatch
from driftfield.field import drifting_field
from driftfield.guidance import sample_guidance_scale, unconditional_weight
from driftfield.loss import (
    DriftingLoss,
    DriftingOutput,
    DriftStatistics,
    FeatureBatch,
    feature_statistics,
    sum_over_features,
)
from driftfield.sample_queue import SampleQueue

__all__ = [
    "DriftStatistics",
    "DriftingBatch",
    "DriftingLoss",
    "DriftingOutput",
    "FeatureBatch",
    "SampleQueue",
    "drifting_field",
    "feature_statistics",
    "sample_guidance_scale",
    "sum_over_features",
    "unconditional_weight",
]
__version__ = "0.1.0"
