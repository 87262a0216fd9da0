"""BlockPush: resets by formula, the rod's lag, friction, what entering a zone is worth; its expert's four plans."""

from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
import pytest

import envs
from envs.block_push import BlockPush, initial_state
from envs.experts.block_push import BlockPushExpert

TABLE = np.array([0.6, -0.3])  # far from zones and blocks' starts


@pytest.fixture(scope="module")
def task() -> Iterator[BlockPush]:
    made = BlockPush()
    yield made
    made.close()


def place(task: BlockPush, block: int, position: Any, *, yaw: float = 0.0, speed: Any = (0.0, 0.0)) -> None:
    joint = task.data.joint(("block", "block2")[block])
    joint.qpos = [*position, 0.02, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
    joint.qvel = [*speed, 0, 0, 0, 0]
    mujoco.mj_forward(task.model, task.data)


def stay(task: BlockPush) -> tuple[float, bool, dict[str, Any]]:
    _, reward, terminated, _, info = task.step(task.action_towards(task.effector_target()))
    return float(reward), terminated, info


def play(task: BlockPush, seed: int) -> tuple[BlockPushExpert, list[float], list[np.ndarray], dict[str, Any]]:
    """An episode of the expert: rewards, states before actions, the last info."""
    observation, info = task.reset(seed=seed)
    expert = BlockPushExpert(task, np.random.default_rng(seed))
    rewards: list[float] = []
    states = [observation["state"]]
    terminated = False
    while not terminated and len(rewards) < task.MAX_STEPS:
        observation, reward, terminated, _, info = task.step(expert.action())
        rewards.append(float(reward))
        states.append(observation["state"])
    return expert, rewards, states, info


# ---- resets


def test_first_block_follows_from_the_first_three_draws() -> None:
    # uniform(a, b) is a + (b - a) u; the yaw's is the original's uniform(pi), from pi down to 1
    for seed in (0, 7, 100_049):
        u = np.random.RandomState(seed).random_sample(3)
        expected = (0.4 - 0.1 + 0.2 * u[0], -0.2 - 0.15 + 0.3 * u[1], np.pi + (1 - np.pi) * u[2])
        np.testing.assert_allclose(initial_state(seed).blocks[0], expected, rtol=1e-12)


def test_initial_states_lie_in_their_ranges_and_apart() -> None:
    states = [initial_state(seed) for seed in range(500)]
    blocks = np.array([state.blocks for state in states])  # [seeds, block, 3]
    targets = np.array([state.targets for state in states])
    assert (abs(blocks[..., 0] - 0.4) <= 0.1).all() and (abs(blocks[..., 1] + 0.2) <= 0.15).all()
    assert (blocks[..., 2] > 1).all() and (blocks[..., 2] <= np.pi).all()
    assert (abs(blocks[:, 0, 0] - blocks[:, 1, 0]) > 0.1).all()
    assert (abs(abs(targets[..., 0] - 0.4) - 0.12) <= 0.005).all() and (abs(targets[..., 1] - 0.2) <= 0.0075).all()
    assert (abs(targets[..., 2] - np.pi) <= np.pi / 30).all()
    assert 200 < (targets[:, 0, 0] > 0.4).sum() < 300  # the first zone is on either side


def test_blocks_settle_where_they_are_put(task: BlockPush) -> None:
    observation, _ = task.reset(seed=3)
    start = initial_state(3)
    for index in (0, 1):
        np.testing.assert_allclose(task.block_position(index), start.blocks[index][:2], atol=2e-4)
        np.testing.assert_allclose(task.target_position(index), start.targets[index][:2], atol=1e-12)
    np.testing.assert_allclose(observation["state"][6:10], [0.3, -0.4, 0.3, -0.4], atol=1e-6)


# ---- observation


def test_state_has_the_published_order(task: BlockPush) -> None:
    task.reset(seed=5)
    place(task, 0, TABLE, yaw=0.5)
    place(task, 1, TABLE + [0, 0.2], yaw=-0.5)
    start = initial_state(5)
    state = task._observe()["state"]
    first, second = ((x, y, yaw % np.pi) for x, y, yaw in start.targets)
    expected = [0.6, -0.3, 0.5, 0.6, -0.1, np.pi - 0.5, 0.3, -0.4, 0.3, -0.4, *first, *second]
    np.testing.assert_allclose(state, expected, atol=1e-6)
    assert len(task.STATE_NAMES) == 16 and task.STATE_NAMES[6:10] == task.PROPRIOCEPTION_NAMES


# ---- action


def test_rod_goes_a_tenth_of_the_way_every_240th_of_a_second(task: BlockPush) -> None:
    task.reset(seed=0)
    observation, *_ = task.step(np.array([0.3, -0.5]))
    expected = -0.5 + 0.1 * 0.9**24
    np.testing.assert_allclose(observation["state"][6:8], [0.3, expected], atol=1e-6)
    np.testing.assert_allclose(observation["state"][8:10], [0.3, -0.5], atol=1e-7)


def test_delta_is_added_to_the_rods_target() -> None:
    absolute, delta = BlockPush(action="absolute"), BlockPush(action="delta")
    absolute.reset(seed=1), delta.reset(seed=1)
    target = np.array([0.3, -0.4])
    for change in np.random.default_rng(0).uniform(-0.03, 0.04, (20, 2)):
        target = np.clip(target + change, [0.15, -0.5], [0.70, 0.5])
        one, two = absolute.step(target)[0], delta.step(change)[0]
        np.testing.assert_allclose(one["state"], two["state"], atol=1e-5)


def test_delta_stops_at_the_tables_edge() -> None:
    task = BlockPush(action="delta")
    task.reset(seed=1)
    for _ in range(3):
        observation, *_ = task.step(np.array([-0.1, -0.1]))
    np.testing.assert_allclose(observation["state"][8:10], [0.15, -0.5], atol=1e-7)


def test_unknown_action_is_refused() -> None:
    with pytest.raises(ValueError, match="action must be one of 'absolute', 'delta', got 'joint'"):
        envs.make("block_push", action="joint")


# ---- physics


def test_friction_of_one_stops_a_sliding_block(task: BlockPush) -> None:
    task.reset(seed=0)
    place(task, 0, TABLE, speed=(0.0, 0.8))
    for _ in range(5):
        stay(task)
    way = task.block_position(0)[1] - TABLE[1]
    # v^2 / (2 mu g), less v h / 2: a step of h seconds moves by the velocity at its end. A cube is about to tip here.
    assert way == pytest.approx(0.8**2 / (2 * 1.0 * 9.81) - 0.8 / 240 / 2, rel=0.1)
    assert task.block_position(0)[0] == pytest.approx(TABLE[0], abs=1e-3)


def test_pushed_block_moves_ahead_of_the_rod(task: BlockPush) -> None:
    task.reset(seed=0)
    place(task, 0, [0.3, -0.3])
    place(task, 1, TABLE)
    for y in np.linspace(-0.4, -0.1, 20):
        task.step(np.array([0.3, y]))
    for _ in range(10):
        task.step(np.array([0.3, -0.1]))
    # Half a block (on its face or on a corner) and the rod's radius lie between their centres.
    assert 0.0245 <= task.block_position(0)[1] + 0.1 <= 0.034
    assert abs(task.data.joint("block").qpos[2] - 0.02) < 5e-4  # it has not tilted


# ---- rewards


def test_an_entry_counts_once_for_a_block_and_a_zone(task: BlockPush) -> None:
    task.reset(seed=0)
    zone = task.target_position(0)
    place(task, 0, zone + [0.03, 0.03])
    assert stay(task)[:2] == (0.49, False)
    assert stay(task)[0] == 0.0
    place(task, 0, TABLE)
    stay(task)
    place(task, 0, zone)
    reward, terminated, info = stay(task)
    assert (reward, terminated, info["score"], info["phases"], info["success"]) == (0.0, False, 0.49, 1, False)
    place(task, 0, task.target_position(1))  # another zone is another entry, but the value has been seen
    reward, terminated, info = stay(task)
    assert (reward, terminated, info["score"], info["phases"]) == (0.49, False, 0.49, 1)


def test_different_zones_end_the_episode(task: BlockPush) -> None:
    task.reset(seed=0)
    place(task, 0, task.target_position(1))
    stay(task)
    place(task, 1, task.target_position(0) + [0.049, 0.0])
    reward, terminated, info = stay(task)
    assert (reward, terminated, info["score"], info["phases"], info["success"]) == (0.51, True, 1.0, 2, True)


def test_one_zone_for_both_is_not_the_end(task: BlockPush) -> None:
    task.reset(seed=0)
    place(task, 0, task.target_position(0) + [0.021, 0])
    stay(task)
    place(task, 1, task.target_position(0) - [0.021, 0])
    reward, terminated, info = stay(task)
    assert (reward, terminated, info["phases"]) == (0.49, False, 1)


def test_five_centimetres_are_outside(task: BlockPush) -> None:
    task.reset(seed=0)
    place(task, 0, task.target_position(0) + [0.0505, 0.0])
    assert stay(task)[0] == 0.0


def test_state_carries_the_entries_so_far(task: BlockPush) -> None:
    task.reset(seed=0)
    place(task, 0, task.target_position(0))
    stay(task)
    kept = task.get_state()
    task.reset(seed=1)
    task.set_state(kept)
    assert stay(task)[0] == 0.0
    place(task, 1, task.target_position(1))
    assert stay(task)[2]["score"] == 1.0


# ---- expert


def test_expert_follows_its_plan(task: BlockPush) -> None:
    seen = set()
    for seed in (0, 1, 4, 11):  # each draws another plan
        expert, rewards, states, info = play(task, seed)
        assert info["success"] and rewards.count(0.49) == 1 and rewards[-1] == 0.51
        entered = states[rewards.index(0.49) + 1]
        blocks, targets = entered[[0, 1, 3, 4]].reshape(2, 2), entered[[10, 11, 13, 14]].reshape(2, 2)
        distance = np.linalg.norm(blocks[:, None] - targets, axis=-1)  # [block, zone]
        assert np.unravel_index(distance.argmin(), (2, 2)) == expert.plan
        seen.add(expert.plan)
    assert len(seen) == 4


def test_expert_keeps_its_speeds(task: BlockPush) -> None:
    _, _, states, _ = play(task, 0)
    steps = np.linalg.norm(np.diff(np.array(states)[:, 8:10], axis=0), axis=1)  # of the rod's target
    assert steps.max() <= 0.035 + 1e-6
    travelling = np.isclose(steps, 0.030, atol=1e-6).sum()
    assert travelling > 10


def test_plans_have_equal_odds(task: BlockPush) -> None:
    task.reset(seed=0)
    plans = [BlockPushExpert(task, np.random.default_rng(seed)).plan for seed in range(400)]
    counts = np.array([plans.count(plan) for plan in set(plans)])
    assert len(counts) == 4 and abs(counts - 100).max() < 4 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.slow
@pytest.mark.parametrize(("action", "episodes"), [("absolute", 100), ("delta", 30)])
def test_expert_solves_nearly_every_episode(action: Any, episodes: int) -> None:
    task = BlockPush(action=action)
    phases = [play(task, seed)[3]["phases"] for seed in range(episodes)]
    assert sum(done >= 1 for done in phases) >= 0.99 * episodes
    assert sum(done >= 2 for done in phases) >= 0.99 * episodes
