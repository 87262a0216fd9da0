"""Robots, the physics: one gymnasium environment per task, each with a scripted expert where one is known."""

from typing import Any, Literal, NamedTuple

import gymnasium


class _Entry(NamedTuple):
    id: str
    entry_point: str  # imported when the task is made: a simulator is needed only by its own tasks
    max_steps: int  # the class's MAX_STEPS


_ENTRIES = {
    "arm_reach": _Entry("driftfield/ArmReach-v0", "envs.arm_reach:ArmReach", 80),
    "push_t": _Entry("driftfield/PushT-v0", "envs.push_t:PushT", 300),
    "block_push": _Entry("driftfield/BlockPush-v0", "envs.block_push:BlockPush", 350),
    "lift": _Entry("driftfield/Lift-v0", "envs.lift:Lift", 400),
    "can": _Entry("driftfield/Can-v0", "envs.can:Can", 400),
    "tool_hang": _Entry("driftfield/ToolHang-v0", "envs.tool_hang:ToolHang", 700),
    "kitchen": _Entry("driftfield/Kitchen-v0", "envs.kitchen:Kitchen", 280),
}
TASKS = {name: entry.id for name, entry in _ENTRIES.items()}  # name -> gymnasium id
SIMULATORS = ("robosuite", "gymnasium_robotics")  # what the extra `simulators` installs

for _entry in _ENTRIES.values():
    gymnasium.register(_entry.id, entry_point=_entry.entry_point, max_episode_steps=_entry.max_steps)


def make(
    name: str,
    *,
    observation: Literal["state", "image"] = "state",
    render_mode: Literal["rgb_array"] | None = None,
    **options: Any,
) -> gymnasium.Env:
    """A task by its name, ended after its MAX_STEPS.

    Args:
        name: one of `TASKS`.
        observation: "state" gives the whole state as numbers, "image" the cameras and the robot's own part of it.
        render_mode: "rgb_array" for pictures of render().
        options: the task's own keywords, and `on_divergence`.

    Raises:
        ValueError: there is no such task.
        ModuleNotFoundError: the task's simulator is not installed.

    Returns:
        The environment; the task itself, with get_state and set_state, is its `.unwrapped`.

    >>> make("arm_reach").action_space.shape
    (2,)
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: expected one of {', '.join(TASKS)}")
    try:
        # Task.step refuses bad actions itself; gymnasium's own checks of every step are for tests.
        return gymnasium.make(
            TASKS[name], disable_env_checker=True, observation=observation, render_mode=render_mode, **options
        )
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in SIMULATORS:
            raise
        message = f"the task {name} needs {missing}, which is not installed: pip install -e '.[simulators]'"
        raise ModuleNotFoundError(message, name=missing) from error
