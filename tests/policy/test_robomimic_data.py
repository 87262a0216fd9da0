"""robomimic's HDF5 files: what is read, absolute actions from the simulator, and what can be wrong with them."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import envs
from policy.data_error import DataError
from policy.demonstrations import load_demonstrations
from policy.robomimic_data import absolute_actions_6d, load_robomimic

LENGTHS = {0: 4, 1: 6, 2: 3, 10: 5}  # demo_10 comes after demo_2
OBSERVATIONS = {
    "object": 10,
    "robot0_eef_pos": 3,
    "robot0_eef_quat": 4,
    "robot0_gripper_qpos": 2,
    "robot0_joint_pos": 7,
}
IMAGES = ("agentview_image", "robot0_eye_in_hand_image")


def demo(length: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    result = {"actions": random.uniform(-1, 1, (length, 7)), "states": random.normal(size=(length, 30))}
    result |= {f"obs/{key}": random.normal(size=(length, size)) for key, size in OBSERVATIONS.items()}
    return result | {f"obs/{key}": random.integers(0, 256, (length, 8, 8, 3)).astype(np.uint8) for key in IMAGES}


def write_file(
    path: Path, demos: dict[int, dict[str, np.ndarray]], *, task: str = "Lift", version: str = "1.5.1"
) -> Path:
    arguments = {"env_name": task, "type": 1, "env_version": version, "env_kwargs": {"control_freq": 20}}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(len(arrays["actions"]) for arrays in demos.values())
        data.attrs["env_args"] = json.dumps(arguments)
        for number, arrays in demos.items():
            group = data.create_group(f"demo_{number}")
            group.attrs["num_samples"] = len(arrays["actions"])
            group.attrs["model_file"] = "<mujoco/>"
            for name, array in arrays.items():
                group[name] = array
        file["mask/train"] = np.array([b"demo_10", b"demo_0"])
    return path


def demos() -> dict[int, dict[str, np.ndarray]]:
    return {number: demo(length, number) for number, length in LENGTHS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_file(tmp_path / "low_dim_v15.hdf5", demos())


# What is read


def test_the_state_is_object_and_proprioception_in_order_of_the_demonstrations(path: Path) -> None:
    buffer = load_demonstrations(path, action="delta")
    assert buffer.episode_ends.tolist() == [4, 10, 13, 18]
    assert [entry["demo"] for entry in buffer.attributes["episodes"]] == ["demo_0", "demo_1", "demo_2", "demo_10"]
    names = buffer.attributes.pop("state_names")
    assert names[:2] == ["object[0]", "object[1]"] and names[10:] == [
        f"robot0_{key}[{entry}]"
        for key, size in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2))
        for entry in range(size)
    ]
    assert buffer.attributes | {"episodes": 0} == {
        "task": "lift", "action": "delta", "observation": "state", "source": "robomimic",
        "versions": {"robosuite": "1.5.1"}, "episodes": 0,
    }  # fmt: skip
    for episode, arrays in enumerate(demos().values()):
        parts = [arrays[f"obs/{key}"] for key in list(OBSERVATIONS)[:4]]
        found = buffer.episode(episode)
        np.testing.assert_array_equal(found["state"], np.concatenate(parts, axis=1).astype(np.float32))
        np.testing.assert_array_equal(found["action"], arrays["actions"].astype(np.float32))


def test_images_come_with_proprioception_alone(path: Path) -> None:
    buffer = load_robomimic(path, observation="image", action="delta")
    assert sorted(buffer.arrays) == ["action", "agentview", "robot0_eye_in_hand", "state"]
    assert buffer.arrays["state"].shape == (18, 9)
    np.testing.assert_array_equal(buffer.episode(1)["agentview"], demos()[1]["obs/agentview_image"])
    assert buffer.arrays["robot0_eye_in_hand"].dtype == np.uint8


def test_a_mask_chooses_demonstrations(path: Path) -> None:
    buffer = load_robomimic(path, action="delta", mask="train")
    assert [entry["demo"] for entry in buffer.attributes["episodes"]] == ["demo_0", "demo_10"]
    with pytest.raises(DataError, match="expected mask/trian, found train; did you mean 'train'?"):
        load_robomimic(path, action="delta", mask="trian")


def test_stored_absolute_actions_get_their_rotation_as_six_numbers(tmp_path: Path) -> None:
    data = demos()
    for arrays in data.values():
        arrays["actions"] = arrays["actions"] * 3  # no delta action is that large
    path = write_file(tmp_path / "low_dim_abs.hdf5", data)
    buffer = load_robomimic(path, stored_action="absolute")
    actions = np.concatenate([arrays["actions"] for arrays in data.values()])
    assert buffer.attributes["action"] == "absolute" and buffer.arrays["action"].shape == (18, 10)
    matrices = Rotation.from_rotvec(actions[:, 3:6]).as_matrix()
    np.testing.assert_allclose(buffer.arrays["action"][:, :3], actions[:, :3], rtol=1e-6)
    np.testing.assert_allclose(buffer.arrays["action"][:, 3:6], matrices[:, 0], atol=1e-6)
    np.testing.assert_allclose(buffer.arrays["action"][:, 6:9], matrices[:, 1], atol=1e-6)
    np.testing.assert_allclose(buffer.arrays["action"][:, 9], actions[:, 6], rtol=1e-6)
    np.testing.assert_array_equal(absolute_actions_6d(actions), buffer.arrays["action"])
    with pytest.raises(
        DataError, match=r"expected delta actions, from -1 to 1, found 2\.9.* say stored_action=absolute"
    ):
        load_robomimic(path)
    with pytest.raises(DataError, match="action: expected 'absolute' as the file has it"):
        load_robomimic(path, stored_action="absolute", action="delta")


def test_another_version_of_the_simulator_is_warned_of(tmp_path: Path) -> None:
    path = write_file(tmp_path / "old.hdf5", demos(), version="1.2.1")
    with pytest.warns(
        UserWarning, match=r"recorded with robosuite 1.2.1: the entries of 'object' are in another order"
    ):
        assert load_robomimic(path, action="delta").attributes["versions"] == {"robosuite": "1.2.1"}


# Absolute actions


@pytest.fixture(scope="module")
def recorded() -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]]:
    """A demonstration of delta actions in the simulator, its state before the first, and the joints after each."""
    if find_spec("robosuite") is None:  # importing it here would choose an OpenGL for the whole process
        pytest.skip("needs robosuite: pip install -e '.[simulators]'")
    task: Any = envs.make("lift", action="delta").unwrapped
    random = np.random.default_rng(0)
    observation, _ = task.reset(seed=3)
    start, joints = task.get_state(), []
    arrays: dict[str, list[np.ndarray]] = {"actions": [], "states": [], "obs/state": []}
    for step in range(25):
        action = np.append(random.uniform(-0.7, 0.7, 6), -1 if step < 12 else 1).astype(np.float32)
        arrays["actions"].append(action)
        arrays["states"].append(np.concatenate([[task.data.time], task.data.qpos, task.data.qvel]))
        arrays["obs/state"].append(observation["state"])
        observation, *_ = task.step(action)
        joints.append(task.data.qpos[:7].copy())
    task.close()
    stacked = {key: np.array(values) for key, values in arrays.items()}
    state, ends = stacked.pop("obs/state"), np.cumsum([10, 3, 4, 2])[:-1]
    yield (
        stacked | {f"obs/{key}": part for key, part in zip(OBSERVATIONS, np.split(state, ends, 1), strict=False)},
        start,
        np.array(joints),
    )


@pytest.mark.slow
def test_absolute_actions_have_the_effect_of_the_delta_actions(tmp_path: Path, recorded: Any) -> None:
    arrays, start, joints = recorded
    buffer = load_robomimic(write_file(tmp_path / "lift.hdf5", {0: arrays}))
    assert buffer.arrays["action"].shape == (25, 10) and buffer.attributes["action"] == "absolute"
    task: Any = envs.make("lift", action="absolute").unwrapped
    observation, _ = task.reset(seed=3)
    task.set_state(start)
    for step, action in enumerate(buffer.arrays["action"]):
        np.testing.assert_allclose(observation["state"], buffer.arrays["state"][step], atol=1e-5)
        observation, *_ = task.step(action)
        np.testing.assert_allclose(task.data.qpos[:7], joints[step], atol=1e-5)  # actions are float32
    task.close()
    assert np.abs(joints[-1] - joints[0]).max() > 0.05


@pytest.mark.slow
def test_states_of_another_simulator_are_refused(tmp_path: Path, recorded: Any) -> None:
    arrays, *_ = recorded
    arrays = arrays | {"obs/robot0_eef_pos": arrays["obs/robot0_eef_pos"] + 0.01}
    with pytest.raises(DataError, match=r"found that at step 0 of all its hand is 0\.0173 m from where the file says"):
        load_robomimic(write_file(tmp_path / "lift.hdf5", {0: arrays}))


# What can be wrong


def broken(change: dict[str, Any], number: int = 1) -> dict[int, dict[str, np.ndarray]]:
    data = demos()
    data[number] = {name: array for name, array in (data[number] | change).items() if array is not None}
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs/object": None}, r"data/demo_1: expected obs/object, found actions, obs/agentview_image, .*"),
        ({"obs/robot0_eef_pos": None}, "data/demo_1: expected obs/robot0_eef_pos, .*did you mean"),
        ({"actions": np.zeros((5, 7))}, "data/demo_1/obs/object: expected 5 steps, found shape"),
        ({"obs/object": np.zeros((6, 14))}, r"data/demo_1/obs/object: expected \[T, \*\[10\]\], found \[6, 14\]"),
        ({"actions": np.full((6, 7), np.nan)}, r"action: .*nan in episode 1 at step 0"),
        ({"obs/object": np.full((6, 10), np.inf)}, r"state: .*inf in episode 1 at step 0"),
    ],
)
def test_a_demonstration_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_file(tmp_path / "bad.hdf5", broken(change))
    with pytest.raises(DataError, match=rf"bad.hdf5: {message}"):
        load_robomimic(path, action="delta")


def test_actions_of_another_robot_are_refused(tmp_path: Path) -> None:
    data = demos()
    for arrays in data.values():
        arrays["actions"] = np.zeros((len(arrays["actions"]), 14))
    with pytest.raises(DataError, match=r"data/demo_0/actions: expected \[T, 7\], found \[4, 14\]"):
        load_robomimic(write_file(tmp_path / "two_arms.hdf5", data), action="delta")


def test_another_number_of_samples_than_said_is_refused(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["data/demo_2"].attrs["num_samples"] = 9
    with pytest.raises(DataError, match="data/demo_2/actions: expected 9 steps, found shape"):
        load_robomimic(path, action="delta")


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(DataError, match="a.hdf5: expected a group data, found images"):
        load_robomimic(tmp_path / "a.hdf5")
    with pytest.raises(DataError, match="b.hdf5: env_name: expected one of Lift, .* found 'NutAssembly'"):
        load_robomimic(write_file(tmp_path / "b.hdf5", demos(), task="NutAssembly"))
    with pytest.raises(DataError, match="c.hdf5: expected data/demo_0, data/demo_1 ..., found none"):
        load_robomimic(write_file(tmp_path / "c.hdf5", {}))
    with pytest.raises(DataError, match="d.hdf5: expected a whole HDF5 file, found FileNotFoundError"):
        load_robomimic(tmp_path / "d.hdf5")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_files_that_are_cut_short_are_refused(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="low_dim_v15.hdf5: expected a whole HDF5 file"):
        load_robomimic(path, action="delta")
