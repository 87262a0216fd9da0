"""Kitchen: the model is gymnasium-robotics' to the last bit, noise and elements by formula, the expert's orders."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="pip install -e '.[simulators]'")

from envs.experts.kitchen import PRIMITIVES, KitchenExpert, Waypoint, _Arm
from envs.kitchen import ELEMENTS, HIGH, LOW, NOISE_AMPLITUDES, START_QPOS, Kitchen, feasible_target, model_path

GOAL_QPOS = START_QPOS.copy()
for _element in ELEMENTS:
    GOAL_QPOS[_element.coordinates] = _element.goal


@pytest.fixture(scope="module")
def kitchen() -> Iterator[Kitchen]:
    task = Kitchen()
    yield task
    task.close()


@pytest.fixture(scope="module")
def reference() -> Any:
    """gymnasium-robotics' own environment."""
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import KitchenEnv

    return KitchenEnv()


def stay(task: Kitchen) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
    return task.step(np.clip(task.data.qpos[:9], LOW, HIGH).astype(np.float32))


def with_goals(names: list[str]) -> dict[str, Any]:
    """Options of a reset that put some elements at their goals."""
    qpos = START_QPOS.copy()
    for element in ELEMENTS:
        if element.name in names:
            qpos[element.coordinates] = element.goal
    return {"qpos": qpos}


# ---- physics


def test_same_controls_lead_to_the_very_same_positions(kitchen: Kitchen, reference: Any) -> None:
    robot = reference.robot_env
    robot.set_state(START_QPOS, np.zeros(29))
    kitchen.reset(seed=0)
    for step in range(50):
        waves = np.sin(0.2 * step * np.linspace(0.5, 1.5, 9) + np.arange(9))
        action = np.clip(START_QPOS[:9] + np.array([0.6] * 7 + [0.04] * 2) * waves, LOW, HIGH)
        kitchen.step(action)
        robot.do_simulation(kitchen.data.ctrl.copy(), 40)
        np.testing.assert_array_equal(kitchen.data.qpos, robot.data.qpos)
    assert np.abs(kitchen.data.qpos[:7] - START_QPOS[:7]).max() > 0.3


def test_start_goals_and_distance_are_the_reference_s(reference: Any) -> None:
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env

    np.testing.assert_array_equal(START_QPOS, reference.robot_env.init_qpos)
    assert [element.name for element in ELEMENTS] == list(kitchen_env.OBS_ELEMENT_GOALS)
    for element in ELEMENTS:
        np.testing.assert_array_equal(element.goal, kitchen_env.OBS_ELEMENT_GOALS[element.name])
        np.testing.assert_array_equal(np.arange(30)[element.coordinates], kitchen_env.OBS_ELEMENT_INDICES[element.name])
    np.testing.assert_array_equal(NOISE_AMPLITUDES[:9], reference.robot_env.robot_pos_noise_amp[:9])
    np.testing.assert_array_equal(NOISE_AMPLITUDES[9:29], reference.robot_env.robot_pos_noise_amp[9:])
    np.testing.assert_array_equal([LOW, HIGH], reference.robot_env.robot_pos_bound[:9].T)


def test_a_target_is_limited_in_speed_and_then_in_range() -> None:
    joints = np.array([0.0, 1.5, 2.5, -3.0, 0.0, 3.5, 0.0, 0.0, 0.04])
    target = np.array([2.9, 1.8, 2.9, -3.1, -0.5, 0.0, -2.9, 0.04, 0.0])
    expected = np.array([0.8, 1.8, 2.9, -3.1, -0.5, 2.7, -0.8, 0.04, 0.0])  # 10 rad/s x 0.08 s
    np.testing.assert_allclose(feasible_target(target, joints), expected, atol=1e-12)
    # A reading outside the range does not take the target out of it.
    outside = np.full(9, 3.9)
    np.testing.assert_allclose(feasible_target(LOW, outside), np.clip(3.9 - 0.8, LOW, HIGH), atol=1e-12)


# ---- observation


def test_state_is_qpos_in_the_model_s_order_and_a_masked_goal(kitchen: Kitchen) -> None:
    state = kitchen.reset(seed=4)[0]["state"]
    assert state.shape == (60,)
    np.testing.assert_array_equal(state[30:], 0.0)
    assert (np.abs(state[:30] - START_QPOS) <= 0.1 * NOISE_AMPLITUDES + 1e-6).all()
    assert len(kitchen.STATE_NAMES) == 60 and kitchen.STATE_NAMES[:9] == kitchen.PROPRIOCEPTION_NAMES
    joints = {"knob_Joint_2": "bottom_left_knob", "knob_Joint_3": "top_right_knob"}
    same = ("bottom_left_burner", "top_left_burner", "light_switch", "slide_cabinet", "left_hinge_cabinet", "microwave")
    for joint, name in (joints | dict(zip(same, same, strict=True)) | {"kettle": "kettle_x"}).items():
        assert kitchen.STATE_NAMES[kitchen.model.joint(joint).qposadr[0]] == name


def test_noise_is_uniform_of_the_given_amplitude_and_a_function_of_seed_and_step(kitchen: Kitchen) -> None:
    first = np.stack([kitchen.reset(seed=seed)[0]["state"][:30] for seed in range(300)]) - START_QPOS
    ratio = first / (0.1 * NOISE_AMPLITUDES)
    assert (np.abs(ratio) < 1.001).all()  # float32 of 1.6 is coarse next to an amplitude of 5e-4
    # A uniform variable on [-1, 1] has the variance 1/3; its estimate from 9000, a standard deviation of 0.003.
    assert abs(ratio.var() - 1 / 3) < 0.015
    assert abs(ratio.mean()) < 0.03

    def three_steps() -> np.ndarray:
        states = [kitchen.reset(seed=7)[0]["state"]]
        return np.stack(states + [stay(kitchen)[0]["state"] for _ in range(2)])

    np.testing.assert_array_equal(once := three_steps(), three_steps())
    assert len(np.unique(once[:, 20])) == 3


# ---- initial states


def test_reset_options_begin_elsewhere_once(kitchen: Kitchen) -> None:
    qvel = np.linspace(-0.01, 0.01, 29)
    kitchen.reset(seed=0, options={"qpos": GOAL_QPOS, "qvel": qvel})
    np.testing.assert_array_equal(kitchen.data.qpos, GOAL_QPOS)
    np.testing.assert_array_equal(kitchen.data.qvel, qvel)
    kitchen.reset(seed=0)
    np.testing.assert_array_equal(kitchen.data.qpos, START_QPOS)
    np.testing.assert_array_equal(kitchen.data.qvel, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qpos": np.zeros(29)}, "qpos must be 30 finite numbers"),
        ({"qvel": np.zeros(30)}, "qvel must be 29 finite numbers"),
        ({"qpos": np.full(30, np.nan)}, "qpos must be 30 finite numbers"),
        ({"position": GOAL_QPOS}, "position"),
    ],
)
def test_reset_refuses_other_options(kitchen: Kitchen, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kitchen.reset(seed=0, options=options)


# ---- elements


@pytest.mark.parametrize("name", [element.name for element in ELEMENTS])
def test_an_element_at_its_goal_counts_once(kitchen: Kitchen, name: str) -> None:
    kitchen.reset(seed=0, options=with_goals([name]))
    _, reward, terminated, _, info = stay(kitchen)
    assert (reward, terminated, info["completed"], info["phases"]) == (1.0, False, [name], 1)
    assert info["score"] == pytest.approx(1 / 7)
    _, reward, _, _, info = stay(kitchen)
    assert (reward, info["completed"]) == (0.0, [name])


@pytest.mark.parametrize(("angle", "complete"), [(-0.57, False), (-0.59, True)])
def test_an_element_is_complete_within_three_tenths(kitchen: Kitchen, angle: float, complete: bool) -> None:
    qpos = START_QPOS.copy()
    qpos[11] = angle  # the bottom burner's knob; its goal is (-0.88, -0.01)
    kitchen.reset(seed=0, options={"qpos": qpos})
    assert stay(kitchen)[4]["completed"] == (["bottom burner"] if complete else [])


def test_four_elements_are_a_success_and_seven_the_end(kitchen: Kitchen) -> None:
    three = ["light switch", "microwave", "kettle"]
    kitchen.reset(seed=0, options=with_goals(three))
    info = stay(kitchen)[4]
    assert (info["phases"], info["success"]) == (3, False)
    kitchen.reset(seed=0, options=with_goals([*three, "slide cabinet"]))
    _, _, terminated, _, info = stay(kitchen)
    assert (info["phases"], info["success"], terminated) == (4, True, False)
    assert info["score"] == pytest.approx(4 / 7)
    kitchen.reset(seed=0, options={"qpos": GOAL_QPOS})
    _, reward, terminated, _, info = stay(kitchen)
    assert (reward, terminated, info["score"], info["phases"]) == (7.0, True, 1.0, 4)


def test_a_saved_state_keeps_what_was_completed(kitchen: Kitchen) -> None:
    kitchen.reset(seed=3, options=with_goals(["kettle"]))
    stay(kitchen)
    state = kitchen.get_state()
    action = np.clip(START_QPOS[:9] + 0.3, LOW, HIGH)
    expected = kitchen.step(action)
    kitchen.reset(seed=5)
    kitchen.set_state(state)
    observation, reward, _, _, info = kitchen.step(action)
    np.testing.assert_array_equal(observation["state"], expected[0]["state"])
    assert (reward, info["completed"]) == (0.0, ["kettle"])


def test_without_the_package_the_error_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"gymnasium_robotics.*pip install -e '\.\[simulators\]'"):
        model_path()


# ---- expert


def episode(kitchen: Kitchen, seed: int, order: list[str] | None = None) -> tuple[KitchenExpert, dict[str, Any]]:
    _, info = kitchen.reset(seed=seed)
    expert = KitchenExpert(kitchen, np.random.default_rng(seed), order=order)
    while not info["success"] and kitchen.steps < kitchen.MAX_STEPS:
        *_, info = kitchen.step(expert.action())
    return expert, info


def test_the_hand_follows_its_way_points(kitchen: Kitchen) -> None:
    kitchen.reset(seed=0)
    arm = _Arm(kitchen)
    approach = arm.approach(Waypoint((-0.3, 0.45, 2.3), hold=3), 0.8)
    line = arm.move(Waypoint((-0.1, 0.45, 2.3), hold=3), 0.8, 0.05)
    assert len(line) >= 4 + 3  # 0.2 m at 0.05 m per step, and the rest
    for target in approach:
        kitchen.step(target)
    hand = kitchen.data.site("end_effector")
    np.testing.assert_allclose(hand.xpos, (-0.3, 0.45, 2.3), atol=0.02)
    for target in line:
        kitchen.step(target)
        np.testing.assert_allclose(hand.xpos[1:], (0.45, 2.3), atol=0.02)
    np.testing.assert_allclose(hand.xpos, (-0.1, 0.45, 2.3), atol=0.02)
    np.testing.assert_allclose(hand.xmat.reshape(3, 3)[:, 2], (0.0, 1.0, 0.0), atol=0.2)  # forward


def test_plans_are_drawn_and_differ(kitchen: Kitchen) -> None:
    kitchen.reset(seed=0)
    orders = [tuple(KitchenExpert(kitchen, np.random.default_rng(seed)).order) for seed in range(20)]
    assert all(len(set(order)) == 4 and set(order) <= set(PRIMITIVES) for order in orders)
    assert len(set(orders)) > 10
    actions = [KitchenExpert(kitchen, np.random.default_rng(seed)).action() for seed in (0, 0, 1)]
    np.testing.assert_array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2])


@pytest.mark.parametrize(
    "order",
    [
        ["kettle", "light switch", "slide cabinet", "bottom burner"],
        pytest.param(["microwave", "bottom burner", "kettle", "slide cabinet"], marks=pytest.mark.slow),
    ],
)
def test_the_expert_completes_four_elements_in_its_order(kitchen: Kitchen, order: list[str]) -> None:
    expert, info = episode(kitchen, 100_000, order)
    assert info["completed"] == expert.order == order
    assert info["success"]


@pytest.mark.slow
def test_the_expert_succeeds_with_drawn_orders(kitchen: Kitchen) -> None:
    assert np.mean([episode(kitchen, seed)[1]["success"] for seed in range(20)]) >= 0.9


def test_the_expert_wants_a_kitchen() -> None:
    from envs.arm_reach import ArmReach

    with pytest.raises(TypeError, match="Kitchen"):
        KitchenExpert(ArmReach(), np.random.default_rng(0))
