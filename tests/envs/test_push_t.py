"""PushT: the published initial states, areas by hand, the agent's spring, quasi-static pushing, picture, expert."""

import math

import cv2
import numpy as np
import pytest
import shapely

from envs.arm_reach import ArmReach
from envs.experts.push_t import PushTExpert, distance_to_goal
from envs.experts.push_t_model import agent_path, blocks_path
from envs.experts.push_t_routes import CONTACTS, ROUTE_GAP, routes
from envs.push_t import (
    CENTRE_OF_GRAVITY,
    GOAL,
    KEY_POINTS,
    OUTLINE,
    PushT,
    coverage,
    initial_state,
    on_table,
    rotation,
)
from envs.push_t_drawing import AGENT_INSIDE, BLOCK_INSIDE, WALL, WHITE
from envs.push_t_drawing import GOAL as GOAL_COLOUR

UPRIGHT = np.array([256.0, 200.0, 0.0])  # the bar's outer edge on top, its middle there
AWAY = np.array([30.0, 480.0])  # the agent does not touch that block


@pytest.fixture
def task() -> PushT:
    task = PushT()
    task.reset(seed=0)
    return task


def go(task: PushT, targets: np.ndarray) -> None:
    for target in targets:
        task.step(target)


def line(start: tuple[float, float], end: tuple[float, float], steps: int) -> np.ndarray:
    return np.linspace(start, end, steps + 1)[1:]


# ---- where episodes begin


def test_initial_state_of_the_published_seed() -> None:
    random = np.random.RandomState(100000)
    sampled = [random.randint(50, 450), random.randint(50, 450), random.randint(100, 400), random.randint(100, 400)]
    assert sampled == [235, 124, 335, 128]
    agent, pose = initial_state(100000)
    np.testing.assert_allclose(agent, [235, 124])
    np.testing.assert_allclose(pose, [299.612885, 145.201581, 5.378258 - 2 * math.pi], atol=1e-6)


def test_initial_angle_turns_the_block_about_its_centre_of_gravity() -> None:
    _, pose = initial_state(100000)
    np.testing.assert_allclose(on_table(CENTRE_OF_GRAVITY, pose), [335, 128 + 45])


def test_reset_is_the_initial_state_where_nothing_overlaps(task: PushT) -> None:
    task.reset(seed=100000)
    agent, pose = initial_state(100000)
    np.testing.assert_allclose(task.agent, agent)
    np.testing.assert_allclose(task.pose, pose)


def test_a_block_on_the_agent_leaves_it(task: PushT) -> None:
    agent = np.array([256.0, 190.0])  # 5 px into the bar
    task.place(agent, UPRIGHT)
    go(task, np.repeat(agent[None], 10, 0))
    gap = shapely.Polygon(on_table(OUTLINE, task.pose)).distance(shapely.Point(agent))
    assert gap == pytest.approx(15, abs=0.1)


# ---- coverage


@pytest.mark.parametrize("along", [(1, 0), (-1, 0), (0, 1), (0, -1)])
@pytest.mark.parametrize("shift", [0, 2.5, 10, 25])
def test_coverage_of_a_shifted_block(along: tuple[int, int], shift: float) -> None:
    # Along either of its axes the T uncovers as much as its extent across: 120 px.
    position = on_table(shift * np.array(along), GOAL)
    assert coverage(np.append(position, GOAL[2])) == pytest.approx((6300 - 120 * shift) / 6300)


def test_coverage_of_a_block_upside_down() -> None:
    # Turned about the middle of the bar, the bar covers itself, and the stem nothing.
    middle = on_table(np.array([0, 15]), GOAL)
    turned = GOAL[2] + math.pi
    assert coverage(np.append(middle - rotation(turned) @ [0, 15], turned)) == pytest.approx(3600 / 6300)


@pytest.mark.parametrize(("shift", "success"), [(2.6, True), (2.65, False)])  # 0.9505 and 0.9495
def test_an_episode_ends_at_a_coverage_above_95_percent(task: PushT, shift: float, success: bool) -> None:
    task.place(AWAY, np.append(on_table(np.array([shift, 0]), GOAL), GOAL[2]))
    _, reward, terminated, _, info = task.step(AWAY)
    assert terminated == success == info["success"]
    assert reward == pytest.approx(min(1, (1 - 120 * shift / 6300) / 0.95))


def test_score_is_the_largest_reward(task: PushT) -> None:
    task.place(AWAY, np.append(on_table(np.array([20, 0]), GOAL), GOAL[2]))
    *_, info = task.step(AWAY)
    best = (1 - 120 * 20 / 6300) / 0.95
    assert info["score"] == pytest.approx(best)
    task.place(AWAY, UPRIGHT + [150, 150, 0])
    _, reward, _, _, info = task.step(AWAY)
    assert reward < best
    assert info["score"] == pytest.approx(best)


# ---- the agent


def test_agent_is_a_damped_spring_whatever_is_in_its_way(task: PushT) -> None:
    position, velocity = np.array([100.0, 290.0]), np.zeros(2)
    task.place(position, UPRIGHT)
    for target in line((150, 290), (450, 250), 20):
        for _ in range(10):
            velocity = velocity + (100 * (target - position) - 20 * velocity) * 0.01
            position = position + velocity * 0.01
        task.step(target)
        np.testing.assert_allclose(task.agent, position, atol=1e-9)
        np.testing.assert_allclose(task.agent_velocity, velocity, atol=1e-9)
    assert np.linalg.norm(task.pose[:2] - UPRIGHT[:2]) > 40  # it went through where the block was


def test_agent_is_behind_a_moving_target_by_a_fifth_of_a_second(monkeypatch: pytest.MonkeyPatch, task: PushT) -> None:
    behind: list[float] = []
    step, targets = task._advance, line((30, 30), (430, 30), 40)  # 10 px a control step: 100 px/s

    def watched_step() -> None:
        behind.append(target[0] - task.data.qpos[0])
        step()

    monkeypatch.setattr(task, "_advance", watched_step)
    task.place(np.array([30.0, 30.0]), UPRIGHT + [0, 100, 0])
    for target in targets:
        task.step(target)
    assert np.mean(behind[-10:]) == pytest.approx(0.2 * 100, abs=1e-6)


# ---- the block


def test_an_untouched_block_stands_still(task: PushT) -> None:
    task.place(np.array([256.0, 160.0]), UPRIGHT)
    go(task, line((256, 160), (450, 160), 10))
    go(task, line((450, 160), (450, 450), 10))
    np.testing.assert_array_equal(task.pose, UPRIGHT)


def test_a_push_through_the_centre_of_gravity_does_not_turn(task: PushT) -> None:
    task.place(np.array([256.0, 183.0]), UPRIGHT)
    for target in line((256, 183), (256, 283), 10):
        task.step(target)
    np.testing.assert_allclose(task.pose[[0, 2]], UPRIGHT[[0, 2]], atol=1e-6)
    assert task.pose[1] > 240
    assert task.pose[1] - task.agent[1] == pytest.approx(15, abs=0.5)  # in contact


@pytest.mark.parametrize("lever", [-50, -20, 20, 50])
def test_a_push_at_a_lever_turns_by_the_moment_over_the_inertia(task: PushT, lever: float) -> None:
    start = np.array([256.0 + lever, 185.0])  # in contact
    task.place(start, UPRIGHT)
    task.step(start + [0, 2])
    (x, y), angle = on_table(CENTRE_OF_GRAVITY, task.pose) - [256, 245], task.pose[2]
    assert y > 0.1
    assert x == pytest.approx(0, abs=0.02 * y)
    assert angle * 3000 == pytest.approx(lever * y, rel=0.01)


def test_a_block_that_is_let_go_stops(task: PushT) -> None:
    task.place(np.array([256.0, 183.0]), UPRIGHT)
    go(task, line((256, 183), (256, 243), 3))
    task.step(np.array([256, 100]))
    pose = task.pose
    go(task, np.repeat([[256.0, 100.0]], 5, 0))
    np.testing.assert_array_equal(task.pose, pose)


def test_walls_stop_the_block_and_not_the_agent(task: PushT) -> None:
    task.place(np.array([102.0, 290.0]), np.array([70.0, 190.0, 0.0]))  # right of the stem, the bar near the wall
    for target in line((102, 290), (52, 290), 10):
        task.step(target)
        assert on_table(OUTLINE, task.pose)[:, 0].min() > 7 - 0.5
    assert on_table(OUTLINE, task.pose)[:, 0].min() < 8
    assert task.pose[2] > 0.2  # about the bar's end
    task.place(np.array([30.0, 100.0]), UPRIGHT)
    go(task, np.repeat([[0.0, 100.0]], 20, 0))
    assert task.agent[0] == pytest.approx(0, abs=0.01)


def test_the_future_depends_on_positions_the_agents_velocity_and_targets_alone(task: PushT) -> None:
    targets = line((256, 183), (200, 283), 10)
    task.place(np.array([230.0, 183.0]), UPRIGHT)
    go(task, targets[:5])
    positions, velocity = task.data.qpos.copy(), task.agent_velocity
    go(task, targets[5:])
    other = PushT()
    other.reset(seed=7)
    other.data.qpos[:], other.data.qvel[:2] = positions, velocity
    go(other, targets[5:])
    np.testing.assert_array_equal(other.data.qpos, task.data.qpos)


# ---- observations


def test_state_is_key_points_and_agent(task: PushT) -> None:
    task.place(AWAY, np.array([256, 200, math.pi / 2]))
    observation, *_ = task.step(AWAY)
    state = observation["state"]
    assert state.shape == (20,)
    turned = np.stack([256 - KEY_POINTS[:, 1], 200 + KEY_POINTS[:, 0]], 1)  # x to y, y to -x
    np.testing.assert_allclose(state[:18].reshape(9, 2), turned, atol=1e-4)
    np.testing.assert_allclose(state[18:], AWAY, atol=1e-4)


def test_picture() -> None:
    task = PushT(observation="image", render_mode="rgb_array")
    observation, _ = task.reset(seed=100000)
    assert observation["image"].shape == (96, 96, 3)
    np.testing.assert_allclose(observation["state"], [235, 124])
    task.place(np.array([50.0, 400.0]), np.array([400, 100, 0]))
    picture = task.render()
    goal_x, goal_y = on_table(np.array([0, 15]), GOAL).astype(int)
    for (x, y), colour in {
        (50, 400): AGENT_INSIDE,
        (400, 115): BLOCK_INSIDE,  # the bar
        (400, 200): BLOCK_INSIDE,  # the stem
        (goal_x, goal_y): GOAL_COLOUR,
        (5, 256): WALL,
        (480, 480): WHITE,
    }.items():
        assert tuple(picture[y, x]) == colour
    observation, *_ = task.step(np.array([50, 400]))
    assert tuple(observation["image"][75, 9]) == AGENT_INSIDE  # (50, 400) 96 / 512
    np.testing.assert_array_equal(observation["image"], cv2.resize(task.render(), (96, 96)))


# ---- the expert


def test_model_agrees_with_the_simulation(task: PushT) -> None:
    random, errors = np.random.default_rng(0), []
    for _ in range(40):
        pose = np.array([256.0, 256.0, random.uniform(-math.pi, math.pi)])
        contact = random.integers(len(CONTACTS.points))
        start = on_table(CONTACTS.points[contact], pose)
        direction = CONTACTS.inward[contact] + pose[2] + random.normal(0, 0.3)
        targets = start + np.outer(np.arange(1, 9) * random.uniform(6, 20), [math.cos(direction), math.sin(direction)])
        task.place(start, pose)
        block = task.data.qpos[2:].copy()
        predicted = blocks_path(block, agent_path(start, np.zeros(2), targets[None]))
        go(task, targets)
        assert np.linalg.norm(task.data.qpos[2:4] - block[:2]) > 5
        errors.append(np.linalg.norm(predicted[-1, :2, 0] - task.data.qpos[2:4]))
    assert np.median(errors) < 0.5


def test_models_agent_is_the_tasks(task: PushT) -> None:
    targets = np.random.default_rng(0).uniform(100, 400, (3, 5, 2))
    start = np.array([200.0, 300.0])
    path = agent_path(start, np.zeros(2), targets).reshape(5, -1, 3, 2)[:, -1]  # [T, N, 2]
    for row in range(3):
        task.place(start, np.array([400, 60, math.pi / 2]))
        for step in range(5):
            task.step(targets[row, step])
            np.testing.assert_allclose(path[step, row], task.agent, atol=1e-9)


def test_distance_is_zero_at_the_goal_and_counts_the_shorter_turn() -> None:
    centre = on_table(CENTRE_OF_GRAVITY, GOAL)
    turns = np.array([0, 2 * math.pi, 0.1 - 4 * math.pi, 3 * math.pi])
    blocks = np.stack([np.full(4, centre[0] + 3), np.full(4, centre[1] + 4), GOAL[2] + turns])
    np.testing.assert_allclose(distance_to_goal(blocks, 100.0), [5, 5, 15, 5 + 100 * math.pi])


def test_routes_keep_off_the_block() -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        pose = np.append(random.uniform(180, 330, 2), random.uniform(-math.pi, math.pi))
        block, agent = shapely.Polygon(on_table(OUTLINE, pose)), random.uniform(20, 490, 2)
        if block.distance(shapely.Point(agent)) < 20:
            continue
        ways = routes(agent, pose)
        for contact in range(len(CONTACTS.points)):
            assert np.isfinite(ways.lengths[contact])
            way = shapely.LineString([agent, *ways.way(contact)])
            assert way.length == pytest.approx(ways.lengths[contact])
            assert block.distance(way) >= 15 + ROUTE_GAP - 1e-6
            np.testing.assert_allclose(way.coords[-1], on_table(CONTACTS.points[contact], pose))


def test_routes_stay_on_the_table() -> None:
    ways = routes(np.array([450.0, 450.0]), np.array([256, 8, 0]))  # the bar's outer edge along the upper wall
    above = CONTACTS.points[:, 1] < -15
    assert above.any()
    assert np.isinf(ways.lengths[: len(above)][above]).all()


def episode(seed: int, plan: int, steps: int = PushT.MAX_STEPS) -> tuple[np.ndarray, bool]:
    task = PushT()
    task.reset(seed=seed)
    expert = PushTExpert(task, np.random.default_rng(plan))
    actions: list[np.ndarray] = []
    terminated = False
    while not terminated and len(actions) < steps:
        actions.append(expert.action())
        _, _, terminated, _, _ = task.step(actions[-1])
    return np.array(actions), terminated


def test_expert_covers_the_goal() -> None:
    actions, solved = episode(100002, 0)
    assert solved
    assert actions.dtype == np.float32
    assert actions.shape[1:] == (2,)


def test_experts_random_numbers_say_how() -> None:
    first, _ = episode(100002, 0, steps=20)
    again, _ = episode(100002, 0, steps=20)
    other, _ = episode(100002, 1, steps=20)
    np.testing.assert_array_equal(again, first)
    assert abs(other - first).max() > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_expert_covers_the_goal_in_most_episodes() -> None:
    assert np.mean([episode(seed, seed)[1] for seed in range(20)]) >= 0.7


def test_expert_refuses_another_task() -> None:
    with pytest.raises(TypeError, match="PushT"):
        PushTExpert(ArmReach(), np.random.default_rng(0))
