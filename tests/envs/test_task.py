"""The base of every task, its registry, and drawing without a screen."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium import spaces

import envs
from envs import offscreen
from envs.experts import EXPERTS, make_expert
from envs.mujoco_task import MujocoTask, check_physics, get_physics, set_physics
from envs.task import Outcome, PhysicsError, Task, check_action

ROOT = Path(__file__).resolve().parents[2]
PENDULUM = """
<mujoco>
  <visual><global offwidth="64" offheight="64"/></visual>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="side" pos="0 -3 0" xyaxes="1 0 0 0 0 1"/>
    <body>
      <joint name="hinge" axis="0 1 0"/>
      <geom type="capsule" fromto="0 0 0 0 0 -1" size="0.05" rgba="1 0 0 1"/>
    </body>
  </worldbody>
  <actuator><motor joint="hinge"/></actuator>
</mujoco>
"""


class Counting(Task):
    """A task without a simulator: its state is what its actions add up to."""

    CONTROL_HZ = 5.0
    MAX_STEPS = 10
    PHASES = ("half", "whole")

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.observation_space = spaces.Dict({"state": spaces.Box(-10, 10, (1,), np.float32)})
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.total = 0.0

    def _reset(self, seed: int) -> None:
        self.total = 0.0

    def _control(self, action: np.ndarray) -> None:
        self.total += float(action[0])
        if self.total < -1:
            raise PhysicsError("below the floor")

    def _observe(self) -> dict[str, np.ndarray]:
        return {"state": np.array([self.total if self.total < 3 else np.nan], np.float32)}

    def _outcome(self) -> Outcome:
        score = min(max(self.total / 2, 0.0), 1.0)
        return Outcome(reward=self.total, score=score, phases=int(self.total), terminated=self.total >= 2)

    def _render(self) -> np.ndarray:
        return np.zeros((2, 2, 3), np.uint8)

    def _get_state(self) -> dict[str, np.ndarray]:
        return {"total": np.array(self.total)}

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        self.total = float(state["total"])


# ---- episodes


def test_score_and_phases_are_the_largest_of_the_episode() -> None:
    task = Counting()
    task.reset(seed=0)
    seen = []
    for action in (0.5, 0.75, -1.0, 1.0, 1.0):
        _, reward, terminated, _, info = task.step(np.array([action]))
        seen.append((reward, info["score"], info["phases"], info["success"], terminated))
    assert seen == [
        (0.5, 0.25, 0, False, False),
        (1.25, 0.625, 1, False, False),
        (0.25, 0.625, 1, False, False),
        (1.25, 0.625, 1, False, False),
        (2.25, 1.0, 2, True, True),
    ]
    _, info = task.reset(seed=0)
    assert (info["score"], info["phases"], info["success"]) == (0.0, 0, False)


@pytest.mark.parametrize("action", [-1.0, 1.0])  # an error of the simulator; an observation of NaN
def test_divergence_takes_score_and_phases_and_repeats_the_last_observation(action: float) -> None:
    task = Counting()
    task.reset(seed=0)
    before, *_, info = task.step(np.array([action]))
    assert info["phases"] == (1 if action > 0 else 0)
    task.total = 2.5 if action > 0 else task.total
    observation, reward, terminated, truncated, info = task.step(np.array([action]))
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert (info["diverged"], info["score"], info["phases"], info["success"]) == (True, 0.0, 0, False)
    np.testing.assert_array_equal(observation["state"], before["state"])
    assert observation["state"] is not before["state"]
    strict = Counting(on_divergence="raise")
    strict.reset(seed=0)
    strict.step(np.array([action]))
    strict.total = 2.5 if action > 0 else strict.total
    with pytest.raises(PhysicsError, match=r"below the floor|state\[0\] is nan"):
        strict.step(np.array([action]))


def test_a_state_holds_the_episodes_progress() -> None:
    task, other = Counting(), Counting()
    task.reset(seed=11)
    task.step(np.array([1.0]))
    task.step(np.array([-0.5]))
    other.set_state(task.get_state())
    assert (other.seed, other.steps, other.total) == (11, 2, 0.5)
    assert other.step(np.array([0.0]))[4] == task.step(np.array([0.0]))[4]


def test_reset_takes_no_options() -> None:
    with pytest.raises(ValueError, match=r"no options, got \['start'\]"):
        Counting().reset(options={"start": 1})


def test_render_needs_its_mode() -> None:
    with pytest.raises(ValueError, match='render_mode="rgb_array"'):
        Counting().render()
    assert Counting(render_mode="rgb_array").render().shape == (2, 2, 3)
    assert Counting.metadata == {"render_modes": ["rgb_array"], "render_fps": 5.0}


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("observation", "states"), ("render_mode", "human"), ("on_divergence", "ignore")],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(keyword: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{keyword} must be one of .*, got '{value}'"):
        Counting(**{keyword: value})


# ---- actions

BOX = spaces.Box(np.array([-1, 0.1, -np.inf], np.float32), np.array([1, 512, np.inf], np.float32))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0, 1], r"expected shape \(3,\), got \(2,\)"),
        (0.0, r"expected shape \(3,\), got \(\)"),
        ([[0, 1, 0]], r"expected shape \(3,\), got \(1, 3\)"),
        ([np.nan, 1, 0], r"action\[0\] must be in \[-1, 1\], got nan"),
        ([0, np.inf, 0], r"action\[1\] must be in \[0.1, 512\], got inf"),
        ([0, 1, np.nan], r"action\[2\] must be in \[-inf, inf\], got nan"),
        ([0, 1, np.inf], r"action\[2\]"),
        ([1.001, 1, 0], r"action\[0\] must be in \[-1, 1\], got 1.001"),
        ([0, 512.01, 0], r"action\[1\]"),
    ],
)
def test_a_bad_action_is_refused_by_name(action: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_action(action, BOX)  # type: ignore[arg-type]


def test_a_good_action_is_copied_and_rounding_past_a_bound_is_taken_back() -> None:
    action = np.array([1 + 1e-7, 512.0001, 1e9])
    checked = check_action(action, BOX)
    np.testing.assert_array_equal(checked, [1, 512, 1e9])
    inside = np.array([0.5, 2.0, 3.0])
    copy = check_action(inside, BOX)
    np.testing.assert_array_equal(copy, inside)
    assert not np.shares_memory(copy, inside) and copy.dtype == np.float64
    low = check_action(BOX.low.clip(-5), BOX)
    assert (low >= BOX.low.astype(np.float64)).all()


# ---- the registry


def test_every_task_is_registered_and_has_an_expert_listed() -> None:
    assert list(EXPERTS) == list(envs.TASKS)
    assert len(envs.TASKS) == 7
    for id in envs.TASKS.values():
        assert id in gymnasium.registry


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no task 'push': expected one of arm_reach, push_t, "):
        envs.make("push")
    with pytest.raises(ValueError, match=r"no expert for 'push': expected one of arm_reach, push_t, "):
        make_expert("push", Counting(), np.random.default_rng(0))


def test_an_expert_needs_a_task() -> None:
    with pytest.raises(TypeError, match="needs a Task"):
        make_expert("arm_reach", gymnasium.Env(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("task", "simulator"),
    [("lift", "robosuite"), ("can", "robosuite"), ("tool_hang", "robosuite"), ("kitchen", "gymnasium_robotics")],
)
def test_a_missing_simulator_is_one_sentence_with_its_installation(
    task: str, simulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("envs.robosuite_task", f"envs.{task}"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, simulator, None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(ModuleNotFoundError) as caught:
        envs.make(task)
    message = f"the task {task} needs {simulator}, which is not installed: pip install -e '.[simulators]'"
    assert (str(caught.value), caught.value.name) == (message, simulator)
    envs.make("arm_reach").reset(seed=0)


# ---- MuJoCo


@pytest.fixture
def pendulum(tmp_path: Path) -> Path:
    (tmp_path / "pendulum.xml").write_text(PENDULUM, encoding="utf-8")
    return tmp_path / "pendulum.xml"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("qpos", np.nan, r"qpos\[0\] is nan"), ("qvel", 1e20, r"qvel\[0\] is 1e\+20"), ("qvel", -np.inf, "is -inf")],
)
def test_broken_numbers_are_found_before_any_step(pendulum: Path, field: str, value: float, message: str) -> None:
    data = mujoco.MjData(mujoco.MjModel.from_xml_path(str(pendulum)))
    check_physics(data)
    getattr(data, field)[0] = value
    with pytest.raises(PhysicsError, match=message):
        check_physics(data)


@pytest.mark.parametrize(
    ("field", "warning"), [("qpos", "mjWARN_BADQPOS"), ("qvel", "mjWARN_BADQVEL"), ("ctrl", "mjWARN_BADCTRL")]
)
def test_what_mujoco_resets_silently_is_found_after_the_step(
    pendulum: Path, field: str, warning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = mujoco.MjModel.from_xml_path(str(pendulum))
    data = mujoco.MjData(model)
    getattr(data, field)[0] = np.nan
    mujoco.mj_step(model, data)
    assert np.isfinite(data.qpos).all(), "MuJoCo goes on as if nothing had been"
    with pytest.raises(PhysicsError, match=warning):
        check_physics(data)
    assert [path.name for path in tmp_path.iterdir()] == ["pendulum.xml"]  # no MUJOCO_LOG.TXT


def test_physics_restored_goes_on_bit_for_bit(pendulum: Path) -> None:
    model = mujoco.MjModel.from_xml_path(str(pendulum))
    data, other = mujoco.MjData(model), mujoco.MjData(model)
    data.ctrl[0] = 3.0
    mujoco.mj_step(model, data, 50)
    state = get_physics(data)
    other.qvel[0] = np.nan
    mujoco.mj_step(model, other)  # set_physics forgets its warning
    set_physics(model, other, state)
    check_physics(other)
    for _ in range(50):
        mujoco.mj_step(model, data)
        mujoco.mj_step(model, other)
        assert (data.qpos[0], data.qvel[0], data.time) == (other.qpos[0], other.qvel[0], other.time)


class Swinging(MujocoTask):
    """The smallest task with a model: a motor at a pendulum."""

    CONTROL_HZ = 50.0
    MAX_STEPS = 10
    PHASES = ("up",)
    RENDER_CAMERA = "side"
    RENDER_SIZE = (32, 48)

    def __init__(self, model: Path, **keywords: Any) -> None:
        super().__init__(model, **keywords)
        self.observation_space = spaces.Dict({"state": spaces.Box(-100, 100, (2,), np.float32)})
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def _reset(self, seed: int) -> None:
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)

    def _control(self, action: np.ndarray) -> None:
        self.data.ctrl[:] = action
        self.simulate(10)

    def _observe(self) -> dict[str, np.ndarray]:
        return {"state": np.concatenate([self.data.qpos, self.data.geom_xpos[0, :1]], dtype=np.float32)}

    def _outcome(self) -> Outcome:
        return Outcome(0.0, 0.0, 0, False)


def test_after_a_control_step_everything_belongs_to_the_present_positions(pendulum: Path) -> None:
    task, plain = Swinging(pendulum), Swinging(pendulum)
    task.reset(seed=0)
    plain.reset(seed=0)
    for _ in range(3):
        observation, *_ = task.step(np.array([1.0]))
        angle, x = observation["state"]
        assert x == pytest.approx(-0.5 * np.sin(angle), rel=1e-6)
        plain.data.ctrl[:] = 1.0
        mujoco.mj_step(plain.model, plain.data, 10)
    np.testing.assert_array_equal(task.data.qpos, plain.data.qpos)  # looking changes nothing
    assert task.data.time == pytest.approx(3 / 50)


# ---- drawing


@pytest.fixture
def another_choice(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The choice of an OpenGL made anew, and forgotten afterwards."""
    monkeypatch.setenv("MUJOCO_GL", "")  # so that it is taken back afterwards, whatever is set meanwhile
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(offscreen.platform, "system", lambda: "Linux")
    monkeypatch.setattr(offscreen, "backend", offscreen.backend.__wrapped__)
    return monkeypatch


@pytest.mark.parametrize(("egl", "osmesa", "expected"), [(True, True, "egl"), (False, True, "osmesa")])
def test_egl_is_taken_where_it_works_and_osmesa_elsewhere(
    another_choice: Any, egl: bool, osmesa: bool, expected: str
) -> None:
    another_choice.setattr(offscreen, "_egl_works", lambda: egl)
    another_choice.setattr(offscreen, "_library", lambda *names: object() if osmesa else None)
    assert offscreen.backend() == expected
    assert offscreen.os.environ["MUJOCO_GL"] == expected


def test_without_any_opengl_the_error_says_what_to_install(another_choice: Any, pendulum: Path) -> None:
    another_choice.setattr(offscreen, "_library", lambda *names: None)
    task = Swinging(pendulum, render_mode="rgb_array")
    task.reset(seed=0)
    with pytest.raises(ImportError, match="neither EGL nor OSMesa works here; install libegl1 or libosmesa6"):
        task.render()
    assert not task.step(np.array([0.5]))[4]["diverged"]  # the numbers need no OpenGL


def test_what_the_user_says_is_taken(another_choice: Any) -> None:
    another_choice.setenv("MUJOCO_GL", "OSMesa ")
    another_choice.setattr(offscreen, "_egl_works", lambda: True)
    assert offscreen.backend() == "osmesa"


@pytest.fixture
def drawing() -> None:
    try:
        offscreen.backend()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("drawing")
def test_pictures_are_upright(pendulum: Path) -> None:
    task = Swinging(pendulum, render_mode="rgb_array")
    task.reset(seed=0)
    picture = task.render()
    assert (picture.shape, picture.dtype) == ((32, 48, 3), np.uint8)
    red = picture[..., 0] > picture[..., 1].astype(int) + 50
    assert red[20:].any() and not red[:12].any()  # it hangs down
    task.data.qpos[0] = np.pi / 2  # about +y: from -z to -x, which is left
    mujoco.mj_forward(task.model, task.data)
    picture = task.render()
    red = picture[..., 0] > picture[..., 1].astype(int) + 50
    assert red[:, :20].any() and not red[:, 28:].any()
    with pytest.raises(ValueError, match="larger than the model's buffer"):
        task.image("side", 65, 64)
    task.close()
    task.close()
    assert task.render().shape == (32, 48, 3)


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("gl", ["", "osmesa"])
def test_python_ends_silently_with_pictures_still_open(gl: str) -> None:
    if gl and not offscreen._library("libOSMesa.so.8", "libOSMesa.so.6"):
        pytest.skip("needs OSMesa: apt-get install libosmesa6")
    script = f"""
import os
os.environ["MUJOCO_GL"] = {gl!r}
os.environ.pop("PYOPENGL_PLATFORM", None)
import envs
env = envs.make("arm_reach", render_mode="rgb_array")
env.reset(seed=0)
print(env.render().shape)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "(480, 480, 3)", "")
