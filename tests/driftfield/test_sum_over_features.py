"""The sum over features (Eq. 13-14, A.5): locations as groups, scalars per feature, one error per feature."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from driftfield import DriftingLoss, FeatureBatch, feature_statistics, sum_over_features

SHAPES = {"global": (), "map": (5,), "grid": (2, 3)}


def features(num: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(3, *locations, num, 4 + len(locations)) for name, locations in SHAPES.items()}


def test_sum_is_each_feature_alone_with_locations_averaged() -> None:
    loss_fn, x, positives, unconditional = DriftingLoss(), features(6), features(7), features(2)
    weight = torch.rand(3, 2)
    total = sum_over_features(loss_fn, x, positives, unconditional, weight)
    expected = torch.zeros(3)
    for i, (name, locations) in enumerate(SHAPES.items()):
        weights = weight.reshape(3, *[1] * len(locations), 2).expand(3, *locations, 2)
        alone = loss_fn(x[name], positives[name], unconditional[name], weights)
        expected += alone.loss.reshape(3, -1).mean(1)
        assert torch.equal(total.drift_norm[i], alone.drift_norm)
        assert torch.equal(total.feature_scale[i], alone.feature_scale)
    torch.testing.assert_close(total.loss, expected)
    assert total.degenerate.tolist() == [False] * 3


def test_gradients_reach_every_feature() -> None:
    x, positives = features(6), features(7)
    for feature in x.values():
        feature.requires_grad_()
    sum_over_features(DriftingLoss(), x, positives).loss.mean().backward()
    assert all(feature.grad is not None and feature.grad.abs().max() > 0 for feature in x.values())


class Halves:
    """A batch in two pieces, made anew at every iteration."""

    def __init__(self, x: dict[str, torch.Tensor], positives: dict[str, torch.Tensor]) -> None:
        self.x, self.positives = x, positives

    def __iter__(self) -> Iterator[FeatureBatch]:
        for part in (slice(0, 1), slice(1, 3)):
            yield FeatureBatch(*({name: sample[name][part] for name in sample} for sample in (self.x, self.positives)))


def test_exact_accumulation_with_features() -> None:
    loss_fn, x, positives = DriftingLoss(), features(6), features(7)
    whole = sum_over_features(loss_fn, x, positives)
    statistics = feature_statistics(loss_fn, Halves(x, positives))
    parts = [sum_over_features(loss_fn, *part, statistics=statistics).loss for part in Halves(x, positives)]
    torch.testing.assert_close(torch.cat(parts), whole.loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(torch.stack([each.drift_norm for each in statistics.values()]), whole.drift_norm)


def test_statistics_need_pieces_that_can_be_gone_through_twice() -> None:
    with pytest.raises(ValueError, match="to be gone through twice"):
        feature_statistics(DriftingLoss(), iter(Halves(features(6), features(7))))


def bad_calls() -> list[tuple[Any, Any, Any, Any, str]]:
    x, others = features(6), features(7)
    flat = {"global": torch.randn(6, 4)}
    ids = {**others, "map": torch.zeros(3, 5, 7, 5, dtype=torch.int64)}
    return [
        ({}, {}, None, None, "x has no features"),
        (x, {"map": x["map"]}, None, None, r"positives has features \['map'\], expected those of x: \['global', 'grid"),
        (x, others, {}, None, r"unconditional has features \[\]"),
        (x, {**others, "grid": others["map"]}, None, None, r"feature 'grid': positives \[3, 5, 7, 5\] does not fit x"),
        (x, ids, None, None, "feature 'map': positives must be floating point, got torch.int64"),
        (flat, flat, None, None, r"feature 'global': x must be \[B, ..., N, D\], got \[6, 4\]"),
        (x, others, others, torch.rand(3), r"feature 'global': unconditional_weight must have one entry per sample"),
        (x, others, others, torch.rand(2, 7), r"feature 'global': unconditional_weight must have one entry per sample"),
        (
            x,
            others,
            others,
            [[1.0]],
            "feature 'global': unconditional_weight must be a floating-point tensor, got list",
        ),
    ]


@pytest.mark.parametrize("call", bad_calls(), ids=range(9))
def test_errors_name_the_feature(call: tuple[Any, Any, Any, Any, str]) -> None:
    *arguments, message = call
    with pytest.raises((TypeError, ValueError), match=message):
        sum_over_features(DriftingLoss(), *arguments)
