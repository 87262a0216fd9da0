"""Lift, Can and ToolHang: robosuite's own numbers, resets by seed, states, both kinds of action, pictures, experts."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import mujoco
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import envs
from envs.experts import make_expert
from envs.rotation import rotation_6d_from_matrix

if find_spec("robosuite") is None:  # importing it here would choose an OpenGL for the whole process
    pytest.skip("needs robosuite: pip install -e '.[simulators]'", allow_module_level=True)

from envs.offscreen import backend
from envs.robosuite_task import RobosuiteTask
from envs.task import PhysicsError

SEEDS_OF_TWO_FACES = {1: "absolute", 2: "delta"}  # the expert grasps the cube by another pair of faces
NAMES = ("lift", "can", "tool_hang")
Make = Callable[..., RobosuiteTask]


@pytest.fixture
def drawing() -> None:
    try:
        backend()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    """Tasks by name and options, each built once."""
    made: dict[tuple[object, ...], RobosuiteTask] = {}

    def task(name: str, **options: object) -> RobosuiteTask:
        key = (name, *sorted(options.items()))
        if key not in made:
            one = envs.make(name, **options).unwrapped  # type: ignore[arg-type]
            assert isinstance(one, RobosuiteTask)
            made[key] = one
        return made[key]

    yield task
    for one in made.values():
        one.close()


def random_deltas(count: int) -> np.ndarray:
    """Smooth delta actions [count, 7] with turns and moving fingers."""
    random = np.random.default_rng(0)
    slow = np.repeat(random.uniform(-0.7, 0.7, (-(-count // 8), 7)), 8, axis=0)[:count]
    return slow.astype(np.float32)


# ---- what is observed


@pytest.mark.parametrize(
    ("name", "size", "first"), [("lift", 19, "cube"), ("can", 23, "Can"), ("tool_hang", 53, "base")]
)
def test_the_state_is_robosuites_in_its_order(make: Make, name: str, size: int, first: str) -> None:
    task = make(name, action="delta")
    observation, _ = task.reset(seed=1)
    for delta in random_deltas(2):
        observation, *_ = task.step(delta)
    assert len(task.STATE_NAMES) == len(set(task.STATE_NAMES)) == size
    assert task.STATE_NAMES[0].startswith(first) and task.STATE_NAMES[-9] == "robot0_eef_pos_x"

    task._world._get_observations(force_update=True)  # the second time, relative poses are of the present
    theirs = task._world._get_observations(force_update=True)
    keys = ("object-state", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
    expected = np.concatenate([theirs[key] for key in keys]).astype(np.float32)
    np.testing.assert_array_equal(observation["state"], expected)


# By names of the datasheets: the first index of a position, with a quaternion behind it.
NAMED = {
    "lift": {"body cube_main": 0, "site gripper0_right_grip_site": 10},
    "can": {"body Can_main": 7, "site gripper0_right_grip_site": 14},
    "tool_hang": {
        "geom stand_base": 7,
        "site frame_intersection_site": 21,
        "body tool_root": 35,
        "site gripper0_right_grip_site": 44,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_those_of_the_datasheet(make: Make, name: str) -> None:
    task = make(name, action="delta")
    state = task.reset(seed=1)[0]["state"]
    for delta in random_deltas(2):
        state = task.step(delta)[0]["state"]
    for named, first in NAMED[name].items():
        kind, xml = named.split()
        thing = getattr(task.data, kind)(xml)
        assert f"`{xml}`" in (type(task).__doc__ or "")
        np.testing.assert_allclose(state[first : first + 3], thing.xpos, atol=1e-6)
        matrix = task.data.body("robot0_right_hand").xmat if "gripper0" in xml else thing.xmat
        turn = Rotation.from_matrix(matrix.reshape(3, 3)).inv() * Rotation.from_quat(state[first + 3 : first + 7])
        assert turn.magnitude() < 1e-5
    fingers = [task.data.joint(f"gripper0_right_finger_joint{number}").qpos[0] for number in (1, 2)]
    np.testing.assert_allclose(state[-2:], fingers, atol=1e-6)


@pytest.mark.parametrize(("name", "thing"), [("can", "Can"), ("tool_hang", "tool")])
def test_relative_poses_are_of_the_present(make: Make, name: str, thing: str) -> None:
    task = make(name, action="delta")
    task.reset(seed=1)
    for delta in random_deltas(3):
        observation, *_ = task.step(delta)
    entry = dict(zip(task.STATE_NAMES, observation["state"].astype(np.float64), strict=True))

    def vector(key: str, letters: str) -> np.ndarray:
        return np.array([entry[f"{key}_{letter}"] for letter in letters])

    gripper = Rotation.from_quat(vector("robot0_eef_quat", "xyzw"))
    relative = gripper.inv().apply(vector(f"{thing}_pos", "xyz") - vector("robot0_eef_pos", "xyz"))
    np.testing.assert_allclose(vector(f"{thing}_to_robot0_eef_pos", "xyz"), relative, atol=1e-6)
    turn = gripper.inv() * Rotation.from_quat(vector(f"{thing}_quat", "xyzw"))
    assert (turn.inv() * Rotation.from_quat(vector(f"{thing}_to_robot0_eef_quat", "xyzw"))).magnitude() < 1e-5


@pytest.mark.usefixtures("drawing")
def test_the_state_of_images_is_the_robots_own(make: Make) -> None:
    state, _ = make("lift", action="delta").reset(seed=2)
    robot, _ = make("lift", observation="image").reset(seed=2)
    np.testing.assert_array_equal(robot["state"], state["state"][-9:])
    assert make("lift", observation="image").PROPRIOCEPTION_NAMES == make("lift", action="delta").STATE_NAMES[-9:]


# ---- resets and states


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_is_a_function_of_its_seed(make: Make, name: str) -> None:
    task = make(name, action="delta")

    def initial(seed: int) -> tuple[np.ndarray, np.ndarray]:
        task.reset(seed=seed)
        return task.data.qpos.copy(), task.model.geom_size.copy()

    first, size = initial(100000)
    other, other_size = initial(100001)
    assert np.abs(first - other).max() > 1e-3
    if name == "lift":
        assert np.abs(size - other_size).max() > 1e-5  # the cube's
    for delta in random_deltas(2):
        task.step(delta)
    again, size_again = initial(100000)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(size, size_again)


def test_a_state_goes_on_in_another_instance_with_another_cube(make: Make) -> None:
    one, two = make("lift", action="delta"), make("lift", action="absolute")
    two.reset(seed=6)
    one.reset(seed=5)
    actions = random_deltas(16)
    for delta in actions[:8]:
        one.step(delta)
    state = one.get_state()
    two.set_state(state)
    np.testing.assert_array_equal(one.model.geom_size, two.model.geom_size)
    for delta in actions[8:]:
        expected, *_ = one.step(delta)
    one.reset(seed=9)
    one.set_state(state)
    for delta in actions[8:]:
        found, *_ = one.step(delta)
    np.testing.assert_array_equal(found["state"], expected["state"])

    assert two.seed == 5
    np.testing.assert_array_equal(two.get_state()["qpos"], state["qpos"])
    two.set_simulator_state(np.concatenate([[state["time"]], state["qpos"], state["qvel"]]))
    for delta in actions[8:]:
        two.step(two.absolute_action(delta))
    np.testing.assert_allclose(two.observe()["state"], expected["state"], atol=1e-4)  # actions are float32


def test_recorded_states_are_set_and_checked(make: Make) -> None:
    task = make("can", action="delta")
    task.reset(seed=1)
    for delta in random_deltas(4):
        observation, *_ = task.step(delta)
    flat = np.concatenate([[task.data.time], task.data.qpos, task.data.qvel])
    task.reset(seed=2)
    task.set_simulator_state(flat)
    np.testing.assert_array_equal(task.observe()["state"], observation["state"])
    with pytest.raises(ValueError, match=r"expected shape \(\d+,\)"):
        task.set_simulator_state(flat[1:])


# ---- actions


def test_a_control_step_is_robosuites_own(make: Make) -> None:
    task = make("can", action="delta")
    task.reset(seed=4)
    state = task.get_state()
    task.set_state(state)
    for delta in random_deltas(3):
        task.step(delta)
    ours = task.data.qpos.copy()
    task.set_state(state)
    for delta in random_deltas(3):
        task._world.step(delta.astype(np.float64))
    np.testing.assert_array_equal(ours, task.data.qpos)


def test_absolute_actions_have_the_effect_of_deltas(make: Make) -> None:
    """Recorded states and delta actions become absolute actions; replayed open loop, the joints move alike."""
    delta_task, absolute_task = make("lift", action="delta"), make("lift", action="absolute")
    delta_task.reset(seed=3)
    joints, states = [], []
    for delta in random_deltas(40):
        states.append(np.concatenate([[delta_task.data.time], delta_task.data.qpos, delta_task.data.qvel]))
        delta_task.step(delta)
        joints.append(delta_task.data.qpos[:7].copy())

    actions = []
    for state, delta in zip(states, random_deltas(40), strict=True):
        absolute_task.set_simulator_state(state)
        actions.append(absolute_task.absolute_action(delta))

    absolute_task.reset(seed=3)
    for action, expected in zip(actions, joints, strict=True):
        absolute_task.step(action)
        np.testing.assert_allclose(absolute_task.data.qpos[:7], expected, atol=1e-5)  # actions are float32
    assert np.abs(joints[-1] - joints[0]).max() > 0.1


def test_an_absolute_action_is_a_pose_in_the_world(make: Make) -> None:
    task = make("lift", action="absolute")
    task.reset(seed=0)
    rotation = Rotation.from_euler("z", 20, degrees=True).as_matrix() @ task.gripper_pose().rotation
    action = np.concatenate([[0.03, -0.08, 0.98], rotation_6d_from_matrix(rotation), [-1.0]]).astype(np.float32)
    for _ in range(30):
        task.step(action)
    pose = task.gripper_pose()
    np.testing.assert_allclose(pose.position, action[:3], atol=0.005)
    assert Rotation.from_matrix(pose.rotation @ rotation.T).magnitude() < 0.02


def test_bad_actions_are_refused_before_physics(make: Make) -> None:
    task = make("lift", action="absolute")
    task.reset(seed=0)
    before = task.data.qpos.copy()
    action = task.absolute_action(np.zeros(7))
    parallel = action.copy()
    parallel[6:9] = parallel[3:6]
    with pytest.raises(ValueError, match="not parallel"):
        task.step(parallel)
    far = action.copy()
    far[2] = 3.0
    with pytest.raises(ValueError, match=r"action\[2\]"):
        task.step(far)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        task.absolute_action(action)
    with pytest.raises(ValueError, match="action must be one of"):
        envs.make("lift", action="joints")
    np.testing.assert_array_equal(task.data.qpos, before)


# ---- scores and divergence


def test_the_score_is_the_largest_reward_and_nothing_ends_the_episode(make: Make) -> None:
    task = make("lift", action="delta")
    task.reset(seed=0)
    task.data.joint("cube_joint0").qpos[2] += 0.1
    mujoco.mj_forward(task.model, task.data)
    rewards = []
    for _ in range(6):
        _, reward, terminated, truncated, info = task.step(np.zeros(7, np.float32))
        rewards.append(reward)
        assert (info["score"], info["phases"], info["success"]) == (1.0, 1, True)
        assert not terminated and not truncated
    assert rewards[0] == 1 and rewards[-1] == 0  # the cube has fallen back


def test_the_can_in_its_compartment_is_solved(make: Make) -> None:
    task = make("can", action="delta")
    task.reset(seed=0)
    assert not task.solved()
    task.data.joint("Can_joint0").qpos[:3] = (0.2, 0.4, 0.86)
    mujoco.mj_forward(task.model, task.data)
    assert task.solved()
    task.data.joint("Can_joint0").qpos[:3] = (0.0, 0.4, 0.86)  # another object's compartment
    mujoco.mj_forward(task.model, task.data)
    assert not task.solved()


def test_divergence_within_a_control_step_ends_the_episode(make: Make) -> None:
    task = make("can", action="delta")
    for on_divergence in ("terminate", "raise"):
        task.reset(seed=0)
        task.on_divergence = on_divergence
        task.data.qfrc_applied[:] = 1e30
        if on_divergence == "raise":
            with pytest.raises(PhysicsError, match="mjWARN_BADQ"):
                task.step(np.zeros(7, np.float32))
        else:
            _, _, terminated, _, info = task.step(np.zeros(7, np.float32))
            assert terminated and info["diverged"] and info["score"] == 0 and not info["success"]
    task.on_divergence = "terminate"
    _, info = task.reset(seed=0)
    assert not info["diverged"]


# ---- pictures


@pytest.mark.usefixtures("drawing")
def test_cameras_see_the_cube_upright_and_change_nothing(make: Make) -> None:
    task = make("lift", observation="image")
    observation, _ = task.reset(seed=2)
    assert set(observation) == {"agentview", "robot0_eye_in_hand", "state"}
    assert observation["agentview"].shape == (84, 84, 3) and observation["agentview"].dtype == np.uint8
    assert task.observation_space.contains(observation)

    camera = task.data.camera("agentview")
    seen = camera.xmat.reshape(3, 3).T @ (task.data.body("cube_main").xpos - camera.xpos)  # x right, y up, -z forward
    focal = 42 / np.tan(np.radians(task.model.camera("agentview").fovy[0]) / 2)
    column, row = 41.5 + focal * seen[0] / -seen[2], 41.5 - focal * seen[1] / -seen[2]
    red, green, blue = observation["agentview"][round(row), round(column)].astype(int)
    assert red > green + 40 and red > blue + 40

    before = task.get_state()
    task.image("agentview", 64)
    after = task.get_state()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])

    task.draws_images = False
    undrawn, *_ = task.step(task.absolute_action(np.zeros(7)))
    task.draws_images = True
    assert not undrawn["agentview"].any() and task.observation_space.contains(undrawn)


# ---- importing, and experts


def test_robosuite_is_silent_and_leaves_the_choice_of_opengl_alone() -> None:
    program = "import os, envs.robosuite_task; assert 'MUJOCO_GL' not in os.environ; print(os.environ.get('MUJOCO_GL'))"
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "None\n", "")


def solve(task: RobosuiteTask, name: str, seed: int) -> tuple[bool, object]:
    """Whether the expert solves an episode, and the expert."""
    _, info = task.reset(seed=seed)
    expert = make_expert(name, task, np.random.default_rng([seed, 1]))
    for _ in range(task.MAX_STEPS):
        *_, info = task.step(expert.action())
        if info["success"]:
            break
    return info["success"], expert


def test_lift_is_solved_by_either_pair_of_faces_with_either_kind_of_action(make: Make) -> None:
    faces = set()
    for seed, action in SEEDS_OF_TWO_FACES.items():
        success, expert = solve(make("lift", action=action), "lift", seed)
        assert success
        faces.add(expert.faces)  # type: ignore[attr-defined]
    assert faces == {0, 1}


def test_can_is_solved(make: Make) -> None:
    assert solve(make("can", action="delta"), "can", 0)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "episodes", "least"), [("lift", 20, 19), ("can", 20, 19), ("tool_hang", 6, 3)])
def test_experts_solve_most_episodes(make: Make, name: str, episodes: int, least: int) -> None:
    assert sum(solve(make(name), name, seed)[0] for seed in range(100, 100 + episodes)) >= least
