"""ArmReach: its geometry by trigonometry, its rules, and its expert."""

import math
import re
from collections.abc import Callable

import mujoco
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

import envs
from envs.arm_reach import BASE, JOINT_SPEED, LINKS, OBSTACLE_RADIUS, PIN_RADIUS, REACHED_WITHIN, ArmReach, joint_angles
from envs.experts import make_expert
from envs.experts.arm_reach import ArmReachExpert, way_round
from envs.task import PhysicsError

TOUCHING = OBSTACLE_RADIUS + PIN_RADIUS  # m, from centre to centre


@pytest.fixture(scope="module")
def task() -> ArmReach:
    task = envs.make("arm_reach").unwrapped
    assert isinstance(task, ArmReach)
    return task


def tip_of(angles: np.ndarray) -> np.ndarray:
    """Forward kinematics: each link leaves the sum of the angles so far, counted to the left from +y."""
    directions = np.cumsum(angles)
    return BASE + np.array(LINKS) @ np.stack([-np.sin(directions), np.cos(directions)], axis=-1)


def place_tip(task: ArmReach, tip: np.ndarray) -> None:
    task.data.qpos[:] = task.data.ctrl[:] = joint_angles(tip)
    task.data.qvel[:] = 0
    mujoco.mj_forward(task.model, task.data)


def episode(task: ArmReach, action: Callable[[], np.ndarray]) -> dict[str, object]:
    for _ in range(task.MAX_STEPS):
        *_, terminated, _, info = task.step(action())
        if terminated:
            break
    return info


@given(x=st.floats(-0.3, 0.3), y=st.floats(0.0, 0.5))
def test_inverse_kinematics_undoes_forward_kinematics_in_the_whole_range_of_actions(x: float, y: float) -> None:
    angles = joint_angles(np.array([x, y]))
    np.testing.assert_allclose(tip_of(angles), [x, y], atol=1e-9)
    assert angles[1] > 0  # the forearm bends to the left, so the elbow is to the right
    # The hand points away from the shoulder.
    np.testing.assert_allclose(math.remainder(angles.sum() - math.atan2(-x, y + 0.25), 2 * math.pi), 0, atol=1e-9)


@pytest.mark.parametrize("tip", [(-0.3, 0.5), (0.3, 0.5), (0.0, 0.0), (0.1, 0.2)])
def test_the_model_has_the_geometry_of_the_equations(task: ArmReach, tip: tuple[float, float]) -> None:
    task.reset(seed=0)
    place_tip(task, np.array(tip))
    np.testing.assert_allclose(task.tip, tip, atol=1e-9)
    np.testing.assert_allclose(task.tip, tip_of(task.data.qpos), atol=1e-9)
    limits = task.model.jnt_range
    assert ((task.data.qpos > limits[:, 0]) & (task.data.qpos < limits[:, 1])).all()


def test_the_observation_is_angles_tip_target_and_obstacle_in_float32(task: ArmReach) -> None:
    observation, _ = task.reset(seed=4)
    expected = np.concatenate([task.data.qpos, tip_of(task.data.qpos), task.target, task.obstacle])
    np.testing.assert_array_equal(observation["state"], expected.astype(np.float32))
    mujoco_target = task.data.body("target").xpos[:2]
    np.testing.assert_array_equal(mujoco_target, task.target)
    np.testing.assert_array_equal(task.data.body("obstacle").xpos[:2], task.obstacle)


def test_the_datasheet_says_the_bounds_of_the_spaces(task: ArmReach) -> None:
    rows = re.findall(
        r"^ *\| (\d) \|.*\| (-?[\d.]+) \| (-?[\d.]+) \| (?:m|rad) \|", ArmReach.__doc__ or "", re.MULTILINE
    )
    low, high = np.array([[float(low), float(high)] for _, low, high in rows], np.float32).T
    assert [int(row[0]) for row in rows] == [0, 1, *range(9)]
    state = task.observation_space["state"]
    assert isinstance(state, spaces.Box)
    np.testing.assert_array_equal(low, np.concatenate([task.action_space.low, state.low]))
    np.testing.assert_array_equal(high, np.concatenate([task.action_space.high, state.high]))


def test_initial_states_fill_the_ranges_of_the_datasheet(task: ArmReach) -> None:
    tips, targets, along, sideways = [], [], [], []
    for seed in range(300):
        task.reset(seed=seed)
        way = task.target - task.tip
        length = np.linalg.norm(way)
        to_obstacle = task.obstacle - task.tip
        tips.append(task.tip)
        targets.append(task.target)
        along.append(to_obstacle @ way / length**2)
        sideways.append((way[0] * to_obstacle[1] - way[1] * to_obstacle[0]) / length)
        assert task.data.ncon == 0 and not task.data.qvel.any()
    for values, low, high in [
        (np.array(tips)[:, 0], -0.1, 0.1),
        (np.array(tips)[:, 1], 0.02, 0.08),
        (np.array(targets)[:, 0], -0.12, 0.12),
        (np.array(targets)[:, 1], 0.40, 0.48),
        (np.array(along), 0.45, 0.6),
        (np.array(sideways), -0.02, 0.02),
    ]:
        assert low - 1e-9 <= values.min() and values.max() <= high + 1e-9
        # 300 uniform draws: the mean within four standard errors, the range nearly filled.
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 300)
        assert np.ptp(values) > 0.95 * (high - low)


@pytest.mark.parametrize("tip", [(0.2, 0.1), (-0.25, 0.45), (0.0, 0.3)])
def test_the_servos_bring_the_tip_where_the_action_says_and_it_stays(task: ArmReach, tip: tuple[float, float]) -> None:
    task.reset(seed=0)
    task._obstacle[:] = task._target[:] = 0.9  # out of the way
    for _ in range(15):
        *_, info = task.step(np.array(tip))
    np.testing.assert_allclose(task.tip, tip, atol=1e-4)
    assert not info["touched"]


def test_joint_targets_move_no_faster_than_they_may(task: ArmReach) -> None:
    task.reset(seed=0)
    for action in task.action_space.low, task.action_space.high:
        before = task.data.ctrl.copy()
        task.step(action)
        assert np.abs(task.data.ctrl - before).max() == pytest.approx(JOINT_SPEED / task.CONTROL_HZ)


@pytest.mark.parametrize("angle", np.linspace(0, 2 * math.pi, 7)[:-1])
def test_pin_and_obstacle_touch_exactly_where_the_circles_do(task: ArmReach, angle: float) -> None:
    task.reset(seed=0)
    away = np.array([math.cos(angle), math.sin(angle)])
    place_tip(task, task.obstacle + (TOUCHING + 1e-4) * away)
    assert task.data.ncon == 0
    place_tip(task, task.obstacle + (TOUCHING - 1e-4) * away)
    assert task.data.ncon > 0


def test_a_touch_between_two_observations_ends_the_episode_as_a_failure(task: ArmReach) -> None:
    task.reset(seed=0)
    place_tip(task, task.obstacle - [TOUCHING + 0.005, 0])
    task._target[:] = task.obstacle - [TOUCHING, 0.0]  # within reach of success as well
    _, reward, terminated, _, info = task.step(task.obstacle)
    assert (reward, terminated, info["touched"], info["success"], info["score"]) == (0.0, True, True, False, 0.0)
    task.reset(seed=0)
    assert not task.step(task.tip)[4]["touched"]


def test_the_target_is_reached_within_two_centimetres(task: ArmReach) -> None:
    for distance, expected in [(REACHED_WITHIN + 2e-3, False), (REACHED_WITHIN - 2e-3, True)]:
        task.reset(seed=0)
        tip = task.target + [0.0, distance]
        place_tip(task, tip)
        _, reward, terminated, _, info = task.step(tip)
        assert (reward == 1, terminated, info["success"], info["score"] == 1) == (expected,) * 4


def test_the_mean_of_the_two_ways_fails(task: ArmReach) -> None:
    """What regression to the mean learns from demonstrations of both sides succeeds almost never."""
    outcomes = []
    for seed in range(40):
        task.reset(seed=seed)
        keep = 0.5 * (0.02 + 0.045) + TOUCHING
        left, right = (way_round(task.tip, task.target, task.obstacle, side, keep) for side in (1, -1))
        mean = iter((left + right)[::8] / 2)
        info = episode(task, lambda mean=mean, end=task.target: next(mean, end))
        outcomes.append((info["success"], info["touched"]))
    assert np.mean(outcomes, axis=0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("offset", [-0.05, 0.0, 0.02])
def test_a_way_passes_on_its_side_and_just_keeps_its_distance(side: int, offset: float) -> None:
    start, end = np.array([0.0, 0.0]), np.array([0.0, 0.4])
    centre = np.array([offset, 0.22])  # left is -x
    way = way_round(start, end, centre, side, 0.1)
    np.testing.assert_allclose(way[[0, -1]], [start, end], atol=1e-12)
    nearest = way[np.argmin(np.linalg.norm(way - centre, axis=1))]
    assert 0.1 <= np.linalg.norm(nearest - centre) < 0.102
    assert np.sign(centre[0] - nearest[0]) == side


def test_a_way_that_would_leave_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps 0\.4 m"):
        way_round(np.array([0.0, 0.0]), np.array([0.0, 0.4]), np.array([0.0, 0.2]), 1, 0.4)


def test_the_expert_succeeds_on_both_sides(task: ArmReach) -> None:
    """At least 0.99 of 200 seeds, with as many ways left as right as fair coins give."""
    succeeded, sides, lengths = [], [], []
    for seed in range(200):
        task.reset(seed=seed)
        expert = make_expert("arm_reach", task, np.random.default_rng(seed))
        assert isinstance(expert, ArmReachExpert)
        passed = 0.0
        way = task.target - task.tip
        for step in range(1, task.MAX_STEPS + 1):  # noqa: B007 - read after the loop
            *_, terminated, _, info = task.step(expert.action())
            from_obstacle = task.tip - task.obstacle
            sideways = (way[0] * from_obstacle[1] - way[1] * from_obstacle[0]) / np.linalg.norm(way)
            passed = max(passed, sideways, key=abs) if abs(from_obstacle @ way) < 0.02 * np.linalg.norm(way) else passed
            if terminated:
                break
        succeeded.append(info["success"])
        if info["success"]:
            assert np.sign(passed) == expert.side
        sides.append(expert.side == 1)
        lengths.append(step)
    assert np.mean(succeeded) >= 0.99
    assert abs(np.sum(sides) - 100) < 4 * math.sqrt(200 / 4)
    assert max(lengths) < 0.6 * task.MAX_STEPS and np.ptp(lengths) > 8  # room for slips; speeds vary


def test_the_expert_plans_once_and_acts_by_the_state_alone(task: ArmReach) -> None:
    task.reset(seed=5)
    expert = ArmReachExpert(task, np.random.default_rng(1))
    first = expert.action()
    np.testing.assert_array_equal(expert.action(), first)
    state = task.get_state()
    task.step(first)
    assert not np.array_equal(expert.action(), first)
    task.set_state(state)
    np.testing.assert_array_equal(expert.action(), first)
    assert first.dtype == np.float32 and task.action_space.contains(first)


def test_the_expert_refuses_another_task() -> None:
    with pytest.raises(TypeError, match="needs an ArmReach"):
        ArmReachExpert(None, np.random.default_rng(0))  # type: ignore[arg-type]


def test_images_show_target_and_obstacle_where_they_are() -> None:
    try:
        task = envs.make("arm_reach", observation="image").unwrapped
        observation, _ = task.reset(seed=1)
    except ImportError as error:
        pytest.skip(str(error))
    assert isinstance(task, ArmReach)
    image = observation["overhead"].astype(float)  # [84, 84, 3]
    np.testing.assert_array_equal(observation["state"], np.concatenate([task.data.qpos, task.tip]).astype(np.float32))
    red = (image[..., 0] > 150) & (image[..., 1] < 120)
    green = (image[..., 1] > 1.3 * image[..., 0]) & (image[..., 1] > 1.3 * image[..., 2])
    # The camera looks straight down on (0, 0.12) from 4 m; 13 degrees fill the picture's height.
    metre = 84 / (2 * 4 * math.tan(math.radians(13 / 2)))  # px
    for mask, centre, height in [(green, task.target, 0.0), (red, task.obstacle, 0.06)]:
        rows, columns = np.nonzero(mask)
        x, y = (centre - [0, 0.12]) * metre * 4 / (4 - height)
        # Part of the obstacle may lie under the arm.
        assert abs(columns.mean() - (42 + x)) < 1.5 and abs(rows.mean() - (42 - y)) < 1.5
    task.draws_images = False
    assert not task.step(task.tip)[0]["overhead"].any()
    task.close()


def test_what_the_simulator_warns_of_ends_a_step(task: ArmReach) -> None:
    task.reset(seed=0)
    task.on_divergence = "raise"
    task.data.qvel[1] = 1e9
    with pytest.raises(PhysicsError, match="mjWARN_BADQ"):
        task.step(task.tip)
    task.on_divergence = "terminate"
