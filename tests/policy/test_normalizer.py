"""Scale and offset: the published rules, their inverse, what is saved, and what is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from policy.normalizer import Normalizer, Part, task_parts

ACTIONS = np.array([[0, -4, 9, 1], [10, 4, 9, -1], [5, 2, 9, 0.5]], np.float32)


def fitted(parts: list[Any], values: np.ndarray = ACTIONS) -> Normalizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Normalizer({"action": parts}).fit({"action": values})


def normalized(normalizer: Normalizer, values: np.ndarray = ACTIONS) -> np.ndarray:
    return normalizer.normalize("action", torch.from_numpy(values)).numpy()


def test_limits_go_to_minus_one_and_one_and_a_constant_to_zero() -> None:
    result = normalized(fitted([Part(4)]))
    np.testing.assert_allclose(result[:, [0, 1, 3]], [[-1, -1, 1], [1, 1, -1], [0, 0.5, 0.5]], atol=1e-6)
    np.testing.assert_array_equal(result[:, 2], 0)


def test_a_range_below_eps_keeps_scale_one_and_its_minimum_goes_to_zero() -> None:
    values = np.array([[3.0, 0.0], [3.02, 1.0]], np.float32)
    result = normalized(fitted([Part(2, "limits", 5e-2)], values), values)
    np.testing.assert_allclose(result, [[0, -1], [0.02, 1]], atol=1e-6)
    wide = normalized(fitted([Part(2, "limits", 1e-4)], values), values)
    np.testing.assert_allclose(wide, [[-1, -1], [1, 1]], atol=1e-4)


def test_max_abs_is_one_factor_without_offset() -> None:
    np.testing.assert_allclose(normalized(fitted([Part(4, "max_abs")])), ACTIONS / 10, rtol=1e-6)
    zeros = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(normalized(fitted([Part(3, "max_abs")], zeros), zeros), 0)


def test_identity_leaves_numbers_as_they_are() -> None:
    np.testing.assert_array_equal(normalized(fitted([Part(4, "identity")])), ACTIONS)


def test_each_part_of_a_key_has_its_own_mode() -> None:
    result = normalized(fitted([Part(1), Part(2, "max_abs"), Part(1, "identity")]))
    np.testing.assert_allclose(result[:, 0], [-1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(result[:, 1:3], ACTIONS[:, 1:3] / 9, rtol=1e-6)
    np.testing.assert_array_equal(result[:, 3], ACTIONS[:, 3])


@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 8), st.just(5)), elements=st.floats(-1e3, 1e3, width=32)),
    mode=st.sampled_from(["limits", "identity", "max_abs"]),
)
def test_unnormalize_is_the_inverse(values: np.ndarray, mode: str) -> None:
    normalizer = fitted([[2, mode], [3]], values)
    x = torch.from_numpy(values)
    back = normalizer.unnormalize("action", normalizer.normalize("action", x))
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-3)  # 1e3 times float32's 6e-8, over a range of 1e-4 or more
    spread = normalizer.normalize("action", x)[:, 2:]
    assert spread.abs().max() <= 1 + 1e-3


def test_leading_dimensions_and_other_precisions_come_out_as_float32() -> None:
    normalizer = fitted([Part(4)])
    x = torch.randn(2, 3, 5, 4)
    for dtype in (torch.float64, torch.bfloat16):
        result = normalizer.normalize("action", x.to(dtype))
        assert result.dtype == torch.float32 and result.shape == x.shape
        assert normalizer.unnormalize("action", result.to(dtype)).dtype == torch.float32
    torch.testing.assert_close(normalizer.normalize("action", x)[0, 1], normalizer.normalize("action", x[0, 1]))


def test_gradients_go_through() -> None:
    y = torch.zeros(1, 4, requires_grad=True)
    fitted([Part(4)]).unnormalize("action", y).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, torch.tensor([[5.0, 4.0, 1.0, 1.0]]))  # half of each range; 1 for a constant


def test_constant_dimensions_are_counted_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"^action: 1 of 4 dimensions hardly vary in the data, .* scale 1: 2$"):
        Normalizer({"action": [Part(4)]}).fit({"action": ACTIONS})
    Normalizer({"action": [Part(4, "identity")]}).fit({"action": ACTIONS})  # warnings are errors here


def test_it_is_built_from_json_and_loads_its_weights(tmp_path: Path) -> None:
    normalizer = fitted([Part(3, "limits", 1e-7), Part(1, "identity")])
    safetensors.torch.save_file(normalizer.state_dict(), tmp_path / "weights.safetensors")
    again = Normalizer(**json.loads(json.dumps(normalizer.config)))
    assert again.config == normalizer.config and again.parts == normalizer.parts
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"), strict=True)
    np.testing.assert_array_equal(normalized(again), normalized(normalizer))
    assert all(buffer.dtype == torch.float32 for buffer in again.buffers()) and not list(again.parameters())


def test_it_refuses_use_before_it_is_fitted() -> None:
    normalizer = Normalizer({"action": [Part(4)]})
    for method in (normalizer.normalize, normalizer.unnormalize, normalizer.clamp):
        with pytest.raises(RuntimeError, match="fit"):
            method("action", torch.zeros(1, 4))
    unfitted = Normalizer({"action": [Part(4)]})
    unfitted.load_state_dict(normalizer.state_dict())
    with pytest.raises(RuntimeError, match="fit"):
        unfitted.normalize("action", torch.zeros(1, 4))


def test_clamping_moves_numbers_into_the_range_of_the_data() -> None:
    x = torch.tensor([[-1.0, 5.0, 8.0, 0.25], [11.0, -5.0, 9.5, -3.0]])
    expected = torch.tensor([[0.0, 4.0, 9.0, 0.25], [10.0, -4.0, 9.0, -1.0]])
    for parts in ([Part(4)], [Part(4, "identity")], [Part(4, "max_abs")]):
        normalizer = fitted(parts)
        torch.testing.assert_close(normalizer.clamp("action", x), expected, rtol=0, atol=0)


def test_differences_are_parts_of_the_range_that_a_group_had_together() -> None:
    normalizer = fitted([Part(4)])  # dimensions 0 and 1 had 0 to 10 and -4 to 4 together -4 to 10, 3 had -1 to 1
    x = torch.tensor([[[1.0, 8.0, 100.0, 0.5], [3.0, -4.0, 0.0, 1.0]]])
    found = normalizer.differences("action", x, [[0, 1], [3, 1, 0]])
    expected = torch.tensor([[[-7.0, -7.5, -0.5, 7.0], [7.0, 5.0, -2.0, -7.0]]]) / 14
    torch.testing.assert_close(found, expected)
    moved = normalizer.differences("action", x + 5, [[0, 1], [3, 1, 0]])
    torch.testing.assert_close(moved, found)


def test_differences_stay_within_one_on_the_data_and_are_nothing_where_nothing_varies() -> None:
    normalizer = fitted([Part(4)])
    found = normalizer.differences("action", torch.from_numpy(ACTIONS), [[0, 1, 2, 3]])
    assert found.shape == (3, 6) and (found.abs() <= 1).all()
    zeros = np.zeros((2, 4), np.float32)
    found = fitted([Part(4)], zeros).differences("action", torch.zeros(2, 4), [[0, 1]])
    torch.testing.assert_close(found, torch.zeros(2, 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"state": ACTIONS}, "expected the key 'action', found state"),
        ({"action": ACTIONS[:, :3]}, r"action: expected floating-point \[N, 4\], found float32 \[3, 3\]"),
        ({"action": ACTIONS[:0]}, r"action: expected .* found float32 \[0, 4\]"),
        ({"action": ACTIONS.astype(int)}, "action: expected floating-point"),
        (
            {"action": np.where(ACTIONS == 2, np.nan, ACTIONS)},
            r"action: expected finite numbers, found nan at \[2, 1\]",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalizer({"action": [Part(4)]}).fit(arrays)


@pytest.mark.parametrize(
    "parts",
    [
        {"action": []},
        {"a.b": [Part(2)]},
        {"action": [Part(0)]},
        {"action": [[2, "gaussian"]]},
        {"action": [[2, "limits", 0.0]]},
        {"action": [{"width": 2}]},
        {"action": [2]},
    ],
)
def test_parts_that_are_none_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Normalizer(parts)


def test_arguments_that_do_not_fit_are_refused() -> None:
    normalizer = fitted([Part(4)])
    with pytest.raises(KeyError, match="state: expected one of action"):
        normalizer.normalize("state", torch.zeros(1, 4))
    with pytest.raises(TypeError, match="expected floating-point numbers, found torch.uint8"):
        normalizer.normalize("action", torch.zeros(1, 4, dtype=torch.uint8))
    for shape in ((4, 3), (1,), ()):
        with pytest.raises(ValueError, match=r"action: expected \[\.\.\., 4\], found"):
            normalizer.unnormalize("action", torch.zeros(shape))


def modes(parts: list[Part]) -> list[tuple[int, str, float]]:
    return [tuple(part) for part in parts]


def test_tasks_are_normalized_as_in_published_results() -> None:
    """ROBOTS: limits for PushT, BlockPush (1e-4) and the kitchen (5e-2); robosuite's own rules."""
    push_t = task_parts("push_t", {"state": 20, "action": 2}, observation="state", action="absolute")
    assert modes(push_t["state"]) == [(20, "limits", 1e-4)] and modes(push_t["action"]) == [(2, "limits", 1e-4)]
    kitchen = task_parts("kitchen", {"state": 60, "action": 9}, observation="state", action="absolute")
    assert modes(kitchen["state"]) == [(60, "limits", 5e-2)]
    lift = task_parts("lift", {"state": 19, "action": 10}, observation="state", action="absolute")
    assert modes(lift["state"]) == [(19, "max_abs", 1e-4)]
    assert modes(lift["action"]) == [(3, "limits", 1e-7), (7, "identity", 1e-4)]
    can = task_parts("can", {"state": 9, "action": 7}, observation="image", action="delta")
    assert modes(can["state"]) == [(3, "limits", 1e-4), (4, "identity", 1e-4), (2, "limits", 1e-4)]
    assert modes(can["action"]) == [(7, "identity", 1e-4)]
    with pytest.raises(ValueError, match="lift: action: expected 10 dimensions, found 7"):
        task_parts("lift", {"state": 19, "action": 7}, observation="state", action="absolute")
